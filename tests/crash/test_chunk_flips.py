"""A few hundred single bit flips of one replica; ``flip_chunk_bits.py`` does ten thousand by hand."""

from pathlib import Path

import flip_chunk_bits
import pytest

from chunkserver import verify
from chunkserver.verify import Verification


async def test_every_flip_is_noticed_and_none_reaches_a_reader(tmp_path: Path) -> None:
    outcomes = await flip_chunk_bits.flips(tmp_path, 300, 1)
    assert not flip_chunk_bits.failed(outcomes), "\n".join(flip_chunk_bits.table(outcomes))
    assert {outcome.region for outcome in outcomes} == set(flip_chunk_bits.REGIONS)
    assert sum(outcome.refused for outcome in outcomes) > 100


async def test_a_blind_verification_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.Verification, "_header", lambda self, file: "")
    assert Verification._header(None, None) == ""  # type: ignore[arg-type]
    outcomes = await flip_chunk_bits.flips(tmp_path, 100, 2)
    assert flip_chunk_bits.failed(outcomes)
