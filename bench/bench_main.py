"""The command line of bench/run: starts the targets, runs the workloads in turns, prints medians and ratios."""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench_measure import MemoryWatch, cpu_seconds, wire
from bench_report import Results, Sample, document
from bench_targets import TARGETS, Target, TargetError, run
from bench_workloads import MIB, QUICK, WORKLOADS, Place, Sizes, Sources, Workload

DEFAULT_WORK = Path("/var/tmp/dfs-bench")
# A workload that takes longer than this is pathological; what follows is not worth waiting for.
NOTABLE_SECONDS = 120.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__, allow_abbrev=False)
    parser.add_argument("--on", default=",".join(TARGETS), help=f"comma-separated: {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--only", default="", help="comma-separated parts of workload names, for example: write,untar")
    parser.add_argument("--rounds", type=int, default=0, help="how often each is run (default: 3, --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small amounts, one round: does it work at all?")
    parser.add_argument("--size", type=int, default=0, metavar="MIB", help="of the big file (default: 1024)")
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help=f"work directory (default: {DEFAULT_WORK})")
    parser.add_argument(
        "--minutes", type=float, default=25.0, help="begins no round that would end later (default: 25)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables, as for docs/performance.md")
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
    load, sent = os.getloadavg()[0], wire()
    before = {role: sum(map(cpu_seconds, pids)) for role, pids in roles.items()}
    started = time.monotonic()
    amount = workload.run(place)
    seconds = time.monotonic() - started
    cpu = {role: sum(map(cpu_seconds, pids)) - before[role] for role, pids in roles.items()}
    return Sample(target.name, workload.name, seconds, amount, cpu, wire().since(sent), load)


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
        run("rm", "-rf", place.root)
    return samples


def all_rounds(
    options: argparse.Namespace,
    targets: Sequence[Target],
    workloads: Sequence[Workload],
    sources: Sources,
    memory: MemoryWatch,
) -> tuple[list[Sample], int]:
    """As many rounds as are wanted and fit into the time (at least one), and how many that were."""
    began, longest, samples = time.monotonic(), 0.0, list[Sample]()
    wanted = options.rounds or (1 if options.quick else 3)
    for number in range(wanted):
        started = time.monotonic()
        if number and started + longest > began + 60 * options.minutes:
            print(f"no more rounds: another {longest:.0f} s would pass the {options.minutes:g} minutes", flush=True)
            return samples, number
        samples += one_round(number, targets, workloads, sources, memory)
        longest = max(longest, time.monotonic() - started)
    return samples, wanted


def to_json(samples: Sequence[Sample], sizes: Sizes, memory: MemoryWatch) -> str:
    about = {"python": platform.python_version(), "kernel": platform.release(), "processors": os.cpu_count()}
    found = [sample._asdict() for sample in samples]
    return json.dumps(
        {"about": about, "sizes": sizes._asdict(), "samples": found, "rss_anon": memory.largest}, indent=1
    )


def compare(options: argparse.Namespace) -> None:
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
    started: list[Target] = []
    try:
        sources = Sources(options.work, sizes)
        sources.make()
        for target in targets:
            started.append(target)
            target.start()
        samples, rounds = all_rounds(options, targets, workloads, sources, memory)
    finally:
        memory.close()
        for target in reversed(started):
            target.stop()
        shutil.rmtree(options.work, ignore_errors=True)
    results = Results(samples, workloads, [target.name for target in targets])
    tables = document(results, memory.largest, rounds, sizes)
    print(f"\n{tables}")
    if options.markdown:
        options.markdown.write_text(tables)
    if options.json:
        options.json.write_text(to_json(samples, sizes, memory))


def main() -> None:
    options = parse(sys.argv[1:])
    if options.list:
        print("\n".join(workload.name for workload in WORKLOADS))
        return
    try:
        compare(options)
    except TargetError as error:
        print(f"bench/run: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("bench/run: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
