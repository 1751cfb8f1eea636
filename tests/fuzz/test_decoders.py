"""The short version of the fuzzing (README.md): every decoder with what hypothesis makes up, from real bytes on."""

import random
from pathlib import Path

import decoders
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SAMPLES = [path.read_bytes() for path in sorted(GOLDEN.glob("*.bin"))]
SAMPLES += [bytes.fromhex(word) for line in (GOLDEN / "wire_messages.txt").read_text().splitlines()
            for word in line.split()[-1:] if len(word) % 2 == 0 and set(word) <= set("0123456789abcdef")]  # fmt: skip


@pytest.mark.parametrize("name", decoders.TARGETS)
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes(name: str, data: bytes) -> None:
    decoders.TARGETS[name](data)


@pytest.mark.parametrize("name", decoders.TARGETS)
def test_real_bytes_with_damage(name: str) -> None:
    chance = random.Random(name)
    for _ in range(20):
        for sample in SAMPLES:
            data = bytearray(chance.choice((b"", bytes([chance.randrange(256), chance.randrange(2)]))) + sample[:8192])
            for _ in range(chance.randrange(4)):
                if data:
                    data[chance.randrange(len(data))] = chance.randrange(256)
            decoders.TARGETS[name](bytes(data))
