"""`dfs gc`: what garbage there is, in words; and waiting until what may be collected now is gone."""

import time

from dfsmount.dfs_api import Api
from dfsmount.dfs_layout import Problem
from dfsmount.dfs_servers import LOOK_SECONDS, watching
from metaserver.protocol import Garbage
from metaserver.words import bytes_text, count_text, seconds_text

# Deleting goes on while it gets on; a server that is away keeps its replicas until it is back.
STANDSTILL_SECONDS = 30.0


def lines(garbage: Garbage) -> list[str]:
    """One line for each kind of garbage that there is."""
    shown = []
    if garbage.dead_chunks:
        waits = "being deleted"
        if garbage.waiting_chunks:
            longest = seconds_text(garbage.longest_wait_seconds)
            waits = f"kept for their grace: {garbage.waiting_chunks:,}, the last for {longest}"
        shown.append(
            f"deleted   {count_text(garbage.dead_chunks, 'chunk')} that nothing refers to"
            f" ({bytes_text(garbage.dead_bytes)} on all servers): {waits}"
        )
    if garbage.orphans:
        files = count_text(garbage.orphans, "file")
        shown.append(f"unlinked  {files} without a name, still open somewhere ({bytes_text(garbage.orphan_bytes)})")
    if garbage.unknown_replicas:
        count = count_text(garbage.unknown_replicas, "replica")
        shown.append(f"unknown   {count} of chunks that the metaserver does not know: deleted after their grace")
    if garbage.cleanable_chunks:
        count = count_text(garbage.cleanable_chunks, "chunk")
        shown.append(
            f"scattered {count} mostly dead: rewriting them frees {bytes_text(garbage.cleanable_bytes)} a copy"
        )
    return shown or ["No garbage: everything that is stored belongs to a file."]


def wait_gone(api: Api, began: Garbage, *, quiet: bool) -> Garbage:
    """Returns when what may be deleted is; :class:`Problem` if nothing moves any more."""
    best, moved_at = due(began), time.monotonic()
    left = began
    with watching(quiet) as show:
        while due(left):
            if due(left) < best:
                best, moved_at = due(left), time.monotonic()
            if time.monotonic() - moved_at > STANDSTILL_SECONDS:
                text = f"{count_text(due(left), 'chunk')} cannot be deleted now"
                raise Problem(f"{text}: `dfs status` shows which servers are away; it goes on when they are back")
            show(f"{count_text(due(left), 'chunk')} ({bytes_text(left.dead_bytes)}) left to delete")
            time.sleep(LOOK_SECONDS)
            left = api.garbage()
    return left


def due(garbage: Garbage) -> int:
    """Chunks that may be deleted now."""
    return garbage.dead_chunks - garbage.waiting_chunks


def freed(began: Garbage, left: Garbage) -> str:
    chunks, size = began.dead_chunks - left.dead_chunks, began.dead_bytes - left.dead_bytes
    if chunks <= 0:
        return "Nothing could be collected now."
    return f"{count_text(chunks, 'chunk')} deleted: {bytes_text(max(0, size))} are free again."
