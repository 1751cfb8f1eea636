"""Which servers get a new replica. Pure: numbers in, servers out.

The writer's own host first, then servers on hosts, and then racks, that have none yet; among equals a random one,
weighted by free space. On one machine with several chunkservers all hosts are equal, and distinct servers must do.
"""

from collections.abc import Collection, Sequence
from random import Random

import msgspec

from metaserver.protocol import CHUNK_CAPACITY


class Candidate(msgspec.Struct, frozen=True):
    """A server that is UP. ``free`` is in bytes, without what is reserved already; servers of one ``device`` (if not
    "") share it."""

    server: int
    host: str
    rack: str
    free: int
    device: str = ""


def choose(
    candidates: Sequence[Candidate],
    count: int,
    random: Random,
    *,
    writer_host: str = "",
    avoid: Collection[int] = (),
    beside: Sequence[Candidate] = (),
    needed: int = CHUNK_CAPACITY,
) -> list[int]:
    """At most ``count`` servers with ``needed`` bytes free, the first to write to first.

    ``avoid`` are used only if there are not enough others. ``beside`` have a replica already: never chosen, and their
    hosts and racks count as used.
    """
    taken = {other.server for other in beside}
    room = [one for one in candidates if one.free >= needed and one.server not in taken]
    used = list(beside)
    chosen: list[Candidate] = []
    while room and len(chosen) < count:
        best = min(_penalty(one, used, writer_host, avoid) for one in room)
        equals = [one for one in room if _penalty(one, used, writer_host, avoid) == best]
        one = random.choices(equals, [candidate.free for candidate in equals])[0] if needed else random.choice(equals)
        chosen.append(one)
        used.append(one)
        room = [other for other in room if other is not one and other.free >= needed * (1 + _sharing(other, chosen))]
    return [one.server for one in chosen]


def _sharing(one: Candidate, chosen: Sequence[Candidate]) -> int:
    """How many of ``chosen`` are on the same filesystem."""
    return sum(bool(one.device) and other.device == one.device for other in chosen)


def spread(places: Sequence[Candidate]) -> tuple[int, int]:
    """How many hosts, and then racks, these are on: larger is better."""
    return len({place.host for place in places}), len({place.rack for place in places})


def _penalty(one: Candidate, used: Sequence[Candidate], writer_host: str, avoid: Collection[int]) -> tuple[int, ...]:
    """Smaller is better; compared in this order."""
    same_host = sum(other.host == one.host for other in used)
    same_rack = sum(bool(one.rack) and other.rack == one.rack for other in used)
    foreign = not used and bool(writer_host) and one.host != writer_host
    return one.server in avoid, same_host, same_rack, foreign
