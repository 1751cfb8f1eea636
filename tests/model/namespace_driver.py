"""Drives the metaserver's namespace functions through its storage engine, next to the model, and kills the engine or
cuts its power. After a power cut it sends again what was answered and did not survive, as a mount does.

``python tests/model/namespace_driver.py OPERATIONS [SEED]`` from the project's directory runs it at length.
"""

import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import trio
from namespace_model import Model, Node

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "crash"))

from powered_files import PoweredFiles

from metaserver import contents, directories, inodes, namespace, xattrs
from metaserver.commit import Change, Committer, Options, open_committer
from metaserver.errors import DfsError
from metaserver.inodes import Effects
from metaserver.protocol import ROOT_INO, Link, Make, ReadDirectory, Rename, SetAttributes, SetXattr, Unlink
from metaserver.schema import Dentry, Session, Table, Transaction, inode_key, key_u64, orphan_key, read_u64, session_key
from metaserver.wire import Replay

SESSION = 1
NAMES = [b"a", b"b", b"c", b"d", b"\xff\xfe", b"n" * 255]
MODES = [0o644, 0o600, 0o755, 0o2775, 0o4711, 0o1777]
KINDS = [stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO]
# Checkpoints often, so that crashes fall before, in and after them; a small log, so that segments change.
OPTIONS = Options(checkpoint_seconds=0.05, checkpoint_changes=400, segment_bytes=1 << 18, map_bytes=1 << 20)
LARGEST_TREE = 600


class Crash(Exception):
    """The process is killed here."""


class PowerCut(Crash):
    """All processes of the machine end, and what was not synced is lost."""


class Kept(NamedTuple):
    """A change that was answered and may still be lost: what a mount keeps of it."""

    epoch: int
    number: int
    function: Callable[[Transaction, int], Any]
    change: Change[Any]

    @property
    def replay(self) -> Replay:
        return Replay(self.epoch, self.number, self.change.time_ns, self.change.ids)


class Driver:
    """One random history. What differs raises ``AssertionError``."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.random = Random(seed)
        self.directory = directory
        self.model = Model()
        self.counts: Counter[str] = Counter()
        self.crashes = self.cuts = self.resent = 0
        self.committer: Committer
        self.files: PoweredFiles
        # In order; those that are known to be durable are forgotten when the power is cut.
        self.kept: list[Kept] = []

    async def run(self, operations: int) -> None:
        done = 0
        while done < operations:
            burst = min(self.random.choice([1, 2, 10, 100, 1000]), operations - done)
            done += burst
            self.files = PoweredFiles(self.random)
            boot_id = b"%16d" % self.cuts
            try:
                async with open_committer(
                    self.directory, options=OPTIONS, files=self.files, boot_id=boot_id
                ) as self.committer:
                    await self._life(burst)
            except* PowerCut:
                self.files.cut_power()
                self.cuts += 1
            except* Crash:
                self.crashes += 1

    async def _life(self, operations: int) -> None:
        """From one crash to the next."""
        if self.committer.read(0, lambda tx: tx.get(Table.INODES, inode_key(ROOT_INO)))[0] is None:
            self.committer.change(0, 0, _begin)
            await self.committer.wait_durable(self.committer.newest)
        self._resend()
        self.compare()
        if self.random.random() < 0.5:
            await self.committer.wait_durable(self.committer.newest)
            self.committer.window_closed()
        for number in range(operations):
            self.step()
            if number % 50 == 49:
                await trio.lowlevel.checkpoint()
        if self.random.random() < 0.2:
            report = await self.committer.check()
            assert not report.problems, report.problems[:3]
        if self.random.random() < 0.5:
            raise Crash
        promised = self.committer.epoch, self.committer.durable
        self.kept = [kept for kept in self.kept if (kept.epoch, kept.number) > promised]
        # What is synced from now on was not promised, and may be lost or not.
        self.files.on = False
        raise PowerCut

    def _resend(self) -> None:
        """What did not survive happens again, exactly as it was answered."""
        survived = {last.epoch: last.number for last in self.committer.survived}
        before, self.kept = self.kept, []
        lost = [kept.number > survived.get(kept.epoch, -1) for kept in before]
        assert lost == sorted(lost), "what survived is not a prefix"
        for kept in (kept for kept, is_lost in zip(before, lost, strict=True) if is_lost):
            again = self._change(kept.function, kept.replay)
            assert again.message == kept.change.message
            self.resent += 1

    def _change(self, function: Callable[[Transaction, int], Any], replay: Replay | None = None) -> Change[Any]:
        change = self.committer.change(SESSION, 0, function, replay=replay)
        if change.number:
            self.kept.append(Kept(self.committer.epoch, change.number, function, change))
        return change

    # -- one operation -----------------------------------------------------------------------------------------

    def step(self) -> None:
        crowded = len(self.model.nodes) > LARGEST_TREE
        steps = [
            *(() if crowded else (self.make, self.make, self.make, self.link)),
            self.unlink, self.unlink, self.rename, self.rename, self.rename, self.change, self.set_xattr,
            self.remove_xattr, self.hold, self.release, self.lookup, self.list,
        ]  # fmt: skip
        step = self.random.choice(steps)
        self.counts[step.__name__] += 1
        step()

    def both(self, theirs: Callable[[], Any], ours: Callable[[Transaction, int], Any]) -> tuple[Any, Any]:
        """What the model and the metaserver make of it; the same error from both counts as the same."""
        expected = found = error = None
        try:
            expected = theirs()
        except DfsError as problem:
            error = problem.code
        try:
            found = self._change(ours).message
        except DfsError as problem:
            assert problem.code is error, (problem, error)
            return None, None
        assert error is None, (error, found)
        return expected, found

    def _ino(self) -> int:
        return self.random.choice(list(self.model.nodes)) if self.random.random() < 0.9 else ROOT_INO

    def _directory(self) -> int:
        for _ in range(5):
            ino = self._ino()
            if self.model.nodes[ino].is_directory:
                break
        return ino

    def _name(self) -> bytes:
        return self.random.choice(NAMES)

    def make(self) -> None:
        parent, name, kind = self._directory(), self._name(), self.random.choice(KINDS)
        mode, uid, gid = self.random.choice(MODES), self.random.randrange(3), self.random.randrange(3)
        target = b"t" * self.random.randrange(1, 50) if kind == stat.S_IFLNK else b""
        message = Make(parent, name, kind | mode, uid, gid, target=target)
        node, made = self.both(
            lambda: self.model.make(parent, name, kind | mode, uid, gid, target),
            lambda tx, now: namespace.make(tx, now, message)[0],
        )
        if isinstance(node, Node):
            assert made not in self.model.nodes
            self.model.enter(parent, name, made, node)

    def unlink(self) -> None:
        parent, name, directory = self._directory(), self._name(), self.random.random() < 0.4
        entries = self.model.nodes[parent].entries
        if entries and self.random.random() < 0.7:
            name = self.random.choice(list(entries))
            directory ^= self.model.nodes[entries[name]].is_directory != directory and self.random.random() < 0.8
        message, openers = Unlink(parent, name, directory), self._openers()
        self.both(
            lambda: self.model.unlink(parent, name, directory),
            lambda tx, now: namespace.unlink(tx, now, message, openers, Effects()),
        )

    def rename(self) -> None:
        openers = self._openers()
        message = Rename(
            self._directory(), self._name(), self._directory(), self._name(), self.random.choice([0, 0, 1, 2])
        )
        self.both(
            lambda: self.model.rename(
                message.parent, message.name, message.new_parent, message.new_name, message.flags
            ),
            lambda tx, now: namespace.rename(tx, now, message, openers, Effects()),
        )

    def link(self) -> None:
        message = Link(self._ino(), self._directory(), self._name())
        self.both(
            lambda: self.model.link(message.ino, message.new_parent, message.new_name),
            lambda tx, now: namespace.link(tx, now, message),
        )

    def change(self) -> None:
        pick = self.random.choice
        ino, mode, uid, gid = self._ino(), pick([None, *MODES]), pick([None, 0, 5]), pick([None, 0, 6])
        size = pick([None, None, None, 0, 1, 4096, 1 << 40])
        message = SetAttributes(ino, mode=mode, uid=uid, gid=gid, size=size)
        self.both(
            lambda: self.model.change(ino, mode=mode, uid=uid, gid=gid, size=size),
            lambda tx, now: contents.set_attributes(tx, now, message, Effects()),
        )

    def set_xattr(self) -> None:
        message = SetXattr(self._ino(), b"user." + self._name()[:200], self.random.randbytes(5), 0)
        self.both(
            lambda: self.model.set_xattr(message.ino, message.name, message.value),
            lambda tx, now: xattrs.set_value(tx, now, message),
        )

    def remove_xattr(self) -> None:
        ino, name = self._ino(), b"user." + self._name()[:200]
        self.both(lambda: self.model.remove_xattr(ino, name), lambda tx, now: xattrs.remove(tx, now, ino, name))

    def hold(self) -> None:
        """Somebody opens it, who dies with a crash only after it was released."""
        ino = self._ino()
        if not self.model.nodes[ino].is_directory and self.model.nodes[ino].names and len(self.model.held) < 20:
            self.model.held.add(ino)

    def release(self) -> None:
        if self.model.held:
            ino = self.random.choice(sorted(self.model.held))
            self.model.release(ino)
            self._change(lambda tx, _: inodes.release(tx, ino, SESSION, Effects()))

    def _openers(self) -> Callable[[int], tuple[int, ...]]:
        """As they are now: a change that is sent again must find the same."""
        held = frozenset(self.model.held)
        return lambda ino: (SESSION,) if ino in held else ()

    def lookup(self) -> None:
        parent, name = self._directory(), self._name()
        expected, found = self.both(
            lambda: self.model.lookup(parent, name), lambda tx, _: namespace.lookup(tx, parent, name)
        )
        assert found == expected

    def list(self) -> None:
        ino, count = self._directory(), self.random.choice([1, 2, 100])
        if not self.model.nodes[ino].is_directory:
            return
        found: list[tuple[bytes, int]] = []
        cookie, end = 0, False
        while not end:
            request = ReadDirectory(ino, cookie, count, False)
            page, _ = self.committer.read(SESSION, lambda tx, request=request: directories.read(tx, request))  # type: ignore[misc]
            found += [(entry.name, entry.ino) for entry in page.entries]
            cookie, end = page.entries[-1].cookie if page.entries else cookie, page.end
        assert dict(found) == self.model.nodes[ino].entries
        assert len(found) == len(dict(found))

    # -- everything --------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """That the metaserver has what the model has, nothing more and nothing less."""
        found, _ = self.committer.read(SESSION, _everything)
        expected = {}
        for ino, node in self.model.nodes.items():
            expected[ino] = (
                node.mode, node.uid, node.gid, self.model.nlink(ino), node.size if not node.is_directory else 0,
                node.target, node.entries, node.xattrs,
            )  # fmt: skip
        assert found.keys() == expected.keys()
        for ino, row in found.items():
            assert row == expected[ino], ino


def _begin(tx: Transaction, now_ns: int) -> None:
    inodes.make_root(tx, now_ns)
    tx.put(Table.SESSIONS, session_key(SESSION), Session("h", "/m", 1, ROOT_INO, False, now_ns).pack())


def _everything(tx: Transaction) -> dict[int, tuple[object, ...]]:
    end = b"\xff" * 300
    entries: dict[int, dict[bytes, int]] = {}
    for key, value in tx.scan(Table.DENTRIES, b"", end):
        entries.setdefault(read_u64(key), {})[key[8:]] = Dentry.unpack(value).ino
    attributes: dict[int, dict[bytes, bytes]] = {}
    for key, value in tx.scan(Table.XATTRS, b"", end):
        attributes.setdefault(read_u64(key), {})[key[8:]] = value
    found: dict[int, tuple[object, ...]] = {}
    for key, value in tx.scan(Table.INODES, b"", end):
        ino, row = read_u64(key), inodes.Inode.unpack(value)
        if not row.nlink and tx.get(Table.ORPHANS, orphan_key(ino, SESSION)) is None:
            continue
        size = 0 if stat.S_ISDIR(row.mode) else row.size
        target = tx.get(Table.SYMLINKS, key_u64(ino)) or b""
        about = row.mode, row.uid, row.gid, row.nlink, size, target
        found[ino] = (*about, entries.get(ino, {}), attributes.get(ino, {}))
    return found


def main() -> None:
    operations, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        driver = Driver(seed, Path(directory))
        trio.run(driver.run, operations)
    print(
        f"seed {seed}: {sum(driver.counts.values())} operations, {driver.crashes} crashes, {driver.cuts} power cuts, "
        f"{driver.resent} changes sent again, no difference"
    )
    print(dict(driver.counts))


if __name__ == "__main__":
    main()
