"""The filesystem as the kernel asks for it: names, contents, attributes, and what the metaserver pushes.

Nothing here knows FUSE: ``operations`` decodes the kernel's requests and encodes these answers.
"""

import math
import stat
import struct
from collections.abc import Sequence

import structlog
import trio

from dfsmount.allowances import UNKNOWN
from dfsmount.config import FLUSH_XATTR
from dfsmount.filefacts import FileFacts
from dfsmount.handles import OpenFile
from dfsmount.vfs_core import Core, Shown
from dfsmount.vfs_files import Files
from dfsmount.vfs_names import Names
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import FsStats, InodeFlags, Opened, SetAttributes

log = structlog.get_logger(__name__)

STATS_SECONDS = 1.0
STATS_KEPT = 100
# What is open is told to a metaserver that is there; another learns it with the end of the session.
FAREWELL_SECONDS = 3.0
_ACL_PREFIX = b"system.posix_acl_"
ACCESS_ACL = b"system.posix_acl_access"
# Made when they are asked for (docs/operations.md).
CHUNKS_XATTR, COPIES_XATTR, CHECKSUM_XATTR = b"user.dfs.chunks", b"user.dfs.copies", b"user.dfs.checksum"
VIRTUAL_XATTRS = frozenset({CHUNKS_XATTR, COPIES_XATTR, CHECKSUM_XATTR})
_ACLS = (ACCESS_ACL, b"system.posix_acl_default")
_PLAIN_ACL = struct.Struct("<IHHIHHIHHI")
_PLAIN_TAGS = (2, 0x01, 0x04, 0x20)
# The namespaces that local filesystems have; the kernel checks who may use them.
_NAMESPACES = (b"user.", b"trusted.", b"security.")


class Vfs:
    """One mounted filesystem. ``root`` is the ino of the directory that is mounted."""

    def __init__(self, core: Core, root: int, facts: FileFacts | None = None) -> None:
        self.core = core
        self.facts = facts
        self.root = root
        self.names = Names(core, root)
        self.files = Files(core)
        # By inode, with when they are to be asked for again.
        self._stats: dict[int, tuple[float, FsStats]] = {}
        self._reopen = trio.Event()

    async def run(self) -> None:
        """What goes on beside the kernel's requests, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._close_idle)
            nursery.start_soon(self.core.jobs.run)
            nursery.start_soon(self.core.tell_kernel)
            nursery.start_soon(self.core.accesses.run)
            nursery.start_soon(self._reopen_all)

    # -- attributes --------------------------------------------------------------------------------------------

    def known_attributes(self, ino: int) -> Shown | None:
        """The answer to a getattr that needs no asking."""
        inode = self.core.inodes.believed(ino)
        return None if inode is None else self.core.show(inode)

    async def get_attributes(self, ino: int) -> Shown:
        return self.core.show(await self.core.attributes(ino))

    async def set_attributes(self, changes: SetAttributes, number: int | None = None) -> Shown:
        """``number``: of the handle it is done through (ftruncate(2)), None for a path."""
        return self.core.show(await self.files.set_attributes(changes, number))

    def inode_of(self, number: int) -> int:
        """Of an open file or directory; 0: there is none with this number."""
        return self.core.handles.inode_of(number)

    def forget(self, ino: int, count: int) -> None:
        """The kernel gives back ``count`` of its references."""
        self.core.inodes.forget(ino, count)

    async def statistics(self, ino: int) -> FsStats:
        """Space and inodes as they are for what is made beside an inode, at most a second old."""
        now = self.core.inodes.now()
        until, stats = self._stats.get(ino, (-math.inf, None))
        if stats is None or now >= until:
            stats = await self.core.remote.stat_fs(ino)
            if len(self._stats) >= STATS_KEPT:
                self._stats.clear()
            self._stats[ino] = now + STATS_SECONDS, stats
        return stats

    # -- extended attributes -----------------------------------------------------------------------------------

    def knows_no_xattr(self, ino: int, name: bytes) -> bool:
        """Whether ``name`` is known to be missing (the kernel asks for security.capability before each write)."""
        inode = self.core.inodes.believed(ino)
        has_none = inode is not None and not inode.attributes.flags & InodeFlags.HAS_XATTRS
        plain = name.startswith(_NAMESPACES) and name not in _NAMESPACES and not name.startswith(b"user.dfs.")
        return has_none and (plain or name in _ACLS)

    async def get_xattr(self, ino: int, name: bytes) -> bytes:
        _check_namespace(name)
        if name == FLUSH_XATTR and ino == self.root:
            await self.write_everything()
            return b"done"
        if name in VIRTUAL_XATTRS:
            return await self._virtual_xattr(ino, name)
        inode = await self.core.attributes(ino)
        if not inode.attributes.flags & InodeFlags.HAS_XATTRS:
            raise DfsError(ErrorCode.NO_ATTRIBUTE)
        await self._settle(ino, name)
        return await self.core.remote.get_xattr(ino, name)

    async def set_xattr(self, ino: int, name: bytes, value: bytes) -> None:
        """Whether the name must or must not exist was checked by pyfuse3, not in one step with the change."""
        _check_namespace(name)
        if name == ACCESS_ACL and self._chmod_instead(ino, value):
            return
        await self._settle(ino, name)
        await self.core.remote.set_xattr(ino, name, value)
        self.core.inodes.doubt(ino)

    def _chmod_instead(self, ino: int, acl: bytes) -> bool:
        """Whether an access ACL said nothing but a mode, as that of each file that `cp -a` copies, and is set as one:
        the metaserver may then be told later (``ahead``)."""
        permissions = _plain_permissions(acl)
        inode = self.core.inodes.believed(ino)
        if permissions is None or inode is None or inode.attributes.flags & InodeFlags.HAS_XATTRS:
            return False
        mode = stat.S_IMODE(self.core.show(inode).mode) & ~0o777 | permissions
        return self.files.set_at_once(SetAttributes(ino, mode=mode)) is not None

    async def _virtual_xattr(self, ino: int, name: bytes) -> bytes:
        """Not listed, so that nothing copies them; what is dirty counts."""
        await self.core.flush(ino)
        inode = await self.core.attributes(ino)
        kind = inode.attributes.mode
        if name == COPIES_XATTR and (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            return str(inode.attributes.copies or self.core.remote.default_copies).encode()
        if self.facts is None or not stat.S_ISREG(kind):
            raise DfsError(ErrorCode.NO_ATTRIBUTE)
        if name == CHUNKS_XATTR:
            return await self.facts.chunks_text(ino)
        if name == CHECKSUM_XATTR:
            return await self.facts.checksum_text(ino)
        raise DfsError(ErrorCode.NO_ATTRIBUTE)

    async def set_virtual_xattr(self, ino: int, name: bytes, value: bytes, uid: int) -> None:
        """As `dfs set-copies`: a number, or ``default``. Only the owner and root may, because it costs space."""
        if name != COPIES_XATTR:
            raise DfsError(ErrorCode.NOT_PERMITTED, "this attribute cannot be set")
        inode = await self.core.attributes(ino)
        if uid not in (0, inode.attributes.uid):
            raise DfsError(ErrorCode.NOT_PERMITTED, "only the owner may")
        text = value.decode("ascii", "replace").strip()
        if text != "default" and not (text.isascii() and text.isdecimal() and 0 < int(text[:6]) < 1 << 16):
            raise DfsError(ErrorCode.INVALID, "a number of copies, or default")
        await self.core.flush(ino)
        await self.core.remote.set_copies(ino, 0 if text == "default" else int(text))
        self.core.inodes.doubt(ino)

    async def _settle(self, ino: int, name: bytes) -> None:
        """Mode and access ACL depend on each other: a chmod that was answered comes first."""
        file = self.core.files.get(ino) if name.startswith(_ACL_PREFIX) else None
        if file is not None:
            await self.core.deferred.settle(file)

    async def list_xattrs(self, ino: int) -> tuple[bytes, ...]:
        inode = await self.core.attributes(ino)
        if not inode.attributes.flags & InodeFlags.HAS_XATTRS:
            return ()
        return await self.core.remote.list_xattrs(ino)

    async def remove_xattr(self, ino: int, name: bytes) -> None:
        _check_namespace(name)
        if name in VIRTUAL_XATTRS:
            raise DfsError(ErrorCode.NOT_PERMITTED, "this attribute cannot be removed")
        await self._settle(ino, name)
        await self.core.remote.remove_xattr(ino, name)
        self.core.inodes.doubt(ino)

    # -- durability --------------------------------------------------------------------------------------------

    async def sync_names(self, number: int | None = None) -> None:
        """fsync(2) of a directory, open as ``number``: every name this mount has made or seen is on stable storage."""
        core = self.core
        await core.deferred.settle_all()
        await core.remote.sync(core.handles.directory(number).losses if number is not None else None)

    async def write_everything(self) -> None:
        """Returns when all that was done here is durable; raises why if some of it is lost."""
        core = self.core
        losses = core.losses
        await core.deferred.settle_all()
        await core.writer.flush_all()
        await core.remote.sync()
        if core.losses > losses and core.last_loss is not None:
            raise DfsError(core.last_loss.code, f"some of what was written is lost: {core.last_loss.text}")

    async def finish(self) -> None:
        """Unmounting: everything written is committed and durable, everything opened deregistered."""
        await self.write_everything()
        await self.core.writer.close()
        self.core.fresh.give_up_all()
        with trio.move_on_after(FAREWELL_SECONDS):
            await self.core.accesses.send()
            await self._close_now()

    async def _close_idle(self) -> None:
        """Deregisters what is not used any more, for ever."""
        while True:
            await self.core.files.wait_idle()
            await self._close_now()
            self.core.inodes.trim()

    async def _close_now(self) -> None:
        """Deregisters what is idle. What may not have been carried out is asked for again the next time."""
        core = self.core
        failed = False
        while not failed and (inos := core.files.take_idle() + core.fresh.take_over()):
            try:
                await core.remote.close(inos)
            except DfsError as error:
                log.warning("could not tell the metaserver what was closed", inodes=len(inos), error=str(error))
                failed = True
            finally:
                core.files.closed(inos)
            if failed:
                for ino in inos:
                    core.files.doubt(ino)

    # -- what the metaserver's client asks and tells; see metaserver.client.Hooks ---------------------------------

    async def flush_pushed(self, inos: Sequence[int]) -> None:
        """Another session wants to see these: returns when what is dirty of them is committed, or cannot be."""

        async def flush(ino: int) -> None:
            try:
                await self.core.flush(ino)
            except DfsError as error:
                log.error("could not write what another mount wants to read", inode=ino, error=str(error))

        async with trio.open_nursery() as nursery:
            for ino in inos:
                nursery.start_soon(flush, ino)

    def changed_pushed(self, inos: Sequence[int]) -> None:
        self.core.doubt_contents(inos)

    def quotas_pushed(self) -> None:
        """Which quota a file is under, and what is held, has to be asked again."""
        self.core.writer.forget_quotas()
        for file in self.core.files:
            file.state.quota = UNKNOWN

    def opened(self) -> list[Opened]:
        """Asked for after a connection was lost, and pushes with it: whatever is open may have changed."""
        self.quotas_pushed()
        self.core.inodes.doubt_all()
        self.core.fresh.give_up_all()
        self.core.foreseen.forget_all()
        self.core.doubt_contents([file.ino for file in self.core.files])
        return self.core.files.opened()

    def new_session(self) -> None:
        """The metaserver gave this mount up: unwritten data is lost, caches are worth nothing, open files go on."""
        self.core.writer.abandon_all(DfsError(ErrorCode.IO, "the session ended before this data was written"))
        self.core.fresh.give_up_all()
        self.core.foreseen.forget_all()
        self.core.doubt_contents([inode.ino for inode in self.core.inodes])
        self._reopen.set()

    async def _reopen_all(self) -> None:
        """Registers what is open with a new session, for ever."""
        while True:
            await self._reopen.wait()
            self._reopen = trio.Event()
            for file in list(self.core.files):
                await self._reopen_one(file)

    async def _reopen_one(self, file: OpenFile) -> None:
        asked_at = self.core.inodes.now()
        try:
            entry = await self.core.remote.open(file.ino, writing=file.writing)
        except DfsError as error:
            log.warning("an open file could not be registered again", inode=file.ino, error=str(error))
        else:
            self.core.learn(entry, asked_at)


def _plain_permissions(acl: bytes) -> int | None:
    """The permission bits that an ACL gives if it has no entries but those of owner, group and others; see
    ``metaserver.acl`` for its form."""
    if len(acl) != _PLAIN_ACL.size:
        return None
    version, user_tag, user, _, group_tag, group, _, other_tag, other, _ = _PLAIN_ACL.unpack(acl)
    if (version, user_tag, group_tag, other_tag) != _PLAIN_TAGS or max(user, group, other) > 7:
        return None
    return int(user << 6 | group << 3 | other)


def _check_namespace(name: bytes) -> None:
    if name in _ACLS:
        return
    if not name.startswith(_NAMESPACES):
        raise DfsError(ErrorCode.NOT_SUPPORTED, "no such namespace of extended attributes")
    if name in _NAMESPACES:
        raise DfsError(ErrorCode.INVALID)
