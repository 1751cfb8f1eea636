"""Whatever fails while files are appended to, what is stored of each is a beginning of what was written (promise P3),
and if it is not all of it the file says so. Random, by seed; ``soak`` runs more of them."""

from random import Random

import pytest
import trio
import trio.testing
from datafakes import Bench, Trouble, open_bench

from dfsmount.schedule import Delays
from dfsmount.writer import WriterOptions
from metaserver.errors import DfsError, ErrorCode

MIB = 1 << 20
FILES = 4
STEPS = 60
# 206: a commit refused in part left a hole.
SEEDS = (206, *range(8))


class Appending:
    def __init__(self, bench: Bench, random: Random) -> None:
        self.bench = bench
        self.random = random
        self.files = [bench.create() for _ in range(FILES)]
        self.written = [bytearray() for _ in range(FILES)]

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._trouble)
            for _ in range(STEPS):
                with trio.fail_after(300):
                    await self._step(self.random.randrange(FILES))
            nursery.cancel_scope.cancel()
        self._calm()
        with trio.fail_after(300):
            await self.bench.writer.flush_all()

    def check(self) -> None:
        for file, written in zip(self.files, self.written, strict=True):
            content = self.bench.meta.content(file.ino)
            assert content == written[: len(content)]
            assert file.error is not None or len(content) == len(written)
            assert file.size == len(content)

    async def _step(self, number: int) -> None:
        file, kind = self.files[number], self.random.randrange(10)
        if file.error is not None:
            return  # as a program that was told, and stops
        if kind < 7:
            await self._append(number)
        elif kind == 7:
            await self.bench.writer.flush(file)
        elif kind == 8:
            self.bench.writer.flush_soon(file)
        else:
            await trio.sleep(self.random.choice([0.01, 0.2, 2]))

    async def _append(self, number: int) -> None:
        file, written = self.files[number], self.written[number]
        data = bytes([self.random.randrange(1, 255)]) * self.random.choice([100, 5000, 70_000, MIB, 3 * MIB])
        try:
            await self.bench.writer.write(file, len(written), data)
        except DfsError:
            return
        written += data

    async def _trouble(self) -> None:
        meta, random = self.bench.meta, self.random
        while True:
            await trio.sleep(random.choice([0.05, 0.3, 1]))
            refused = DfsError(random.choice([ErrorCode.NO_SPACE, ErrorCode.TIMEOUT]))
            server = self.bench.pool.servers[random.randint(1, len(self.bench.pool.servers))]
            match random.randrange(6):
                case 0:
                    meta.errors["allocate"].extend([DfsError(ErrorCode.NO_SPACE)] * random.randint(1, 9))
                case 1:
                    meta.errors["commit"].extend([refused] * random.randint(1, 3))
                case 2:
                    server.troubles.extend([random.choice(list(Trouble))] * random.randint(1, 4))
                case 3:
                    meta.space = random.choice([0, 4 * MIB, 20 * MIB])
                case 4:
                    meta.space = 1 << 40
                case 5:
                    for each in self.bench.pool.servers.values():
                        each.troubles.extend([Trouble.REFUSE] * random.randint(1, 6))

    def _calm(self) -> None:
        for server in self.bench.pool.servers.values():
            server.troubles.clear()
        self.bench.meta.errors.clear()
        self.bench.meta.space = 1 << 40


async def test_a_write_that_waits_while_older_bytes_are_lost_is_not_taken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_bench(writing=WriterOptions(max_dirty_bytes=MIB)) as bench:
        file = bench.create()
        bench.meta.errors["commit"].append(DfsError(ErrorCode.NO_SPACE))
        await bench.writer.write(file, 0, b"1" * MIB)
        with pytest.raises(DfsError) as raised:
            await bench.writer.write(file, MIB, b"2" * MIB)
        assert raised.value.code is ErrorCode.NO_SPACE
        await bench.writer.flush(file)
        assert bench.meta.content(file.ino) == b""
        assert file.size == 0


async def append_through_trouble(seed: int) -> None:
    random = Random(seed)
    delays = Delays(age_seconds=random.choice([0.05, 1.0]))
    options = WriterOptions(max_dirty_bytes=random.choice([8, 32, 128]) * MIB, delays=delays)
    async with open_bench(servers=4, writing=options) as bench:
        bench.pool.latency_seconds = random.choice([0.001, 0.05, 0.6])
        bench.meta.latency_seconds = random.choice([0.001, 0.05, 0.3])
        appending = Appending(bench, random)
        await appending.run()
        appending.check()


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_is_stored_is_a_beginning_of_what_was_written(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    await append_through_trouble(seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 400))
async def test_what_is_stored_is_a_beginning_at_length(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    await append_through_trouble(seed)
