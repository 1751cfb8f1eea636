"""Checksums put together against checksums of what was put together."""

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from dfsmount.crc import joined, of_zeros


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_of_two_strings_one_after_the_other(first: bytes, second: bytes) -> None:
    assert joined(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


@pytest.mark.parametrize("length", [0, 1, 7, 64 << 10, 1_000_003])
def test_of_zeros(length: int) -> None:
    assert of_zeros(length) == crc32c(bytes(length))


def test_the_longest_file_takes_no_time() -> None:
    half = (1 << 62) - 1
    assert joined(of_zeros(half), of_zeros(half), half) == of_zeros(2 * half)
