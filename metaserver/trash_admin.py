"""What an operator does with the trash over HTTP: looks, restores, empties. Routes under the token.

Paths are from the root of the cluster; bytes that are no UTF-8 are shown escaped (``\\xff``), and compared so. Rows are
looked at in slices, between which others have their turn; what takes long is asked for page by page.
"""

import stat
from itertools import islice

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from metaserver import inodes, trash
from metaserver.changes import Changes
from metaserver.commit import Committer
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import json_reply, read_json
from metaserver.inodes import Effects
from metaserver.protocol import ROOT_INO, TrashEmptied, TrashEmpty, TrashEntry, TrashPage, TrashRestore, TrashRestored
from metaserver.schema import (
    Inode,
    Listed,
    Table,
    Transaction,
    Trashed,
    after,
    inode_key,
    key_u64,
    listing_key,
    read_u64,
    trash_key,
)
from metaserver.trash import Place, Purged, Restored
from metaserver.trashing import Trash

# Rows looked at in one turn (about 5 ms) and for one answer; entries restored or purged by one request.
SLICE_ROWS = 200
PAGE_ROWS = 2000
MOST_ENTRIES = 500
LISTING_ROWS = 2000
_END = b"\xff" * 17
# Where a directory is that is not known any more.
UNKNOWN = "?"

Row = tuple[bytes, Trashed, Inode]


class TrashAdmin:
    def __init__(self, committer: Committer, changes: Changes, bin_: Trash) -> None:
        self._committer = committer
        self._changes = changes
        self._trash = bin_

    async def page(self, below: str, position: bytes, count: int) -> TrashPage:
        """Entries at or below a path ("": all), from a key on, in the order in which they expire; as many as are found
        among :data:`PAGE_ROWS`."""
        paths = Paths(self._committer)
        page = TrashPage([], "")
        left = PAGE_ROWS
        while left > 0 and len(page.entries) < count:
            rows = self._rows(position, min(SLICE_ROWS, left))
            for key, row, inode in rows:
                position = key + b"\0"
                path = await paths.of_entry(row)
                if is_below(path, below):
                    page.entries.append(_entry(key, row, inode, path))
                    if len(page.entries) == count:
                        break
            else:
                if len(rows) < min(SLICE_ROWS, left):
                    return page
            left -= len(rows)
            await trio.lowlevel.checkpoint()
        page.next = position.hex()
        return page

    def _rows(self, position: bytes, count: int) -> list[Row]:
        def read(tx: Transaction) -> list[Row]:
            found = []
            for key, value in islice(tx.scan(Table.TRASH, position, _END), count):
                inode = tx.get(Table.INODES, inode_key(read_u64(key, 8)))
                if inode is not None:
                    found.append((key, Trashed.unpack(value), Inode.unpack(inode)))
            return found

        return self._committer.read(0, read)[0]

    # -- restoring -------------------------------------------------------------------------------------------------

    async def restore(self, told: TrashRestore) -> list[TrashRestored]:
        """Restores entries one by one, durably; of each what became of it."""
        if len(told.ids) > MOST_ENTRIES or (told.name and len(told.ids) != 1):
            raise DfsError(ErrorCode.INVALID, f"at most {MOST_ENTRIES} entries at once, and one with a new name")
        if not all(0 <= number < 1 << 63 for number in (*told.ids, told.parent)):
            raise DfsError(ErrorCode.INVALID, "a number that no inode has")
        to = Place(told.parent, told.name) if told.name else None
        done = []
        for ino in told.ids:
            done.append(self._restore(ino, to))
            await trio.lowlevel.checkpoint()
        await self._committer.wait_durable(self._committer.newest)
        paths = Paths(self._committer)
        return [answer if place is None else TrashRestored(answer.id, await paths.of(place)) for answer, place in done]

    def _restore(self, ino: int, to: Place | None) -> tuple[TrashRestored, Place | None]:
        def change(tx: Transaction, now_ns: int) -> tuple[Restored, Effects]:
            effects = Effects()
            return trash.restore(tx, now_ns, ino, to, effects), effects

        try:
            restored, effects = self._committer.change(0, 0, change).message
        except DfsError as error:
            return TrashRestored(ino, "", error.code.name, error.text), None
        effects.changed += restored.changed
        self._changes.carry_out(effects)
        return TrashRestored(ino, ""), restored.place

    # -- emptying --------------------------------------------------------------------------------------------------

    async def empty(self, told: TrashEmpty) -> TrashEmptied:
        """Purges entries for good: of those that one page has, and those only that were deleted long enough ago."""
        if not 0 <= told.older_than_seconds < 1e10:
            raise DfsError(ErrorCode.INVALID, f"{told.older_than_seconds} seconds: 0 to 10^10")
        page = await self.page(told.path, _key(told.after), MOST_ENTRIES)
        until_ns = self._trash.now_ns() - int(told.older_than_seconds * 1e9)
        done = TrashEmptied(0, 0, page.next)
        for entry in page.entries:
            if entry.deleted_ns <= until_ns:
                purged = self._trash.carry_through(
                    lambda tx, effects, entry=entry: _purge(tx, entry, effects)  # type: ignore[misc]
                )
                done.files += purged.entries
                done.bytes += purged.bytes
                await trio.lowlevel.checkpoint()
        await self._committer.wait_durable(self._committer.newest)
        return done


def _purge(tx: Transaction, entry: TrashEntry, effects: Effects) -> Purged:
    """An entry, if it is still there."""
    key = trash_key(entry.expires_ns, entry.id)
    value = tx.get(Table.TRASH, key)
    return Purged() if value is None else Purged(1, trash.purge(tx, key, Trashed.unpack(value), effects))


def _entry(key: bytes, row: Trashed, inode: Inode, path: str) -> TrashEntry:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return TrashEntry(
        id=read_u64(key, 8),
        path=path,
        kind=kinds.get(stat.S_IFMT(inode.mode), "file"),
        size=0 if row.directory else inode.size,
        uid=inode.uid,
        gid=inode.gid,
        deleted_ns=row.deleted_ns,
        expires_ns=read_u64(key),
        host=row.host,
    )


def is_below(path: str, above: str) -> bool:
    """Whether ``path`` is ``above`` or something in it; "" or "/": everything is."""
    above = above.rstrip("/")
    return not above or path == above or path.startswith(f"{above}/")


class Paths:
    """Paths of directories that exist or are in the trash, remembered for one answer."""

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self._known = {ROOT_INO: ""}

    async def of_entry(self, row: Trashed) -> str:
        return await self.of(Place(row.parent, row.name))

    async def of(self, place: Place) -> str:
        directory = await self._directory(place.parent)
        return f"{directory}/{text(place.name)}"

    async def _directory(self, ino: int) -> str:
        """Without recursion: trees may be deep."""
        way: list[tuple[int, str]] = []
        while ino not in self._known:
            place = await self._place(ino)
            if place is None:
                self._known[ino] = UNKNOWN
                break
            way.append((ino, text(place.name)))
            ino = place.parent
        for child, name in reversed(way):
            self._known[child] = f"{self._known[ino]}/{name}"
            ino = child
        return self._known[ino]

    async def _place(self, ino: int) -> Place | None:
        found, _ = self._committer.read(0, lambda tx: (inodes.find(tx, ino), trash.look(tx, ino)))
        inode, trashed = found
        if trashed is not None:
            return Place(trashed[1].parent, trashed[1].name)
        if inode is None or inode.nlink == 0:
            return None
        return await self._place_of_live(inode.parent, ino)

    async def _place_of_live(self, parent: int, ino: int) -> Place | None:
        """A directory has one name, which only a look through the one above tells."""
        cookie = 0
        while True:
            rows, _ = self._committer.read(0, lambda tx, cookie=cookie: _listing(tx, parent, cookie))  # type: ignore[misc]
            name = next((listed.name for _, listed in rows if listed.ino == ino), None)
            if name is not None:
                return Place(parent, name)
            if len(rows) < LISTING_ROWS:
                return None
            cookie = rows[-1][0] + 1
            await trio.lowlevel.checkpoint()


def _listing(tx: Transaction, ino: int, cookie: int) -> list[tuple[int, Listed]]:
    rows = islice(tx.scan(Table.LISTING, listing_key(ino, cookie), after(key_u64(ino))), LISTING_ROWS)
    return [(read_u64(key, 8), Listed.unpack(value)) for key, value in rows]


def text(name: bytes) -> str:
    """A name as paths show it."""
    return name.decode(errors="backslashreplace")


def _key(position: str) -> bytes:
    try:
        key = bytes.fromhex(position)
    except ValueError:
        raise DfsError(ErrorCode.INVALID, "`after` has to be the `next` of another answer") from None
    if len(key) > len(_END):
        raise DfsError(ErrorCode.INVALID, "`after` has to be the `next` of another answer")
    return key


def routes(admin: TrashAdmin, changes: Changes) -> list[Route]:
    """``changes`` says whether any are taken."""

    async def show(request: Request) -> Response:
        asked = request.query_params
        count = asked.get("count", str(MOST_ENTRIES))
        if not count.isdecimal() or not 0 < int(count[:9]) <= PAGE_ROWS:
            raise DfsError(ErrorCode.INVALID, f"count: 1 to {PAGE_ROWS}")
        page = await admin.page(asked.get("path", ""), _key(asked.get("after", "")), int(count))
        return json_reply(page)

    async def restore(request: Request) -> Response:
        told = await read_json(request, TrashRestore)
        _require(changes)
        return json_reply(await admin.restore(told))

    async def empty(request: Request) -> Response:
        told = await read_json(request, TrashEmpty)
        _require(changes)
        return json_reply(await admin.empty(told))

    return [
        Route("/v1/trash", show),
        Route("/v1/trash/restore", restore, methods=["POST"]),
        Route("/v1/trash/empty", empty, methods=["POST"]),
    ]


def _require(changes: Changes) -> None:
    if changes.refusing:
        raise DfsError(ErrorCode.READ_ONLY, changes.refusing)
