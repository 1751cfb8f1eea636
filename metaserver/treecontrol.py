"""Sums of trees and quotas as they are asked for over HTTP: routes under the token, and the parts of a metaserver that
answer them."""

import stat
from collections.abc import Callable

import structlog
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from metaserver import inodes, limits, trees
from metaserver.commit import Committer
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import json_reply, read_json
from metaserver.overlay import row_key
from metaserver.protocol import ROOT_INO, QuotaStatus, SetQuota, TreeStatus
from metaserver.quotas import Quotas, Used, used_of
from metaserver.schema import (
    ALL_COUNTED,
    Inode,
    Listed,
    Quota,
    Table,
    Transaction,
    Tree,
    after,
    inode_key,
    key_u64,
    listing_key,
    quota_key,
    read_u64,
)

log = structlog.get_logger(__name__)

# Above so many rows that no checkpoint has, one is made first: to go through them takes 5 us a row.
MANY_ROWS = 4000
CHECKPOINT_SECONDS = 10.0
# 2^62: far above every disk, far below where sums overflow.
MOST = 1 << 62
MOST_GRACE_SECONDS = 10 * 366 * 24 * 3600
MOST_QUOTAS = 10_000


class TreeControl:
    """``changed`` is called when quotas have come, gone or changed: mounts are to ask again."""

    def __init__(
        self, committer: Committer, quotas: Quotas, now_ns: Callable[[], int], changed: Callable[[], None]
    ) -> None:
        self._committer = committer
        self._quotas = quotas
        self._now_ns = now_ns
        self._changed = changed
        self._setting = trio.Lock()

    def load(self) -> None:
        """Takes up what earlier epochs left; the engine has just written a checkpoint."""
        rows, _ = self._committer.read(0, lambda tx: list(tx.scan(Table.QUOTAS, b"", b"\xff" * 9)))
        orphans, _ = self._committer.read(0, lambda tx: list(tx.scan(Table.ORPHANS, b"", b"\xff" * 17)))
        quotas = [(read_u64(key), Quota.unpack(row)) for key, row in rows]
        self._quotas.load(quotas, {read_u64(key) for key, _ in orphans})
        if quotas:
            log.info("quotas are enforced", trees=len(quotas))

    # -- sums --------------------------------------------------------------------------------------------------

    async def tree(self, ino: int) -> TreeStatus:
        """What is in a directory and below, itself included; or what a file has. Exact for everything that the
        metaserver knows when it answers."""
        self._require_counted()
        inode, _ = self._committer.read(0, lambda tx: inodes.find(tx, ino))
        if inode is None:
            raise DfsError(ErrorCode.NOT_FOUND, f"there is no inode {ino}")
        quota = self.quota(ino) if ino in self._quotas.rows else None
        if not stat.S_ISDIR(inode.mode):
            return TreeStatus(ino, False, 1, 0, inode.allocated, inode.size, quota)
        tree = await self._sums(ino)
        return TreeStatus(ino, True, tree.files, tree.directories + 1, tree.allocated, tree.size, quota)

    async def _sums(self, ino: int) -> Tree:
        layers = self._committer.layers
        if layers.pending_rows > MANY_ROWS:
            # On a full disk it may not come to its end.
            with trio.move_on_after(CHECKPOINT_SECONDS):
                await self._committer.checkpoint()
        return self._sums_now(ino)

    def _sums_now(self, ino: int) -> Tree:
        """TREES, and what is changed since the checkpoint that it is of."""
        layers = self._committer.layers
        key = row_key(Table.TREES, inode_key(ino))
        pending = trees.changed(layers.pending(), layers.store.get)
        row = pending[key] if key in pending else layers.store.get(key)
        return Tree(0, 0, 0, 0) if row is None else Tree.unpack(row)

    def _require_counted(self) -> None:
        done, _ = self._committer.read(0, lambda tx: tx.get(Table.COUNTERS, ALL_COUNTED))
        if done is None:
            raise DfsError(
                ErrorCode.UNAVAILABLE, "the files of this older store are still being counted: try again in a while"
            )

    # -- quotas ------------------------------------------------------------------------------------------------

    def quotas(self) -> list[QuotaStatus]:
        return [self.quota(root) for root in sorted(self._quotas.rows)]

    def quota(self, root: int) -> QuotaStatus:
        row = self._quotas.rows.get(root)
        if row is None:
            raise DfsError(ErrorCode.NOT_FOUND, "there is no quota on this directory")
        used, now_ns = self._quotas.used[root], self._now_ns()
        path, _ = self._committer.read(0, lambda tx: path_of(tx, root))
        return QuotaStatus(
            root,
            path,
            used.bytes,
            used.inodes,
            row.bytes_soft,
            row.bytes_hard,
            row.inodes_soft,
            row.inodes_hard,
            row.grace_ns / 1e9,
            _grace_left(row.bytes_since_ns, row.grace_ns, now_ns),
            _grace_left(row.inodes_since_ns, row.grace_ns, now_ns),
        )

    async def set_quota(self, root: int, told: SetQuota) -> QuotaStatus:
        """Sets what is not None in ``told``; durable when it returns."""
        self._require_counted()
        async with self._setting:
            await self._sums(root)
            # From here to the change nothing comes between.
            used = self._quotas.used.get(root) or used_of(self._sums_now(root).pack())
            change = self._committer.change(0, 0, lambda tx, now: self._put(tx, root, told, used, now))
            quota = change.message
            self._quotas.put(root, quota, used)
            await self._committer.wait_durable(change.number)
        log.info("quota set", directory=root, **{name: getattr(quota, name) for name in _LIMITS})
        self._changed()
        return self.quota(root)

    def _put(self, tx: Transaction, root: int, told: SetQuota, used: Used, now_ns: int) -> Quota:
        inode = inodes.find(tx, root)
        if inode is None or not inode.nlink:
            raise DfsError(ErrorCode.NOT_FOUND, f"there is no inode {root}")
        if not stat.S_ISDIR(inode.mode):
            raise DfsError(ErrorCode.INVALID, "a quota is for a directory and all below it")
        if root not in self._quotas.rows and len(self._quotas.rows) >= MOST_QUOTAS:
            raise DfsError(ErrorCode.INVALID, f"there are {MOST_QUOTAS} quotas already")
        quota = limits.noted(told_quota(self._quotas.rows.get(root), told), used.bytes, used.inodes, now_ns)
        tx.put(Table.QUOTAS, quota_key(root), quota.pack())
        return quota

    async def remove_quota(self, root: int) -> QuotaStatus:
        """Removes a quota; durable when it returns what it was."""
        async with self._setting:
            was = self.quota(root)
            change = self._committer.change(0, 0, lambda tx, _: tx.delete(Table.QUOTAS, quota_key(root)), frees=True)
            self._quotas.remove(root)
            await self._committer.wait_durable(change.number)
        log.info("quota removed", directory=root)
        self._changed()
        return was

    def recount(self) -> None:
        """Looks usage up again after a tree has moved where it should not (a change from before a crash)."""
        if self._quotas.doubtful:
            self._quotas.doubtful = False
            self._quotas.recount(lambda root: used_of(self._sums_now(root).pack()))


_LIMITS = ("bytes_soft", "bytes_hard", "inodes_soft", "inodes_hard")


def told_quota(old: Quota | None, told: SetQuota) -> Quota:
    """The row with what is told changed; raises INVALID for what makes no sense."""
    old = old or Quota(0, 0, 0, 0, SetQuota.DEFAULT_GRACE_SECONDS * 1_000_000_000)
    values: dict[str, int] = {
        name: getattr(old, name) if getattr(told, name) is None else getattr(told, name) for name in _LIMITS
    }
    if any(not 0 <= value <= MOST for value in values.values()):
        raise DfsError(ErrorCode.INVALID, f"limits are from 0 (none) to {MOST}")
    for what in ("bytes", "inodes"):
        soft, hard = values[f"{what}_soft"], values[f"{what}_hard"]
        if hard and soft > hard:
            raise DfsError(ErrorCode.INVALID, f"the soft limit of {soft} {what} is above the hard limit of {hard}")
    if not any(values.values()):
        raise DfsError(ErrorCode.INVALID, "a quota without any limit: remove it instead")
    grace_ns = old.grace_ns
    if told.grace_seconds is not None:
        if not 0 <= told.grace_seconds <= MOST_GRACE_SECONDS:
            raise DfsError(ErrorCode.INVALID, "the grace time is from 0 seconds to 10 years")
        grace_ns = int(told.grace_seconds * 1e9)
    return Quota(**values, grace_ns=grace_ns, bytes_since_ns=old.bytes_since_ns, inodes_since_ns=old.inodes_since_ns)


def _grace_left(since_ns: int, grace_ns: int, now_ns: int) -> float:
    """Seconds until a soft limit becomes hard, -1 while it is not passed."""
    return max(0.0, (since_ns + grace_ns - now_ns) / 1e9) if since_ns else -1.0


def path_of(tx: Transaction, directory: int) -> str:
    """From the root; "" if it has no name any more."""
    parts: list[bytes] = []
    while directory != ROOT_INO:
        row = tx.get(Table.INODES, inode_key(directory))
        if row is None:
            return ""
        parent = Inode.unpack(row).parent
        names = (
            Listed.unpack(value) for _, value in tx.scan(Table.LISTING, listing_key(parent, 0), after(key_u64(parent)))
        )
        name = next((entry.name for entry in names if entry.ino == directory), None)
        if name is None:
            return ""
        parts.append(name)
        directory = parent
    return "/" + b"/".join(reversed(parts)).decode(errors="backslashreplace")


def routes(control: TreeControl, require_changes: Callable[[], None]) -> list[Route]:
    """``require_changes`` raises why nothing can be changed at present."""

    async def show_tree(request: Request) -> Response:
        return json_reply(await control.tree(_ino(request)))

    async def show_quotas(request: Request) -> Response:
        return json_reply(control.quotas())

    async def show_quota(request: Request) -> Response:
        return json_reply(control.quota(_ino(request)))

    async def set_quota(request: Request) -> Response:
        require_changes()
        told = await read_json(request, SetQuota)
        return json_reply(await control.set_quota(_ino(request), told))

    async def remove_quota(request: Request) -> Response:
        require_changes()
        return json_reply(await control.remove_quota(_ino(request)))

    return [
        Route("/v1/trees/{ino}", show_tree),
        Route("/v1/quotas", show_quotas),
        Route("/v1/quotas/{ino}", show_quota),
        Route("/v1/quotas/{ino}", set_quota, methods=["POST"]),
        Route("/v1/quotas/{ino}/remove", remove_quota, methods=["POST"]),
    ]


def _ino(request: Request) -> int:
    text = request.path_params["ino"]
    if not text.isdecimal() or len(text) > 20 or not 0 < int(text) < 1 << 64:
        raise DfsError(ErrorCode.INVALID, f"{text[:40]!r} is no inode number")
    return int(text)
