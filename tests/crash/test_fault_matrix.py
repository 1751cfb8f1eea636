"""A sample of the fault matrix (``fault_matrix.py``): no damage to a data directory gives a wrong answer, an unclear
end or a signal. Thousands of positions by hand: ``python tests/crash/fault_matrix.py DIRECTORY 50 SEED``."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import fault_matrix
import pytest

# How often each pair of structure and fault is tried here; each time somewhere else.
ROUNDS = 2
SEED = 5
# What may come of damage to a structure: anything else fails, wrong answers and signals first.
STORE = {"harmless", "recovered"}
TAIL = {"cut", "accepted", "harmless"}
HARMLESS = {"harmless"}
ALLOWED = {
    "LMDB leaf page": STORE,
    "LMDB branch page": STORE,
    "LMDB meta pages": STORE,
    "LMDB free-list page": STORE,
    "LMDB lock file": HARMLESS,
    "changelog record in the middle": {"accepted"},
    "changelog record already stored": HARMLESS,
    "changelog record at the tail": TAIL,
    "segment header": TAIL,
    "pre-zeroed rest": TAIL,
    "newest snapshot file": HARMLESS,
    "older snapshot file": HARMLESS,
    "lock file": HARMLESS,
    "reserve file": HARMLESS,
}


class Matrix:
    """A filled directory, and where in it what is."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.expected = fault_matrix.prepare_directory(work)
        self.places = fault_matrix.places_of(work / "whole")
        self.choose = random.Random(SEED)

    def trial(self, structure: str, fault: str) -> str:
        place = self.choose.choice(self.places[structure])
        whole, copy = self.work / "whole", self.work / "copy"
        return fault_matrix.trial(whole, copy, place, fault, self.choose, self.expected)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    shared = Path("/dev/shm")
    work = tmp_path_factory.mktemp("faults")
    if shared.is_dir():
        work = shared / f"{work.parent.name}-{work.name}"
    try:
        yield Matrix(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def test_every_structure_is_in_the_matrix(matrix: Matrix) -> None:
    assert set(matrix.places) == set(ALLOWED)
    assert all(matrix.places.values())
    assert fault_matrix.tail_of(matrix.expected) == fault_matrix.DURABLE_TAIL + fault_matrix.LOOSE_TAIL


@pytest.mark.parametrize("structure", ALLOWED)
def test_damage_is_masked_or_explained(matrix: Matrix, structure: str) -> None:
    seen = {}
    for fault in fault_matrix.FAULTS:
        for number in range(1 if fault == "deletion" else ROUNDS):
            seen[fault, number] = matrix.trial(structure, fault)
    wrong = {trial: outcome for trial, outcome in seen.items() if outcome.split(":")[0] not in ALLOWED[structure]}
    assert wrong == {}


def test_the_matrix_notices_wrong_rows(matrix: Matrix) -> None:
    """One that could not find anything would prove nothing."""
    other = dict(list(matrix.expected.items())[1:])
    assert fault_matrix.in_child(fault_matrix.attempt, _copy(matrix), other).startswith(("wrong", "cut"))
    assert fault_matrix.in_child(fault_matrix.attempt, _copy(matrix), matrix.expected) == "harmless"
    assert fault_matrix.in_child(lambda: _die()).startswith("killed by signal")


def _copy(matrix: Matrix) -> Path:
    copy = matrix.work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(matrix.work / "whole", copy)
    return copy


def _die() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "alive"
