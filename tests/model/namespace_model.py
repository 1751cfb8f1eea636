"""The namespace as a few dictionaries: what POSIX says, said as simply as possible. Nothing here is fast or durable."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import ROOT_INO, RenameFlags


@dataclass
class Node:
    """An inode. ``names`` counts its names; a directory has ``entries`` in order of creation and a ``parent``."""

    mode: int
    uid: int
    gid: int
    names: int = 1
    size: int = 0
    parent: int = 0
    target: bytes = b""
    entries: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Model:
    """``held`` are inodes that somebody has open: they outlive their last name."""

    def __init__(self) -> None:
        self.nodes = {ROOT_INO: Node(stat.S_IFDIR | 0o755, 0, 0, parent=ROOT_INO)}
        self.held: set[int] = set()

    def nlink(self, ino: int) -> int:
        node = self.nodes[ino]
        if not node.is_directory:
            return node.names
        return 0 if not node.names else 2 + sum(self.nodes[child].is_directory for child in node.entries.values())

    def _directory(self, ino: int) -> Node:
        node = self.nodes.get(ino)
        if node is None:
            raise DfsError(ErrorCode.STALE_INODE)
        if not node.is_directory:
            raise DfsError(ErrorCode.NOT_DIRECTORY)
        return node

    def _node(self, ino: int) -> Node:
        if ino not in self.nodes:
            raise DfsError(ErrorCode.STALE_INODE)
        return self.nodes[ino]

    def lookup(self, parent: int, name: bytes) -> int:
        entries = self._directory(parent).entries
        if name not in entries:
            raise DfsError(ErrorCode.NOT_FOUND)
        return entries[name]

    def make(self, parent: int, name: bytes, mode: int, uid: int, gid: int, target: bytes) -> Node:
        """The new inode, which :meth:`enter` gives a number."""
        directory = self._directory(parent)
        if name in directory.entries:
            raise DfsError(ErrorCode.EXISTS)
        if not directory.names:
            raise DfsError(ErrorCode.NOT_FOUND)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        return Node(mode, uid, gid, size=len(target), parent=parent if stat.S_ISDIR(mode) else 0, target=target)

    def enter(self, parent: int, name: bytes, ino: int, node: Node) -> None:
        self.nodes[ino] = node
        self.nodes[parent].entries[name] = ino

    def unlink(self, parent: int, name: bytes, directory: bool) -> None:
        entries = self._directory(parent).entries
        if name not in entries:
            raise DfsError(ErrorCode.NOT_FOUND)
        node = self.nodes[entries[name]]
        if node.is_directory != directory:
            raise DfsError(ErrorCode.IS_DIRECTORY if node.is_directory else ErrorCode.NOT_DIRECTORY)
        if node.entries:
            raise DfsError(ErrorCode.NOT_EMPTY)
        self._drop(entries.pop(name))

    def _drop(self, ino: int) -> None:
        node = self.nodes[ino]
        node.names -= 1
        if not node.names and ino not in self.held:
            del self.nodes[ino]

    def release(self, ino: int) -> None:
        self.held.discard(ino)
        if ino in self.nodes and not self.nodes[ino].names:
            del self.nodes[ino]

    def link(self, ino: int, parent: int, name: bytes) -> None:
        node = self._node(ino)
        directory = self._directory(parent)
        if name in directory.entries:
            raise DfsError(ErrorCode.EXISTS)
        if not directory.names:
            raise DfsError(ErrorCode.NOT_FOUND)
        if node.is_directory:
            raise DfsError(ErrorCode.NOT_PERMITTED)
        if not node.names:
            raise DfsError(ErrorCode.NOT_FOUND)
        node.names += 1
        directory.entries[name] = ino

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        old, new = self._directory(parent), self._directory(new_parent)
        if name not in old.entries:
            raise DfsError(ErrorCode.NOT_FOUND)
        ino, other = old.entries[name], new.entries.get(new_name)
        if other is not None and flags & RenameFlags.NOREPLACE:
            raise DfsError(ErrorCode.EXISTS)
        if other is None and flags & RenameFlags.EXCHANGE:
            raise DfsError(ErrorCode.NOT_FOUND)
        exchange = bool(flags & RenameFlags.EXCHANGE)
        if parent != new_parent and ino in self._above(new_parent):
            raise DfsError(ErrorCode.INVALID)
        if parent != new_parent and other in self._above(parent):
            raise DfsError(ErrorCode.INVALID if exchange else ErrorCode.NOT_EMPTY)
        if ino == other:
            return
        if exchange:
            assert other is not None
            old.entries[name], new.entries[new_name] = other, ino
            self._moved(other, parent)
        else:
            self._replace(ino, other, new)
            del old.entries[name]
            new.entries[new_name] = ino
        self._moved(ino, new_parent)

    def _replace(self, ino: int, other: int | None, new: Node) -> None:
        if not new.names:
            raise DfsError(ErrorCode.NOT_FOUND)
        if other is None:
            return
        moved, gone = self.nodes[ino], self.nodes[other]
        if moved.is_directory != gone.is_directory:
            raise DfsError(ErrorCode.NOT_DIRECTORY if moved.is_directory else ErrorCode.IS_DIRECTORY)
        if gone.entries:
            raise DfsError(ErrorCode.NOT_EMPTY)
        self._drop(other)

    def _moved(self, ino: int, parent: int) -> None:
        if self.nodes[ino].is_directory:
            self.nodes[ino].parent = parent

    def _above(self, ino: int) -> Iterator[int]:
        """The directory and those it lies in."""
        yield ino
        while ino != ROOT_INO:
            ino = self.nodes[ino].parent
            yield ino

    def change(self, ino: int, *, mode: int | None, uid: int | None, gid: int | None, size: int | None) -> None:
        node = self._node(ino)
        if size is not None:
            if node.is_directory:
                raise DfsError(ErrorCode.IS_DIRECTORY)
            if not stat.S_ISREG(node.mode):
                raise DfsError(ErrorCode.INVALID)
            node.size = size
        if mode is not None:
            node.mode = stat.S_IFMT(node.mode) | mode
        node.uid = node.uid if uid is None else uid
        node.gid = node.gid if gid is None else gid

    def set_xattr(self, ino: int, name: bytes, value: bytes) -> None:
        self._node(ino).xattrs[name] = value

    def remove_xattr(self, ino: int, name: bytes) -> None:
        if self._node(ino).xattrs.pop(name, None) is None:
            raise DfsError(ErrorCode.NO_ATTRIBUTE)
