"""Many simulated clusters, each with troubles of its own; the same seed is the same run (see ``simulate.py``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import simulate
from simulate import Result

HERE = Path(__file__).resolve().parent
# 1,000 take about two minutes on two processors.
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "1000"))
FIRST = int(os.environ.get("SIMULATION_FIRST", "1"))
SHOWN = 5


def kept_seeds() -> list[int]:
    lines = (HERE / "seeds.txt").read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line.strip() and not line.startswith("#")]


def explain(failed: list[Result]) -> str:
    lines = [f"seed {result.seed}: {result.violations[0]}" for result in failed[:SHOWN]]
    tail = "\n".join(failed[0].tail)
    replay = f"python tests/cluster/simulate.py {failed[0].seed} --trace"
    return f"{len(failed)} seeds failed\n" + "\n".join(lines) + f"\n{tail}\nto replay: {replay}"


@pytest.mark.timeout(1800)
def test_seeds() -> None:
    failed = [result for result in simulate.run_many(range(FIRST, FIRST + SEEDS), 2) if result.violations]
    assert not failed, explain(failed)


@pytest.mark.parametrize("seed", kept_seeds())
def test_kept_seeds(seed: int) -> None:
    result = simulate.simulate(seed)
    assert not result.violations, explain([result])


def test_same_seed_same_run() -> None:
    """In this process, again, and in others with other hashes of strings."""
    seeds = (3, 31)
    here = [simulate.simulate(seed).hash for seed in seeds]
    assert [simulate.simulate(seed).hash for seed in seeds] == here
    program = f"import simulate; print(*(simulate.simulate(seed).hash for seed in {seeds}))"
    for hash_seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{HERE.parent.parent}:{HERE}"}
        output = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        ).stdout
        assert output.split() == here


def test_other_seed_other_run() -> None:
    assert simulate.simulate(3).hash != simulate.simulate(4).hash


@pytest.mark.parametrize("sabotage", ["chunk-sync", "meta-sync", "early-commit"])
def test_sabotage_is_noticed(sabotage: str) -> None:
    """Who would not notice a broken promise here proves nothing by being content."""
    faults = ["cut_all", "cut_one"]
    for seed in range(1, 41):
        result = simulate.simulate(seed, sabotage=frozenset({sabotage}), faults=faults)
        if result.violations:
            return
    pytest.fail(f"40 seeds did not notice {sabotage}")
