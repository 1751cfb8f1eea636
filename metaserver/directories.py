"""Listing of directories, in the order of their cookies. Synchronous, over one transaction."""

from metaserver.errors import DfsError, ErrorCode
from metaserver.inodes import find, require_directory
from metaserver.protocol import PAGE_ENTRIES, DirectoryEntry, DirectoryPage, ReadDirectory
from metaserver.schema import Dentry, Listed, Table, Transaction, after, dentry_key, key_u64, listing_key, read_u64

_LAST_COOKIE = (1 << 64) - 1


def read(tx: Transaction, message: ReadDirectory) -> DirectoryPage:
    """A page after ``message.cookie``; an unknown cookie continues where it would have been."""
    last = require_directory(tx, message.ino).next_cookie - 1
    cookie = message.cookie
    if message.after:
        row = tx.get(Table.DENTRIES, dentry_key(message.ino, message.after))
        if row is None:
            raise DfsError(ErrorCode.NOT_FOUND)
        cookie = Dentry.unpack(row).cookie
    count = max(1, min(message.count, PAGE_ENTRIES))
    entries: list[DirectoryEntry] = []
    if not 0 <= cookie < _LAST_COOKIE:
        return DirectoryPage((), True, last)
    start = listing_key(message.ino, cookie + 1)
    for key, value in tx.scan(Table.LISTING, start, after(key_u64(message.ino))):
        if len(entries) == count:
            return DirectoryPage(tuple(entries), False, last)
        listed = Listed.unpack(value)
        attributes = None
        if message.attributes:
            inode = find(tx, listed.ino)
            attributes = None if inode is None else inode.attributes(listed.ino)
        entries.append(DirectoryEntry(listed.name, listed.ino, listed.type, read_u64(key, 8), attributes))
    return DirectoryPage(tuple(entries), True, last)
