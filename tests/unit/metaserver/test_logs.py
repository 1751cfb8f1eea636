"""Logs in the journal; test_httpserver.py has those on a terminal."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from metaserver import logs


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


def written(*, json: bool = False, prefixed: bool) -> list[str]:
    stream = io.StringIO()
    logs.configure("info", json, stream, prefixed=prefixed)
    log = structlog.get_logger("x")
    log.info("serving", port=9400)
    log.warning("a replica is gone", chunk="1f")
    log.critical("rolled back")
    logging.getLogger("elsewhere").error("also %s", "bad")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    return stream.getvalue().splitlines()


def test_lines_for_the_journal_have_priorities_and_no_time_of_their_own() -> None:
    lines = written(prefixed=True)
    assert lines[:4] == ["<6>serving port=9400", "<4>a replica is gone chunk=1f", "<2>rolled back", "<3>also bad"]
    assert lines[4] == "<3>failed"
    assert lines[-1] == "<3>ValueError: why"
    assert all(line.startswith("<3>") for line in lines[4:])


def test_elsewhere_lines_have_time_and_level() -> None:
    lines = written(prefixed=False)
    assert lines[0][:4].isdecimal()
    assert "[info" in lines[0]
    assert "<" not in lines[0]


def test_json_in_the_journal_keeps_its_time() -> None:
    assert '"timestamp":' in written(json=True, prefixed=True)[0].replace(" ", "")


def test_whether_output_goes_to_the_journal() -> None:
    """By what the file is, not by the variable alone: it is inherited by programs whose output goes elsewhere."""
    with open(os.devnull, "w") as stream:
        found = os.fstat(stream.fileno())
        assert logs.in_journal(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        assert not logs.in_journal(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
        assert not logs.in_journal(stream, {})
    assert not logs.in_journal(io.StringIO(), {"JOURNAL_STREAM": "1:1"})


@pytest.mark.parametrize("program", ["metaserver", "chunkserver"])
def test_the_reason_of_an_end_is_an_error_in_the_journal(program: str) -> None:
    reading, writing = os.pipe()
    found = os.fstat(writing)
    environment = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
    done = subprocess.run(
        [sys.executable, "-m", program, "--config", "/nonexistent"], stderr=writing, env=environment, check=False
    )
    os.close(writing)
    with os.fdopen(reading) as said:
        assert said.read().startswith(f"<3>{program}: cannot read ")
    assert done.returncode != 0
