"""Every error has an errno."""

import errno

import pytest

from dfsmount.errors import ERRNO, errno_of
from metaserver.errors import ConnectionLost, DfsError, ErrorCode


def test_the_table_is_total() -> None:
    assert set(ERRNO) == set(ErrorCode)


def test_answers_to_file_operations_have_an_errno_of_their_own() -> None:
    answers = [code for code in ErrorCode if code < 100]
    assert len({ERRNO[code] for code in answers}) == len(answers)


def test_cluster_errors_are_eio_but_a_full_disk_is_not() -> None:
    for code in ErrorCode:
        if code >= 100:
            assert ERRNO[code] == (errno.ENOSPC if code is ErrorCode.DISK_FULL else errno.EIO)


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (DfsError(ErrorCode.NOT_FOUND), errno.ENOENT),
        (DfsError(ErrorCode.STALE_INODE), errno.ESTALE),
        (DfsError(ErrorCode.NO_ATTRIBUTE), errno.ENODATA),
        (ConnectionLost("gone"), errno.EIO),
    ],
)
def test_errno_of(error: DfsError, number: int) -> None:
    assert errno_of(error) == number
