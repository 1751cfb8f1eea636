"""Runs simulations by hand: ``python tests/cluster/simulate.py SEED [--count N] [--trace] [--jobs N] [--big]``.

A failing seed prints what was violated and the last events before it; running it again repeats it exactly.
"""

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
for _path in (str(HERE), str(HERE.parent.parent)):
    if _path not in sys.path:
        sys.path.insert(0, _path)

import determinism  # noqa: E402
import trio  # noqa: E402
from simcluster import Cluster, Plan  # noqa: E402
from simfaults import FAULTS, MINOR_FAULTS, befall  # noqa: E402
from siminvariants import check_at_rest  # noqa: E402
from simtrace import Trace  # noqa: E402

from dfsmount.chunkwriter import Sent  # noqa: E402

# Virtual seconds after which a run is stuck.
LONGEST_SECONDS = 900.0
LAST_EVENTS = 60
# A run of many says so often how far it is.
PROGRESS_SEEDS = 100


class Result(NamedTuple):
    """What came of a seed. ``hash`` is the same whenever it is the same run."""

    seed: int
    violations: list[str]
    hash: str
    tail: list[str]
    counts: dict[str, int]
    virtual_seconds: float
    real_seconds: float


def simulate(
    seed: int,
    *,
    verbose: bool = False,
    sabotage: frozenset[str] = frozenset(),
    faults: list[str] | None = None,
    big: bool = False,
) -> Result:
    """One whole run."""
    began = time.monotonic()
    trace = Trace(verbose)
    end = [0.0]
    with trace.logging(), broken(sabotage):
        try:
            determinism.run(seed, _run, seed, trace, sabotage, faults, big, end)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            import traceback

            trace.violations.append("".join(traceback.format_exception(error)))
    gc.collect()
    tail = trace.lines[-LAST_EVENTS:]
    return Result(seed, trace.violations, trace.hash, tail, dict(trace.counts), end[0], time.monotonic() - began)


@contextmanager
def broken(sabotage: frozenset[str]) -> Iterator[None]:
    """Breaks on purpose what is broken in the code itself, not in the simulated world (see ``World.sabotage``)."""

    async def at_once(self: Sent) -> None:
        """Commits before the servers have acknowledged the append."""
        await trio.lowlevel.checkpoint()

    kept = Sent.acknowledged
    if "early-commit" in sabotage:
        Sent.acknowledged = at_once  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Sent.acknowledged = kept  # type: ignore[method-assign]


async def _run(
    seed: int, trace: Trace, sabotage: frozenset[str], faults: list[str] | None, big: bool, end: list[float]
) -> None:
    random = Random(f"{seed} plan")
    plan = Plan(random, sabotage, big=big)
    names = list(FAULTS)
    possible = [name for name in names if name in MINOR_FAULTS or not plan.minor]
    chosen = faults if faults is not None else random.sample(possible, random.randint(1, 6))
    if faults is not None:
        plan.minor = False
    async with trio.open_nursery() as nursery:
        cluster = Cluster(seed, plan, trace, nursery)
        trace.add(f"SEED {seed}: {vars(plan)} {cluster.world.config} {chosen}")
        try:
            with trio.move_on_after(LONGEST_SECONDS) as scope:
                await _story(cluster, chosen)
            if scope.cancelled_caught:
                trace.violation("the run does not end")
        finally:
            with trio.CancelScope(shield=True):
                await cluster.end()
                cluster.meta.remove()
        end[0] = trio.current_time()


async def _story(cluster: Cluster, faults: list[str]) -> None:
    await cluster.start()
    for program in cluster.programs:
        cluster.world.nursery.start_soon(program.run)
    await trio.sleep(1.0)
    await befall(cluster, faults, cluster.plan.seconds)
    await cluster.heal()
    await check_at_rest(cluster)
    cluster.trace.counts["operations"] += sum(program.operations for program in cluster.programs)


def show(result: Result) -> None:
    for line in result.tail:
        print(line)
    for violation in result.violations:
        print(f"seed {result.seed}: {violation}")
    print(f"to replay: python tests/cluster/simulate.py {result.seed} --trace")


def run_many(seeds: Sequence[int], jobs: int, **options: Any) -> Iterator[Result]:
    """The results of many seeds, as they come; ``options`` are those of :func:`simulate`."""
    if jobs == 1:
        yield from (simulate(seed, **options) for seed in seeds)
        return
    # Not forked: what this process has loaded and done must not matter.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=100) as pool:
        yield from pool.imap_unordered(partial(simulate, **options), seeds, chunksize=5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--big", action="store_true", help="longer runs; a seed is another one with it")
    parser.add_argument("--faults", help="only these, separated by commas")
    parser.add_argument("--sabotage", default="", help="what is broken on purpose")
    options = parser.parse_args()
    began = time.monotonic()
    failed: list[int] = []
    counts: Counter[str] = Counter()
    virtual = 0.0
    seeds = range(options.seed, options.seed + options.count)
    more = {
        "sabotage": frozenset(options.sabotage.split(",")) - {""},
        "faults": None if options.faults is None else [name for name in options.faults.split(",") if name],
        "big": options.big,
    }
    results = (
        (simulate(seed, verbose=options.trace, **more) for seed in seeds)
        if options.jobs == 1
        else run_many(seeds, options.jobs, **more)
    )
    for number, result in enumerate(results, 1):
        if number % PROGRESS_SEEDS == 0:
            print(f"{number} seeds, failed: {sorted(failed)}", file=sys.stderr, flush=True)
        virtual += result.virtual_seconds
        counts.update(result.counts)
        if result.violations:
            failed.append(result.seed)
            if options.count == 1:
                show(result)
            else:
                print(f"seed {result.seed}: {result.violations[0][:400]}", flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")
    seconds = time.monotonic() - began
    print(f"{options.count} seeds, {virtual:.0f} virtual seconds in {seconds:.1f} s; failed: {sorted(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
