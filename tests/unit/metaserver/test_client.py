"""The session client against a scripted metaserver: what it resends, retries, forgets and gives up."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from metaserver import client, protocol, transport, wire
from metaserver.connection import Connection, Incoming, Reply, Result, accept_handshake
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey

KEY = ClusterKey(b"k" * 32)
ATTRIBUTES = protocol.Attributes(1, 0o40755, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
METHODS = {method.number: method for method in vars(protocol).values() if isinstance(method, wire.Method)}


class Script:
    """A metaserver that keeps a list of what it was asked and answers as its fields say."""

    def __init__(self) -> None:
        self.epoch = 1
        self.number = 0
        self.durable = 0
        self.survived: tuple[protocol.LastNumber, ...] = ()
        self.stale = False
        self.steady_ms = 0
        self.expires_ms: list[int] = []
        self.log: list[tuple[str, int]] = []
        self.resent: list[tuple[int, Any]] = []
        self.declared: list[protocol.Declare] = []
        self.refuse_resent: set[int] = set()
        self.refusing_resends = False
        self.drop_before_answer = 0
        self.connections: list[Connection] = []
        self.flushed_arrived = trio.Event()

    def dispatch(self, connection: Connection, incoming: Incoming) -> Result:
        method = METHODS[incoming.method]
        request = method.decode_request(incoming.body)
        self.log.append((method.name, request.operation))
        if method.number in protocol.CHANGES:
            self.expires_ms.append(request.expires_ms)
        if self.drop_before_answer and method.number in protocol.CHANGES:
            self.drop_before_answer -= 1
            self.number += 1
            connection.close("scripted")
            return Reply(wire.Empty())
        answer = getattr(self, method.name, None)
        if answer is None:
            raise DfsError(ErrorCode.UNKNOWN_METHOD, method.name)
        result: Result = answer(connection, request)
        return result

    def reply(self, message: Any, ids: tuple[int, ...] = ()) -> Reply:
        return Reply(message, (), self.number, self.durable, 1000 + self.number, ids)

    def open_session(self, connection: Connection, request: Any) -> Result:
        if self.stale and request.message.session:
            raise DfsError(ErrorCode.STALE_SESSION)
        session = request.message.session or 7 + len(self.connections)
        self.connections.append(connection)
        return self.reply(
            protocol.SessionOpened(
                session, self.epoch, "c", ATTRIBUTES, self.survived, 5_000, 1.0, 60.0, 2, self.steady_ms
            )
        )

    def declare(self, connection: Connection, request: Any) -> Result:
        self.declared.append(request.message)
        return self.reply(wire.Empty())

    def resend(self, connection: Connection, request: Any) -> Result:
        if self.refusing_resends:
            raise DfsError(ErrorCode.INVALID, "too much to do again")
        for change in request.message.changes:
            self.resent.append((change.operation, METHODS[change.method].decode_request(change.request)))
        return self.reply(wire.Empty())

    def resume_done(self, connection: Connection, request: Any) -> Result:
        results = []
        for operation, again in self.resent:
            if operation in self.refuse_resent:
                results.append(protocol.Resent(operation, b"", ErrorCode.EXISTS, "exists"))
                continue
            self.number += 1
            ids = again.replay.ids if again.replay else (900 + operation,)
            response = wire.Response(self.number, self.durable, self.made(ids[0]), 1, ids)
            results.append(protocol.Resent(operation, wire.encode(response), 0, ""))
        return self.reply(protocol.Resumed(tuple(results)))

    def made(self, ino: int) -> protocol.Made:
        attributes = protocol.Attributes(ino, 0o100644, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        return protocol.Made(protocol.Entry(attributes), True)

    def make(self, connection: Connection, request: Any) -> Result:
        self.number += 1
        return self.reply(self.made(100 + request.operation), (100 + request.operation,))

    def get_attributes(self, connection: Connection, request: Any) -> Result:
        return self.reply(protocol.Entry(ATTRIBUTES))

    def sync(self, connection: Connection, request: Any) -> Result:
        self.durable = max(self.durable, request.message.number)
        return self.reply(wire.Empty())

    def keep_alive(self, connection: Connection, request: Any) -> Result:
        return self.reply(protocol.KeptAlive(5_000))

    def close_session(self, connection: Connection, request: Any) -> Result:
        return self.reply(wire.Empty())

    def flushed(self, connection: Connection, request: Any) -> Result:
        assert request.message.ticket == 11
        self.flushed_arrived.set()
        return self.reply(wire.Empty())


class World:
    def __init__(self, script: Script, meta: client.MetaClient, events: list[Any]) -> None:
        self.script, self.meta, self.events = script, meta, events

    async def make(self, name: bytes = b"f", timeout: float = 5) -> int:
        made = await self.meta.call(protocol.MAKE, protocol.Make(1, name, 0o100644, 0, 0), timeout=timeout)
        return made.entry.attributes.ino

    def cut(self) -> None:
        self.script.connections[-1].close("scripted")


@asynccontextmanager
async def a_world(script: Script) -> AsyncIterator[World]:
    listener = transport.listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    events: list[Any] = []

    async def handle(stream: transport.SocketTransport) -> None:
        try:
            connection = await accept_handshake(stream, script.dispatch, key=KEY, cluster_id="c", role=protocol.ROLE)
        except DfsError:
            return
        await connection.run()

    async def on_flush(inos: Any) -> None:
        events.append(("flush", tuple(inos)))

    hooks = client.Hooks(
        on_flush,
        lambda inos: events.append(("changed", tuple(inos))),
        lambda: [protocol.Opened(5, True)],
        lambda: events.append(("new session", 0)),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.serve, listener, handle)
        identity = client.SessionIdentity("here", "/mnt", 1)
        async with client.open_meta("127.0.0.1", port, KEY, identity, hooks) as meta:
            yield World(script, meta, events)
        nursery.cancel_scope.cancel()


async def test_a_change_whose_answer_is_lost_happens_once_under_its_number() -> None:
    script = Script()
    async with a_world(script) as world:
        script.drop_before_answer = 1
        assert await world.make() == 901
        assert [operation for operation, _ in script.resent] == [1]
        assert script.resent[0][1].replay is None
        assert script.declared[0].opened == (protocol.Opened(5, True),)
        assert await world.make() == 102


async def test_answered_changes_are_resent_only_if_the_log_lost_them_and_with_their_first_answer() -> None:
    script = Script()
    async with a_world(script) as world:
        inos = [await world.make() for _ in range(3)]
        script.epoch, script.survived = 2, (protocol.LastNumber(1, 1),)
        script.number = script.durable = 0
        world.cut()
        assert (await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))).attributes.ino == 1
        assert [operation for operation, _ in script.resent] == [2, 3]
        replays = [request.replay for _, request in script.resent]
        assert [(replay.epoch, replay.number, replay.ids) for replay in replays] == [
            (1, 2, (inos[1],)),
            (1, 3, (inos[2],)),
        ]
        await world.meta.sync()
        script.resent.clear()
        script.epoch, script.survived = 3, (protocol.LastNumber(2, 2),)
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        assert script.resent == []


async def test_durable_changes_are_forgotten() -> None:
    script = Script()
    async with a_world(script) as world:
        for _ in range(5):
            await world.make()
        assert len(world.meta._changes) == 5
        await world.meta.sync()
        assert not world.meta._changes
        asked = len(script.log)
        await world.meta.sync()
        assert len(script.log) == asked
        assert world.meta.acknowledged == 5


async def test_a_lost_change_that_fails_again_is_an_error_at_the_next_sync_once() -> None:
    script = Script()
    async with a_world(script) as world:
        await world.make()
        script.epoch, script.number, script.refuse_resent = 2, 0, {1}
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        with pytest.raises(DfsError, match="lost in a crash"):
            await world.meta.sync()
        await world.meta.sync()


async def test_an_evicted_mount_gets_a_new_session_and_is_told() -> None:
    script = Script()
    async with a_world(script) as world:
        first = world.meta.session
        await world.make()
        script.stale = True
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        assert world.meta.session != first
        assert world.events == [("new session", 0)]
        assert script.resent == []


async def test_a_sync_waits_until_what_a_crash_took_is_done_again() -> None:
    script = Script()
    async with a_world(script) as world:
        await world.make()
        resume_done, asked, window = script.resume_done, trio.Event(), trio.Event()

        async def in_the_window(connection: Connection, request: Any) -> Reply:
            asked.set()
            await window.wait()
            result = resume_done(connection, request)
            assert isinstance(result, Reply)
            return result

        script.resume_done = in_the_window  # type: ignore[method-assign]
        script.epoch, script.number, script.refuse_resent = 2, 0, {1}
        world.cut()
        with trio.fail_after(5):
            await asked.wait()
        with trio.move_on_after(0.2) as waited:
            await world.meta.sync()
        assert waited.cancelled_caught
        window.set()
        with pytest.raises(DfsError, match="lost in a crash"):
            await world.meta.sync()


@pytest.mark.parametrize(("epoch", "survived", "lost"), [(1, -1, False), (2, 1, False), (2, 0, True)])
async def test_what_a_crash_took_from_an_evicted_mount_is_an_error_once(epoch: int, survived: int, lost: bool) -> None:
    script = Script()
    async with a_world(script) as world:
        await world.make()
        script.stale, script.epoch, script.survived = True, epoch, (protocol.LastNumber(1, survived),)
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        if lost:
            with pytest.raises(DfsError, match="lost in a crash"):
                await world.meta.sync()
        await world.meta.sync()


async def test_a_change_that_times_out_is_withdrawn() -> None:
    script = Script()
    async with a_world(script) as world:

        async def never() -> Reply:
            await trio.sleep_forever()
            raise AssertionError

        script.make = lambda connection, request: never()  # type: ignore[method-assign]
        with pytest.raises(DfsError) as caught:
            await world.meta.call(protocol.MAKE, protocol.Make(1, b"x", 0o100644, 0, 0), timeout=0.1)
        assert caught.value.code is ErrorCode.TIMEOUT
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        assert script.declared[-1].withdrawn == (1,)


async def test_any_number_of_withdrawn_changes_can_be_told() -> None:
    """In one message they would pass its bound, and no connection would come about any more."""
    script = Script()
    async with a_world(script) as world:
        many = [(1 << 50) + number for number in range(150_000)]
        world.meta._withdrawn = list(many)
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        assert [operation for page in script.declared for operation in page.withdrawn] == many
        assert [opened for page in script.declared for opened in page.opened] == [protocol.Opened(5, True)]


async def test_what_is_withdrawn_while_a_session_returns_is_told_the_next_time() -> None:
    script = Script()
    async with a_world(script) as world:
        resumed = script.resume_done

        def resume_done(connection: Connection, request: Any) -> Result:
            world.meta._withdrawn.append(77)
            return resumed(connection, request)

        script.resume_done = resume_done  # type: ignore[method-assign]
        world.meta._withdrawn = [5]
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        assert [page.withdrawn for page in script.declared] == [(5,)]
        script.resume_done = resumed  # type: ignore[method-assign]
        world.cut()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        assert [page.withdrawn for page in script.declared] == [(5,), (77,)]


async def test_pushes_reach_the_hooks_and_a_flush_is_answered() -> None:
    script = Script()
    async with a_world(script) as world:
        script.connections[0].push(protocol.CHANGED, protocol.Changed((3,)))
        script.connections[0].push(protocol.FLUSH, protocol.Flush(11, (4, 5)))
        with trio.fail_after(5):
            await script.flushed_arrived.wait()
        assert world.events == [("changed", (3,)), ("flush", (4, 5))]


@pytest.mark.parametrize("key", [ClusterKey(b"x" * 32), None])
async def test_a_wrong_key_is_one_clear_error(key: ClusterKey | None) -> None:
    script = Script()
    async with a_world(script) as world:

        async def on_flush(inos: Any) -> None: ...

        hooks = client.Hooks(on_flush, lambda inos: None, list, lambda: None)
        with pytest.raises(DfsError) as caught:
            async with client.open_meta("127.0.0.1", world.meta.port, key, client.SessionIdentity("h", "/", 1), hooks):
                raise AssertionError
        assert caught.value.code is ErrorCode.BAD_KEY


async def test_nobody_there_is_one_clear_error() -> None:
    async def on_flush(inos: Any) -> None: ...

    hooks = client.Hooks(on_flush, lambda inos: None, list, lambda: None)
    with pytest.raises(DfsError, match="cannot connect"):
        async with client.open_meta("127.0.0.1", 1, KEY, client.SessionIdentity("h", "/", 1), hooks):
            raise AssertionError


async def test_times_are_never_later_than_there_nor_earlier_than_what_was_told() -> None:
    script = Script()
    async with a_world(script) as world:
        meta, here = world.meta, 1_000_000
        meta._wall = client.RemoteClock(lambda: here)
        meta._latest_ns = 0
        # The metaserver is 500 ahead; answers take 30, 10 and 70 to come back.
        for way in (30, 10, 70):
            here += 1000
            meta._hear_time(here + 500 - way)
            assert meta.now_ns() <= here + 500
            assert meta.now_ns() > here + 500 - way
        assert meta.now_ns() == here + 490
        # What was told is never undercut, even if our clock is set back.
        told = here + 500 - 70
        here -= 100_000
        assert meta.now_ns() == told + 1


async def test_changes_say_when_they_are_given_up_on_the_steady_clock_of_the_metaserver() -> None:
    script = Script()
    script.steady_ms = 7_000_000
    async with a_world(script) as world:
        started = trio.current_time()
        await world.make(timeout=5)
        # Refused before it is given up, whatever the clocks of files say.
        assert script.expires_ms[0] < 7_005_000
        assert script.expires_ms[0] > 7_003_000 - 1000 * (trio.current_time() - started)
        # What is sent again to another life of the metaserver expires on that one's clock.
        script.steady_ms, script.epoch, script.drop_before_answer = 1_000, 2, 1
        await world.make(b"g", timeout=20)
        again = script.resent[-1][1]
        assert 15_000 < again.expires_ms < 21_000


async def test_without_a_steady_clock_changes_never_expire() -> None:
    script = Script()
    async with a_world(script) as world:
        await world.make()
        assert script.expires_ms == [0]


async def test_a_remote_clock_is_never_ahead_although_it_is_set() -> None:
    here, there = 0, 5_000
    clock = client.RemoteClock(lambda: here)
    clock.heard(there - 30)
    clock.heard(there - 10)
    assert clock.now_ns() == there - 10
    # Set forward there: known with the next answer.
    clock.heard(there + 1_000_000)
    assert clock.now_ns() == there + 1_000_000
    clock.forget()
    assert clock.offset_ns is None


async def test_a_session_that_cannot_be_resumed_is_lost_once_not_for_ever() -> None:
    script = Script()
    async with a_world(script) as world:
        await world.make()
        first = world.meta.session
        script.refusing_resends, script.epoch = True, 2
        world.cut()
        with pytest.raises(DfsError, match="the session has ended"):
            await world.make(b"g")
        await world.make(b"h")
        assert world.meta.session != first
        assert world.events == [("new session", 0)]
        with pytest.raises(DfsError, match="lost in a crash") as error:
            await world.meta.sync()
        assert error.value.code is ErrorCode.IO
        await world.meta.sync()
        # Whoever had a file open before is told, too: it may have been that one's.
        for _ in range(2):
            with pytest.raises(client.LostChange, match="lost in a crash"):
                await world.meta.sync(0)
        await world.meta.sync(world.meta.lost_told)


async def test_what_is_kept_for_sending_it_again_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_UNDURABLE_BYTES", 1000)
    script = Script()
    async with a_world(script) as world:
        for number in range(20):
            await world.make(b"%d" % number)
            assert world.meta._kept_bytes == 300 * len(world.meta._changes) <= 1500
        await world.meta.sync()
        await world.meta.call(protocol.GET_ATTRIBUTES, protocol.GetAttributes(1))
        assert world.meta._kept_bytes == 0
