"""The metaserver's namespace against a model, with a crash or a power cut between any two changes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from namespace_driver import Driver


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_namespace_is_what_the_model_says(seed: int, tmp_path: Path) -> None:
    driver = Driver(seed, tmp_path)
    await driver.run(12_000)
    assert driver.crashes > 5
    assert driver.cuts > 5
    assert driver.resent > 10
    assert min(driver.counts.values()) > 100
