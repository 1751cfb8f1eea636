"""Which chunks to look at although nobody has told of them: all of them, slowly, again and again; and all that a server
has, soon after it was lost, has come, or is being drained. Bounded pages; nothing here waits.
"""

from itertools import islice

from metaserver.commit import Committer
from metaserver.members import Members
from metaserver.planning import is_lost
from metaserver.schema import Table, Transaction, by_server_key, chunk_key, parse_by_server_key, read_u64

# Chunks of one tick (a second); looking at one takes about 50 us.
WALK_CHUNKS = 200
SURVEY_CHUNKS = 2000


class Tours:
    """``_surveys``: where the look through a server's chunks goes on."""

    def __init__(self, committer: Committer, members: Members) -> None:
        self._committer = committer
        self._members = members
        self._surveys: dict[int, int] = {}
        self._walked = 0

    # -- all chunks ------------------------------------------------------------------------------------------------

    @property
    def at_the_beginning(self) -> bool:
        """Whether all have been walked over, and it begins anew."""
        return not self._walked

    def walked(self) -> list[int]:
        """The next ones."""

        def page(tx: Transaction) -> list[int]:
            rows = tx.scan(Table.CHUNKS, chunk_key(self._walked + 1), b"\xff" * 9)
            return [read_u64(key) for key, _ in islice(rows, WALK_CHUNKS)]

        found, _ = self._committer.read(0, page)
        self._walked = found[-1] if len(found) == WALK_CHUNKS else 0
        return found

    # -- of a server -----------------------------------------------------------------------------------------------

    def survey(self, server: int) -> None:
        """Everything that it has, from the beginning."""
        self._surveys[server] = 0

    def removed(self, server: int) -> None:
        """It is no member any more."""
        self._surveys.pop(server, None)

    @property
    def losses_unknown(self) -> bool:
        """Whether a lost server's chunks have not all been looked at."""
        return any(is_lost(self._members, server) for server in self._surveys)

    def surveyed(self) -> list[int]:
        """The next ones, of lost servers first: nothing but that tells what is most urgent."""
        found: list[int] = []
        for server in sorted(self._surveys, key=lambda server: not is_lost(self._members, server)):
            left = SURVEY_CHUNKS - len(found)
            if left <= 0:
                break
            found += self._page(server, left)
        return found

    def _page(self, server: int, count: int) -> list[int]:
        position = self._surveys[server]

        def page(tx: Transaction) -> list[int]:
            rows = tx.scan(Table.BY_SERVER, by_server_key(server, position), by_server_key(server + 1, 0))
            return [parse_by_server_key(key)[1] for key, _ in islice(rows, count)]

        found, _ = self._committer.read(0, page)
        if len(found) < count:
            del self._surveys[server]
        else:
            self._surveys[server] = found[-1] + 1
        return found
