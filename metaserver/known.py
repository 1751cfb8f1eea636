"""What is known of the pages of a store's file, so that a start need not look at each of their rows.

Beside the store lies a file with a CRC-32C for each page of the tree of rows, in the order of pages (u32,
little-endian; where the meta pages are: magic and version). A page that is byte for byte what it was when LMDB had just
written it, or when a start last looked at all of it, need not be looked at again. 0: nothing is known; so it is for
free pages, for those of the tree of free pages, and for leaves with values on pages of their own.

It is no more than a memory of what was found right: if it is lost, old, or damaged itself, pages differ from what it
says and are looked at row by row. So it is never synced, and no error with it is more than a slow start.

After each checkpoint the pages that only the new tree has get their checksum, those that only the old one had get 0:
both are found from the two roots, since whatever hangs below an unchanged page is unchanged. 6 us a page.
"""

import os
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog
from crc32c import crc32c

from metaserver.pages import PAGE_BYTES, DamagedPage, Tree, children, is_branch, is_plain_leaf, read_newest

log = structlog.get_logger(__name__)

SUFFIX = ".known"
_HEAD = struct.Struct("<II")
_MAGIC, _VERSION = 0x4B4E574E, 1
_ENTRY = struct.Struct("<I")
# As in the store: the event loop is not to wait for this thread.
_PAUSE_PAGES = 16
_PAUSE_SECONDS = 50e-6


class Known:
    """One store's, for one life of it. Blocking, in whatever thread writes the store."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._path = known_path(store)
        # The transaction it describes; None: it describes none any more.
        self._transaction: int | None = None

    def read(self) -> Sequence[int]:
        """Checksums by page as far as they are there."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return ()
        if len(data) < _HEAD.size or _HEAD.unpack_from(data) != (_MAGIC, _VERSION):
            return ()
        found = array("I", data[: len(data) // _ENTRY.size * _ENTRY.size])
        if sys.byteorder == "big":
            found.byteswap()
        return found

    def begin(self, transaction: int, checksums: Sequence[int], before: Sequence[int]) -> None:
        """Starts with what a start has found of this transaction; ``before`` is what :meth:`read` returned."""
        entries = array("I", checksums)
        entries[0:2] = array("I", (_MAGIC, _VERSION))
        self._transaction = transaction
        if entries == before:
            return
        if sys.byteorder == "big":
            entries.byteswap()
        self._try(lambda descriptor: _write_whole(descriptor, entries.tobytes()))

    def note(self) -> None:
        """A transaction has been committed."""
        if self._transaction is None:
            return
        try:
            descriptor = os.open(self._store, os.O_RDONLY | os.O_CLOEXEC)
            try:
                changes = self._changes(descriptor)
            finally:
                os.close(descriptor)
        except (OSError, DamagedPage, struct.error) as error:
            self._forget(str(error))
            return
        if changes:
            self._try(lambda known: _write_entries(known, changes))

    def _changes(self, descriptor: int) -> dict[int, int]:
        newest, previous = read_newest(descriptor)
        if newest.transaction == self._transaction:
            return {}
        if previous is None or previous.transaction != self._transaction:
            raise DamagedPage("transactions are missing between")
        self._transaction = newest.transaction
        fresh, gone = _difference(_Pages(descriptor), previous.trees[1], newest.trees[1])
        return dict.fromkeys(gone, 0) | fresh

    def _try(self, write: Callable[[int], None]) -> None:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                write(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._forget(str(error))

    def _forget(self, reason: str) -> None:
        """On a full disk, say: the next start is slow, that is all."""
        log.warning("the next start will have to look at every row", reason=reason)
        self._transaction = None
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot remove what was known of pages", error=str(error))


def known_path(store: Path) -> Path:
    return store.with_name(store.name + SUFFIX)


class _Pages:
    """Reads pages, with a pause now and then."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._count = 0

    def read(self, page: int) -> bytes:
        self._count += 1
        if self._count % _PAUSE_PAGES == 0:
            time.sleep(_PAUSE_SECONDS)
        data = os.pread(self._descriptor, PAGE_BYTES, page * PAGE_BYTES)
        if len(data) != PAGE_BYTES:
            raise DamagedPage(f"page {page} is cut off")
        return data


def _difference(pages: _Pages, old: Tree, new: Tree) -> tuple[dict[int, int], set[int]]:
    """Pages that only the new tree has, with their checksums, and those that only the old one had."""
    fresh: dict[int, int] = {}
    gone: set[int] = set()
    ours: set[int] = set()
    theirs: set[int] = set()
    # Levels are counted from the leaves: there a page stays where it is, however high the tree becomes.
    for level in range(max(old.depth, new.depth), 0, -1):
        if level == new.depth:
            ours.add(new.root)
        if level == old.depth:
            theirs.add(old.root)
        ours, theirs = ours - theirs, theirs - ours
        gone |= theirs
        ours = _take(pages, ours, fresh, leaves=level == 1)
        theirs = _below(pages, theirs) if level > 1 else set()
    return fresh, gone


def _take(pages: _Pages, numbers: Iterable[int], fresh: dict[int, int], *, leaves: bool) -> set[int]:
    """Notes new pages of one level; what hangs below them."""
    below: set[int] = set()
    for page in numbers:
        data = pages.read(page)
        if leaves:
            fresh[page] = crc32c(data) if is_plain_leaf(page, data) else 0
            continue
        if not is_branch(page, data):
            raise DamagedPage(f"page {page} is damaged")
        fresh[page] = crc32c(data)
        below.update(children(data))
    return below


def _below(pages: _Pages, numbers: Iterable[int]) -> set[int]:
    below: set[int] = set()
    for page in numbers:
        data = pages.read(page)
        if not is_branch(page, data):
            raise DamagedPage(f"page {page} is damaged")
        below.update(children(data))
    return below


def _write_whole(descriptor: int, data: bytes) -> None:
    os.ftruncate(descriptor, 0)
    if os.pwrite(descriptor, data, 0) != len(data):
        raise OSError("not all of it was written")


def _write_entries(descriptor: int, changes: dict[int, int]) -> None:
    """Neighbours in one call."""
    first = 0
    run: list[int] = []
    for page in sorted(changes):
        if run and page != first + len(run):
            _write_run(descriptor, first, run)
            run = []
        if not run:
            first = page
        run.append(changes[page])
    if run:
        _write_run(descriptor, first, run)


def _write_run(descriptor: int, first: int, run: list[int]) -> None:
    data = struct.pack(f"<{len(run)}I", *run)
    if os.pwrite(descriptor, data, first * _ENTRY.size) != len(data):
        raise OSError("not all of it was written")
