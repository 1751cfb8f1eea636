"""What one chunk needs next. Pure: rows and the state of servers in, at most one step out.

Words: a replica is *good* if it counts as a copy and its server is not LOST; *sure* if it was also confirmed, on a
server that is up and has reported everything it has in this epoch; it *stays* if its server is not being drained, and
the disk there has not failed.

Nothing is deleted as superfluous unless enough sure replicas stay. Whatever moves is copied first: the copy makes the
old one superfluous, and of superfluous ones that goes whose going costs the least spread over hosts and racks, then the
one on the fullest server. What a server that was LOST has kept is read back from its disk before it counts for that.
A useless replica is not deleted to make room for a right one, but replaced by it: what is left of it may be needed.
Nor is a replica deleted because it was superfluous once: if the others are not there any more, it is kept.
"""

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from metaserver.members import DISK_FAILED, Members
from metaserver.placement import Candidate, spread
from metaserver.protocol import ChunkState, OrderKind, ReplicaState, ServerState
from metaserver.schema import Chunk, Replica


class Group(Enum):
    """Steps that wait for each other; of each group some are taken in each round, so that none starves another."""

    COPIES = 1
    SETTLING = 2
    MOVES = 3
    SHIFTS = 4
    DELETIONS = 5


class Kind(Enum):
    """A step: its order, if it is one, and with which others it waits. COPY makes a copy that is missing, MOVE one in
    place of what is to leave its server, SHIFT one that would only be better placed; KEEP takes a deletion back."""

    FORGET = (None, Group.SETTLING)
    KEEP = (None, Group.DELETIONS)
    COPY = (OrderKind.COPY, Group.COPIES)
    MOVE = (OrderKind.COPY, Group.MOVES)
    SHIFT = (OrderKind.COPY, Group.SHIFTS)
    SEAL = (OrderKind.SEAL, Group.SETTLING)
    VERIFY = (OrderKind.VERIFY, Group.SETTLING)
    DELETE = (OrderKind.DELETE, Group.DELETIONS)

    def __init__(self, order: OrderKind | None, group: Group) -> None:
        self.order = order
        self.group = group


class Step(NamedTuple):
    """``others``: no replica is known to be whole, and these have what there is. ``replace``: a useless replica."""

    kind: Kind
    server: int
    source: int = 0
    others: tuple[int, ...] = ()
    replace: bool = False


Replicas = list[tuple[int, Replica]]


class Hints(NamedTuple):
    """What else is known. ``suspects``: servers whose replica is verified before it counts again. ``avoid``: servers
    that have just failed this chunk, used only if there are no others. ``sending``: copies under way from each server.
    ``unwanted``: a server whose replica goes if one of equally good ones has to."""

    suspects: Collection[int] = ()
    avoid: Collection[int] = ()
    sending: Mapping[int, int] = {}
    unwanted: int = 0


def plan(chunk: int, row: Chunk, replicas: Replicas, members: Members, hints: Hints) -> Step | None:
    """The next step for a chunk on which no order is under way; None: it needs nothing that can be done now."""
    if row.state == ChunkState.OPEN or (row.state == ChunkState.FILLING and not row.entries):
        return None
    up = [(server, replica) for server, replica in replicas if _is_up(members, server)]
    if row.state == ChunkState.DEAD:
        return Step(Kind.DELETE, up[0][0]) if up else None
    copies = _Copies(chunk, row, replicas, up, members, hints)
    settling = _settle(chunk, up, members, hints)
    meanwhile = copies.beside_doubts() if settling is not None and settling.server in hints.avoid else None
    return copies.leaving() or meanwhile or settling or copies.step()


def good_copies(replicas: Replicas, members: Members) -> tuple[int, int]:
    """How many replicas are good, and how many of those are on servers that are up: the fewest are the most urgent."""
    good = [server for server, replica in replicas if replica.good and not is_lost(members, server)]
    return len(good), sum(_is_up(members, server) for server in good)


def sure(row: Chunk, replicas: Replicas, members: Members) -> list[int]:
    """Servers that certainly have the chunk, exactly, and can be asked for it."""
    return [server for server, one in replicas if _is_up(members, server) and _confirmed(row, server, one, members)]


def plan_shift(chunk: int, row: Chunk, replicas: Replicas, members: Members, giving: int, taking: int) -> Step | None:
    """A copy to ``taking`` that makes the replica on ``giving`` superfluous; None unless the chunk is as it should be,
    and would be no less spread. Only for a chunk that :func:`plan` has no step for."""
    if row.state != ChunkState.SEALED or any(server == taking for server, _ in replicas):
        return None
    up = [(server, replica) for server, replica in replicas if _is_up(members, server)]
    staying = _Copies(chunk, row, replicas, up, members, Hints()).staying
    if len(staying) != row.copies or giving not in staying or not _takes(members, taking, row.length):
        return None
    places = _places(members, staying)
    after = [place for place in places if place.server != giving] + _places(members, [taking])
    return Step(Kind.SHIFT, taking, giving) if spread(after) >= spread(places) else None


def _is_up(members: Members, server: int) -> bool:
    member = members.by_id.get(server)
    return member is not None and member.up


def is_lost(members: Members, server: int) -> bool:
    member = members.by_id.get(server)
    return member is None or member.state is ServerState.LOST


def _drains(members: Members, server: int) -> bool:
    return members.by_id[server].row.draining


def _counts(members: Members, server: int) -> bool:
    """Whether a good replica there is one of those that are wanted: what lies on a failed disk may be read, but not
    for long, and others take its place."""
    return not _drains(members, server) and members.by_id[server].disk_state != DISK_FAILED


def _takes(members: Members, server: int, length: int) -> bool:
    return any(one.server == server and one.free >= length for one in members.candidates())


def _places(members: Members, servers: Sequence[int]) -> list[Candidate]:
    return [members.by_id[server].candidate() for server in servers]


def _settle(chunk: int, up: Replicas, members: Members, hints: Hints) -> Step | None:
    """Replicas that are to be sealed, or of which it is not known whether they are right. Sealing reads nothing back
    that this life of the server has written: a doubt is settled by reading only."""
    steps = []
    for server, replica in up:
        unsure, unsealed = replica.state == ReplicaState.UNSURE, chunk in members.by_id[server].unsealed
        if unsure and (not unsealed or server in hints.suspects):
            steps.append(Step(Kind.VERIFY, server))
        elif unsealed and (unsure or replica.good):
            steps.append(Step(Kind.SEAL, server))
    return min(steps, key=lambda step: step.server in hints.avoid, default=None)


class _Copies:
    """The replicas of one chunk by what they are worth, and what is missing or too much."""

    def __init__(
        self, chunk: int, row: Chunk, replicas: Replicas, up: Replicas, members: Members, hints: Hints
    ) -> None:
        self.chunk = chunk
        self.row = row
        self.members = members
        self.hints = hints
        self.everywhere = [server for server, _ in replicas]
        self.copying = [server for server, replica in replicas if replica.state == ReplicaState.COPYING]
        self.deleting = [server for server, replica in up if replica.state == ReplicaState.DELETING]
        self.bad = [server for server, replica in up if replica.state == ReplicaState.BAD]
        self.good = [server for server, replica in replicas if replica.good and not is_lost(members, server)]
        self.sure = [server for server, replica in up if _confirmed(row, server, replica, members)]
        self.staying = [server for server in self.sure if members.by_id[server].works]

    def leaving(self) -> Step | None:
        """What was to be deleted, and perhaps was. If it may still be there and has come to be missed, it is kept until
        it was looked for: should the order be carried out after all, then before what looks."""
        for server in self.deleting:
            enough = len(self.staying) >= self.row.copies
            return Step(Kind.DELETE if enough else Kind.KEEP, server)
        return None

    def step(self) -> Step | None:
        return self._under_way() or self._missing() or self._superfluous() or self._better_spread()

    def beside_doubts(self) -> Step | None:
        """A copy that is missing while a server cannot say what another replica is worth (its disk hangs, for
        instance): that may last, and the others must not be left alone for so long. Nothing goes meanwhile."""
        step = self._under_way() or self._missing()
        return step if step is not None and (step.kind is Kind.FORGET or (step.source and not step.others)) else None

    @property
    def _lacking(self) -> int:
        """Copies that have to be made, those on servers that are being drained and on failed disks not counted."""
        return self.row.copies - sum(_counts(self.members, server) for server in self.good)

    def _copy_to(self, target: int) -> Step:
        kind = Kind.COPY if len(self.good) < self.row.copies else Kind.MOVE
        return Step(kind, target, self._source())

    def _source(self) -> int:
        avoid, sending = self.hints.avoid, self.hints.sending
        return min(self.sure, key=lambda server: (server in avoid, sending.get(server, 0)))

    def _under_way(self) -> Step | None:
        """Copies whose order is void: they go on, unless they are not wanted any more or go badly."""
        for server in self.copying:
            wanted = self._lacking > 0 and _is_up(self.members, server) and _counts(self.members, server)
            if not wanted or server in self.hints.avoid:
                return Step(Kind.FORGET, server)
        return self._copy_to(self.copying[0]) if self.copying and self.sure else None

    def _missing(self) -> Step | None:
        if self._lacking <= 0:
            return None
        if not self.sure:
            return self._salvage() if self.bad and not self.good else None
        target = self._target()
        return self._copy_to(target) if target else self._replace()

    def _replace(self) -> Step | None:
        """There is nowhere else to go: a right replica in the place of a useless one, which stays until then if the
        disk has room for both."""
        fit = self._replaceable()
        if fit:
            return Step(Kind.COPY, fit, self._source(), replace=True)
        # What a failed disk holds may be gone at the next read: then what is left of the bad ones is needed.
        lasting = any(self.members.by_id[server].disk_state != DISK_FAILED for server in self.sure)
        return Step(Kind.DELETE, self.bad[0]) if self.bad and lasting else None

    def _salvage(self) -> Step | None:
        """A whole replica out of what is left of several, each perhaps damaged in another place."""
        target = self.copying[0] if self.copying else self._target()
        others = tuple(self.bad[1:]) or (self.bad[0],)
        if target:
            return Step(Kind.COPY, target, self.bad[0], others)
        fit = self._replaceable()
        return Step(Kind.COPY, fit, self.bad[0], others, replace=True) if fit else None

    def _replaceable(self) -> int:
        """A server with a useless replica and room for a right one beside it; 0: none."""
        found = (self.members.by_id[server] for server in self.bad)
        return next((each.server for each in found if each.usable and each.room >= self.row.length), 0)

    def _target(self) -> int:
        # What is to leave its server takes up no host or rack.
        leaving = {server for server in self.sure if not _counts(self.members, server)}
        beside = [server for server in self.everywhere if server not in leaving]
        return self.members.place_copy(
            beside, self.row.length, self.hints.avoid, without=leaving, makes_room=self.row.state == ChunkState.FILLING
        )

    def _superfluous(self) -> Step | None:
        """What may go because enough others are known to be right."""
        if len(self.staying) < self.row.copies:
            return None
        leaving = [*self.bad, *(server for server in self.sure if _drains(self.members, server))]
        victim = next(iter(leaving), 0)
        if not victim and len(self.staying) > self.row.copies:
            victim = self._least_missed()
        return self._doubtful(victim) or Step(Kind.DELETE, victim) if victim else None

    def _doubtful(self, victim: int) -> Step | None:
        """Reads back what is to be relied on without ``victim``, and was out of sight for long."""
        for server in self.staying:
            member = self.members.by_id[server]
            if server != victim and member.was_lost and self.chunk not in member.verified:
                return Step(Kind.VERIFY, server)
        return None

    def _least_missed(self) -> int:
        """The replica whose going leaves the best spread, then the most even use of space."""
        places = _places(self.members, self.staying)

        def worth(server: int) -> tuple[tuple[int, int], bool, float, int]:
            rest = [place for place in places if place.server != server]
            member = self.members.by_id[server]
            return spread(rest), server == self.hints.unwanted, member.fullness, member.occupied

        return max(self.staying, key=worth)

    def _better_spread(self) -> Step | None:
        """Copies that share a host or rack although there is another."""
        places = _places(self.members, self.staying)
        if len(places) != self.row.copies or not _crowded(places):
            return None
        target = self.members.place_copy(self.everywhere, self.row.length, self.hints.avoid)
        if not target:
            return None
        more = places + _places(self.members, [target])
        best = max(spread([place for place in more if place is not left]) for left in more)
        return Step(Kind.SHIFT, target, self._source()) if best > spread(places) else None


def _crowded(places: Sequence[Candidate]) -> bool:
    """Whether two places have a host, or a rack that has a name, in common."""
    racks = [place.rack for place in places if place.rack]
    return len({place.host for place in places}) < len(places) or len(set(racks)) < len(racks)


def _confirmed(row: Chunk, server: int, replica: Replica, members: Members) -> bool:
    same = (replica.length, replica.entries, replica.chain) == (row.length, row.entries, row.chain)
    return replica.good and same and members.by_id[server].listed
