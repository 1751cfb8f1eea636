"""Limits of a tree's bytes and inodes, and when a soft one becomes a hard one, as quota(8) has it. Pure.

Usage may pass a soft limit for a grace time; after that nothing more is taken until usage is below it again. A hard
limit is never passed. A limit of 0 is none.
"""

from metaserver.schema import Quota


def ceiling(soft: int, hard: int, since_ns: int, grace_ns: int, now_ns: int) -> int:
    """What usage may not pass now, 0 if nothing; ``since_ns``: since when it is above ``soft`` (0: it is not)."""
    if soft and since_ns and now_ns >= since_ns + grace_ns:
        return soft
    return hard


def bytes_ceiling(quota: Quota, now_ns: int) -> int:
    return ceiling(quota.bytes_soft, quota.bytes_hard, quota.bytes_since_ns, quota.grace_ns, now_ns)


def inodes_ceiling(quota: Quota, now_ns: int) -> int:
    return ceiling(quota.inodes_soft, quota.inodes_hard, quota.inodes_since_ns, quota.grace_ns, now_ns)


def since(soft: int, used: int, since_ns: int, now_ns: int) -> int:
    """Since when ``used`` is above ``soft``."""
    if not soft or used <= soft:
        return 0
    return since_ns or now_ns


def noted(quota: Quota, used_bytes: int, used_inodes: int, now_ns: int) -> Quota:
    """The row with what this usage does to it; the same row if that is nothing."""
    bytes_since = since(quota.bytes_soft, used_bytes, quota.bytes_since_ns, now_ns)
    inodes_since = since(quota.inodes_soft, used_inodes, quota.inodes_since_ns, now_ns)
    if (bytes_since, inodes_since) == (quota.bytes_since_ns, quota.inodes_since_ns):
        return quota
    return Quota(
        quota.bytes_soft,
        quota.bytes_hard,
        quota.inodes_soft,
        quota.inodes_hard,
        quota.grace_ns,
        bytes_since,
        inodes_since,
    )
