"""The whole data path against arrays of bytes: random writes, truncates, flushes and reads while replicas fail."""

from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing
from datafakes import Bench, Trouble, open_bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfsmount.filestate import FileState
from dfsmount.readahead import ReadAhead
from dfsmount.writer import WriterOptions

FILES = 3
SIZE = 300_000

file_numbers = st.integers(0, FILES - 1)
offsets = st.one_of(st.integers(0, SIZE), st.sampled_from([0, 4096, 65536, 131072]))
lengths = st.one_of(st.integers(1, 300), st.sampled_from([4096, 65536, 70_000, 200_000]))

steps = st.one_of(
    st.tuples(st.just("write"), file_numbers, offsets, lengths),
    st.tuples(st.just("append"), file_numbers, st.just(0), lengths),
    st.tuples(st.just("read"), file_numbers, offsets, lengths),
    st.tuples(st.just("truncate"), file_numbers, offsets, st.just(0)),
    st.tuples(st.just("flush"), file_numbers, st.just(0), st.just(0)),
    st.tuples(st.just("close"), file_numbers, st.just(0), st.just(0)),
    st.tuples(st.just("reopen"), file_numbers, st.just(0), st.just(0)),
    st.tuples(st.just("wait"), file_numbers, st.sampled_from([1, 20, 300, 2000]), st.just(0)),
    st.tuples(st.just("trouble"), st.integers(1, 5), st.integers(0, len(Trouble) - 1), st.just(0)),
    st.tuples(st.just("corrupt"), st.integers(1, 5), st.just(0), st.just(0)),
)


class Model:
    """Files as arrays of bytes, and the same files here."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.files = [bench.create() for _ in range(FILES)]
        self.contents = [bytearray() for _ in range(FILES)]
        self.handle = ReadAhead()
        self.written = 0

    async def write(self, number: int, offset: int, length: int) -> None:
        self.written += 1
        data = bytes((index * 31 + self.written * 7) & 0xFF for index in range(min(length, 1021)))
        data = (data * (length // len(data) + 1))[:length]
        await self.bench.writer.write(self.files[number], offset, data)
        content = self.contents[number]
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + length] = data

    async def append(self, number: int, _: int, length: int) -> None:
        await self.write(number, len(self.contents[number]), length)

    async def read(self, number: int, offset: int, length: int) -> None:
        assert self.files[number].size == len(self.contents[number])
        data = await self.bench.reader.read(self.files[number], self.handle, offset, length)
        assert data == self.contents[number][offset : offset + length]

    async def truncate(self, number: int, size: int, _: int) -> None:
        await self.bench.truncate(self.files[number], size)
        content = self.contents[number]
        del content[size:]
        content.extend(bytes(size - len(content)))

    async def flush(self, number: int, _: int, __: int) -> None:
        await self.bench.writer.flush(self.files[number])
        assert self.bench.meta.content(self.files[number].ino) == self.contents[number]

    async def close(self, number: int, _: int, __: int) -> None:
        self.bench.writer.flush_soon(self.files[number])

    async def reopen(self, number: int, _: int, __: int) -> None:
        await self.flush(number, 0, 0)
        self.files[number] = FileState(self.bench.meta.entry(self.files[number].ino, with_map=self.written % 2 == 0))

    async def wait(self, _: int, milliseconds: int, __: int) -> None:
        await trio.sleep(milliseconds / 1000)

    async def trouble(self, server: int, which: int, _: int) -> None:
        self.bench.pool.servers[server].troubles.append(list(Trouble)[which])

    async def corrupt(self, server: int, _: int, __: int) -> None:
        """One replica at a time gives wrong bytes."""
        for each in self.bench.pool.servers.values():
            each.corrupt = each.server == server

    async def finish(self) -> None:
        for number in range(FILES):
            await self.read(number, 0, 2 * SIZE)
            await self.flush(number, 0, 0)
            assert self.files[number].error is None
            self.bench.reader.cache.clear()
            self.files[number] = self.bench.reopen(self.files[number], with_map=False)
            await self.read(number, 0, 2 * SIZE)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, min_size=5, max_size=40), st.booleans())
def test_is_what_arrays_of_bytes_say(program: list[tuple[str, int, int, int]], slow: bool) -> None:
    async def main() -> None:
        # Little memory, so that writers wait for it; and patience for any number of failures in a row.
        options = WriterOptions(max_dirty_bytes=600_000, give_up_seconds=1000)
        async with open_bench(servers=5, writing=options, cache_bytes=400_000) as bench:
            bench.pool.latency_seconds = 0.05 if slow else 0.001
            bench.meta.page = 3
            model = Model(bench)
            for what, *arguments in program:
                step: Callable[..., Awaitable[Any]] = getattr(model, what)
                await step(*arguments)
            await model.finish()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(0, 60)), min_size=3, max_size=25))
def test_a_crash_leaves_a_prefix(writes: list[tuple[int, int, int]]) -> None:
    """After every commit the file is what it was after some number of its writes (promise P3)."""

    async def main() -> None:
        async with open_bench(servers=4) as bench:
            file = bench.create()
            content = bytearray()
            states = [b""]
            bench.pool.latency_seconds = 0.01
            for number, (offset, length, pause) in enumerate(writes):
                if file.error is not None:
                    break  # so many full disks that it was given up: the next write would say so
                data = bytes([number + 1]) * length * 10_000
                await bench.writer.write(file, offset * 10_000, data)
                content.extend(bytes(max(0, offset * 10_000 - len(content))))
                content[offset * 10_000 : offset * 10_000 + len(data)] = data
                states.append(bytes(content))
                if pause % 5 == 0:
                    bench.pool.servers[pause % 4 + 1].troubles.append(list(Trouble)[pause % 3])
                await trio.sleep(pause / 1000)
                if pause % 2:
                    bench.writer.schedule.want(file)
                    bench.writer._wake(file)
                assert bench.meta.content(file.ino) in states
            while file.is_dirty:
                await file.settled.park()
                assert bench.meta.content(file.ino) in states
            assert file.error is not None or bench.meta.content(file.ino) == states[-1]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
