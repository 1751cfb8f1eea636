"""`dfs du`, `dfs df` and `dfs quota`: paths on a mount to inodes, and the answers to words."""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from dfsmount.dfs_api import Api
from dfsmount.dfs_chunks import resolve
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import inode_below, mounts, our_mount_of
from metaserver.protocol import QuotaStatus, SetQuota, Status, TreeStatus
from metaserver.words import bytes_text, seconds_text

FLUSH_XATTR = "user.dfs.flush"
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:I?B)?", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.IGNORECASE)


class PathTree(msgspec.Struct):
    path: str
    tree: TreeStatus


class PathQuota(msgspec.Struct):
    path: str
    quota: QuotaStatus


# -- what is given ------------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes: `500M`, `1.5GiB`, `none` (0). Units are powers of 1,024."""
    return _number(text, "size", "500M, 2T or `none`", lambda unit: 1 << _UNITS[unit.upper()], _SIZE)


def parse_count(text: str) -> int:
    """A number of files: `10000`, `10K` (10,240), `none` (0)."""
    return _number(text, "number", "10000, 1M or `none`", lambda unit: 1 << _UNITS[unit.upper()], _SIZE)


def parse_seconds(text: str) -> int:
    """`7d`, `12h`, `90s`."""
    return _number(text, "time", "30s, 10m, 12h, 7d or 2w", lambda unit: _SECONDS[unit.lower()], _TIME)


def _number(text: str, what: str, examples: str, factor: Callable[[str], int], pattern: re.Pattern[str]) -> int:
    if text == "none" and pattern is _SIZE:
        return 0
    found = pattern.fullmatch(text.strip())
    if found is None or len(text) > 30:
        raise Problem(f"{text[:40]!r} is no {what}: give for example {examples}")
    return int(float(found[1]) * factor(found[2])) if "." in found[1] else int(found[1]) * factor(found[2])


def limits(size: str, size_soft: str, count: str, count_soft: str, grace: str) -> SetQuota:
    """What the options say; "" leaves a limit as it is."""
    told = SetQuota(
        bytes_soft=parse_size(size_soft) if size_soft else None,
        bytes_hard=parse_size(size) if size else None,
        inodes_soft=parse_count(count_soft) if count_soft else None,
        inodes_hard=parse_count(count) if count else None,
        grace_seconds=parse_seconds(grace) if grace else None,
    )
    if told == SetQuota():
        raise Problem("nothing to set: give --bytes, --inodes, --soft-bytes, --soft-inodes or --grace")
    return told


# -- asking -------------------------------------------------------------------------------------------------------


def found(paths: Sequence[Path], find: Callable[[Path], Access]) -> list[tuple[Path, Access, int]]:
    """All paths are looked up before anything is done to the first."""
    table = mounts()
    looked_up = []
    for given in paths:
        path = resolve(given)
        try:
            looked_up.append((path, find(path), inode_below(path, table)))
        except OSError as error:
            raise Problem(f"cannot find {given}: {error.strerror}") from None
    return looked_up


def trees(paths: Sequence[Path], find: Callable[[Path], Access]) -> list[PathTree]:
    """Sums of trees; what the mounts that they lie on have not written yet is written first."""
    looked_up = found(paths, find)
    for point in {our_mount_of(path, mounts()).point for path, _, _ in looked_up}:
        # If it cannot be, what is there is told all the same.
        with suppress(OSError):
            os.getxattr(point, FLUSH_XATTR)
    shown = []
    for path, access, ino in looked_up:
        with Api(access) as api:
            shown.append(PathTree(str(path), api.tree(ino)))
    return shown


def quotas(
    paths: Sequence[Path], find: Callable[[Path], Access], ask: Callable[[Api, int], QuotaStatus]
) -> list[PathQuota]:
    shown = []
    for path, access, ino in found(paths, find):
        with Api(access) as api:
            shown.append(PathQuota(str(path), ask(api, ino)))
    return shown


# -- words --------------------------------------------------------------------------------------------------------


def tree_cells(shown: PathTree, *, exact: bool) -> tuple[str, ...]:
    tree = shown.tree
    size: Callable[[int], str] = str if exact else bytes_text
    return size(tree.allocated), size(tree.size), str(tree.files), str(tree.directories), shown.path


def limit_text(soft: int, hard: int, text: Callable[[int], str]) -> str:
    parts = [text(hard)] if hard else []
    return ", ".join([*parts, f"soft {text(soft)}"] if soft else parts) or "-"


def state_text(quota: QuotaStatus) -> str:
    """Whether something is refused, or soon will be."""
    full = (quota.bytes_hard and quota.used_bytes >= quota.bytes_hard) or (
        quota.inodes_hard and quota.used_inodes >= quota.inodes_hard
    )
    left = [seconds for seconds in (quota.bytes_grace_left, quota.inodes_grace_left) if seconds >= 0]
    if full or 0 in left:
        return "FULL"
    return f"over, {seconds_text(min(left))} left" if left else "ok"


def quota_cells(path: str, quota: QuotaStatus) -> tuple[str, ...]:
    return (
        path,
        bytes_text(quota.used_bytes),
        limit_text(quota.bytes_soft, quota.bytes_hard, bytes_text),
        str(quota.used_inodes),
        limit_text(quota.inodes_soft, quota.inodes_hard, str),
        state_text(quota),
    )


def df_cells(status: Status, quotas: Sequence[QuotaStatus]) -> list[tuple[str, ...]]:
    """The cluster and the trees with a quota of bytes, as df(1) has it."""
    rows = [_df_row("(the cluster)", status.total, status.total - status.free, status.free)]
    for quota in quotas:
        size = quota.bytes_hard or quota.bytes_soft
        if size:
            rows.append(_df_row(quota.path, size, quota.used_bytes, min(status.free, max(0, size - quota.used_bytes))))
    return rows


def _df_row(path: str, size: int, used: int, free: int) -> tuple[str, ...]:
    percent = f"{-(-100 * used // size)} %" if size else "-"
    return bytes_text(size), bytes_text(used), bytes_text(free), percent, path


def set_text(path: str, quota: QuotaStatus) -> Sequence[str]:
    """What a new quota means for what is there."""
    size = limit_text(quota.bytes_soft, quota.bytes_hard, bytes_text)
    number = limit_text(quota.inodes_soft, quota.inodes_hard, str)
    used = f"{bytes_text(quota.used_bytes)} in {quota.used_inodes:,}"
    lines = [f"{path}: bytes {size}; files and directories {number}. Used: {used}."]
    over = (quota.bytes_hard and quota.used_bytes > quota.bytes_hard) or (
        quota.inodes_hard and quota.used_inodes > quota.inodes_hard
    )
    if over:
        lines.append("More is used than that: nothing is deleted, and nothing can be added until usage is below it.")
    return lines
