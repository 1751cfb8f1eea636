"""What an operator asks for over HTTP: routes under the token. Decodes, calls, encodes."""

import stat

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from metaserver import copies, inodes, treecontrol
from metaserver.balancing import Balancer
from metaserver.changes import Changes
from metaserver.commit import Committer
from metaserver.config import Config
from metaserver.draining import Draining as Drains
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import json_reply, read_json
from metaserver.inodes import Effects, start_task
from metaserver.losses import Losses
from metaserver.protocol import CopiesStatus, Draining, Rebalance, RebalanceStatus, Removal, SetCopies
from metaserver.resume import Window
from metaserver.schema import Inode, Task, TaskKind, Transaction
from metaserver.tasks import Tasks
from metaserver.treecontrol import TreeControl


class Admin:
    """What changes the cluster, each durable when it is answered; and what is asked for beside the status."""

    def __init__(
        self,
        committer: Committer,
        config: Config,
        changes: Changes,
        tasks: Tasks,
        drains: Drains,
        balancer: Balancer,
        losses: Losses,
        window: Window,
        trees: TreeControl,
    ) -> None:
        self._committer = committer
        self._config = config
        self._changes = changes
        self._tasks = tasks
        self._window = window
        self.drains = drains
        self.balancer = balancer
        self.losses = losses
        self.trees = trees

    # -- copies --------------------------------------------------------------------------------------------------

    def get_copies(self, ino: int) -> CopiesStatus:
        inode, _ = self._committer.read(0, lambda tx: _with_copies(tx, ino))
        setting = bool(self._tasks.count(TaskKind.SET_COPIES))
        own, directory = inode.storage_class, stat.S_ISDIR(inode.mode)
        return CopiesStatus(ino, own, self._config.copies, directory, setting)

    async def set_copies(self, ino: int, number: int) -> CopiesStatus:
        """Begins to give a file, or a directory and all below it, another number of copies; 0: the default."""
        self.require_changes()
        least = self._config.min_copies
        if number and not least <= number <= copies.MOST_COPIES:
            raise DfsError(ErrorCode.INVALID, f"{number} copies: {least} to {copies.MOST_COPIES} are possible")
        effects = Effects()

        def start(tx: Transaction, _: int) -> None:
            _with_copies(tx, ino)
            start_task(tx, Task(TaskKind.SET_COPIES, ino, value=number, stack=[(ino, 0)]), effects)

        change = self._committer.change(0, 0, start)
        self._changes.carry_out(effects)
        await self._committer.wait_durable(change.number)
        return self.get_copies(ino)

    # -- rebalancing ---------------------------------------------------------------------------------------------

    def rebalance(self, *, stop: bool) -> RebalanceStatus:
        self.require_changes()
        if stop:
            self.balancer.stop()
        else:
            self.balancer.start()
        return self.balancer.status()

    # -- all of them -----------------------------------------------------------------------------------------------

    def require_changes(self) -> None:
        if self._changes.refusing:
            raise DfsError(ErrorCode.READ_ONLY, self._changes.refusing)
        if self._window.open:
            raise DfsError(ErrorCode.UNAVAILABLE, "the metaserver has just started: try again in a few seconds")


def routes(admin: Admin) -> list[Route]:
    async def drain(request: Request) -> Response:
        admin.require_changes()
        told = await read_json(request, Draining)
        return json_reply(await admin.drains.drain(request.path_params["server"], force=told.force))

    async def undrain(request: Request) -> Response:
        admin.require_changes()
        return json_reply(await admin.drains.undrain(request.path_params["server"]))

    async def remove(request: Request) -> Response:
        admin.require_changes()
        told = await read_json(request, Removal)
        return json_reply(await admin.drains.remove(request.path_params["server"], lose=told.lose))

    async def show_copies(request: Request) -> Response:
        return json_reply(admin.get_copies(parse_ino(request)))

    async def set_copies(request: Request) -> Response:
        told = await read_json(request, SetCopies)
        return json_reply(await admin.set_copies(parse_ino(request), told.copies))

    async def show_rebalance(request: Request) -> Response:
        return json_reply(admin.balancer.status())

    async def rebalance(request: Request) -> Response:
        told = await read_json(request, Rebalance)
        return json_reply(admin.rebalance(stop=told.stop))

    async def missing(request: Request) -> Response:
        return json_reply(await admin.losses.find())

    return [
        Route("/v1/servers/{server}/drain", drain, methods=["POST"]),
        Route("/v1/servers/{server}/undrain", undrain, methods=["POST"]),
        Route("/v1/servers/{server}/remove", remove, methods=["POST"]),
        Route("/v1/copies/{ino}", show_copies),
        Route("/v1/copies/{ino}", set_copies, methods=["POST"]),
        Route("/v1/rebalance", show_rebalance),
        Route("/v1/rebalance", rebalance, methods=["POST"]),
        Route("/v1/missing", missing),
        *treecontrol.routes(admin.trees, admin.require_changes),
    ]


def parse_ino(request: Request) -> int:
    text = request.path_params["ino"]
    if not text.isdecimal() or not 0 < int(text) < 1 << 64:
        raise DfsError(ErrorCode.INVALID, f"{text[:40]!r} is no inode number")
    return int(text)


def _with_copies(tx: Transaction, ino: int) -> Inode:
    """The inode, if it is one that can have a number of copies."""
    inode = inodes.find(tx, ino)
    if inode is None:
        raise DfsError(ErrorCode.NOT_FOUND, f"there is no inode {ino}")
    if not stat.S_ISDIR(inode.mode) and not stat.S_ISREG(inode.mode):
        raise DfsError(ErrorCode.INVALID, "only files and directories have copies")
    return inode
