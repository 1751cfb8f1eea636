"""Disk faults under real processes (``tests/crash/process_faults.py``): a sample, and (soak) the whole matrix."""

from pathlib import Path

import process_faults
import pytest
from process_faults import Cell, Matrix

# One of each kind of outcome; together well under a minute.
SAMPLE = [
    Cell("LMDB file", "ENOSPC", "running"),
    Cell("changelog", "EIO on fsync", "running"),
]


@pytest.mark.timeout(180)
def test_a_sample_of_the_matrix(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path, hold_seconds=2.0)
    assert matrix.run(SAMPLE) == []
    assert [str(matrix.outcomes[cell]) for cell in SAMPLE] == ["ENOSPC", "restarted"]
    assert all(outcome.hits for outcome in matrix.outcomes.values())


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_whole_matrix(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path)
    assert matrix.run(list(process_faults.cells())) == []
