"""Quotas in a running metaserver without sockets: exact usage, hard limits with several sessions, grace, restarts."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from running_metaserver import FILE, Mount, Running, running

from metaserver import limits, protocol
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import Link, Rename, RenameFlags, Reserve, SetAttributes, SetQuota, Unlink
from metaserver.schema import Quota, Table, key_u64
from metaserver.wire import Empty

DIRECTORY = 0o040755
MB = 1 << 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


async def tree(mount: Mount, name: bytes = b"tree", parent: int = 1) -> int:
    return await mount.make(name, parent, DIRECTORY)


async def rename(mount: Mount, old: tuple[int, bytes], new: tuple[int, bytes]) -> protocol.Renamed:
    renamed: protocol.Renamed = await mount.call(protocol.RENAME, Rename(*old, *new, RenameFlags.NONE))
    return renamed


async def used(metaserver: Running, root: int) -> tuple[int, int]:
    """As kept in memory, which must be what TREES says."""
    quota = metaserver.parts.trees.quota(root)
    sums = await metaserver.parts.trees.tree(root)
    orphans = [orphan for orphan in metaserver.parts.quotas.orphans.values() if root in orphan.roots]
    assert quota.used_bytes == sums.allocated + sum(orphan.bytes for orphan in orphans)
    assert quota.used_inodes == sums.files + sums.directories - 1 + len(orphans)
    return quota.used_bytes, quota.used_inodes


async def chunk_of(metaserver: Running, mount: Mount) -> int:
    if not metaserver.parts.members.by_id:
        for number in (1, 2):
            await metaserver.server(number)
    return (await mount.allocate()).chunk


async def test_inodes_are_limited_when_they_are_made(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        root = await tree(mount)
        await mount.make(b"a", root)
        await metaserver.parts.trees.set_quota(root, SetQuota(inodes_hard=3))
        assert await used(metaserver, root) == (0, 1)
        below = await tree(mount, b"below", root)
        await mount.make(b"b", below)
        for parent in (root, below):
            message = protocol.Make(parent, b"more", FILE, 0, 0)
            assert await mount.fails(protocol.MAKE, message) is ErrorCode.QUOTA_EXCEEDED
        await mount.unlink(b"a", root)
        await mount.make(b"more", below)
        await mount.make(b"elsewhere")
        assert await used(metaserver, root) == (0, 3)


async def test_bytes_are_limited_at_the_commit(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        root = await tree(mount)
        ino = await mount.make(b"a", root)
        await metaserver.parts.trees.set_quota(root, SetQuota(bytes_hard=1000))
        chunk = await chunk_of(metaserver, mount)
        await mount.write(ino, chunk, 1000)
        with pytest.raises(DfsError) as caught:
            await mount.write(ino, chunk, 1, 1000)
        assert caught.value.code is ErrorCode.QUOTA_EXCEEDED
        # In place of what is there: nothing is added.
        await mount.write(ino, chunk, 500, 0)
        assert await used(metaserver, root) == (1000, 1)
        await mount.call(protocol.SET_ATTRIBUTES, SetAttributes(ino, size=10))
        assert await used(metaserver, root) == (10, 1)


async def test_what_one_session_holds_is_refused_to_others(data: Path) -> None:
    async with running(data) as metaserver:
        one, other = await metaserver.mount(), await metaserver.mount()
        root = await tree(one)
        first, second = await one.make(b"1", root), await one.make(b"2", root)
        await metaserver.parts.trees.set_quota(root, SetQuota(bytes_hard=1000))
        assert await one.call(protocol.RESERVE, Reserve(first, 700)) == protocol.Reserved(root, 762)
        assert await other.call(protocol.RESERVE, Reserve(second, 700)) == protocol.Reserved(root, 238, True)
        chunk = await chunk_of(metaserver, one)
        await one.write(first, chunk, 700)
        # What it has committed it holds no more, and it gives the rest back.
        assert await one.call(protocol.RESERVE, Reserve(first, 0)) == protocol.Reserved(root, 0)
        assert await other.call(protocol.RESERVE, Reserve(second, 700)) == protocol.Reserved(root, 300)
        with pytest.raises(DfsError):
            await one.write(first, chunk, 1, 700)
        await other.call(protocol.CLOSE_SESSION, Empty())
        assert await one.call(protocol.RESERVE, Reserve(first, 300)) == protocol.Reserved(root, 300)


async def test_a_mount_is_told_which_quota_it_writes_under(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        outer = await tree(mount)
        inner = await tree(mount, b"inner", outer)
        await metaserver.parts.trees.set_quota(outer, SetQuota(bytes_hard=MB))
        await metaserver.parts.trees.set_quota(inner, SetQuota(inodes_hard=100))
        made = await mount.call(protocol.MAKE, protocol.Make(inner, b"f", FILE, 0, 0, open=True))
        assert made.entry.quota == inner
        outside = await mount.call(protocol.MAKE, protocol.Make(1, b"f", FILE, 0, 0, open=True))
        assert outside.entry.quota == 0
        ino = made.entry.attributes.ino
        assert mount.quotas_changed == 2
        assert (await mount.call(protocol.OPEN, protocol.Open(ino, True))).quota == inner
        await metaserver.parts.trees.remove_quota(outer)
        assert await mount.call(protocol.RESERVE, Reserve(ino, -1)) == protocol.Reserved(0)


async def test_trees_with_different_quotas_are_like_different_filesystems(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        root = await tree(mount)
        below = await tree(mount, b"below", root)
        outside, inside = await mount.make(b"o"), await mount.make(b"i", root)
        await tree(mount, b"d")
        await metaserver.parts.trees.set_quota(root, SetQuota(bytes_hard=MB))
        for old, new in (((1, b"o"), (root, b"o")), ((root, b"i"), (1, b"i")), ((1, b"d"), (below, b"d"))):
            message = Rename(*old, *new, RenameFlags.NONE)
            assert await mount.fails(protocol.RENAME, message) is ErrorCode.CROSS_DEVICE
        assert await mount.fails(protocol.LINK, Link(outside, below, b"l")) is ErrorCode.CROSS_DEVICE
        await mount.call(protocol.LINK, Link(inside, below, b"l"))
        await rename(mount, (root, b"below"), (root, b"moved"))
        # The tree as a whole goes anywhere, with its quota.
        await rename(mount, (1, b"tree"), (1, b"other"))
        assert metaserver.parts.trees.quota(root).path == "/other"
        assert await used(metaserver, root) == (0, 2)


async def test_a_soft_limit_becomes_hard_after_its_grace(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        root = await tree(mount)
        told = SetQuota(inodes_soft=1, inodes_hard=9, grace_seconds=0)
        await metaserver.parts.trees.set_quota(root, told)
        await mount.make(b"a", root)
        assert metaserver.parts.trees.quota(root).inodes_grace_left == -1
        await mount.make(b"b", root)
        assert metaserver.parts.trees.quota(root).inodes_grace_left == 0
        assert await mount.fails(protocol.MAKE, protocol.Make(root, b"c", FILE, 0, 0)) is ErrorCode.QUOTA_EXCEEDED
        await mount.unlink(b"b", root)
        assert metaserver.parts.trees.quota(root).inodes_grace_left == -1
        await mount.make(b"b", root)


async def test_a_quota_below_what_is_used_only_refuses_more(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        root = await tree(mount)
        for name in (b"a", b"b", b"c"):
            await mount.make(name, root)
        quota = await metaserver.parts.trees.set_quota(root, SetQuota(inodes_hard=1))
        assert (quota.used_inodes, quota.inodes_hard) == (3, 1)
        assert await mount.fails(protocol.MAKE, protocol.Make(root, b"d", FILE, 0, 0)) is ErrorCode.QUOTA_EXCEEDED
        await mount.unlink(b"a", root)
        await rename(mount, (root, b"b"), (root, b"e"))


async def test_what_is_open_without_a_name_still_counts(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        root = await tree(mount)
        below = await tree(mount, b"below", root)
        await metaserver.parts.trees.set_quota(root, SetQuota(bytes_hard=1000))
        made = await mount.call(protocol.MAKE, protocol.Make(below, b"f", FILE, 0, 0, open=True))
        ino = made.entry.attributes.ino
        chunk = await chunk_of(metaserver, mount)
        await mount.write(ino, chunk, 600)
        await mount.unlink(b"f", below)
        await mount.call(protocol.UNLINK, Unlink(root, b"below", True))
        assert await used(metaserver, root) == (600, 1)
        await mount.write(ino, chunk, 400, 600)
        with pytest.raises(DfsError):
            await mount.write(ino, chunk, 1, 1000)
        await mount.call(protocol.CLOSE, protocol.Close((ino,)))
        assert await used(metaserver, root) == (0, 0)


async def test_quotas_are_there_after_a_restart_and_go_with_their_directory(data: Path) -> None:
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        root, other = await tree(mount), await tree(mount, b"other")
        await mount.make(b"a", root)
        await metaserver.parts.trees.set_quota(root, SetQuota(inodes_hard=1))
        await metaserver.parts.trees.set_quota(other, SetQuota(inodes_hard=1))
        await mount.call(protocol.UNLINK, Unlink(1, b"other", True))
        assert [quota.ino for quota in metaserver.parts.trees.quotas()] == [root]
        rows, _ = metaserver.committer.read(0, lambda tx: list(tx.scan(Table.QUOTAS, b"", b"\xff" * 9)))
        assert [key for key, _ in rows] == [key_u64(root)]
    async with running(data) as metaserver:
        assert await used(metaserver, root) == (0, 1)
        mount = await metaserver.mount()
        assert await mount.fails(protocol.MAKE, protocol.Make(root, b"b", FILE, 0, 0)) is ErrorCode.QUOTA_EXCEEDED


@pytest.mark.parametrize(
    "told",
    [
        SetQuota(),
        SetQuota(bytes_hard=-1),
        SetQuota(bytes_hard=1 << 63),
        SetQuota(bytes_soft=2, bytes_hard=1),
        SetQuota(bytes_hard=1, grace_seconds=-1),
        SetQuota(bytes_hard=1, grace_seconds=float("nan")),
    ],
)
async def test_what_makes_no_sense_is_refused(data: Path, told: SetQuota) -> None:
    async with running(data) as metaserver:
        with pytest.raises(DfsError) as caught:
            await metaserver.parts.trees.set_quota(1, told)
        assert caught.value.code is ErrorCode.INVALID
        assert metaserver.parts.trees.quotas() == []


@pytest.mark.parametrize("seed", range(6))
async def test_usage_is_exact_whatever_is_done(data: Path, seed: int) -> None:
    """Nested trees and random names; usage kept in memory is compared with TREES, which checkpoints work out."""
    random = Random(seed)
    async with running(data) as metaserver:
        mount = await metaserver.mount()
        outer = await tree(mount)
        inner = await tree(mount, b"inner", outer)
        chunk = await chunk_of(metaserver, mount)
        roots = (outer, inner)
        await metaserver.parts.trees.set_quota(outer, SetQuota(bytes_hard=2000, inodes_hard=6))
        await metaserver.parts.trees.set_quota(inner, SetQuota(bytes_soft=900, inodes_soft=3, grace_seconds=0.001))
        directories, files, names = [1, outer, inner], [await mount.make(b"z")], [b"a", b"b", b"c"]
        refused = 0
        for step in range(400):
            parent, name = random.choice(directories), random.choice(names)
            target = (random.choice(directories), random.choice(names))
            try:
                await _do(random.randrange(7), mount, random, parent, name, target, files, directories, chunk)
            except DfsError as error:
                refused += error.code is ErrorCode.QUOTA_EXCEEDED
            if step % 10 == 0:
                for root in roots:
                    await used(metaserver, root)
                assert metaserver.parts.trees.quota(outer).used_bytes <= 2000
                assert metaserver.parts.trees.quota(outer).used_inodes <= 6
        assert refused
        assert (await metaserver.committer.check()).problems == []


async def _do(
    what: int, mount: Mount, random: Random, parent: int, name: bytes, target: Any, files: Any, dirs: Any, chunk: int
) -> None:
    match what:
        case 0 | 1:
            files.append(await mount.make(name, parent, open=random.random() < 0.5))
        case 2:
            dirs.append(await tree(mount, name, parent))
        case 3:
            await mount.call(protocol.UNLINK, Unlink(parent, name, random.random() < 0.3))
        case 4:
            await rename(mount, (parent, name), target)
        case 5:
            await mount.call(protocol.LINK, Link(random.choice(files), *target))
        case _:
            await mount.write(random.choice(files), chunk, random.randrange(1, 500), random.randrange(500))


def test_ceilings() -> None:
    quota = Quota(10, 20, 0, 5, 100, bytes_since_ns=1000)
    assert (limits.bytes_ceiling(quota, 1099), limits.bytes_ceiling(quota, 1100)) == (20, 10)
    assert limits.inodes_ceiling(quota, 10**18) == 5
    assert limits.noted(quota, 11, 0, 5000) is quota
    assert limits.noted(quota, 10, 0, 5000).bytes_since_ns == 0
