"""Uploads: written under a hidden name in the directory where they belong, made durable, then renamed.

So nobody ever sees a part of a file, and the file inherits what its directory hands down. What is left over when the
gateway is killed has to be found again without walking the tree: before the first upload into a directory, a *note*
with the directory's inode number is made in ``/.dfs-gateway-uploads``. A gateway removes at its start what an earlier
life of its own has left, and what others left when it is a day old.

    notes:    /.dfs-gateway-uploads/GATEWAY.INSTANCE.INO     (a symbolic link; its target means nothing)
    uploads:  .../.dfs-gateway-GATEWAY.INSTANCE.NUMBER

GATEWAY is the same in every life of a gateway, INSTANCE never.
"""

import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import NamedTuple

import structlog
import trio

from dfsmount.gateway_paths import HIDDEN
from dfsmount.gateway_tree import Node, Tree, version_of
from dfsmount.vfs_files import without_special_bits
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpranges import Version
from metaserver.protocol import DirectoryEntry, RenameFlags, SetAttributes

log = structlog.get_logger(__name__)

NOTES = HIDDEN + b"uploads"
# What belongs to no gateway that is known here is left over when nothing was written to it for so long.
ABANDONED_SECONDS = 24 * 3600.0
SWEEP_SECONDS = 3600.0
RETRY_SECONDS = 20.0
# To remove an upload that came to nothing, before it is left to be tried again.
CLEAN_UP_SECONDS = 10.0
# Notes of directories without uploads are kept up to this number: the next upload there then needs none.
KEPT_NOTES = 64
# Collected before it is handed to the writer: what comes from the network comes in small pieces.
BUFFER_BYTES = 256 << 10
# Requests; each takes up to a MiB of buffers. More have to wait, and so do their senders.
UPLOADS_AT_A_TIME = 64

_NOTE = re.compile(rb"([A-Za-z0-9_-]+\.[0-9a-f]+)\.([0-9a-f]{1,16})")


@contextmanager
def suppress_code(code: ErrorCode) -> Iterator[None]:
    """Goes on behind the block after a failure with this code."""
    try:
        yield
    except DfsError as error:
        if error.code is not code:
            raise


class Uploaded(NamedTuple):
    """``created``: there was nothing of that name before."""

    version: Version
    created: bool


class Upload:
    """One file that nobody sees yet. Used by :meth:`Uploads.begin`."""

    def __init__(self, tree: Tree, parent: int, name: bytes, number: int, ino: int) -> None:
        self.parent = parent
        self.name = name
        self.ino = ino
        self.number = number
        self.size = 0
        self.placed = False
        self._tree = tree
        self._files = tree.client.vfs.files
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """Adds bytes at the end; waits while the cluster does not take them as fast as they come."""
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) >= BUFFER_BYTES:
            await self._write_out()

    async def _write_out(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        if data:
            await self._files.write(self.number, self.size - len(data), data)

    async def complete(self) -> None:
        """All of it is on stable storage, still unseen."""
        await self._write_out()
        await self._files.fsync(self.number)

    async def place(self, name: bytes, before: Node | None, *, replace: bool) -> Uploaded:
        """Gives a complete upload its name; durable when it returns. EXISTS if something has it and is not to be
        replaced; what replaces a file gets its mode and owner, but no S_ISUID or S_ISGID: who may upload may not
        thereby have root run something."""
        client = self._tree.client
        if before is not None and stat.S_ISREG(before.attributes.mode):
            old = before.attributes
            mode = without_special_bits(stat.S_IMODE(old.mode))
            await client.vfs.set_attributes(SetAttributes(self.ino, mode=mode, uid=old.uid, gid=old.gid))
            await self._files.fsync(self.number)
        flags = RenameFlags.NONE if replace else RenameFlags.NOREPLACE
        await client.vfs.names.rename(self.parent, self.name, self.parent, name, flags)
        self.placed = True
        await client.vfs.sync_names()
        state = client.core.handles.file(self.number).file.state
        return Uploaded(version_of(state.attributes), before is None)


class Uploads:
    """All uploads of a gateway, and what earlier ones left. :meth:`run` must be running."""

    def __init__(self, tree: Tree, gateway: str, instance: str, mode: int = 0o644) -> None:
        self.in_progress = 0
        self.slots = trio.Semaphore(UPLOADS_AT_A_TIME)
        self._mode = mode
        self._tree = tree
        self._vfs = tree.client.vfs
        self._gateway = gateway.encode()
        self._own = f"{gateway}.{instance}".encode()
        self._numbers = count(1)
        # Directory -> uploads in progress there, for those with a note.
        self._noted: dict[int, int] = {}
        self._noting = trio.Lock()
        # Uploads that could not be removed yet: (directory, name).
        self._left: dict[tuple[int, bytes], None] = {}

    # -- one upload --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def begin(self, parent: int) -> AsyncIterator[Upload]:
        """A new upload into the directory ``parent``; unless it was placed, nothing of it remains after the block."""
        name = HIDDEN + b"%s.%d" % (self._own, next(self._numbers))
        await self._note(parent)
        self.in_progress += 1
        try:
            upload = await self._create(parent, name)
            try:
                yield upload
            finally:
                await self._end(upload)
        finally:
            self.in_progress -= 1
            self._noted[parent] -= 1
            await self._drop_notes(KEPT_NOTES)

    async def _create(self, parent: int, name: bytes) -> Upload:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            opened, shown = await self._vfs.files.create(
                parent, name, stat.S_IFREG | self._mode, flags, self._tree.caller
            )
        except BaseException:
            # It may have been made all the same.
            self._left[parent, name] = None
            await self._clean_up(self._remove_left)
            raise
        return Upload(self._tree, parent, name, opened.number, shown.ino)

    async def _end(self, upload: Upload) -> None:
        if not upload.placed:
            self._left[upload.parent, upload.name] = None
            await self._clean_up(self._remove_left)
        self._vfs.files.release(upload.number)
        self._vfs.forget(upload.ino, 1)

    @staticmethod
    async def _clean_up(work: Callable[[], Awaitable[None]]) -> None:
        """Also if whoever was uploading is gone; bounded, because a gateway that ends waits for it."""
        with trio.CancelScope(shield=True), trio.move_on_after(CLEAN_UP_SECONDS):
            await work()

    async def _remove_left(self) -> None:
        for parent, name in list(self._left):
            if await self._remove(parent, name):
                self._left.pop((parent, name), None)

    async def _remove(self, parent: int, name: bytes) -> bool:
        """Whether there is nothing of that name any more."""
        try:
            await self._vfs.names.unlink(parent, name, directory=False)
        except DfsError as error:
            if error.code not in (ErrorCode.NOT_FOUND, ErrorCode.STALE_INODE, ErrorCode.NOT_DIRECTORY):
                log.warning("could not remove what is left of an upload yet", name=name.decode(), error=str(error))
                return False
        return True

    # -- notes -------------------------------------------------------------------------------------------------

    async def _note(self, parent: int) -> None:
        """Makes sure that there is a note of ``parent``, and counts an upload there."""
        async with self._noting:
            if parent not in self._noted:
                await self._make_note(b"%s.%x" % (self._own, parent))
                self._noted[parent] = 0
            self._noted[parent] += 1

    async def _make_note(self, name: bytes) -> None:
        directory = await self._notes(make=True)
        with suppress_code(ErrorCode.EXISTS):
            shown = await self._vfs.names.make_link(directory, name, b"upload", self._tree.caller)
            self._vfs.forget(shown.ino, 1)

    async def _notes(self, *, make: bool) -> int:
        """The directory of notes; 0 if there is none and it is not to be made."""
        root = self._tree.root
        with suppress_code(ErrorCode.NOT_FOUND):
            return (await self._tree.look_up(root, NOTES)).ino
        if not make:
            return 0
        # Another gateway may be faster.
        with suppress_code(ErrorCode.EXISTS):
            await self._tree.make_directory(root, NOTES, 0o700)
        return (await self._tree.look_up(root, NOTES)).ino

    async def _drop_notes(self, keep: int) -> None:
        """Removes notes of directories without uploads, all but ``keep``."""
        idle = [ino for ino, uploads in self._noted.items() if uploads == 0]
        for ino in idle[: max(0, len(idle) - keep)]:
            if any(parent == ino for parent, _ in self._left):
                continue
            await self._clean_up(lambda ino=ino: self._drop_note(ino))  # type: ignore[misc]

    async def _drop_note(self, ino: int) -> None:
        async with self._noting:
            if self._noted.get(ino) == 0:
                directory = await self._tree_notes_or_none()
                if directory and await self._remove(directory, b"%s.%x" % (self._own, ino)):
                    del self._noted[ino]

    async def _tree_notes_or_none(self) -> int:
        try:
            return await self._notes(make=False)
        except DfsError:
            return 0

    # -- what others left --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Removes what is left over: of this gateway's earlier lives at once, of others when it is old. For ever."""
        swept = -SWEEP_SECONDS
        while True:
            try:
                if trio.current_time() - swept >= SWEEP_SECONDS:
                    await self.sweep()
                    swept = trio.current_time()
                await self._remove_left()
            except DfsError as error:
                log.warning("could not look for what uploads have left", error=str(error))
            await trio.sleep(RETRY_SECONDS)

    async def close(self) -> None:
        """Nothing of this life remains; for an orderly end."""
        await self._clean_up(self._remove_left)
        await self._drop_notes(0)

    async def sweep(self) -> None:
        directory = await self._notes(make=False)
        if not directory:
            return
        for entry in await self._tree.entries(directory, lambda entry: True):
            match = _NOTE.fullmatch(entry.name)
            if (
                match is not None
                and match[1] != self._own
                and await self._sweep_note(match[1], int(match[2], 16), entry)
            ):
                await self._remove(directory, entry.name)

    async def _sweep_note(self, owner: bytes, ino: int, note: DirectoryEntry) -> bool:
        """Removes what ``owner`` left in a directory; whether the note is not needed any more."""
        prefix = HIDDEN + owner + b"."
        ours = owner.rpartition(b".")[0] == self._gateway
        try:
            found = await self._tree.entries(ino, lambda entry: entry.name.startswith(prefix))
        except DfsError as error:
            if error.code not in (ErrorCode.STALE_INODE, ErrorCode.NOT_FOUND, ErrorCode.NOT_DIRECTORY):
                raise
            # The directory is gone.
            return True
        clean = True
        for entry in found:
            clean = (ours or self._is_old(entry)) and await self._remove(ino, entry.name) and clean
        if found:
            log.info("removed what interrupted uploads left", gateway=owner.decode(), files=len(found), all=clean)
        return clean and (ours or self._is_old(note))

    def _is_old(self, entry: DirectoryEntry) -> bool:
        assert entry.attributes is not None
        age_ns = self._tree.client.meta.now_ns() - entry.attributes.mtime_ns
        return age_ns > ABANDONED_SECONDS * 1e9
