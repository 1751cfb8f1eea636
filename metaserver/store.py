"""Rows on stable storage, in LMDB: the only module that imports lmdb.

One tree without named databases. A row's key is one byte of table number and the key of ``schema.py``: named
databases would add root pointers that no row checksum covers, and a checkpoint could not write its rows in one sorted
pass. A row's value ends with the CRC-32C (little-endian) of row key and value. The TOTALS row of a table has the number
of its rows and the XOR of their checksums, so that a row that is silently absent is noticed.

LMDB itself detects no damage. Whatever a read finds wrong is :class:`CorruptStore`, after which every read raises it.

The file is kept as long as the map (sparse), so that a file shorter than its meta page says is damage, never an
unwritten last page: LMDB would meet it with SIGBUS.

Threads: :meth:`Store.write`, :meth:`Store.copy` and work on a :class:`View` may run in a worker thread; everything else
belongs to the thread of the event loop.
"""

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator
from itertools import chain
from itertools import count as count_from
from pathlib import Path

import lmdb
import structlog
from crc32c import crc32c

from metaserver.files import FULL, SHORTAGES, is_full, naming, sync_file
from metaserver.known import Known
from metaserver.overlay import PREFIX, Rows
from metaserver.pages import PAGE_BYTES, RESIDUE, DamagedPage, check_pages, read_meta
from metaserver.schema import Table, Total

log = structlog.get_logger(__name__)

# Address space and a sparse file, not memory or disk; doubled whenever it is full.
MAP_BYTES = 1 << 30
# The store's own reads, a background walk, a check, a snapshot copy, and one to spare.
MAX_READERS = 8
CHECKSUM_BYTES = 4
# Rows verified between two chances to do something else.
VERIFY_ROWS = 500
_CRC = struct.Struct("<I")
# A thread that gives up the interpreter for the microsecond of each LMDB call takes it back before the event loop has
# woken up, which then waits for sys.getswitchinterval (5 ms). So a write really sleeps now and then. A checkpoint of
# 20,000 changes beside 20,000 changes a second: gaps of the loop p99 3.7 ms without, 0.25 ms with a sleep every 64 rows
# (256 rows: 1.6 ms; 16 rows: 0.4 ms and twice as long). With very many rows to write, catching up is more important.
PAUSE_ROWS = 64
PAUSE_SECONDS = 50e-6
CATCH_UP_ROWS = 400_000
# Less than this, and a disk is full.
ROOM_BYTES = 1 << 20
# Rows that follow from others: see :meth:`Store.write`.
Derive = Callable[[Rows, Callable[[bytes], bytes | None]], Rows]
TABLES = tuple(table for table in Table if table is not Table.TOTALS)


class CorruptStore(Exception):
    """The file is damaged: nothing more is served from it. The text ends with what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{text}; stop the metaserver and run: metaserver recover")
        self.reason = text


class MapFull(Exception):
    """The transaction was aborted because the map is full: :meth:`Store.grow`, then write again."""


class StoreFull(Exception):
    """The transaction was aborted because the disk is full: nothing changed; write again later."""

    def __init__(self, text: str = "the metaserver's disk is full: make some space") -> None:
        super().__init__(text)


class ViewExpired(Exception):
    """The map was moved: what this view showed can be seen again in a new one."""


def nothing_derived(rows: Rows, read: Callable[[bytes], bytes | None]) -> Rows:
    """A :data:`Derive`."""
    return {}


def row_checksum(key: bytes, value: bytes) -> int:
    """The CRC-32C of a row, ``key`` being its row key and ``value`` without checksum."""
    return crc32c(value, crc32c(key))


def seal_row(key: bytes, value: bytes) -> bytes:
    """The value as it is stored."""
    return value + _CRC.pack(crc32c(value, crc32c(key)))


def check_file(path: Path, seconds: float | None = None, known: Known | None = None) -> int:
    """Raises :class:`CorruptStore` unless every page and row of the file is what it should be; with ``seconds``, it may
    stop before it has seen all (0: it only looks at the meta pages), and need not look at rows of pages that are known.
    Returns the map size it was last written with, in bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(2 * PAGE_BYTES)
            size = os.fstat(file.fileno()).st_size
        if len(head) < 2 * PAGE_BYTES:
            raise CorruptStore(f"{path} is cut off at {size} bytes")
        metas = [meta for page in (0, 1) if (meta := read_meta(head[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]))]
        if not metas:
            raise CorruptStore(f"{path} has no valid meta page")
        newest = max(metas, key=lambda meta: meta.transaction)
        needed = (newest.last_page + 1) * PAGE_BYTES
        if size < needed:
            raise CorruptStore(f"{path} is cut off at {size} of {needed} bytes")
        if not needed <= newest.map_bytes <= 1 << 46:
            raise CorruptStore(f"{path} has a damaged meta page")
        # LMDB trusts what it maps: a damaged page would end the process with a signal, or hide rows.
        if seconds != 0:
            _look_through(path, seconds, known)
    except DamagedPage as error:
        raise CorruptStore(f"{path}: {error}") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        raise CorruptStore(f"{path} cannot be read ({error.strerror})") from None
    return newest.map_bytes


def _look_through(path: Path, seconds: float | None, known: Known | None) -> None:
    before = () if known is None else known.read()
    # Without a limit nothing is taken for granted.
    checked = check_pages(path, seconds, before if seconds is not None else ())
    if not checked.whole:
        log.warning("the store was not looked through at the start: it is too large", path=str(path))
    if known is not None:
        known.begin(checked.transaction, checked.checksums, before)


def create_store(path: Path) -> None:
    """Makes an empty store durably: it is there whole or not at all. Raises :class:`StoreFull` or ``OSError``."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    _lock_file(temporary).unlink(missing_ok=True)
    try:
        _write_empty(temporary)
    except lmdb.Error as error:
        raise _failure(error, temporary) from error
    _lock_file(temporary).unlink(missing_ok=True)
    sync_file(temporary)
    os.rename(temporary, path)


def _write_empty(path: Path) -> None:
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 20, mode=0o600, max_readers=1)
    try:
        with environment.begin(write=True) as transaction:
            for table in TABLES:
                key = PREFIX[Table.TOTALS] + PREFIX[table]
                transaction.put(key, seal_row(key, Total(0, 0).pack()))
    finally:
        environment.close()


def _lock_file(path: Path) -> Path:
    return path.with_name(path.name + "-lock")


class Reader:
    """Verified reads of one LMDB snapshot. Keys are row keys; values come without checksum."""

    def __init__(self, transaction: "lmdb.Transaction[bytes]", damage: list[CorruptStore]) -> None:
        self._transaction = transaction
        # For _check_absent: most changes look for three rows that are not there, and a new cursor each time costs twice
        # as much as looking.
        self._finder: lmdb.Cursor[bytes] | None = None
        # Shared by all readers of one file: what one has found stops the others.
        self._damage = damage

    def get(self, key: bytes) -> bytes | None:
        try:
            data = self._transaction.get(key)
        except lmdb.Error as error:
            raise self._unreadable(error) from error
        if data is None:
            if self._damage:
                raise self._damage[0]
            self._check_absent(key)
            return None
        return self._verified(key, data)

    def _check_absent(self, key: bytes) -> None:
        """A damaged branch leads to the wrong leaf, where a row is not found that is elsewhere: then the neighbours
        there are not this key's neighbours."""
        try:
            cursor = self._finder
            if cursor is None:
                cursor = self._finder = self._transaction.cursor()
            found = cursor.set_range(key)
            if found and cursor.key() <= key:
                raise self.damaged(f"the row {key.hex()} is not found where it should be")
            if (cursor.prev() if found else cursor.last()) and cursor.key() >= key:
                raise self.damaged(f"the row {key.hex()} is not found where it should be")
        except lmdb.Error as error:
            raise self._unreadable(error) from error

    def _end_transaction(self) -> None:
        """A cursor does not outlive its transaction."""
        if self._finder is not None:
            self._finder.close()
            self._finder = None
        self._transaction.abort()

    def scan(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop in key order; may be left early, and changes of the store do not show."""
        try:
            with self._transaction.cursor() as cursor:
                if not cursor.set_range(start):
                    return
                for key, data in cursor.iternext():
                    if key >= stop:
                        return
                    yield key, self._verified(key, data)
        except lmdb.Error as error:
            raise self._unreadable(error) from error

    def scan_back(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The same from the end."""
        try:
            with self._transaction.cursor() as cursor:
                if not (cursor.prev() if cursor.set_range(stop) else cursor.last()):
                    return
                for key, data in cursor.iterprev():
                    if key < start:
                        return
                    yield key, self._verified(key, data)
        except lmdb.Error as error:
            raise self._unreadable(error) from error

    def verify(self) -> Iterator[int]:
        """Reads every row and compares all of them with TOTALS; raises :class:`CorruptStore`. Yields the number of rows
        so far about once a millisecond."""
        totals: dict[int, Total] = {table: Total(0, 0) for table in Table}
        count = 0
        try:
            with self._transaction.cursor() as cursor:
                for key, data in cursor.iternext():
                    self._verified(key, data)
                    total = totals.get(key[0])
                    if total is None:
                        raise self.damaged(f"the row {key.hex()} belongs to no table")
                    total.count += 1
                    total.checksums ^= int.from_bytes(data[-CHECKSUM_BYTES:], "little")
                    count += 1
                    if count % VERIFY_ROWS == 0:
                        yield count
        except lmdb.Error as error:
            raise self._unreadable(error) from error
        known = read_totals(self)
        for table in TABLES:
            if known.get(table, Total(0, 0)) != totals[table]:
                raise self.damaged(f"{table.name} does not have the rows it should have")
        yield count

    def entries(self) -> int:
        """How many rows the tree itself says it has, TOTALS included."""
        count: int = self._transaction.stat()["entries"]
        return count

    def damaged(self, text: str) -> CorruptStore:
        """Notes damage, so that no more is read, and returns what to raise."""
        if not self._damage:
            self._damage.append(CorruptStore(text))
        return self._damage[0]

    def _verified(self, key: bytes, data: bytes) -> bytes:
        if self._damage or crc32c(data, crc32c(key)) != RESIDUE:
            raise self.damaged(f"the row {key.hex()} has a wrong checksum")
        return data[:-CHECKSUM_BYTES]

    def _unreadable(self, error: Exception) -> Exception:
        return self.damaged(f"the store cannot be read ({error})")


class View(Reader):
    """A consistent state of the store that stays while newer checkpoints are written. Close it soon: its pages are not
    reused meanwhile. Raises :class:`ViewExpired` once the map has been moved."""

    def __init__(self, store: "Store") -> None:
        super().__init__(store.environment.begin(), store.damage)
        self._store = store
        self._expired = False
        store.views.add(self)

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._store.views.discard(self)
        self._end_transaction()

    def expire(self) -> None:
        self._expired = True
        self.close()

    def _unreadable(self, error: Exception) -> Exception:
        return ViewExpired() if self._expired else super()._unreadable(error)


class Store(Reader):
    """An open store: reads of the newest checkpoint, and the writing of the next one."""

    def __init__(self, path: Path, environment: "lmdb.Environment", known: Known | None = None) -> None:
        self.path = path
        self._known = known
        self.environment = environment
        self.damage: list[CorruptStore] = []
        self.views: set[View] = set()
        super().__init__(environment.begin(), self.damage)

    @classmethod
    def open(
        cls, path: Path, map_bytes: int = MAP_BYTES, check_seconds: float | None = None, known: Known | None = None
    ) -> "Store":
        """Opens an existing store after looking through it, normally for so long at most; raises :class:`CorruptStore`
        or ``OSError``. One process at a time: the caller holds the lock of the data directory. ``known`` is told what
        becomes of its pages."""
        map_bytes = max(check_file(path, check_seconds, known), map_bytes)
        os.truncate(path, max(map_bytes, path.stat().st_size))
        try:
            environment = lmdb.open(
                str(path),
                subdir=False,
                map_size=map_bytes,
                max_readers=MAX_READERS,
                max_spare_txns=1,
                mode=0o600,
                readahead=False,
            )
        except lmdb.Error as error:
            raise _unopened(error, path) from error
        store = cls(path, environment, known)
        try:
            store.check_entries()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open_readonly(cls, path: Path) -> "Store":
        """Opens a store that nobody writes meanwhile, such as a snapshot file, changing nothing on disk; raises
        :class:`CorruptStore` or ``OSError``."""
        map_bytes = check_file(path)
        try:
            environment = lmdb.open(
                str(path), subdir=False, map_size=map_bytes, readonly=True, lock=False, readahead=False, create=False
            )
        except lmdb.Error as error:
            raise _unopened(error, path) from error
        return cls(path, environment)

    def check_entries(self) -> None:
        """Compares the row counts of TOTALS with that of the tree; raises :class:`CorruptStore`."""
        totals = read_totals(self)
        if sum(total.count for total in totals.values()) + len(totals) != self.entries():
            raise self.damaged(f"{self.path} does not have as many rows as it should")

    def renew(self) -> None:
        """Goes on to the newest checkpoint. No scan may be under way."""
        # py-lmdb keeps the reader slot of the aborted transaction for the next one.
        self._end_transaction()
        self._transaction = self.environment.begin()

    def view(self) -> View:
        """The newest checkpoint, to be read slowly or in a worker thread."""
        return View(self)

    def write(self, rows: Rows, derive: Derive = nothing_derived) -> None:
        """Writes rows and tombstones, what follows from them, and the new TOTALS in one transaction, synced when this
        returns. ``derive`` gets the rows and a function that reads what is there before, by row key.

        Runs in one worker thread from begin to commit. Nothing has changed if it raises: :class:`MapFull`,
        :class:`StoreFull`, :class:`CorruptStore`, or ``OSError`` when the disk fails.
        """
        try:
            with self.environment.begin(write=True) as transaction:
                derived = derive(rows, self._paused_reads(transaction, len(rows)))
                self._write_rows(transaction, rows, derived)
        except lmdb.MapFullError as error:
            raise MapFull from error
        except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError) as error:
            raise self.damaged(f"{self.path} cannot be written ({error})") from error
        except lmdb.Error as error:
            raise _failure(error, self.path) from error
        if self._known is not None:
            self._known.note()

    def _paused_reads(self, transaction: "lmdb.Transaction[bytes]", count: int) -> Callable[[bytes], bytes | None]:
        """Reads of what is there before ``count`` rows are written, with the same pauses as the writing."""
        reads = count_from(1)
        pauses = count < CATCH_UP_ROWS

        def read(key: bytes) -> bytes | None:
            if pauses and next(reads) % PAUSE_ROWS == 0:
                time.sleep(PAUSE_SECONDS)
            data = transaction.get(key)
            return None if data is None else self._verified(key, data)

        return read

    def _write_rows(self, transaction: "lmdb.Transaction[bytes]", rows: Rows, derived: Rows) -> None:
        counts = [0] * len(PREFIX)
        checksums = [0] * len(PREFIX)
        replace, pop, pack = transaction.replace, transaction.pop, _CRC.pack
        pauses = len(rows) < CATCH_UP_ROWS
        for position, (key, value) in enumerate(chain(rows.items(), derived.items()), 1):
            if pauses and position % PAUSE_ROWS == 0:
                time.sleep(PAUSE_SECONDS)
            table = key[0]
            if value is None:
                old = pop(key)
            else:
                checksum = crc32c(value, crc32c(key))
                checksums[table] ^= checksum
                counts[table] += 1
                old = replace(key, value + pack(checksum))
            if old is not None:
                checksums[table] ^= int.from_bytes(old[-CHECKSUM_BYTES:], "little")
                counts[table] -= 1
        for table in TABLES:
            if counts[table] or checksums[table]:
                self._add_total(transaction, table, counts[table], checksums[table])

    def _add_total(self, transaction: "lmdb.Transaction[bytes]", table: Table, count: int, checksums: int) -> None:
        key = PREFIX[Table.TOTALS] + PREFIX[table]
        data = transaction.get(key)
        if data is None and table > Table.TOTALS:
            data = seal_row(key, Total(0, 0).pack())
        if data is None or crc32c(data, crc32c(key)) != RESIDUE:
            raise self.damaged(f"the totals of {table.name} are damaged")
        total = Total.unpack(data[:-CHECKSUM_BYTES])
        total.count += count
        total.checksums ^= checksums
        if total.count < 0:
            raise self.damaged(f"{table.name} has lost rows")
        transaction.put(key, seal_row(key, total.pack()))

    def grow(self) -> None:
        """Doubles the map. Views expire; no write, copy or scan may be under way. Raises ``OSError`` with nothing
        changed if the file cannot become so long, ``MemoryError`` if there is no address space for it."""
        map_bytes = 2 * self.environment.info()["map_size"]
        os.truncate(self.path, map_bytes)
        for view in tuple(self.views):
            view.expire()
        self._end_transaction()
        self.environment.set_mapsize(map_bytes)
        self._transaction = self.environment.begin()

    def copy(self, path: Path) -> None:
        """Writes a compacted copy of the newest checkpoint, not synced; raises :class:`StoreFull` or ``OSError``.

        Runs in a worker thread; no :meth:`grow` meanwhile.
        """
        try:
            self.environment.copy(str(path), compact=True)
        except lmdb.Error as error:
            raise _failure(error, path) from error

    def reserve(self, length: int) -> None:
        """Has the disk keep space for ``length`` bytes more, inside the file, so that what frees space can be written
        on a full disk; raises ``OSError``. In a worker thread."""
        info = self.environment.info()
        used = (info["last_pgno"] + 1) * PAGE_BYTES
        length = min(length, info["map_size"] - used)
        if length > 0:
            with naming(self.path), self.path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), used, length)

    def copy_bytes(self) -> int:
        """How large a :meth:`copy` is, nearly."""
        stat = self.environment.stat()
        pages: int = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return (pages + 2) * PAGE_BYTES  # and the two meta pages

    def sizes(self) -> dict[str, int]:
        """For metrics: bytes of the map, bytes in use at its highest page, rows."""
        info = self.environment.info()
        used = (info["last_pgno"] + 1) * PAGE_BYTES
        return {"map_bytes": info["map_size"], "used_bytes": used, "rows": self.entries()}

    def close(self) -> None:
        for view in tuple(self.views):
            view.close()
        self._end_transaction()
        self.environment.close()


def _unopened(error: lmdb.Error, path: Path) -> CorruptStore | OSError:
    """What it means that LMDB does not open a file: of a shortage there is only the text."""
    short = next((number for number in (*SHORTAGES, *FULL) if os.strerror(number) in str(error)), 0)
    if short:
        return OSError(short, os.strerror(short), str(path))
    return CorruptStore(f"{path} cannot be opened ({error})")


def _failure(error: lmdb.Error, path: Path) -> StoreFull | OSError:
    """What a write of LMDB's means that failed."""
    if _is_full(error, path):
        return StoreFull()
    return OSError(errno.EIO, f"{path} cannot be written ({error})")


def _is_full(error: lmdb.Error, path: Path) -> bool:
    """LMDB has a class for a full disk; a full quota comes as text only. Where part of a write found room, the kernel
    says how much, and LMDB something else."""
    if isinstance(error, lmdb.DiskError) or os.strerror(errno.EDQUOT) in str(error):
        return True
    return not _has_room(path.with_name(path.name + ".room"))


def _has_room(probe: Path) -> bool:
    """Whether a file of some size can be made; asked by making one, since nothing else knows of quotas."""
    try:
        descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, ROOM_BYTES)
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError as error:
        return not is_full(error)
    return True


def read_totals(reader: Reader) -> dict[Table, Total]:
    """TOTALS of a store; raises :class:`CorruptStore` if a table has none. A table that came later than the store's
    last checkpoint has none, and is not there."""
    totals: dict[Table, Total] = {}
    for table in TABLES:
        value = reader.get(PREFIX[Table.TOTALS] + PREFIX[table])
        if value is not None:
            totals[table] = Total.unpack(value)
        elif table < Table.TOTALS:
            raise reader.damaged(f"{table.name} has no totals")
    return totals
