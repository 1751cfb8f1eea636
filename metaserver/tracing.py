"""One number follows a request of the kernel through all programs and their logs.

The mount numbers each request of its kernel; whatever is sent on its behalf carries that number in the frame
(``trace_id``), also from chunkserver to chunkserver, and every log line that a program writes while it works on it has
it as ``trace=``. 0: nobody's, work of the program itself. A context variable carries it from task to task: trio hands
the context of whoever starts a task on to it.
"""

from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

TRACE: ContextVar[int] = ContextVar("trace", default=0)
MASK = 0xFFFFFFFF


def text(trace: int) -> str:
    """As logs and people write it: eight hexadecimal digits."""
    return f"{trace:08x}"


def add_trace(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor."""
    trace = TRACE.get()
    if trace and "trace" not in event:
        event["trace"] = text(trace)
    return event
