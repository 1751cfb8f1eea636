"""What the metaserver hears: deltas until acknowledged, registration anew, patience, and when to give up."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import pytest

from chunkserver.report import BACKOFF_LIMIT_SECONDS, STUCK_SECONDS, Mailbox, Outbox, Reporter, Snapshot, report_pages
from metaserver.errors import ConnectionLost, DfsError, ErrorCode
from metaserver.protocol import (
    Heartbeat,
    HeartbeatReply,
    Json,
    Order,
    OrderKind,
    OrderResult,
    Register,
    Registered,
    ReplicaReport,
    ReportPage,
)

ReplyT = TypeVar("ReplyT")


def replica(chunk: int, length: int = 0) -> ReplicaReport:
    return ReplicaReport(chunk, length, 0, 0, False)


def test_outbox_keeps_what_was_not_acknowledged() -> None:
    news: list[int] = []
    outbox = Outbox(lambda: news.append(1))
    outbox.changed(replica(1))
    outbox.changed(replica(2))
    first = outbox.parcel()
    outbox.changed(replica(1, 5))
    outbox.gone(3)
    outbox.result(OrderResult(9, 1, ""))
    assert [r.chunk for r in first.changes] == [1, 2]
    outbox.acknowledge(first.mark)
    second = outbox.parcel()
    assert (second.changes, second.gone, [r.order for r in second.results]) == ([replica(1, 5)], [3], [9])
    assert outbox.parcel() == second
    outbox.changed(replica(3))  # it came back
    assert outbox.parcel().gone == []
    outbox.forget_chunks()
    assert outbox.parcel().changes == []
    assert len(outbox.parcel().results) == 1
    outbox.acknowledge(outbox.parcel().mark)
    assert outbox.parcel().results == []
    assert len(news) == 6


def test_outbox_sends_in_pages() -> None:
    outbox = Outbox(lambda: None)
    for chunk in range(10):
        outbox.changed(replica(chunk))
        outbox.result(OrderResult(chunk, 1, ""))
    seen: list[int] = []
    orders: list[int] = []
    for _ in range(10):
        parcel = outbox.parcel(limit=3)
        seen += [r.chunk for r in parcel.changes]
        orders += [r.order for r in parcel.results]
        outbox.acknowledge(parcel.mark)
        if not parcel.more:
            break
    assert sorted(set(seen)) == sorted(set(orders)) == list(range(10))
    assert outbox.parcel().changes == []


@pytest.mark.parametrize(("count", "pages"), [(0, 1), (1, 1), (3, 1), (4, 2), (7, 3)])
def test_report_pages(count: int, pages: int) -> None:
    made = report_pages(5, [replica(chunk) for chunk in range(count)], size=3)
    assert [(page.page, page.last, page.incarnation) for page in made] == [(n, n == pages - 1, 5) for n in range(pages)]
    assert [r.chunk for page in made for r in page.replicas] == list(range(count))


class Metaserver:
    """Answers as a metaserver does, or fails as told; ``script`` is called before each request."""

    def __init__(self) -> None:
        self.heard: list[msgspec.Struct] = []
        self.reply = HeartbeatReply(1, 0, False, [])
        self.script: Callable[[msgspec.Struct], None] = lambda message: None

    def post(self, path: str, message: msgspec.Struct, reply: type[ReplyT]) -> ReplyT:
        self.heard.append(message)
        self.script(message)
        answer: Any
        if isinstance(message, Register):
            assert path == "/v1/servers/register"
            answer = Registered("cluster", 1, 1.0)
        elif isinstance(message, ReportPage):
            assert path == "/v1/servers/77/report"
            answer = Json()
        else:
            assert isinstance(message, Heartbeat)
            assert path == "/v1/servers/77/heartbeat"
            answer = msgspec.structs.replace(self.reply, acknowledged=message.number)
            self.reply = HeartbeatReply(1, 0, False, [])
        assert isinstance(answer, reply)
        return answer


class PatientMailbox(Mailbox):
    """Does not wait; closes after a number of waits."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self.waits = waits
        self.waited: list[float] = []

    def wait(self, seconds: float) -> None:
        self.pause(seconds)

    def pause(self, seconds: float) -> None:
        self.waited.append(seconds)
        if len(self.waited) >= self.waits:
            self.close()


class Server:
    """The reporter's callbacks."""

    def __init__(self) -> None:
        self.orders_taken: list[Order] = []
        self.replicas = [replica(1), replica(2)]

    def registration(self) -> Register:
        return Register(77, "n", "cluster", 5, "h", 1, 2, "", [], "/d", 10, 5, 0, 0, 1)

    def registered(self, reply: Registered) -> None:
        if reply.cluster_id != "cluster":
            raise DfsError(ErrorCode.WRONG_CLUSTER)

    def listing(self) -> list[ReplicaReport]:
        return self.replicas

    def orders(self, orders: list[Order]) -> None:
        self.orders_taken += orders


class Bench:
    def __init__(self, waits: int) -> None:
        self.metaserver = Metaserver()
        self.server = Server()
        self.mailbox = PatientMailbox(waits)
        self.outbox = Outbox(lambda: None)
        self.now = 0.0
        self.mailbox.post(Snapshot(0.0, 100, 50, 2, "OK", 1, 2))
        self.reporter = Reporter(self.metaserver, self.server, self.outbox, self.mailbox, lambda: self.now)

    def heartbeats(self) -> list[Heartbeat]:
        return [message for message in self.metaserver.heard if isinstance(message, Heartbeat)]


def test_registers_reports_and_beats() -> None:
    bench = Bench(waits=4)
    order = Order(1, 1, OrderKind.DELETE, 5)
    bench.metaserver.reply.orders = [order]
    bench.metaserver.reply.chunk_limit = 77
    bench.outbox.changed(replica(2, 9))
    bench.reporter.run()
    kinds = [type(message) for message in bench.metaserver.heard]
    assert kinds == [Register, ReportPage, Heartbeat, Heartbeat]
    first, second = bench.heartbeats()
    assert (first.number, first.changes, first.free, first.disk_state) == (1, [replica(2, 9)], 50, "OK")
    assert (second.number, second.changes) == (2, [])
    assert bench.server.orders_taken == [order]
    assert bench.mailbox.chunk_limit == 77


def test_lost_heartbeat_is_said_again_without_registering() -> None:
    bench = Bench(waits=8)
    failures = [ConnectionLost("away")] * 3

    def fail(message: msgspec.Struct) -> None:
        if isinstance(message, Heartbeat) and failures:
            raise failures.pop()

    bench.metaserver.script = fail
    bench.outbox.gone(4)
    bench.reporter.run()
    assert [h.number for h in bench.heartbeats()][:4] == [1, 2, 3, 4]
    assert [h.gone for h in bench.heartbeats()[:5]] == [[4], [4], [4], [4], []]
    assert sum(isinstance(message, Register) for message in bench.metaserver.heard) == 1


def test_patience_grows_to_its_limit() -> None:
    bench = Bench(waits=10)

    def fail(message: msgspec.Struct) -> None:
        raise ConnectionLost("away")

    bench.metaserver.script = fail
    bench.reporter.run()
    assert bench.mailbox.waited[:3] == [0.1, 0.2, 0.4]
    assert max(bench.mailbox.waited) == bench.mailbox.waited[-1] == BACKOFF_LIMIT_SECONDS


def test_registers_anew_when_told_or_unknown() -> None:
    bench = Bench(waits=3)
    bench.metaserver.reply.register_again = True
    bench.metaserver.reply.orders = [Order(1, 1, OrderKind.DELETE, 5)]
    bench.reporter.run()
    kinds = [type(message).__name__ for message in bench.metaserver.heard]
    assert kinds[:6] == ["Register", "ReportPage", "Heartbeat", "Register", "ReportPage", "Heartbeat"]
    assert bench.server.orders_taken == []  # whoever does not know us has no orders for us

    bench = Bench(waits=4)
    failures = [DfsError(ErrorCode.NOT_FOUND, "who are you")]

    def fail(message: msgspec.Struct) -> None:
        if isinstance(message, Heartbeat) and failures:
            raise failures.pop()

    bench.metaserver.script = fail
    bench.reporter.run()
    assert sum(isinstance(message, Register) for message in bench.metaserver.heard) == 2


@pytest.mark.parametrize("code", [ErrorCode.WRONG_CLUSTER, ErrorCode.BAD_KEY, ErrorCode.WRONG_VERSION])
def test_what_no_patience_cures_ends_it(code: ErrorCode) -> None:
    bench = Bench(waits=5)

    def fail(message: msgspec.Struct) -> None:
        raise DfsError(code, "no")

    bench.metaserver.script = fail
    with pytest.raises(DfsError) as error:
        bench.reporter.run()
    assert error.value.code is code


def test_key_refused_later_is_no_reason_to_stop_serving() -> None:
    bench = Bench(waits=6)

    def fail(message: msgspec.Struct) -> None:
        if isinstance(message, Heartbeat):
            raise DfsError(ErrorCode.BAD_KEY, "changed")

    bench.metaserver.script = fail
    bench.reporter.run()
    assert len(bench.heartbeats()) > 1


def test_stuck_loop_is_not_covered_up() -> None:
    bench = Bench(waits=4)
    bench.now = STUCK_SECONDS + 1
    bench.reporter.run()
    assert bench.heartbeats() == []


def test_bell_ends_a_wait() -> None:
    mailbox = Mailbox()
    mailbox.ring()
    mailbox.wait(1000)
    mailbox.close()
    mailbox.wait(1000)
    mailbox.pause(1000)
    assert mailbox.closed
