"""Histograms, and how they are shown; the socket through which a process is asked about itself."""

import os
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from metaserver import controlsocket, tracing
from metaserver.controlsocket import Control, Process, Refused
from metaserver.exposition import families
from metaserver.timings import BOUNDS_SECONDS, Timing, Timings


@given(st.lists(st.integers(0, 1 << 40)))
def test_each_duration_is_in_its_bucket(durations: list[int]) -> None:
    timing = Timing()
    for duration in durations:
        timing.add(duration)
    below = 0
    for bound, count in zip(BOUNDS_SECONDS, timing.buckets, strict=False):
        below += count
        assert below == sum(duration / 1e9 < bound for duration in durations)
    assert sum(timing.buckets) == timing.count == len(durations)
    assert timing.total_ns == sum(durations)


def test_a_quantile_is_never_above_the_longest() -> None:
    timing = Timing()
    for duration in (1_000, 20_000, 3_000_000):
        timing.add(duration)
    assert timing.quantile_seconds(0.5) == BOUNDS_SECONDS[1]
    assert timing.quantile_seconds(1.0) == 0.003
    assert Timing().quantile_seconds(0.99) == 0


def test_the_text_is_what_prometheus_reads() -> None:
    timings = Timings()
    timings.of("read").add(20_000)
    timings.of("read").failed += 1

    class Shown(Collector):
        def collect(self) -> Any:
            return families(timings.by_name, "program_request", "method", "requests")

    registry = CollectorRegistry()
    registry.register(Shown())
    text = generate_latest(registry).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    buckets = [s for s in found["program_request_duration_seconds"].samples if s.name.endswith("_bucket")]
    assert [s.value for s in buckets] == [0.0] + [1.0] * (len(buckets) - 1)
    assert buckets[-1].labels == {"method": "read", "le": "+Inf"}
    assert found["program_request_failures"].samples[0].value == 1


def test_a_log_line_has_the_trace_of_its_task() -> None:
    token = tracing.TRACE.set(0xAB)
    assert tracing.add_trace(None, "", {"event": "x"}) == {"event": "x", "trace": "000000ab"}
    tracing.TRACE.reset(token)
    assert tracing.add_trace(None, "", {"event": "x"}) == {"event": "x"}


async def test_a_process_answers_its_own_user() -> None:
    async def double(arguments: dict[str, Any]) -> int:
        if "number" not in arguments:
            raise Refused("double what?")
        return int(arguments["number"]) * 2

    me = Process("tester", os.getpid())
    async with trio.open_nursery() as nursery:
        await nursery.start(Control("tester", {"double": double}).run)
        assert me in controlsocket.processes()
        ask = controlsocket.ask
        assert await trio.to_thread.run_sync(lambda: ask(me, "double", number=4)) == 8
        with pytest.raises(Refused, match="double what"):
            await trio.to_thread.run_sync(lambda: ask(me, "double"))
        with pytest.raises(Refused, match="does not know"):
            await trio.to_thread.run_sync(lambda: ask(me, "nonsense"))
        with pytest.raises(Refused, match="seconds"):
            await trio.to_thread.run_sync(lambda: ask(me, "cpu", seconds=1e9))
        rows = await trio.to_thread.run_sync(lambda: ask(me, "cpu", seconds=0.05))
        assert rows
        assert {"function", "own", "calls"} <= set(rows[0])
        nursery.cancel_scope.cancel()


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(Refused, match="process 1 cannot be asked"):
        controlsocket.ask(Process("metaserver", 1), "stats")
