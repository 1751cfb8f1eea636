"""What can be asked of a chunkserver over the data plane, by mounts and by other chunkservers; and what it answers over
HTTP to people.

Entries are the 64-byte index entries of ``chunkserver/chunkfile.py``, back to back; payloads are the stored bytes of
those entries, back to back in the same order. Lengths and offsets are in bytes.
"""

import msgspec

from metaserver.protocol import ScrubStatus
from metaserver.wire import Empty, Message, Method

ROLE = "chunkserver"


class Pong(Message):
    """Answers a ping. ``disk_ms``: how long writes and syncs take at present; those under way count with what they have
    taken until now."""

    disk_ms: int = 0


class Peer(Message):
    """Where a chunkserver's data plane listens."""

    server: int
    host: str
    port: int


class Progress(Message):
    """How far a replica is: stored payload bytes, logical bytes, number of index entries, chain of the last entry."""

    stored_length: int
    logical_length: int
    entries: int
    chain: int


class ReplicaFailure(Message):
    """Which replica could not do its part, and why (an ``ErrorCode``).

    CANCELLED: a server before it in the chain failed, so that it is not known whether the request reached this one;
    it is not to blame.
    """

    server: int
    code: int
    text: str


class Append(Message):
    """Adds blocks at the end of a chunk, here and on every server of ``forward_to`` (each passes on the rest).

    ``offset`` is the stored length and ``index`` the number of entries before this append; ``chain`` is the chain
    before it. The payload is the blocks' bytes. The first append (``index`` 0) creates the chunk. With ``sync``,
    everything up to and including this append is on stable storage on every replica when the answer comes. An append
    of exactly what is already there succeeds; any other that is not at the end is refused (WRONG_OFFSET,
    CHAIN_MISMATCH). Appends to one chunk that are sent one after another on one connection are carried out in order.
    """

    chunk: int
    index: int
    offset: int
    chain: int
    entries: bytes
    forward_to: tuple[Peer, ...]
    sync: bool


class AppendReply(Message):
    """The state after the append on the first replica, and the replicas further on that failed (empty: all have it).

    If the first replica itself fails the answer is an ERROR frame instead.
    """

    progress: Progress
    failures: tuple[ReplicaFailure, ...]


class Sync(Message):
    """Makes a chunk durable up to ``length`` stored bytes with this ``chain``, here and on ``forward_to``."""

    chunk: int
    length: int
    chain: int
    forward_to: tuple[Peer, ...]


class Read(Message):
    """Asks for the blocks that cover ``length`` logical bytes from ``offset``; fewer if they pass the payload limit."""

    chunk: int
    offset: int
    length: int


class ReadReply(Message):
    """Entries of whole blocks, in order; their stored bytes are the payload. Empty past the end of the chunk."""

    entries: bytes


class ReadIndex(Message):
    """Asks for the entries from number ``index`` on, at most ``count``; for copying and checking."""

    chunk: int
    index: int
    count: int


class ReadIndexReply(Message):
    entries: bytes
    progress: Progress


class Stat(Message):
    chunk: int


class StatReply(Message):
    """``state`` is a name of ``chunkserver.store.ReplicaState``; ``path`` is the file on that host."""

    progress: Progress
    state: str
    path: str
    created_ns: int


class Verify(Message):
    """Re-reads a replica from disk (not from the page cache) and checks every block against its entry."""

    chunk: int


class VerifyReply(Message):
    """``bad_blocks`` holds the entry numbers (at most 1,000) whose stored bytes are wrong or unreadable."""

    progress: Progress
    bad_blocks: tuple[int, ...]


class ReadRaw(Message):
    """Asks for ``length`` bytes of the file from ``position`` on, as they are, whatever is known of the replica: for
    making a whole one out of several that are damaged. The payload has them, fewer at the end of the file."""

    chunk: int
    position: int
    length: int


class ListChunks(Message):
    """Asks for the replicas with ids above ``after``, sorted, at most ``count`` and 5,000."""

    after: int
    count: int


class Listed(Message):
    """One replica. ``sealed`` and ``error`` as in a report (``metaserver.protocol.ReplicaReport``)."""

    chunk: int
    length: int
    entries: int
    chain: int
    sealed: bool
    error: str
    created_ns: int


class ListChunksReply(Message):
    """``end``: there are no more. ``highest_epoch`` and ``highest_chunk`` are the largest this server has ever seen.

    ``server``, ``name`` and ``data_path`` say which server it is: whoever asks may know it by its address only.
    """

    replicas: tuple[Listed, ...]
    end: bool
    highest_epoch: int
    highest_chunk: int
    server: int = 0
    name: str = ""
    data_path: str = ""


APPEND = Method(1, "append", Append, AppendReply)
SYNC = Method(2, "sync", Sync, AppendReply)
READ = Method(3, "read", Read, ReadReply)
READ_INDEX = Method(4, "read_index", ReadIndex, ReadIndexReply)
STAT = Method(5, "stat", Stat, StatReply)
VERIFY = Method(6, "verify", Verify, VerifyReply)
PING = Method(7, "ping", Empty, Pong)
READ_RAW = Method(9, "read_raw", ReadRaw, Empty)
LIST_CHUNKS = Method(8, "list_chunks", ListChunks, ListChunksReply)


class ScrubReport(msgspec.Struct):
    """What is answered over HTTP. ``incarnation`` is of the process, whose passes are numbered from 1 on; ``running``
    is the present one's number or 0, ``asked`` the number of the last that was asked for, ``completed`` of the last
    that has ended. ``damaged`` names replicas found damaged by the present pass, or by the last one if none is
    running."""

    incarnation: str
    running: int
    asked: int
    completed: int
    status: ScrubStatus
    damaged: list[tuple[str, str]]
