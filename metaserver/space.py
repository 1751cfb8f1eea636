"""How the space of the chunkservers is given out: every reserve and limit in one place. Pure.

A chunkserver's disk, from what is used to what is not::

    used | room: for mounts | spare: for compacting and copies | untouched: file names, logs, the file system itself
                            |<------------- the reserve (chunkserver/config.py) ------------->|

``free`` of a heartbeat is what lies above the reserve, ``spare`` the part of the reserve (half of it) that may be used
to make more space. *Room* is what is free and not reserved for chunks that are being written. A chunk being written
reserves the bytes that it may still take, its *limit*: a whole chunk's capacity where there is plenty, a share of the
room where there is little, so that the last of the space can be used by many writers at once. Space that is short is
given back sooner: mounts seal chunks they do not write to within seconds, and what nothing refers to any more is
deleted without the long grace. Deleted files that are kept (``trashing.py``) take up only what nobody needs.
"""

from collections.abc import Iterable
from typing import NamedTuple

from metaserver.protocol import CHUNK_CAPACITY

# A new chunk takes at most this part of its servers' room, so that so many writers get one.
SHARES = 16
# No chunk is made smaller than this as long as so much is left: a mount's unit of writing (dfsmount/dirty.py), twice.
LEAST_LIMIT = 8 << 20
# What a chunk's file takes beside its payload: header, and an index of 64 bytes for each block, rounded up.
_FIXED_BYTES = 64 << 10
_BLOCK_SHARE = 512
# So much of all is kept free of deleted files: more than what makes space short, and enough for a few writers, unless
# that were much of a small disk.
_KEPT_PART, _KEPT_LIMITS, _MOST_KEPT_PART = 16, 4, 4
# Space is short when less than this part of all is left...
SHORT_PART = 20
# ...and pressing on a server that has no room for so many whole chunks, or for so long after a refusal.
PRESSING_CHUNKS = 2
PRESSING_SECONDS = 60.0
# How long a DEAD chunk is kept where space is pressing. The grace is for a metaserver that is put back to an earlier
# state by hand, and for readers with an old map, who ask again; neither is worth a full disk.
SHORT_GRACE_SECONDS = 2.0
# What is kept for the long grace takes up no more than this part of all that is stored, so that beside what the cleaner
# leaves (below 1/0.6 of what is live) disks hold less than twice what is live; or, in small clusters, a chunk's copies.
MOST_KEPT_PART = 8
MOST_KEPT_BYTES = 2 * CHUNK_CAPACITY


# What the cleaner has at least, if that is not more than this part of a disk; the spare is by default that part.
CLEANING_BYTES = 8 << 20
_CLEANING_PART = 16
_SPARE_PART = 200


class Volume(NamedTuple):
    """A filesystem: bytes that can be placed on it, and how many servers have their data there."""

    room: int
    servers: int


def cleaning_room(capacity: int) -> int:
    """Bytes of a disk that nothing new is placed in, beside the spare: where that is little, on disks below 1.6 GiB.
    Dead bytes of chunks that are partly alive come back only if what is alive can be put somewhere."""
    return min(max(0, CLEANING_BYTES - capacity // _SPARE_PART), capacity // _CLEANING_PART)


def footprint(length: int) -> int:
    """Bytes of disk that a chunk with ``length`` bytes of payload takes, if its blocks are not all tiny."""
    return length + length // _BLOCK_SHARE + _FIXED_BYTES


def payload(room: int) -> int:
    """The payload for which ``room`` bytes of disk are enough."""
    return max(0, (room - _FIXED_BYTES) * _BLOCK_SHARE // (_BLOCK_SHARE + 1))


def chunk_limit(room: int, least: int) -> int:
    """How many bytes a new chunk may take, at least ``least`` (0: a whole chunk's), where the fullest of its servers
    has ``room`` for at least that."""
    if not least:
        return CHUNK_CAPACITY
    wanted = max(least, LEAST_LIMIT, room // SHARES)
    return max(least, min(CHUNK_CAPACITY, wanted, payload(room)))


def placeable(volumes: Iterable[Volume], copies: int) -> int:
    """How many bytes can be stored at ``copies`` copies, each on a server of its own.

    The largest x with copies * x <= sum of min(room, servers * x): no server takes more than one copy of anything.
    """
    found = sorted((volume for volume in volumes if volume.servers), key=lambda volume: volume.room / volume.servers)
    servers = sum(volume.servers for volume in found)
    copies = min(copies, servers)
    filled = 0
    for volume in found:
        # With those before it filled up, and the others taking x from each of their servers.
        if servers < copies and filled * volume.servers <= (copies - servers) * volume.room:
            return filled // (copies - servers)
        filled += volume.room
        servers -= volume.servers
    return filled // copies if copies else 0


def kept_free(total: int) -> int:
    """Bytes of ``total`` that deleted files may not take up."""
    return max(total // _KEPT_PART, min(_KEPT_LIMITS * LEAST_LIMIT, total // _MOST_KEPT_PART))


def is_short(total: int, free: int) -> bool:
    """Whether little is left of so much."""
    return free * SHORT_PART < total
