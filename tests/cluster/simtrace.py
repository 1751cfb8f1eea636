"""What happened in a simulation, in order: for people to read, and a hash to compare two runs by."""

import hashlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog
import trio
from determinism import NODE

from metaserver.engine import EngineFailed

INFO, WARNING, ERROR = 20, 30, 40
# What programs say at ERROR or above when the world is as bad as the simulation makes it.
EXPECTED_ERRORS = frozenset(
    {
        "this mount was evicted: unwritten data is lost, opening a new session",
        "could not write what another mount wants to read",
        "written data is given up",
        "lost change",
        "giving up a replica",
        "a replica is damaged",
        "a replica does not read back",
        # What the program is told is judged there.
        "read failed",
        "the disk has failed; nothing more is written to it",
        "metaserver cannot go on",
        "operation given up",
        "background work failed",
        "commit refused",
        "the metaserver's disk is full: only what frees space goes on",
        "the reserve is used up",
        "the changelog is used again: until a snapshot file can be made, the store cannot be rebuilt",
        # The same after a restart.
        "until a snapshot file is made, the store cannot be rebuilt",
        "the end of the window could not be noted; the next start will wait again",
        "no space for a snapshot file",
        "attributes of a file could not be set",
        "a cleaning cannot go on",
        "a copy of this server's identity cannot be used",
        "there is space again",
        "an answered change that was lost cannot be done again",
    }
)


class Violation(Exception):
    """An invariant does not hold."""


class Trace:
    """``violations``: what must not have happened."""

    def __init__(self, verbose: bool = False) -> None:
        self.lines: list[str] = []
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.verbose = verbose
        self._hash = hashlib.sha256()

    def add(self, what: str) -> None:
        line = f"{trio.current_time():10.4f} {NODE.get() or '-':>6} {what}"
        self._hash.update(line.encode())
        self.lines.append(line)
        if self.verbose:
            print(line)

    def violation(self, what: str) -> None:
        self.add(f"VIOLATION {what}")
        self.violations.append(f"at {trio.current_time():.4f}: {what}")

    @property
    def hash(self) -> str:
        return self._hash.hexdigest()

    def _log(self, _: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        name = event.pop("event")
        failed = event.pop("exc_info", None)
        rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("seconds",))
        self.add(f"{method.upper()} {name} {rest}")
        self.counts[f"log: {name}"] += 1
        if isinstance(sys.exc_info()[1], EngineFailed):
            # The metaserver ends by itself: its disk fails.
            pass
        elif method in ("error", "critical", "exception") and name not in EXPECTED_ERRORS:
            self.violation(f"logged at {method}: {name} {rest}\n{traceback.format_exc() if failed else ''}")
        raise structlog.DropEvent

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Takes what the programs log into the trace."""
        kept = structlog.get_config()
        structlog.configure(
            processors=[self._log],
            wrapper_class=structlog.make_filtering_bound_logger(INFO),
            logger_factory=structlog.ReturnLoggerFactory(),
            cache_logger_on_first_use=False,
        )
        try:
            yield
        finally:
            structlog.configure(**kept)
