"""A sync of the changelog fails, and the kernel then takes what it could not write for written: it is read as long as
the machine lives, later syncs succeed, and a power cut shows that the disk never had it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from metaserver_load import create, names, prepare

from metaserver.commit import EngineFailed, open_committer
from metaserver.files import Files
from metaserver.offline import check_directory
from metaserver.recover import recover
from metaserver.start import Options

STEPS = ("start:before-epoch", "segment:before-directory-sync", "checkpoint:before-commit", "checkpoint:after-commit")


QUIET = Options(checkpoint_seconds=3600, segment_bytes=1 << 17, map_bytes=1 << 20)


class PowerCut(BaseException):
    pass


class ForgetfulFiles(Files):
    """``fail`` makes the next syncs fail. What was not on the disk then is on it only once it is written again."""

    def __init__(self, step: str = "") -> None:
        super().__init__(self._announced)
        self.stop_at = step
        self.fail = False
        self.paths: dict[int, Path] = {}
        self.unsynced: dict[Path, list[tuple[int, int]]] = {}
        self.dropped: dict[Path, list[tuple[int, int]]] = {}

    def _announced(self, step: str) -> None:
        if step == self.stop_at:
            raise PowerCut

    def create(self, path: Path, head: bytes, size: int) -> int:
        descriptor = super().create(path, head, size)
        self.paths[descriptor] = path
        return descriptor

    def append(self, descriptor: int, data: bytes, offset: int) -> None:
        super().append(descriptor, data, offset)
        self.unsynced.setdefault(self.paths[descriptor], []).append((offset, len(data)))

    def sync(self, descriptor: int) -> None:
        path = self.paths[descriptor]
        written = self.unsynced.pop(path, [])
        if self.fail:
            self.dropped.setdefault(path, []).extend(written)
            raise OSError(errno.EIO, "Input/output error")
        super().sync(descriptor)

    def write_again(self, path: Path) -> None:
        super().write_again(path)
        self.dropped.pop(path, None)

    def cut_power(self) -> None:
        """Zeroes come back where the disk has nothing else."""
        for lost in (self.dropped, self.unsynced):
            for path, writes in lost.items():
                with path.open("r+b") as file:
                    for offset, length in writes:
                        file.seek(offset)
                        file.write(bytes(length))


def promised() -> set[bytes]:
    return {b"promised %d" % number for number in range(30)}


@contextmanager
def ending_with(kind: type[BaseException]) -> Iterator[None]:
    """Nothing but this is raised, in whatever groups."""
    try:
        yield
    except kind:
        return
    except BaseExceptionGroup as group:
        if group.split(kind)[1] is not None:
            raise
        return
    raise AssertionError(f"{kind.__name__} was not raised")


async def life_with_a_failing_sync(directory: Path, files: ForgetfulFiles) -> None:
    with ending_with(EngineFailed):
        async with open_committer(directory, options=QUIET, files=files, boot_id=b"1" * 16) as committer:
            prepare(committer)
            for number, name in enumerate(sorted(promised())):
                create(committer, name, number + 1)
            await committer.wait_durable(committer.newest)
            files.fail = True
            for number in range(20):
                create(committer, b"unpromised %d" % number, 100 + number)
            with pytest.raises(EngineFailed):
                await committer.wait_durable(committer.newest)
            assert committer.failed, "it is not tried again"
            with pytest.raises(EngineFailed):
                create(committer, b"after", 1000)
            await trio.sleep(10)


@pytest.mark.parametrize("step", STEPS)
async def test_what_the_kernel_takes_for_written_does_not_become_a_promise(tmp_path: Path, step: str) -> None:
    files = ForgetfulFiles()
    await life_with_a_failing_sync(tmp_path, files)
    assert files.dropped, "or this proves nothing"
    files.fail, files.stop_at = False, step
    with ending_with(PowerCut):
        async with open_committer(tmp_path, options=QUIET, files=files, boot_id=b"1" * 16):
            pass
    files.cut_power()
    assert check_directory(tmp_path).problems == []
    async with open_committer(tmp_path, options=QUIET, boot_id=b"2" * 16) as committer:
        assert committer.boot_lost_tail, "clients are asked to send again"
        assert promised() <= names(committer)
    (tmp_path / "data.mdb").unlink()
    recover(tmp_path)
    async with open_committer(tmp_path, options=QUIET, boot_id=b"2" * 16) as committer:
        assert promised() <= names(committer)


async def test_without_a_restart_the_power_cut_takes_only_what_was_not_promised(tmp_path: Path) -> None:
    files = ForgetfulFiles()
    await life_with_a_failing_sync(tmp_path, files)
    files.cut_power()
    async with open_committer(tmp_path, options=QUIET, boot_id=b"2" * 16) as committer:
        assert names(committer) == promised()
