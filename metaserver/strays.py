"""Replicas of chunks that nobody knows: what chunkservers have and no row speaks of. In memory, synchronous.

They are deleted after a grace, once nobody can still tell of them (``repair.py``). An entry stays until its server says
that the replica is gone, begins a new life (it then lists what it has), or is removed; so a deletion that fails or
comes to nothing is tried again.
"""


class Strays:
    """By chunk: its servers, and when each was first heard of, in seconds of the lived clock."""

    def __init__(self) -> None:
        self._since: dict[int, dict[int, float]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._since.values()))

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._since

    def add(self, chunk: int, server: int, now: float) -> None:
        self._since.setdefault(chunk, {}).setdefault(server, now)

    def discard(self, chunk: int, server: int) -> None:
        """The server has it no more, or the chunk has come to be known."""
        servers = self._since.get(chunk)
        if servers is not None:
            servers.pop(server, None)
            if not servers:
                del self._since[chunk]

    def forget(self, server: int) -> None:
        """The server has begun a new life, or is no member any more."""
        for chunk in list(self._since):
            self.discard(chunk, server)

    def servers(self, chunk: int) -> list[int]:
        """Who has this one."""
        return sorted(self._since.get(chunk, ()))

    def heard_before(self, time: float) -> list[tuple[int, int]]:
        """Chunk and server of those known since then or earlier."""
        return [
            (chunk, server) for chunk, all_ in self._since.items() for server, since in all_.items() if since <= time
        ]
