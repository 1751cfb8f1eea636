"""A network in memory: connections with latency, partitions, resets, and hosts that are down.

It behaves as TCP does in what matters: bytes arrive in order or the connection breaks; what is sent into a partition
waits and arrives when that heals within ``DEAD_PEER_SECONDS``, and breaks the connection otherwise; a process that is
killed breaks its connections at once, a host that loses its power says nothing.
"""

import heapq
import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from functools import partial
from random import Random
from typing import Any, TypeVar

import msgspec
import trio
from determinism import NODE

from metaserver.errors import ConnectionLost
from metaserver.transport import DEAD_PEER_SECONDS
from metaserver.wire import Buffer

T = TypeVar("T")

CONNECT_SECONDS = 3.0
# What a kernel takes of a sender before the receiver has read it.
SOCKET_BYTES = 1 << 20
# What httpx waits for an answer.
REQUEST_SECONDS = 5.0


class Clockwork:
    """Calls functions at moments of virtual time, in order of time and of asking. Not a task for each of them."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._scope: trio.CancelScope | None = None

    def at(self, when: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._count), function))
        if self._scope is not None and self._scope.deadline > when:
            self._scope.deadline = when

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        self.at(trio.current_time() + seconds, function)

    async def run(self) -> None:
        while True:
            when = self._heap[0][0] if self._heap else float("inf")
            if when > trio.current_time():
                with trio.CancelScope(deadline=when) as self._scope:
                    await trio.sleep_forever()
                self._scope = None
                continue
            heapq.heappop(self._heap)[2]()


class End:
    """One end of a connection: a ``transport.Transport``."""

    def __init__(self, net: "SimNet", node: str, peer: str) -> None:
        self.net = net
        self.node = node
        self.peer_node = peer
        self.name = peer
        self.other: End
        self.inbox = bytearray()
        self.ended = ""  # nothing more comes: why
        self.closed = False
        # What is on its way to the other end or unread there, and when the last of it arrives.
        self.in_flight = 0
        self.arrives = 0.0
        self.held: list[Callable[[], None]] = []
        self._readers: list[trio.lowlevel.Task] = []
        self._writers: list[trio.lowlevel.Task] = []

    def try_send(self, buffers: Sequence[Buffer]) -> int:
        if self.closed or self.ended:
            raise ConnectionLost(f"connection to {self.name} lost: {self.ended or 'closed on this side'}")
        room = SOCKET_BYTES - self.in_flight
        data = b"".join(buffers)[:room]
        if data:
            self.in_flight += len(data)
            self.net.send(self, data)
        return len(data)

    def try_receive_into(self, view: memoryview) -> int:
        if self.closed:
            raise ConnectionLost(f"connection to {self.name} lost: closed on this side")
        if not self.inbox:
            if self.ended:
                raise ConnectionLost(f"connection to {self.name} lost: {self.ended}")
            return 0
        count = min(len(view), len(self.inbox))
        view[:count] = self.inbox[:count]
        del self.inbox[:count]
        self.other.in_flight -= count
        self.other._wake(self.other._writers)
        return count

    async def wait_readable(self) -> None:
        if not self.inbox and not self.ended and not self.closed:
            await self._wait(self._readers)
        else:
            await trio.lowlevel.checkpoint()
        if self.closed:
            raise ConnectionLost(f"connection to {self.name} lost: closed on this side")

    async def wait_writable(self) -> None:
        if self.in_flight >= SOCKET_BYTES and not self.ended and not self.closed:
            await self._wait(self._writers)
        else:
            await trio.lowlevel.checkpoint()
        if self.closed:
            raise ConnectionLost(f"connection to {self.name} lost: closed on this side")

    async def _wait(self, waiting: list[trio.lowlevel.Task]) -> None:
        task = trio.lowlevel.current_task()
        waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    @staticmethod
    def _wake(waiting: list[trio.lowlevel.Task]) -> None:
        while waiting:
            trio.lowlevel.reschedule(waiting.pop(0))

    def arrive(self, data: bytes) -> None:
        if not self.closed and not self.ended:
            self.inbox += data
            self._wake(self._readers)

    def end(self, reason: str) -> None:
        """The kernel notices that nothing more comes."""
        if not self.ended:
            self.ended = reason
            self._wake(self._readers)
            self._wake(self._writers)

    def close(self) -> None:
        """On this side, by its own process or because that is gone; the other side hears of it if it can."""
        if self.closed:
            return
        self.closed = True
        self._wake(self._readers)
        self._wake(self._writers)
        self.net.closed(self)

    def vanish(self) -> None:
        """The host has lost its power: nobody is told."""
        self.closed = True
        self.inbox.clear()


class SimNet:
    """All connections. Nodes are names, which are their hosts too."""

    def __init__(self, random: Random, clockwork: Clockwork) -> None:
        self.random = random
        self.clockwork = clockwork
        self.latency = 0.0002
        self.jitter = 0.0003
        # Seconds more from one node to another.
        self.delays: dict[tuple[str, str], float] = {}
        self.bytes_per_second = 500e6
        # (from, to): nothing gets through.
        self.cut: dict[tuple[str, str], None] = {}
        self.powerless: dict[str, None] = {}
        self.lost_requests = 0.0
        self.ends: dict[End, None] = {}
        self._listening: dict[tuple[str, int], tuple[trio.Nursery, Callable[[End], Awaitable[None]]]] = {}
        self._serving: dict[str, trio.Nursery] = {}

    # -- nodes -------------------------------------------------------------------------------------------------

    def listen(self, node: str, port: int, nursery: trio.Nursery, handle: Callable[[End], Awaitable[None]]) -> None:
        self._listening[node, port] = (nursery, handle)

    def serve_requests(self, node: str, nursery: trio.Nursery) -> None:
        """From now on :meth:`request` reaches it."""
        self._serving[node] = nursery

    def nursery_of(self, node: str) -> trio.Nursery | None:
        """Where tasks of a node that answers requests run."""
        return self._serving.get(node)

    def down(self, node: str, *, power: bool = False) -> None:
        """Its process is gone; with ``power`` its host as well, until :meth:`up`."""
        for key in [key for key in self._listening if key[0] == node]:
            del self._listening[key]
        self._serving.pop(node, None)
        if power:
            self.powerless[node] = None
        for end in [end for end in self.ends if end.node == node]:
            if power:
                end.vanish()
                self.clockwork.after(DEAD_PEER_SECONDS, partial(end.other.end, "timed out"))
                self._forget(end)
            else:
                end.close()

    def up(self, node: str) -> None:
        """The host has its power back: it resets what others believe to be connected."""
        if self.powerless.pop(node, False) is None:
            for end in [end for end in self.ends if end.other.node == node and end.other.closed]:
                self.clockwork.after(self._delay(node, end.node), partial(end.end, "reset by peer"))

    # -- trouble -----------------------------------------------------------------------------------------------

    def blocked(self, source: str, to: str) -> bool:
        return (source, to) in self.cut or source in self.powerless or to in self.powerless

    def partition(self, source: str, to: str) -> None:
        """Nothing gets from ``source`` to ``to`` until :meth:`heal`."""
        self.cut[source, to] = None
        for end in self.ends:
            if (end.node, end.other.node) == (source, to):
                self._watch(end)

    def heal(self, source: str, to: str) -> None:
        if self.cut.pop((source, to), False) is not None:
            return
        for end in [end for end in self.ends if (end.node, end.other.node) == (source, to)]:
            held, end.held = end.held, []
            for step in held:
                step()

    def heal_all(self) -> None:
        for source, to in list(self.cut):
            self.heal(source, to)
        self.delays.clear()

    def reset(self, end: End) -> None:
        """Something on the way breaks a connection."""
        end.end("reset by peer")
        end.other.end("reset by peer")

    def _watch(self, end: End) -> None:
        """A partition in either direction breaks a connection after a time: what is sent is not acknowledged."""
        source, to = end.node, end.other.node

        def still() -> None:
            if self.blocked(source, to) and not end.closed:
                end.end("timed out")
                end.other.end("timed out")
                end.held.clear()

        self.clockwork.after(DEAD_PEER_SECONDS + self.random.random(), still)

    # -- bytes -------------------------------------------------------------------------------------------------

    def _delay(self, source: str, to: str) -> float:
        return self.latency + self.random.random() * self.jitter + self.delays.get((source, to), 0.0)

    def send(self, end: End, data: bytes) -> None:
        now = trio.current_time()
        end.arrives = max(end.arrives, now + self._delay(end.node, end.other.node)) + len(data) / self.bytes_per_second
        self._deliver(end, end.arrives, partial(end.other.arrive, data))

    def _deliver(self, end: End, when: float, step: Callable[[], None]) -> None:
        def arrive() -> None:
            if end.held or self.blocked(end.node, end.other.node):
                end.held.append(step)
            else:
                step()

        self.clockwork.at(when, arrive)

    def closed(self, end: End) -> None:
        if end.other.closed:
            self._forget(end)
            return
        when = max(end.arrives, trio.current_time() + self._delay(end.node, end.other.node))
        self._deliver(end, when, partial(end.other.end, "closed by peer"))
        if self.blocked(end.node, end.other.node):
            self._watch(end.other)

    def _forget(self, end: End) -> None:
        if end.other.closed:
            self.ends.pop(end, None)
            self.ends.pop(end.other, None)

    async def connect(self, source: str, host: str, port: int) -> End:
        """From a task of ``source``."""
        deadline = trio.current_time() + CONNECT_SECONDS
        await trio.sleep(self._delay(source, host) + self._delay(host, source))
        while self.blocked(source, host) or self.blocked(host, source):
            if trio.current_time() >= deadline:
                raise ConnectionLost(f"cannot connect to {host}:{port}: timed out")
            await trio.sleep(0.2)
        listening = self._listening.get((host, port))
        if listening is None:
            raise ConnectionLost(f"cannot connect to {host}:{port}: connection refused")
        ours, theirs = End(self, source, f"{host}:{port}"), End(self, host, source)
        ours.other, theirs.other = theirs, ours
        self.ends[ours] = self.ends[theirs] = None
        nursery, handle = listening
        self.start_on(host, nursery, self._accepted, theirs, handle)
        return ours

    async def _accepted(self, end: End, handle: Callable[[End], Awaitable[None]]) -> None:
        try:
            await handle(end)
        finally:
            end.close()

    def connector(self, source: str) -> Callable[[str, int], Awaitable[End]]:
        return partial(self.connect, source)

    @staticmethod
    def start_on(node: str, nursery: trio.Nursery, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Starts a task of ``node``."""
        context = copy_context()
        context.run(NODE.set, node)
        context.run(nursery.start_soon, function, *arguments)

    # -- requests of the control plane ---------------------------------------------------------------------------

    async def request(self, source: str, to: str, handle: Callable[[], Awaitable[T]]) -> T:
        """One HTTP exchange: ``handle`` runs at ``to``, perhaps without an answer getting back."""
        outcome: list[T | Exception] = []
        done = trio.Event()

        async def carry_out() -> None:
            try:
                outcome.append(await handle())
            except Exception as error:
                outcome.append(error)
            if self._gets_through(to, source):
                self.clockwork.after(self._delay(to, source), done.set)

        with trio.move_on_after(REQUEST_SECONDS):
            await trio.sleep(self._delay(source, to))
            if self._gets_through(source, to):
                nursery = self._serving.get(to)
                if nursery is None:
                    raise ConnectionLost(f"{to}: connection refused")
                self.start_on(to, nursery, carry_out)
            await done.wait()
            if isinstance(outcome[0], Exception):
                raise outcome[0]
            return outcome[0]
        raise ConnectionLost(f"{to}: timed out")

    def _gets_through(self, source: str, to: str) -> bool:
        return not self.blocked(source, to) and self.random.random() >= self.lost_requests


def over_the_wire(message: msgspec.Struct) -> Any:
    """What the other side decodes."""
    return msgspec.json.decode(msgspec.json.encode(message), type=type(message))
