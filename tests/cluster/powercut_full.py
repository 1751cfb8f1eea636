"""Deleting on a metaserver's full disk while the power is cut: it must go on, and what was acknowledged stays deleted.

Deletions fill the log, so that on a full disk its old segments are used again, again and again.
"""

import errno
import os
import stat

import trio
from powercut_client import ME, PowerClient

from metaserver.errors import DfsError, ErrorCode

# More than fill two of the segments of ``powercut_cluster``.
FILES = 350
SYNCED = 25
AGAIN_SECONDS = 0.05
PATIENCE_SECONDS = 60.0


class Deletions:
    """Empty files in a directory of their own, deleted one after the other. ``broken``: promises that were."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.broken: list[str] = []
        self.deleted = 0
        # The first so many are deleted durably.
        self.durable = 0
        self._names = [b"%d" % number for number in range(FILES)]

    async def prepare(self, client: PowerClient) -> None:
        vfs = client.vfs
        directory = (await vfs.names.make(vfs.root, self.name.encode(), stat.S_IFDIR | 0o755, ME)).ino
        for name in self._names:
            opened, shown = await vfs.files.create(directory, name, stat.S_IFREG | 0o644, os.O_RDWR, ME)
            vfs.forget(shown.ino, 1)
            await client.close(opened.number)
        await vfs.sync_names()

    async def run(self, client: PowerClient) -> None:
        """Until all are deleted, or the client dies with its servers."""
        try:
            directory = await client.call(client.ino_of, self.name)
            for name in self._names:
                await client.call(self._delete, client, directory, name)
                self.deleted += 1
                if self.deleted % SYNCED == 0:
                    number = self.deleted
                    await client.call(client.vfs.sync_names)
                    self.durable = number
        except OSError as error:
            if not client.dead:
                self.broken.append(f"{self.name}: rm failed on a full disk: {error}")

    @staticmethod
    async def _delete(client: PowerClient, directory: int, name: bytes) -> None:
        await client.vfs.names.unlink(directory, name, directory=False)

    async def verify(self, client: PowerClient) -> None:
        """Nothing that is durably deleted is there, and everything else that was not touched."""
        there = set(await client.files(self.name))
        wrong = {name.decode() for name in self._names[: self.durable]} & there
        lost = {name.decode() for name in self._names[self.deleted + 1 :]} - there
        if wrong or lost:
            self.broken.append(f"{self.name}: {len(wrong)} deleted files are back, {len(lost)} others are gone")


async def insist(client: PowerClient, path: str) -> None:
    """Makes a directory as soon as the metaserver has noticed that there is space again."""
    with trio.fail_after(PATIENCE_SECONDS):
        while True:
            try:
                return await client.make_directory(path)
            except DfsError as error:
                if error.code is not ErrorCode.NO_SPACE:
                    raise
            await trio.sleep(AGAIN_SECONDS)


def is_full(error: OSError) -> bool:
    return error.errno == errno.ENOSPC
