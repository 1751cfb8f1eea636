"""`check` on a running metaserver."""

from metaserver.commit import Committer
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import CheckReport


async def check_running(committer: Committer) -> CheckReport:
    raise DfsError(ErrorCode.UNAVAILABLE, "check is not there yet")
