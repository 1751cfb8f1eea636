"""The resources of WebDAV. Everything here runs in a worker thread of ``gateway_dav`` and asks the event loop.

Files and directories; symbolic links and special files are not shown, for WebDAV has no such thing. A file is written
as any upload: unseen until it is complete and durable. Dead properties are extended attributes
``user.dav.{NAMESPACE}NAME`` of the file, so a mount sees them, and they move along. What is locked, WebDAV's clients of
this gateway respect, nobody else: the locks are in its memory.
"""

import mimetypes
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar, TypeVarTuple, Unpack

import trio
from wsgidav.dav_error import DAVError
from wsgidav.dav_provider import DAVCollection, DAVNonCollection, DAVProvider

from dfsmount import gateway_paths
from dfsmount.gateway_http import PIECE_BYTES, STATUS, Refusal
from dfsmount.gateway_tree import Node, Tree
from dfsmount.gateway_uploads import BUFFER_BYTES, Upload, Uploads
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import ClientGone
from metaserver.protocol import DirectoryEntry, RenameFlags

KEY = "dfs.running"
# Resources that one request looks at; an answer has about a KiB for each.
RESOURCES = 20_000
PROPERTY = b"user.dav."
_XATTR_NAME_MAX = 255
DIRECTORY_MODE = 0o755
# RFC 4918: a name whose directory is missing is a conflict, and so is what stands in the way.
_STATUS = {**STATUS, ErrorCode.ARGUMENT_TOO_BIG: 507}

ResultT = TypeVar("ResultT")
ArgumentsT = TypeVarTuple("ArgumentsT")


class Running:
    """One request. ``stack`` ends with it, and with it what it has not completed."""

    def __init__(self, tree: Tree, uploads: Uploads, stack: AsyncExitStack, method: str) -> None:
        self.tree, self.uploads, self.method = tree, uploads, method
        self.gone = False
        self._stack = stack
        self._resources = 0

    def ask(self, work: Callable[[Unpack[ArgumentsT]], Awaitable[ResultT]], *arguments: *ArgumentsT) -> ResultT:
        """What ``work`` gives in the event loop; its failures as those that WsgiDAV knows."""
        with self.translated():
            return trio.from_thread.run(work, *arguments)

    @contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except DfsError as error:
            raise DAVError(_STATUS.get(error.code, 500), error.text) from None
        except Refusal as refusal:
            raise DAVError(refusal.status, refusal.text) from None
        except ClientGone:
            self.gone = True
            raise DAVError(400, "the body ends too early") from None

    def count(self, resources: int) -> None:
        self._resources += resources
        if self._resources > RESOURCES:
            raise DAVError(403, f"more than {RESOURCES} files at a time: use a mount, or /files")

    async def begin(self, parent: int) -> Upload:
        await self._stack.enter_async_context(self.uploads.slots)
        return await self._stack.enter_async_context(self.uploads.begin(parent))


# -- in the event loop ---------------------------------------------------------------------------------------------


async def _find(tree: Tree, path: str) -> Node | None:
    """What is at a path; None: nothing, or nothing that is shown here."""
    node = await tree.find(gateway_paths.Place((), True))
    for name in _names(path):
        if not node.is_directory:
            return None
        try:
            node = await tree.look_up(node.ino, name)
        except DfsError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            return None
    return node if _is_shown(node.attributes.mode) else None


def _names(path: str) -> list[bytes]:
    return [part.encode() for part in path.split("/") if part]


def _is_shown(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


async def _members(tree: Tree, ino: int) -> list[DirectoryEntry]:
    def wanted(entry: DirectoryEntry) -> bool:
        assert entry.attributes is not None
        plain = gateway_paths.is_text(entry.name) and not gateway_paths.is_hidden(entry.name)
        return plain and _is_shown(entry.attributes.mode)

    found: list[DirectoryEntry] = []
    after = 0
    while len(found) <= RESOURCES:
        listing = await tree.listing(ino, after, 1000, b"")
        found += [entry for entry in listing.entries if wanted(entry)]
        after = listing.next
        if not after:
            break
    return found


async def _remove(tree: Tree, node: Node) -> None:
    """A file, or a directory with all that is in it, from the bottom; stops at the first that cannot be removed."""
    if node.is_directory:
        after, again = 0, True
        while again:
            listing = await tree.listing(node.ino, after, 1000, b"")
            for entry in listing.entries:
                assert entry.attributes is not None
                await _remove(tree, Node(node.ino, entry.name, entry.attributes))
            after, again = listing.next, bool(listing.next)
    await tree.remove(node)


async def _copy_properties(tree: Tree, source: int, target: int) -> None:
    vfs = tree.client.vfs
    for name in await vfs.list_xattrs(source):
        if name.startswith(b"user."):
            await vfs.set_xattr(target, name, await vfs.get_xattr(source, name))


async def _place(running: Running, upload: Upload, name: bytes, source: int = 0) -> None:
    """Makes an upload visible. It gets the properties of ``source``, otherwise those of what it replaces."""
    await upload.complete()
    before = None
    try:
        before = await running.tree.look_up(upload.parent, name)
    except DfsError as error:
        if error.code is not ErrorCode.NOT_FOUND:
            raise
    if before is not None and before.is_directory:
        raise DfsError(ErrorCode.IS_DIRECTORY, "there is a directory of that name now")
    if source or before is not None:
        await _copy_properties(running.tree, source or (before.ino if before is not None else 0), upload.ino)
    await upload.place(name, before, replace=True)


async def _copy_file(running: Running, source: Node, parent: Node, name: bytes) -> None:
    tree = running.tree
    async with running.uploads.slots, running.uploads.begin(parent.ino) as upload, tree.opened(source) as opened:
        while data := await tree.read(opened, upload.size, PIECE_BYTES):
            await upload.write(data)
        await _place(running, upload, name, source.ino)


async def _copy_directory(tree: Tree, source: Node, parent: Node, name: bytes) -> None:
    try:
        await tree.make_directory(parent.ino, name, DIRECTORY_MODE)
    except DfsError as error:
        if error.code is not ErrorCode.EXISTS:
            raise
    made = await tree.look_up(parent.ino, name)
    await _copy_properties(tree, source.ino, made.ino)
    await tree.client.vfs.sync_names()


async def _move(tree: Tree, source: Node, parent: Node, name: bytes, flags: RenameFlags) -> None:
    vfs = tree.client.vfs
    await vfs.names.rename(source.parent, source.name, parent.ino, name, flags)
    await vfs.sync_names()


# -- resources -----------------------------------------------------------------------------------------------------


class _Shared:
    """What files and directories have in common. ``node`` is None for a file that is not there yet."""

    path: str
    environ: dict[str, Any]
    node: Node | None

    @property
    def running(self) -> Running:
        running: Running = self.environ[KEY]
        return running

    def there(self) -> Node:
        if self.node is None:
            raise DAVError(404)
        return self.node

    def ask(self, work: Callable[[Unpack[ArgumentsT]], Awaitable[ResultT]], *arguments: *ArgumentsT) -> ResultT:
        return self.running.ask(work, *arguments)

    def get_creation_date(self) -> float | None:
        return None

    def get_last_modified(self) -> float | None:
        return None if self.node is None else self.node.attributes.mtime_ns / 1e9

    def target(self, path: str) -> tuple[Node, bytes]:
        """The directory and the name of a path that is to be made."""
        parent = self.ask(_find, self.running.tree, path.rstrip("/").rpartition("/")[0])
        if parent is None or not parent.is_directory:
            raise DAVError(409, "there is no such directory")
        return parent, _names(path)[-1]

    def is_link(self) -> bool:
        return False


class File(_Shared, DAVNonCollection):  # type: ignore[misc]
    def __init__(self, path: str, environ: dict[str, Any], node: Node | None) -> None:
        super().__init__(path, environ)
        self.node = node
        self._upload: Upload | None = None

    def get_content_length(self) -> int | None:
        return 0 if self.node is None else self.node.attributes.size

    def get_content_type(self) -> str:
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    def get_display_info(self) -> dict[str, str]:
        return {"type": "File"}

    def get_etag(self) -> str | None:
        return None if self.node is None else self.node.version.etag.strip('"')

    def support_etag(self) -> bool:
        return True

    def support_ranges(self) -> bool:
        return True

    def get_content(self) -> None:
        raise NotImplementedError("GET does without WsgiDAV")

    def begin_write(self, *, content_type: str | None = None) -> "_Writer":
        parent, _ = self.target(self.path)
        self._upload = self.ask(self.running.begin, parent.ino)
        return _Writer(self.running, self._upload)

    def end_write(self, *, with_errors: bool) -> None:
        if not with_errors and self._upload is not None:
            self.ask(_place, self.running, self._upload, _names(self.path)[-1])
            self.node = self.ask(_find, self.running.tree, self.path)

    def delete(self) -> None:
        self.ask(_remove, self.running.tree, self.there())
        self.remove_all_locks(recursive=True)

    def copy_move_single(self, dest_path: str, *, is_move: bool) -> None:
        self.ask(_copy_file, self.running, self.there(), *self.target(dest_path))

    def handle_move(self, dest_path: str) -> bool:
        """Over a file: in one step. Everything else is left to the general way."""
        before = self.ask(_find, self.running.tree, dest_path)
        if before is None or before.is_directory:
            return False
        self.move_recursive(dest_path, RenameFlags.NONE)
        return True

    def support_recursive_move(self, dest_path: str) -> bool:
        return True

    def move_recursive(self, dest_path: str, flags: RenameFlags = RenameFlags.NOREPLACE) -> list[Any]:
        self.ask(_move, self.running.tree, self.there(), *self.target(dest_path), flags)
        self.remove_all_locks(recursive=True)
        return []


class _Writer:
    """Where WsgiDAV writes the body of a PUT to."""

    def __init__(self, running: Running, upload: Upload) -> None:
        self._running, self._upload = running, upload
        self._pending: list[bytes] = []
        self._length = 0

    def writelines(self, pieces: Iterator[bytes]) -> None:
        with self._running.translated():
            for piece in pieces:
                self._pending.append(piece)
                self._length += len(piece)
                if self._length >= BUFFER_BYTES:
                    self._hand_over()
            self._hand_over()

    def _hand_over(self) -> None:
        trio.from_thread.run(self._upload.write, b"".join(self._pending))
        self._pending, self._length = [], 0

    def close(self) -> None:
        """Completed when it is placed."""


class Directory(_Shared, DAVCollection):  # type: ignore[misc]
    def __init__(self, path: str, environ: dict[str, Any], node: Node) -> None:
        super().__init__(path, environ)
        self.node = node

    def get_display_info(self) -> dict[str, str]:
        return {"type": "Directory"}

    def get_etag(self) -> None:
        return None

    def _child(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def get_member_names(self) -> list[str]:
        return [entry.name.decode() for entry in self.ask(_members, self.running.tree, self.there().ino)]

    def get_member_list(self) -> list["File | Directory"]:
        entries = self.ask(_members, self.running.tree, self.there().ino)
        self.running.count(len(entries))
        found: list[File | Directory] = []
        for entry in entries:
            assert entry.attributes is not None
            node = Node(self.there().ino, entry.name, entry.attributes)
            found.append(_resource(self._child(entry.name.decode()), self.environ, node))
        return found

    def get_member(self, name: str) -> "File | Directory | None":
        return _look(self._child(name), self.environ)

    def create_empty_resource(self, name: str) -> File:
        """For LOCK, an empty file; for PUT nothing yet: it appears when it is complete."""
        made = File(self._child(name), self.environ, None)
        if self.running.method == "LOCK":
            made.begin_write()
            made.end_write(with_errors=False)
        return made

    def create_collection(self, name: str) -> None:
        self.ask(self.running.tree.make_directory, self.there().ino, name.encode(), DIRECTORY_MODE)

    def support_recursive_delete(self) -> bool:
        return True

    def delete(self) -> list[Any]:
        self.ask(_remove, self.running.tree, self.there())
        self.remove_all_locks(recursive=True)
        return []

    def copy_move_single(self, dest_path: str, *, is_move: bool) -> None:
        self.ask(_copy_directory, self.running.tree, self.there(), *self.target(dest_path))

    def support_recursive_move(self, dest_path: str) -> bool:
        return True

    def move_recursive(self, dest_path: str) -> list[Any]:
        parent, name = self.target(dest_path)
        self.ask(_move, self.running.tree, self.there(), parent, name, RenameFlags.NOREPLACE)
        self.remove_all_locks(recursive=True)
        return []


def _resource(path: str, environ: dict[str, Any], node: Node) -> File | Directory:
    return Directory(path, environ, node) if node.is_directory else File(path, environ, node)


def _look(path: str, environ: dict[str, Any]) -> File | Directory | None:
    running: Running = environ[KEY]
    node = running.ask(_find, running.tree, path)
    return None if node is None else _resource(path, environ, node)


class Provider(DAVProvider):  # type: ignore[misc]
    def __init__(self, read_only: bool) -> None:
        super().__init__()
        self._read_only = read_only

    def is_readonly(self) -> bool:
        return self._read_only

    def get_resource_inst(self, path: str, environ: dict[str, Any]) -> File | Directory | None:
        return _look(path, environ)


class Properties:
    """WsgiDAV's property manager: dead properties as extended attributes. They go and come with their file."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def _ino(self, url: str, environ: dict[str, Any]) -> int:
        running: Running = environ[KEY]
        node = running.ask(_find, running.tree, self._provider.ref_url_to_path(url))
        if node is None:
            raise DAVError(404)
        return node.ino

    def get_properties(self, url: str, environ: dict[str, Any]) -> list[str]:
        running: Running = environ[KEY]
        names = running.ask(running.tree.client.vfs.list_xattrs, self._ino(url, environ))
        return [name.removeprefix(PROPERTY).decode() for name in names if name.startswith(PROPERTY)]

    def get_property(self, url: str, name: str, environ: dict[str, Any]) -> bytes | None:
        running: Running = environ[KEY]
        attribute = PROPERTY + name.encode()
        if len(attribute) > _XATTR_NAME_MAX:
            return None
        try:
            return trio.from_thread.run(running.tree.client.vfs.get_xattr, self._ino(url, environ), attribute)
        except DfsError as error:
            if error.code is ErrorCode.NO_ATTRIBUTE:
                return None
            raise DAVError(_STATUS.get(error.code, 500), error.text) from None

    def write_property(self, url: str, name: str, value: bytes, dry_run: bool, environ: dict[str, Any]) -> None:
        attribute = PROPERTY + name.encode()
        if len(attribute) > _XATTR_NAME_MAX:
            raise DAVError(507, "namespace and name of a property are too long together")
        if not dry_run:
            running: Running = environ[KEY]
            running.ask(running.tree.client.vfs.set_xattr, self._ino(url, environ), attribute, value)
            running.ask(running.tree.client.vfs.sync_names)

    def remove_property(self, url: str, name: str, dry_run: bool, environ: dict[str, Any]) -> None:
        if dry_run or self.get_property(url, name, environ) is None:
            return
        running: Running = environ[KEY]
        running.ask(running.tree.client.vfs.remove_xattr, self._ino(url, environ), PROPERTY + name.encode())
        running.ask(running.tree.client.vfs.sync_names)

    def copy_properties(self, source: str, target: str, environ: dict[str, Any]) -> None:
        """A file that is copied brings them."""

    def move_properties(self, source: str, target: str, with_children: bool, environ: dict[str, Any]) -> None:
        """A file that is moved keeps them."""

    def remove_properties(self, url: str, environ: dict[str, Any]) -> None:
        """They are gone with the file."""
