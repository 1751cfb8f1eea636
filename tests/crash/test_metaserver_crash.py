"""The metaserver's storage engine dies: at every named step, by kill -9 at any moment, and by a power cut.

After each death everything that was answered (kill), or promised to be durable (power cut), is there, what is there is
a prefix of what was done, and every invariant holds.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from metaserver_load import OPTIONS, create, inode_of, names, prepare, remove
from powered_files import PoweredFiles

from metaserver.commit import Change, Committer, EngineFailed, open_committer
from metaserver.files import Files
from metaserver.logrecord import FIRST_RECORD
from metaserver.offline import check_directory
from metaserver.protocol import Made
from metaserver.recover import recover
from metaserver.wire import Replay

BOOT = b"b" * 16
STEPS = (
    "changelog:before-write",
    "changelog:after-write",
    "changelog:before-sync",
    "changelog:after-sync",
    "segment:before-create",
    "segment:before-sync",
    "segment:before-rename",
    "segment:before-directory-sync",
    "segment:before-delete",
    "start:before-epoch",
    "checkpoint:before-commit",
    "checkpoint:after-commit",
    "snapshot:before-copy",
    "snapshot:before-sync",
    "snapshot:before-rename",
    "snapshot:after-rename",
)


class Crash(BaseException):
    """Nothing runs after it but what Python itself does."""


class History:
    """What a client knows: names that must be there, and one whose change was not answered."""

    def __init__(self) -> None:
        self.answered: set[bytes] = set()
        self.unanswered: bytes | None = None
        self.operation = 0

    def change(self, committer: Committer) -> None:
        self.operation += 1
        name = b"%d" % self.operation
        self.unanswered = name
        if self.operation % 7 == 0 and self.answered:
            name = self.unanswered = min(self.answered)
            remove(committer, name)
            self.answered.discard(name)
        else:
            create(committer, name, self.operation)
            self.answered.add(name)
        self.unanswered = None

    def settle(self, found: set[bytes]) -> None:
        """After a restart the change that was not answered has happened or not; nothing else is different."""
        maybe = {self.unanswered} - {None}
        assert found - maybe == self.answered - maybe
        self.answered = found
        self.unanswered = None


async def live(directory: Path, history: History, files: Files, changes: int) -> None:
    async with open_committer(directory, options=OPTIONS, files=files, boot_id=BOOT) as committer:
        prepare(committer)
        history.settle(names(committer))
        for number in range(changes):
            history.change(committer)
            if number % 100 == 99:
                await committer.snapshot()
            elif number % 30 == 29:
                await committer.checkpoint()
            elif number % 5 == 4:
                await committer.wait_durable(committer.newest)


def only_crashes(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        # Who waited for something to be durable is told that the engine has ended.
        return error.split((Crash, EngineFailed, trio.Cancelled))[1] is None
    return isinstance(error, Crash)


async def count_steps(directory: Path) -> Counter[str]:
    """How often each step is passed in a whole life."""
    seen: Counter[str] = Counter()
    await live(directory, History(), Files(lambda step: seen.update([step])), 320)
    return seen


async def test_every_step_is_visited(tmp_path: Path) -> None:
    seen = await count_steps(tmp_path)
    assert set(seen) == set(STEPS)


@pytest.mark.parametrize("step", STEPS)
async def test_a_death_at_a_step_loses_nothing(tmp_path: Path, step: str) -> None:
    """Dies at the first, the second, the fifth ... visit of the step, each time going on with what was left."""
    history = History()
    for visit in (1, 2, 5, 3, 1, 10):
        left = visit

        def stop(name: str) -> None:
            nonlocal left
            left -= name == step
            if left <= 0:
                raise Crash(step)

        try:
            await live(tmp_path, history, Files(stop), 220)
        except BaseException as error:
            if not only_crashes(error):
                raise
        found = check_directory(tmp_path).problems
        if not history.answered:
            found = [problem for problem in found if problem.text != "there is no root directory"]
        assert found == []
    async with open_committer(tmp_path, options=OPTIONS, boot_id=BOOT) as committer:
        history.settle(names(committer))
        assert not committer.boot_lost_tail
        assert (await committer.check()).problems == []
    (tmp_path / "data.mdb").unlink()
    recover(tmp_path)
    async with open_committer(tmp_path, options=OPTIONS, boot_id=BOOT) as committer:
        assert names(committer) == history.answered


# -- kill -9 -------------------------------------------------------------------------------------------------------


def run_and_kill(directory: Path, seconds: float) -> list[bytes]:
    """The names that the program was told were created."""
    program = Path(__file__).with_name("metaserver_load.py")
    environment = {**os.environ, "PYTHONPATH": str(program.parents[2])}
    command = [sys.executable, str(program), str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    assert first, "it did not even start"
    lines = (first + rest).split(b"\n")
    return lines[:-1]


async def test_kill_9_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    choose = random.Random(4)
    expected: set[bytes] = set()
    for _ in range(6):
        expected.update(await trio.to_thread.run_sync(run_and_kill, tmp_path, choose.uniform(0, 0.4)))
        assert check_directory(tmp_path).problems == []
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        found = names(committer)
        assert expected <= found
        # Of each life one creation may have happened without having been printed.
        assert len(found - expected) <= 6
        assert not committer.boot_lost_tail


def test_no_flipped_bit_of_the_store_goes_unnoticed(tmp_path: Path) -> None:
    program = Path(__file__).with_name("flip_bits.py")
    environment = {**os.environ, "PYTHONPATH": str(program.parents[2])}
    command = [sys.executable, str(program), str(tmp_path), "150", "7"]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    seen = {outcome: int(times) for outcome, times in (line.split() for line in output.splitlines())}
    assert sum(seen.values()) == 150
    assert seen["noticed"] > 10
    assert "unnoticed" not in seen


# -- power cuts ----------------------------------------------------------------------------------------------------


class Client:
    """Keeps every change until it is durable, like a mount."""

    def __init__(self) -> None:
        self.operation = 0
        self.kept: dict[int, tuple[bytes, Change[Made]]] = {}
        self.inos: dict[bytes, int] = {}

    def change(self, committer: Committer) -> None:
        self.operation += 1
        name = b"%d" % self.operation
        change = create(committer, name, self.operation)
        self.kept[self.operation] = (name, change)
        self.inos[name] = change.message.entry.attributes.ino

    def resend(self, committer: Committer, epoch: int) -> int:
        """Sends what did not survive, with the ids and times of its first answer; returns how many that were."""
        survived = {last.epoch: last.number for last in committer.survived}[epoch]
        lost = 0
        for operation, (name, change) in self.kept.items():
            assert (inode_of(committer, name) is not None) == (change.number <= survived), "not a prefix"
            if change.number > survived:
                lost += 1
                again = create(committer, name, operation, Replay(epoch, change.number, change.time_ns, change.ids))
                assert again.message == change.message, "exactly as it was answered"
        self.kept.clear()
        return lost


class PowerCut(Exception):
    pass


async def powered_life(directory: Path, files: PoweredFiles, client: Client, boot_id: bytes, epoch: int) -> int:
    """Works until the power is cut; returns the epoch. Before, what the last cut took is sent again."""
    async with open_committer(directory, options=OPTIONS, files=files, boot_id=boot_id) as committer:
        if epoch:
            assert committer.boot_lost_tail
            client.resend(committer, epoch)
            await committer.wait_durable(committer.newest)
        committer.window_closed()
        prepare(committer)
        await committer.wait_durable(committer.newest)
        for _ in range(files.choose.randint(1, 150)):
            client.change(committer)
            if files.choose.random() < 0.1:
                await trio.lowlevel.checkpoint()
            if files.choose.random() < 0.02:
                await committer.snapshot()
        promised = committer.durable
        client.kept = {key: kept for key, kept in client.kept.items() if kept[1].number > promised}
        # What is synced from now on is too late to have been promised, and may be lost or not.
        files.on = False
        raise PowerCut(committer.epoch)


@pytest.mark.parametrize("seed", range(6))
async def test_a_power_cut_takes_nothing_that_was_promised(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    client, epoch = Client(), 0
    for life in range(6):
        files = PoweredFiles(choose)
        try:
            await powered_life(tmp_path, files, client, b"%16d" % life, epoch)
        except BaseExceptionGroup as group:
            cuts, others = group.split(PowerCut)
            if others is not None or cuts is None:
                raise
            epoch = cuts.exceptions[0].args[0]
        files.cut_power()
        assert check_directory(tmp_path).problems == []
    async with open_committer(tmp_path, options=OPTIONS, boot_id=b"%16d" % 99) as committer:
        client.resend(committer, epoch)
        assert names(committer) == set(client.inos)
        assert (await committer.check()).problems == []
        await committer.wait_durable(committer.newest)
    (tmp_path / "data.mdb").unlink()
    recover(tmp_path)
    async with open_committer(tmp_path, options=OPTIONS) as committer:
        assert names(committer) == set(client.inos)


async def test_a_power_cut_during_the_start_after_a_kill(tmp_path: Path) -> None:
    """The start reads records that are only in the page cache, and builds an epoch on them: it syncs them first."""
    client = Client()
    files = PoweredFiles(random.Random(1))
    with pytest.raises(BaseExceptionGroup):
        await powered_life(tmp_path, files, client, BOOT, 0)
    before = sorted((tmp_path / "changelog").glob("*.log"))
    synced: list[Path] = []

    def stop(step: str) -> None:
        if step == "start:before-epoch":
            raise Crash

    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Crash):
            async with open_committer(tmp_path, options=OPTIONS, files=Files(stop), boot_id=BOOT):
                pass
    epoch_segments = [path for path in before if path.exists() and path.stat().st_size > FIRST_RECORD]
    assert set(epoch_segments) <= set(synced)


async def test_a_torn_tail_is_cut_and_stays_cut(tmp_path: Path) -> None:
    """What one start cut must not come back in the next, nor in a recovery."""
    client = Client()
    files = PoweredFiles(random.Random(3))
    with pytest.raises(BaseExceptionGroup):
        await powered_life(tmp_path, files, client, BOOT, 0)
    first = next(iter(client.kept.values()))[0] if client.kept else None
    if first is None:
        pytest.skip("everything had been synced")
    shutil.copytree(tmp_path, tmp_path.with_name("torn"))
    directory = tmp_path.with_name("torn")
    for path in (directory / "changelog").glob("*.log"):
        data = path.read_bytes()
        path.write_bytes(
            data.replace(b"\x02" + bytes(7) + b"\x01" + first, b"\x02" + bytes(7) + b"\x01" + b"?" * len(first))
        )
    found: list[set[bytes]] = []
    for _ in range(2):
        async with open_committer(directory, options=OPTIONS, boot_id=b"x" * 16) as committer:
            found.append(names(committer))
    (directory / "data.mdb").unlink()
    recover(directory)
    async with open_committer(directory, options=OPTIONS) as committer:
        found.append(names(committer))
    assert found[0] == found[1] == found[2]
    assert first not in found[0]
