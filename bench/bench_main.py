"""The command line of bench/run: starts the targets, runs the workloads in turns, prints medians and ratios."""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench_measure import MemoryWatch, cpu_seconds
from bench_targets import TARGETS, Target, TargetError
from bench_workloads import MIB, QUICK, WORKLOADS, Place, Sizes, Sources, Workload

DEFAULT_WORK = Path("/var/tmp/dfs-bench")
# A workload that takes longer than this is pathological; what follows is not worth waiting for.
NOTABLE_SECONDS = 120.0


class Sample(NamedTuple):
    """One run of one workload on one target; ``cpu`` is by role of its processes."""

    target: str
    workload: str
    seconds: float
    amount: float
    cpu: dict[str, float]

    def value(self, unit: str) -> float:
        return self.seconds if unit == "s" else self.amount / self.seconds


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--on", default=",".join(TARGETS), help=f"comma-separated: {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--only", default="", help="comma-separated parts of workload names, for example: write,untar")
    parser.add_argument("--rounds", type=int, default=0, help="how often each is run (default: 3, --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small amounts, one round: does it work at all?")
    parser.add_argument("--size", type=int, default=0, metavar="MIB", help="of the big file (default: 1024)")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help=f"work directory (default: {DEFAULT_WORK})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single result, as JSON")
    parser.add_argument("--list", action="store_true", help="list the workloads")
    return parser.parse_args(arguments)


def choose_workloads(only: str) -> list[Workload]:
    """Those with one of the words in their name, and what they need before them."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    wanted = {work.name for work in WORKLOADS if not words or any(word in work.name for word in words)}
    needed = {work.needs for work in WORKLOADS if work.name in wanted}
    return [work for work in WORKLOADS if work.name in wanted | needed]


def choose_targets(names: str, work: Path) -> list[Target]:
    chosen = []
    for name in names.split(","):
        if name not in TARGETS:
            raise TargetError(f"--on {name}: there is {', '.join(TARGETS)}")
        target = TARGETS[name](work)
        missing = target.missing()
        if missing:
            print(f"{name}: left out, {missing} is not installed")
        else:
            chosen.append(target)
    return chosen


def measure(target: Target, workload: Workload, place: Place, memory: MemoryWatch) -> Sample:
    if workload.prepare is not None:
        workload.prepare(place)
    if workload.cold:
        target.chill()
        place.sources.warm()
    else:
        os.sync()
    roles = target.processes()
    memory.watch(target.name, roles)
    before = {role: sum(map(cpu_seconds, pids)) for role, pids in roles.items()}
    started = time.monotonic()
    amount = workload.run(place)
    seconds = time.monotonic() - started
    cpu = {role: sum(map(cpu_seconds, pids)) - before[role] for role, pids in roles.items()}
    return Sample(target.name, workload.name, seconds, amount, cpu)


def one_round(
    number: int, targets: Sequence[Target], workloads: Sequence[Workload], sources: Sources, memory: MemoryWatch
) -> list[Sample]:
    """Every workload on every target, the targets in turns and each time another one first."""
    places = {target.name: Place(target.root / f"round{number}", sources) for target in targets}
    for place in places.values():
        place.root.mkdir()
    samples = []
    for index, workload in enumerate(workloads):
        shift = (number + index) % len(targets)
        for target in [*targets[shift:], *targets[:shift]]:
            sample = measure(target, workload, places[target.name], memory)
            samples.append(sample)
            slow = "  (!)" if sample.seconds > NOTABLE_SECONDS else ""
            value = f"{sample.value(workload.unit):10.2f} {workload.unit}"
            print(f"round {number + 1}  {workload.name:<28} {target.name:<10} {value}{slow}", flush=True)
    for place in places.values():
        shutil.rmtree(place.root)
    return samples


def medians(samples: Sequence[Sample], workload: Workload) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for sample in samples:
        if sample.workload == workload.name:
            values.setdefault(sample.target, []).append(sample.value(workload.unit))
    return {target: statistics.median(found) for target, found in values.items()}


def ratio(workload: Workload, ours: float, other: float) -> float:
    """How many times as fast we are."""
    return other / ours if workload.unit == "s" else ours / other


def report(samples: Sequence[Sample], workloads: Sequence[Workload], names: Sequence[str], memory: MemoryWatch) -> None:
    others = [name for name in names if name != "ours"] if "ours" in names else []
    print("\nMedians; then how many times as fast as each we are (above 1: faster)\n")
    head = [f"{name:>12}" for name in names] + [f"{'/ ' + name:>12}" for name in others]
    print(f"{'workload':<30}{'unit':<7}" + "".join(head))
    for workload in workloads:
        found = medians(samples, workload)
        cells = [f"{found[name]:12.2f}" for name in names]
        cells += [f"{ratio(workload, found['ours'], found[name]):12.2f}" for name in others]
        print(f"{workload.name:<30}{workload.unit:<7}" + "".join(cells))
    print("\nCPU seconds of the processes that serve it, one run (median)\n")
    for workload in workloads:
        parts = [f"{name}: {cpu_text(samples, workload.name, name)}" for name in names if name != "local"]
        print(f"{workload.name:<30}" + "   ".join(parts))
    print("\nLargest RssAnon of one process, MiB")
    for role, largest in sorted(memory.largest.items()):
        print(f"  {role:<28}{largest / MIB:8.1f}")


def cpu_text(samples: Sequence[Sample], workload: str, target: str) -> str:
    found = [sample.cpu for sample in samples if (sample.workload, sample.target) == (workload, target)]
    roles = {role for cpu in found for role in cpu}
    parts = {role: statistics.median([cpu.get(role, 0.0) for cpu in found]) for role in sorted(roles)}
    return ", ".join(f"{role} {seconds:.2f}" for role, seconds in parts.items() if seconds >= 0.005) or "0"


def to_json(samples: Sequence[Sample], sizes: Sizes, memory: MemoryWatch) -> str:
    about = {"python": platform.python_version(), "kernel": platform.release(), "processors": os.cpu_count()}
    found = [sample._asdict() for sample in samples]
    return json.dumps(
        {"about": about, "sizes": sizes._asdict(), "samples": found, "rss_anon": memory.largest}, indent=1
    )


def run(options: argparse.Namespace) -> None:
    workloads = choose_workloads(options.only)
    if not workloads:
        raise TargetError(f"--only {options.only}: no workload has that in its name (see --list)")
    if os.geteuid():
        raise TargetError("mounting and dropping caches need root")
    sizes = QUICK if options.quick else Sizes()
    if options.size:
        sizes = sizes._replace(big=options.size * MIB)
    if options.work.exists():
        raise TargetError(f"{options.work} exists: left by another run? Unmount what is mounted there, then remove it")
    targets = choose_targets(options.on, options.work)
    options.work.mkdir(parents=True)
    memory = MemoryWatch()
    samples: list[Sample] = []
    started: list[Target] = []
    try:
        sources = Sources(options.work, sizes)
        sources.make()
        for target in targets:
            started.append(target)
            target.start()
        for number in range(options.rounds or (1 if options.quick else 3)):
            samples += one_round(number, targets, workloads, sources, memory)
    finally:
        memory.close()
        for target in reversed(started):
            target.stop()
        shutil.rmtree(options.work, ignore_errors=True)
    report(samples, workloads, [target.name for target in targets], memory)
    if options.json:
        options.json.write_text(to_json(samples, sizes, memory))


def main() -> None:
    options = parse(sys.argv[1:])
    if options.list:
        print("\n".join(workload.name for workload in WORKLOADS))
        return
    try:
        run(options)
    except TargetError as error:
        print(f"bench/run: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("bench/run: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
