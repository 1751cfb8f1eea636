"""Names: lookup, make, unlink, rename and link as POSIX and Linux define them. Synchronous, over one transaction.

Errors come in the order in which Linux finds them (fs/namei.c). Permissions are the kernel's business
(``default_permissions``); nothing is checked for them here. Times of inodes and parents change as on ext4.
"""

import stat
from collections.abc import Collection

from metaserver import counted, xattrs
from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import (
    Effects,
    Keep,
    Leaving,
    Openers,
    drop_name,
    keep_nothing,
    new_inode,
    require,
    require_directory,
    save,
)
from metaserver.protocol import (
    LINK_MAX,
    NAME_MAX,
    ROOT_INO,
    SYMLINK_MAX,
    Attributes,
    Link,
    Make,
    Rename,
    Renamed,
    RenameFlags,
    Unlink,
    Unlinked,
)
from metaserver.schema import (
    Dentry,
    IdKind,
    Inode,
    Listed,
    Table,
    Transaction,
    after,
    dentry_key,
    inode_key,
    key_u64,
    listing_key,
)

_TYPES: Collection[int] = frozenset(
    {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}
)
_DOTS = (b".", b"..")
_TYPE_DIRECTORY = stat.S_IFDIR >> 12


def lookup(tx: Transaction, parent: int, name: bytes) -> int:
    """The inode of a name; ``.`` and ``..`` included."""
    if len(name) <= NAME_MAX:
        row = tx.get(Table.DENTRIES, dentry_key(parent, name))
        if row is not None:
            return Dentry.unpack(row).ino
    directory = require_directory(tx, parent)
    check_name(name)
    if name == b".":
        return parent
    if name == b"..":
        return directory.parent
    raise DfsError(ErrorCode.NOT_FOUND)


def resolve(tx: Transaction, path: bytes) -> int:
    """The directory at a path below the root; symlinks are not followed."""
    ino = ROOT_INO
    for name in path.split(b"/"):
        if name and name != b".":
            ino = lookup(tx, ino, name)
    require_directory(tx, ino)
    return ino


def make(tx: Transaction, now_ns: int, message: Make) -> tuple[int, Inode, bool]:
    """Creates what ``message`` says: ino, inode, and whether it is new (see ``protocol.Make.exclusive``)."""
    parent, name = message.parent, message.name
    directory = require_directory(tx, parent)
    check_name(name)
    if name in _DOTS:
        raise DfsError(ErrorCode.EXISTS)
    row = tx.get(Table.DENTRIES, dentry_key(parent, name))
    if row is not None:
        return _existing(tx, Dentry.unpack(row).ino, exclusive=message.exclusive)
    _check_live(directory)
    inode = _new(tx, now_ns, message, directory)
    ino = tx.allocate(IdKind.INODE)
    if message.target:
        tx.put(Table.SYMLINKS, inode_key(ino), message.target)
    xattrs.inherit(tx, parent, directory, ino, inode)
    save(tx, ino, inode)
    _add_entry(tx, parent, directory, name, ino, inode.mode >> 12)
    _touch(tx, parent, directory, now_ns)
    return ino, inode, True


def _existing(tx: Transaction, ino: int, *, exclusive: bool) -> tuple[int, Inode, bool]:
    if exclusive:
        raise DfsError(ErrorCode.EXISTS)
    inode = require(tx, ino)
    if stat.S_ISDIR(inode.mode):
        raise DfsError(ErrorCode.IS_DIRECTORY)
    if not stat.S_ISREG(inode.mode):
        raise DfsError(ErrorCode.EXISTS)
    return ino, inode, False


def _new(tx: Transaction, now_ns: int, message: Make, directory: Inode) -> Inode:
    kind = stat.S_IFMT(message.mode) or stat.S_IFREG
    mode = kind | stat.S_IMODE(message.mode)
    if kind not in _TYPES or (kind == stat.S_IFLNK) != bool(message.target):
        raise DfsError(ErrorCode.NOT_FOUND if kind == stat.S_IFLNK else ErrorCode.INVALID)
    if len(message.target) > SYMLINK_MAX:
        raise DfsError(ErrorCode.NAME_TOO_LONG)
    if b"\0" in message.target:
        raise DfsError(ErrorCode.INVALID)
    rdev = message.rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    gid = message.gid
    if directory.mode & stat.S_ISGID:
        gid = directory.gid
        mode |= stat.S_ISGID if kind == stat.S_IFDIR else 0
    copies = directory.storage_class
    if kind != stat.S_IFDIR:
        inode = new_inode(mode, message.uid, gid, now_ns, rdev=rdev, size=len(message.target), copies=copies)
    else:
        _check_links(directory)
        directory.nlink += 1
        inode = new_inode(mode, message.uid, gid, now_ns, nlink=2, parent=message.parent, copies=copies)
    counted.born(inode, message.parent, directory.next_cookie)
    return inode


def unlink(
    tx: Transaction, now_ns: int, message: Unlink, openers: Openers, effects: Effects, keep: Keep = keep_nothing
) -> Unlinked:
    """unlink(2) or rmdir(2). With sessions that have it open, the inode becomes an orphan; ``keep`` may put it into the
    trash."""
    parent, name = message.parent, message.name
    directory = require_directory(tx, parent)
    check_name(name)
    if name in _DOTS:
        if not message.directory:
            raise DfsError(ErrorCode.IS_DIRECTORY)
        raise DfsError(ErrorCode.INVALID if name == b"." else ErrorCode.NOT_EMPTY)
    row = tx.get(Table.DENTRIES, dentry_key(parent, name))
    if row is None:
        raise DfsError(ErrorCode.NOT_FOUND)
    dentry = Dentry.unpack(row)
    is_directory = dentry.type == _TYPE_DIRECTORY
    if message.directory != is_directory:
        raise DfsError(ErrorCode.IS_DIRECTORY if is_directory else ErrorCode.NOT_DIRECTORY)
    if is_directory:
        _check_empty(tx, dentry.ino)
        directory.nlink -= 1
    inode = require(tx, dentry.ino)
    _remove_entry(tx, parent, name, dentry)
    _forget_name(tx, inode, parent, dentry)
    leaving = Leaving(dentry.ino, inode, parent, directory, name)
    dropped = drop_name(tx, now_ns, leaving, openers, effects, keep)
    _touch(tx, parent, directory, now_ns)
    return Unlinked(dentry.ino, dropped.nlink, dropped.orphan, dropped.kept)


def link(tx: Transaction, now_ns: int, message: Link) -> Attributes:
    """link(2): another name for something that is not a directory."""
    inode = require(tx, message.ino)
    directory = require_directory(tx, message.new_parent)
    check_name(message.new_name)
    if (
        message.new_name in _DOTS
        or tx.get(Table.DENTRIES, dentry_key(message.new_parent, message.new_name)) is not None
    ):
        raise DfsError(ErrorCode.EXISTS)
    _check_live(directory)
    if stat.S_ISDIR(inode.mode):
        raise DfsError(ErrorCode.NOT_PERMITTED)
    if inode.nlink == 0:
        raise DfsError(ErrorCode.NOT_FOUND)
    _check_links(inode)
    inode.nlink += 1
    inode.ctime_ns = now_ns
    counted.named(tx, message.ino, inode, message.new_parent, directory.next_cookie)
    save(tx, message.ino, inode)
    _add_entry(tx, message.new_parent, directory, message.new_name, message.ino, inode.mode >> 12)
    _touch(tx, message.new_parent, directory, now_ns)
    return inode.attributes(message.ino)


def rename(
    tx: Transaction, now_ns: int, message: Rename, openers: Openers, effects: Effects, keep: Keep = keep_nothing
) -> Renamed:
    """renameat2(2), without RENAME_WHITEOUT. What is replaced is dealt with as by :func:`unlink`."""
    flags = message.flags
    if flags not in (RenameFlags.NONE, RenameFlags.NOREPLACE, RenameFlags.EXCHANGE):
        raise DfsError(ErrorCode.INVALID)
    old_directory = require_directory(tx, message.parent)
    new_directory = old_directory
    if message.new_parent != message.parent:
        new_directory = require_directory(tx, message.new_parent)
    check_name(message.name)
    check_name(message.new_name)
    if message.name in _DOTS or message.new_name in _DOTS:
        raise DfsError(ErrorCode.BUSY)
    old_row = tx.get(Table.DENTRIES, dentry_key(message.parent, message.name))
    if old_row is None:
        raise DfsError(ErrorCode.NOT_FOUND)
    source = Dentry.unpack(old_row)
    new_row = tx.get(Table.DENTRIES, dentry_key(message.new_parent, message.new_name))
    target = None if new_row is None else Dentry.unpack(new_row)
    if target is not None and flags & RenameFlags.NOREPLACE:
        raise DfsError(ErrorCode.EXISTS)
    if target is None and flags & RenameFlags.EXCHANGE:
        raise DfsError(ErrorCode.NOT_FOUND)
    _check_ancestors(tx, message, source, target)
    if target is not None and flags & RenameFlags.EXCHANGE:
        return _exchange(tx, now_ns, message, source, target, old_directory, new_directory)
    if target is not None and target.ino == source.ino:
        return Renamed(source.ino, 0, 0)
    return _replace(tx, now_ns, message, source, target, old_directory, new_directory, openers, effects, keep)


def _replace(
    tx: Transaction,
    now_ns: int,
    message: Rename,
    source: Dentry,
    target: Dentry | None,
    old_directory: Inode,
    new_directory: Inode,
    openers: Openers,
    effects: Effects,
    keep: Keep,
) -> Renamed:
    is_directory = source.type == _TYPE_DIRECTORY
    moved = require(tx, source.ino)
    _check_live(new_directory)
    if target is not None:
        _check_replaceable(tx, is_directory, target)
    elif is_directory and new_directory is not old_directory:
        _check_links(new_directory)
    _remove_entry(tx, message.parent, message.name, source)
    renamed = Renamed(source.ino, 0, 0)
    cookie = new_directory.next_cookie if target is None else target.cookie
    if target is None:
        _add_entry(tx, message.new_parent, new_directory, message.new_name, source.ino, source.type)
    else:
        # The name was there all the time: it keeps its place in listings.
        _put_entry(tx, message.new_parent, message.new_name, Dentry(source.ino, target.cookie, source.type))
        gone = require(tx, target.ino)
        _forget_name(tx, gone, message.new_parent, target)
        leaving = Leaving(target.ino, gone, message.new_parent, new_directory, message.new_name)
        dropped = drop_name(tx, now_ns, leaving, openers, effects, keep)
        renamed = Renamed(source.ino, target.ino, dropped.nlink, dropped.kept)
    if is_directory:
        old_directory.nlink -= 1
        new_directory.nlink += target is None
    counted.moved(tx, source.ino, moved, (message.parent, source.cookie), (message.new_parent, cookie))
    moved.ctime_ns = now_ns
    save(tx, source.ino, moved)
    _touch_both(tx, now_ns, message, old_directory, new_directory)
    return renamed


def _exchange(
    tx: Transaction,
    now_ns: int,
    message: Rename,
    source: Dentry,
    target: Dentry,
    old_directory: Inode,
    new_directory: Inode,
) -> Renamed:
    if source.ino == target.ino:
        return Renamed(source.ino, 0, 0)
    _put_entry(tx, message.parent, message.name, Dentry(target.ino, source.cookie, target.type))
    _put_entry(tx, message.new_parent, message.new_name, Dentry(source.ino, target.cookie, source.type))
    old, new = (message.parent, source.cookie), (message.new_parent, target.cookie)
    for dentry, place in ((source, (old, new)), (target, (new, old))):
        inode = require(tx, dentry.ino)
        inode.ctime_ns = now_ns
        counted.moved(tx, dentry.ino, inode, *place)
        save(tx, dentry.ino, inode)
    change = (source.type == _TYPE_DIRECTORY) - (target.type == _TYPE_DIRECTORY)
    if new_directory is not old_directory:
        old_directory.nlink -= change
        new_directory.nlink += change
    _touch_both(tx, now_ns, message, old_directory, new_directory)
    return Renamed(source.ino, 0, 0)


def _check_replaceable(tx: Transaction, is_directory: bool, target: Dentry) -> None:
    if is_directory and target.type != _TYPE_DIRECTORY:
        raise DfsError(ErrorCode.NOT_DIRECTORY)
    if not is_directory and target.type == _TYPE_DIRECTORY:
        raise DfsError(ErrorCode.IS_DIRECTORY)
    if is_directory:
        _check_empty(tx, target.ino)


def _check_ancestors(tx: Transaction, message: Rename, source: Dentry, target: Dentry | None) -> None:
    """A directory cannot move below itself, nor replace one that it lies in."""
    if message.parent == message.new_parent:
        return
    if source.type == _TYPE_DIRECTORY and _lies_in(tx, message.new_parent, source.ino):
        raise DfsError(ErrorCode.INVALID)
    if target is not None and target.type == _TYPE_DIRECTORY and _lies_in(tx, message.parent, target.ino):
        raise DfsError(ErrorCode.INVALID if message.flags & RenameFlags.EXCHANGE else ErrorCode.NOT_EMPTY)


def _lies_in(tx: Transaction, ino: int, ancestor: int) -> bool:
    while ino != ancestor:
        if ino == ROOT_INO:
            return False
        ino = require_directory(tx, ino).parent
    return True


def attach(tx: Transaction, now_ns: int, parent: int, name: bytes, ino: int, inode: Inode) -> None:
    """Gives an inode that has no name this one: what was deleted, or has been made out of sight. Its nlink is set
    already, as with that name; saves inode and directory."""
    directory = require_directory(tx, parent)
    check_name(name)
    if name in _DOTS or tx.get(Table.DENTRIES, dentry_key(parent, name)) is not None:
        raise DfsError(ErrorCode.EXISTS)
    _check_live(directory)
    if stat.S_ISDIR(inode.mode):
        _check_links(directory)
        directory.nlink += 1
        inode.parent = parent
    counted.born(inode, parent, directory.next_cookie)
    inode.ctime_ns = now_ns
    save(tx, ino, inode)
    _add_entry(tx, parent, directory, name, ino, inode.mode >> 12)
    _touch(tx, parent, directory, now_ns)


def check_name(name: bytes) -> None:
    """Raises unless this can be a name; ``.`` and ``..`` pass."""
    if not name or b"/" in name or b"\0" in name:
        raise DfsError(ErrorCode.INVALID, "not a name")
    if len(name) > NAME_MAX:
        raise DfsError(ErrorCode.NAME_TOO_LONG)


def _check_live(directory: Inode) -> None:
    if directory.nlink == 0:
        raise DfsError(ErrorCode.NOT_FOUND, "the directory was removed")


def _check_links(inode: Inode) -> None:
    if inode.nlink >= LINK_MAX:
        raise DfsError(ErrorCode.TOO_MANY_LINKS)


def _check_empty(tx: Transaction, ino: int) -> None:
    prefix = key_u64(ino)
    if next(iter(tx.scan(Table.LISTING, prefix, after(prefix))), None) is not None:
        raise DfsError(ErrorCode.NOT_EMPTY)


def _add_entry(tx: Transaction, parent: int, directory: Inode, name: bytes, ino: int, type_: int) -> None:
    """At the end of the directory; the caller saves the directory."""
    cookie = directory.next_cookie
    directory.next_cookie = cookie + 1
    _put_entry(tx, parent, name, Dentry(ino, cookie, type_))


def _put_entry(tx: Transaction, parent: int, name: bytes, dentry: Dentry) -> None:
    tx.put(Table.DENTRIES, dentry_key(parent, name), dentry.pack())
    tx.put(Table.LISTING, listing_key(parent, dentry.cookie), Listed(dentry.ino, dentry.type, name).pack())


def _remove_entry(tx: Transaction, parent: int, name: bytes, dentry: Dentry) -> None:
    tx.delete(Table.DENTRIES, dentry_key(parent, name))
    tx.delete(Table.LISTING, listing_key(parent, dentry.cookie))


def _forget_name(tx: Transaction, inode: Inode, parent: int, dentry: Dentry) -> None:
    """An inode loses this name; if it has others, one of them tells from now on where it counts."""
    if inode.nlink > 1 and dentry.type != _TYPE_DIRECTORY:
        counted.unnamed(tx, dentry.ino, inode, parent, dentry.cookie)


def _touch(tx: Transaction, ino: int, directory: Inode, now_ns: int) -> None:
    directory.mtime_ns = directory.ctime_ns = now_ns
    save(tx, ino, directory)


def _touch_both(tx: Transaction, now_ns: int, message: Rename, old: Inode, new: Inode) -> None:
    _touch(tx, message.parent, old, now_ns)
    if new is not old:
        _touch(tx, message.new_parent, new, now_ns)
