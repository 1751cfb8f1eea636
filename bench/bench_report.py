"""Tables of what bench/run has measured, in Markdown: they are read in a terminal and go into docs/performance.md."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench_measure import Wire
from bench_workloads import MIB, Sizes, Workload

# Ours is compared with the better of these, see :func:`best_peer`. What is safe is shown beside it: ours always is.
PEERS = ("moosefs", "moosefs-safe", "glusterfs")


class Sample(NamedTuple):
    """One run of one workload on one target; ``cpu`` is by role of its processes, ``load`` the machine's before it."""

    target: str
    workload: str
    seconds: float
    amount: float
    cpu: dict[str, float]
    wire: Wire
    load: float

    def value(self, unit: str) -> float:
        return self.seconds if unit == "s" else self.amount / self.seconds


class Table:
    """Rows of cells as Markdown."""

    def __init__(self, *head: str) -> None:
        self._rows = [head, ("---",) * len(head)]

    def add(self, *cells: str) -> None:
        self._rows.append(cells)

    def __str__(self) -> str:
        return "\n".join(f"| {' | '.join(row)} |" for row in self._rows)


def ratio(unit: str, ours: float, other: float) -> float:
    """How many times as fast we are."""
    return other / ours if unit == "s" else ours / other


def best_peer(unit: str, found: dict[str, float]) -> str:
    """The fastest of the other distributed filesystems, or "" if none was measured."""
    peers = [name for name in PEERS if name in found]
    choose: Callable[..., str] = min if unit == "s" else max
    return choose(peers, key=found.__getitem__) if peers else ""


def per(unit: str) -> tuple[float, str]:
    """How much of a workload's amount CPU time and requests are given for, and how that is called."""
    return {"MiB/s": (1024.0, "GiB"), "/s": (1000.0, "1,000")}.get(unit, (1.0, "run"))


class Results:
    """All samples of a run; ``targets`` in the order of the columns."""

    def __init__(self, samples: Sequence[Sample], workloads: Sequence[Workload], targets: Sequence[str]) -> None:
        self._samples = samples
        self._targets = targets
        done = {sample.workload for sample in samples}
        self._workloads = [workload for workload in workloads if workload.name in done]

    def of(self, workload: Workload, target: str) -> list[Sample]:
        return [each for each in self._samples if (each.workload, each.target) == (workload.name, target)]

    def medians(self, workload: Workload) -> dict[str, float]:
        found = {target: self.of(workload, target) for target in self._targets}
        return {
            target: statistics.median(sample.value(workload.unit) for sample in samples)
            for target, samples in found.items()
            if samples
        }

    def speeds(self) -> Table:
        table = Table("workload", "unit", *self._targets, "ours / best other", "bar", "")
        for workload in self._workloads:
            found = self.medians(workload)
            table.add(
                workload.name,
                workload.unit,
                *(f"{found[name]:.2f}" if name in found else "-" for name in self._targets),
                *_judged(workload, found),
            )
        return table

    def costs(self) -> Table:
        """CPU seconds of each program, and traffic, per GiB or thousand operations, or for the run."""
        table = Table("workload", "per", "target", "CPU seconds", "MiB on the wire", "packets", "load")
        for workload in self._workloads:
            for target in self._targets:
                samples = self.of(workload, target)
                if samples:
                    table.add(workload.name, per(workload.unit)[1], target, *_cost(workload, samples))
        return table


def _judged(workload: Workload, found: dict[str, float]) -> Iterator[str]:
    best = best_peer(workload.unit, found)
    if "ours" not in found or not best:
        yield from ("-", f"{workload.bar}" if workload.bar else "-", "")
        return
    reached = ratio(workload.unit, found["ours"], found[best])
    yield f"{reached:.2f} ({best})"
    yield f"{workload.bar}" if workload.bar else "-"
    yield "" if not workload.bar else "reached" if reached >= workload.bar else "missed"


def _cost(workload: Workload, samples: Sequence[Sample]) -> Iterator[str]:
    amount = per(workload.unit)[0]

    def middle(of: Callable[[Sample], float]) -> float:
        return statistics.median(of(sample) * amount / sample.amount for sample in samples)

    roles = sorted({role for sample in samples for role in sample.cpu})
    seconds = {role: middle(lambda sample, role=role: sample.cpu.get(role, 0.0)) for role in roles}  # type: ignore[misc]
    yield ", ".join(f"{role} {spent:.2f}" for role, spent in seconds.items() if spent >= 0.005) or "0"
    yield f"{middle(lambda sample: sample.wire.bytes / MIB):.1f}"
    yield f"{middle(lambda sample: float(sample.wire.packets)):.0f}"
    yield f"{statistics.median(sample.load for sample in samples):.1f}"


def memory_table(largest: dict[str, int]) -> Table:
    table = Table("process", "largest RssAnon, MiB")
    for role, found in sorted(largest.items()):
        table.add(role, f"{found / MIB:.1f}")
    return table


def about(rounds: int, sizes: Sizes) -> str:
    """When, where and what."""
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    return (
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {os.cpu_count()} processors, {memory} GiB of memory, "
        f"Linux {platform.release()}, Python {platform.python_version()}; {rounds} rounds, medians; big file of "
        f"{sizes.big // MIB} MiB, trees of {sizes.tree_files:,} files; everything with two copies on three servers."
    )


def document(results: Results, memory: dict[str, int], rounds: int, sizes: Sizes) -> str:
    """All of it, as it goes into docs/performance.md."""
    return f"""{about(rounds, sizes)}

{results.speeds()}

"s" is the time of a run (less is better); the ratio says how many times as fast ours is, so that above 1 is faster.
`moosefs` has its default settings, which sync neither data nor the log of changes when a program's fsync returns;
`moosefs-safe` has `HDD_FSYNC_BEFORE_CLOSE=1` and `CHANGELOG_SAVE_MODE=2`. `local` is a directory on the same disk.

CPU seconds of the processes that serve it, and what went over this machine's loopback interface (of all programs on the
machine; an acknowledgement is a packet, too). Of several processes of a program the sum is given.

{results.costs()}

Largest memory of a process of each program in all of this:

{memory_table(memory)}
"""
