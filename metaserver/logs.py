"""Logging of all three programs: structlog to standard error, one line an event, secrets never among them.

Where the journal (or syslog) reads them, lines begin with their priority as ``<6>`` (sd-daemon(3)) instead of carrying
a time and a level of their own: it has both, and shows them.
"""

import logging
import os
import sys
from collections.abc import Mapping
from typing import TextIO

import structlog

from metaserver import tracing

LEVELS = ("debug", "info", "warning", "error")
# httpx logs every request at INFO: one line a heartbeat.
_CHATTY = ("httpx", "httpcore", "hypercorn.access")
# syslog(3).
_PRIORITIES = {"critical": 2, "error": 3, "exception": 3, "warning": 4, "info": 6, "debug": 7}


def in_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether what is written there goes to the journal: the service manager names it in JOURNAL_STREAM
    (systemd.exec(5)), which is inherited by children whose output goes elsewhere."""
    told = environment.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return told == f"{found.st_dev}:{found.st_ino}"


def complain(text: str) -> None:
    """Why this program ends, in one line on standard error; an error in the journal, too."""
    print(f"<{_PRIORITIES['error']}>{text}" if in_journal(sys.stderr, os.environ) else text, file=sys.stderr)


def _prefixed(render: structlog.typing.Processor) -> structlog.typing.Processor:
    """The same without the level, which comes first in each line of the text."""

    def rendering(logger: structlog.typing.WrappedLogger, name: str, event: structlog.typing.EventDict) -> str:
        prefix = f"<{_PRIORITIES.get(str(event.pop('level', 'info')), 6)}>"
        return "\n".join(prefix + line for line in str(render(logger, name, event)).splitlines())

    return rendering


def configure(
    level: str = "info", json: bool = False, stream: TextIO | None = None, *, prefixed: bool | None = None
) -> None:
    """Sets up structlog and the standard library's logging for this process; call once, from a command line.

    ``level`` is one of :data:`LEVELS`; ``stream`` is standard error if nothing is said; ``prefixed``: lines begin with
    their priority, None: if they go to the journal. Tracebacks are plain: a renderer that shows local variables would
    show keys.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    stream = stream or sys.stderr
    number = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        tracing.add_trace,
        structlog.stdlib.add_log_level,
    ]
    if prefixed is None:
        prefixed = in_journal(stream, os.environ)
    if json or not prefixed:
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    rendering: list[structlog.typing.Processor]
    if json:
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Columns help where time and level precede them; the journal's lines have other lengths.
        console = structlog.dev.ConsoleRenderer(
            colors=stream.isatty() and not prefixed,
            exception_formatter=structlog.dev.plain_traceback,
            pad_event_to=0 if prefixed else 30,
        )
        rendering = [_prefixed(console) if prefixed else console]
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(stream),
        # Costs a microsecond a line; cached loggers would outlive what a test configures.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    logging.basicConfig(level=number, handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
