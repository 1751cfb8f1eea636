"""A whole cluster in one trio run: its nodes, what befalls them, and when it is at rest again."""

from collections.abc import Callable
from contextlib import suppress
from random import Random

import trio
from determinism import Freezer
from siminspect import check_unlink
from simmodel import Model
from simnet import Clockwork, SimNet
from simnodes import META, ChunkNode, ClientNode, MetaNode, SimNode, World, scratch
from simtrace import Trace
from simwork import Program

from metaserver.config import Config
from metaserver.errors import ErrorCode
from metaserver.protocol import ReplicaState
from metaserver.schema import Chunk, Replica, Table, parse_replica_key

# How long after trouble an operation may still fail or be slow because of it.
EXCUSED_SECONDS = 45.0
# How severe trouble is: MINOR is no excuse (one chunkserver of enough), FULL only for ENOSPC.
MINOR, FULL, HARD = 0, 1, 2
# What a program may wait for while there is no more than minor trouble (issue 4: five seconds of stall), and a bit.
STALL_SECONDS = 6.0


class Plan:
    """What a seed decides about the size of things; ``big``: for long runs by hand."""

    def __init__(self, random: Random, sabotage: frozenset[str] = frozenset(), *, big: bool = False) -> None:
        self.servers = random.choice((2, 3, 3, 4, 5))
        self.clients = random.choice((1, 2, 2, 3))
        self.programs = random.choice((1, 1, 2))
        self.copies = random.choice((2, 2, 2, 3)) if self.servers > 2 else 2
        self.min_copies = random.choice((1, 1, 2))
        self.seconds = random.choice((20.0, 40.0, 80.0) if big else (4.0, 8.0, 12.0))
        # Seconds between two operations of a program, on average.
        self.pace = random.choice((0.05, 0.2, 1.0) if big else (0.1, 0.4, 1.0))
        self.sabotage = sabotage
        # Only one chunkserver ever is in trouble, and there are enough others: nobody may notice but by waiting.
        self.minor = self.servers > max(self.copies, self.min_copies) and random.random() < 0.4


class Cluster:
    """Made inside the run. ``trouble`` says since when and why operations may fail."""

    def __init__(self, seed: int, plan: Plan, trace: Trace, nursery: trio.Nursery) -> None:
        self.random = Random(f"{seed} faults")
        self.plan = plan
        self.trace = trace
        self.freezer = Freezer()
        self.clockwork = Clockwork()
        self.net = SimNet(Random(f"{seed} net"), self.clockwork)
        config = Config(
            data="x",
            copies=plan.copies,
            min_copies=plan.min_copies,
            lost_after_seconds=self.random.choice((4.0, 12.0)),
            keep_alive_seconds=2.0,
            session_deadline_seconds=self.random.choice((6.0, 20.0)),
            window_seconds=self.random.choice((3.0, 8.0)),
            delete_grace_seconds=self.random.choice((1.0, 5.0)),
            # Of its own, so that older seeds do all else as they did.
            trash_seconds=Random(f"{seed} trash").choice((0.0, 0.0, 2.0, 86400.0)),
        )
        self.world = World(
            random=Random(f"{seed} nodes"),
            net=self.net,
            trace=trace,
            nursery=nursery,
            directory=scratch() / f"{seed}",
            config=config,
            timeout=30.0,
            copies=plan.copies,
            sabotage=plan.sabotage,
        )
        self.model = Model()
        self.meta = MetaNode(self.world)
        self.chunks = [ChunkNode(self.world, number, self.meta) for number in range(1, plan.servers + 1)]
        self.clients = [ClientNode(self.world, number) for number in range(1, plan.clients + 1)]
        self.lost_servers: list[int] = []
        self.victim = self.random.choice(self.chunks)
        self.world.on_unlink = lambda number, path: check_unlink(self, number, path)
        self._trouble: dict[str, tuple[float, int]] = {}
        self._frozen_at: dict[str, float] = {}
        programs = Random(f"{seed} programs")
        self.programs = [
            Program(
                f"p{client.number}{number}", client, self.model, Random(programs.random()), trace,
                lambda: self.meta.cuts, self.excused, plan.pace,
            )
            for client in self.clients
            for number in range(plan.programs)
        ]  # fmt: skip
        for program in self.programs:
            program.others = [other for other in self.programs if other is not program]

    @property
    def nodes(self) -> list[SimNode]:
        return [self.meta, *self.chunks, *self.clients]

    async def start(self) -> None:
        self.world.nursery.start_soon(self.clockwork.run)
        await self.meta.start()
        for node in self.chunks:
            await node.start()
        await self.until(lambda: self.up_servers() == len(self.chunks), 30.0, "the chunkservers are up")
        for client in self.clients:
            await client.start()

    async def end(self) -> None:
        for node in self.nodes:
            await self.kill(node)
        self.world.nursery.cancel_scope.cancel()

    def up_servers(self) -> int:
        if self.meta.parts is None:
            return 0
        return sum(member.up for member in self.meta.parts.members.by_id.values())

    async def until(self, condition: Callable[[], bool], seconds: float, what: str) -> bool:
        """Waits for something that must come to pass."""
        deadline = trio.current_time() + seconds
        while not condition():
            if trio.current_time() > deadline:
                self.trace.violation(f"after {seconds:.0f} s it is not true that {what}")
                return False
            await trio.sleep(0.25)
        return True

    # -- trouble -------------------------------------------------------------------------------------------------

    def note_trouble(self, what: str, severity: int = HARD) -> None:
        self._trouble[what] = (float("inf"), MINOR if self.plan.minor else severity)

    def end_trouble(self, what: str) -> None:
        self._trouble[what] = (trio.current_time(), self._trouble[what][1])

    def excused(self, started: float, code: ErrorCode) -> str:
        """Why an operation that began then (0: ever) may fail like this."""
        least = FULL if code is ErrorCode.NO_SPACE else HARD
        for what, (ended, severity) in self._trouble.items():
            if severity >= least and (ended + EXCUSED_SECONDS > started or not started):
                return what
        parts = self.meta.parts
        if parts is not None and sum(member.works for member in parts.members.by_id.values()) < self.plan.min_copies:
            return "too few servers take data"
        return ""

    def pick(self) -> ChunkNode:
        """A chunkserver to befall."""
        return self.victim if self.plan.minor else self.random.choice(self.chunks)

    def pick_any(self) -> SimNode:
        """Any node to befall."""
        return self.victim if self.plan.minor else self.random.choice(self.nodes)

    async def kill(self, node: SimNode) -> None:
        self.thaw(node)
        await node.kill()

    async def cut_power(self, node: SimNode, keep: float) -> None:
        self.thaw(node)
        await node.cut_power(keep)

    async def restart(self, node: SimNode) -> None:
        if not node.running:
            await node.start()

    def freeze(self, node: SimNode) -> None:
        if node.running and node.name not in self._frozen_at:
            self.trace.add(f"FREEZE {node.name}")
            self._frozen_at[node.name] = trio.current_time()
            self.freezer.freeze(node.name)

    def thaw(self, node: SimNode) -> None:
        since = self._frozen_at.pop(node.name, None)
        if since is not None:
            self.trace.add(f"THAW {node.name}")
            node.frozen_seconds += trio.current_time() - since
            self.freezer.thaw(node.name)

    async def lose(self, node: ChunkNode) -> None:
        """It is gone, and its disk with it."""
        self.trace.add(f"LOSE {node.name}")
        await self.kill(node)
        self.chunks.remove(node)
        self.lost_servers.append(node.number)

    async def join(self) -> None:
        """A new chunkserver."""
        number = max([chunk.number for chunk in self.chunks] + self.lost_servers) + 1
        node = ChunkNode(self.world, number, self.meta)
        self.chunks.append(node)
        await node.start()

    async def heal(self) -> None:
        """Ends all trouble and starts what does not run."""
        self.trace.add("HEAL")
        self.net.heal_all()
        self.net.lost_requests = 0.0
        self.world.slow_disk.clear()
        for chunk in self.chunks:
            chunk.storage.faults.clear()
            chunk.storage.capacity = chunk.capacity
            chunk.steps_left = chunk.crash_keep = None
        self.meta.failing.clear()
        self.meta.end_crash()
        for node in self.nodes:
            self.thaw(node)
            await self.restart(node)
        for chunk in self.chunks:
            if chunk.node is not None and chunk.node.running and chunk.node.running.store.table.disk_error:
                # A failed disk is looked at again by a restart only.
                await self.kill(chunk)
                await self.restart(chunk)
        await self.scrub()

    async def scrub(self) -> None:
        """Finds whatever rot there is in what is sealed."""
        await self.until(lambda: all(chunk.serving for chunk in self.chunks), 30.0, "all chunkservers run")
        for chunk in self.chunks:
            if chunk.serving is not None:
                chunk.serving.scrubber.ask()

    # -- what the metaserver knows -------------------------------------------------------------------------------

    def chunk_rows(self) -> dict[int, tuple[Chunk, dict[int, Replica]]]:
        """All chunks with their replicas by server; nothing if there is no metaserver."""
        found: dict[int, tuple[Chunk, dict[int, Replica]]] = {}
        if self.meta.parts is None:
            return found

        def look(tx: object) -> None:
            for key, value in tx.scan(Table.CHUNKS, b"", b"\xff" * 9):  # type: ignore[attr-defined]
                found[int.from_bytes(key, "big")] = (Chunk.unpack(value), {})
            for key, value in tx.scan(Table.REPLICAS, b"", b"\xff" * 13):  # type: ignore[attr-defined]
                chunk, server = parse_replica_key(key)
                if chunk in found:
                    found[chunk][1][server] = Replica.unpack(value)

        with suppress(Exception):
            self.meta.parts.committer.read(0, look)
        return found

    def good_copies(self) -> dict[int, list[int]]:
        return {
            chunk: [server for server, replica in replicas.items() if replica.state == ReplicaState.GOOD]
            for chunk, (_, replicas) in self.chunk_rows().items()
        }


__all__ = ["META", "Cluster", "Plan"]
