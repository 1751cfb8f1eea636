"""The end of /dev/fuse, with a socket that keeps messages apart in place of the device."""

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio

from dfsmount import fusewire
from dfsmount.device import IDLE_TASKS, REQUESTS_PER_TURN, Device, NoAnswer, Served
from dfsmount.fusewire import Request
from dfsmount.operations import FUSEError
from metaserver.errors import DfsError, ErrorCode

SOON, LATER, FORGET, REFUSE, BREAK, BREAK_LATER, LONG = range(1, 8)


class Kernel:
    """Asks, and serves itself as far as a test wants."""

    def __init__(self) -> None:
        self.socket, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self._owner = device
        self.go = trio.Event()
        self.served: list[int] = []
        self.device = Device(device.fileno(), self.serve)

    def serve(self, request: Request, body: memoryview) -> Served:
        self.served.append(request.unique)
        if request.opcode == LATER:
            return self._later(bytes(body))
        if request.opcode == FORGET:
            raise NoAnswer
        if request.opcode == REFUSE:
            raise DfsError(ErrorCode.NO_SPACE)
        if request.opcode == BREAK:
            raise ZeroDivisionError
        if request.opcode == BREAK_LATER:
            return self._break()
        return bytes(100_000) if request.opcode == LONG else bytes(body) or None

    async def _later(self, body: bytes) -> bytes:
        await self.go.wait()
        return body

    async def _break(self) -> bytes:
        await trio.lowlevel.checkpoint()
        raise FUSEError(errno.EROFS)

    def ask(self, opcode: int, unique: int, body: bytes = b"") -> None:
        self.socket.send(fusewire.HEADER.pack(40 + len(body), opcode, unique, 1, 0, 0, 0, 0, 0) + body)

    async def answer(self) -> tuple[int, int, bytes]:
        """Number, errno and data of the next answer."""
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.socket)
        data = self.socket.recv(1 << 20)
        length, error, unique = struct.unpack_from("<IiQ", data)
        assert length == len(data)
        return unique, -error, data[16:]

    def close(self) -> None:
        self.socket.close()
        self._owner.close()


@pytest.fixture
async def kernel(nursery: trio.Nursery) -> AsyncIterator[Kernel]:
    kernel = Kernel()
    nursery.start_soon(kernel.device.run)
    yield kernel
    kernel.device.stop()
    kernel.go.set()
    await trio.testing.wait_all_tasks_blocked()
    kernel.close()


async def test_answers_at_once_and_later(kernel: Kernel) -> None:
    kernel.ask(LATER, 1, b"late")
    kernel.ask(SOON, 2, b"early")
    kernel.ask(SOON, 3)
    assert await kernel.answer() == (2, 0, b"early")
    assert await kernel.answer() == (3, 0, b"")
    kernel.go.set()
    assert await kernel.answer() == (1, 0, b"late")
    kernel.ask(LONG, 4)
    assert await kernel.answer() == (4, 0, bytes(100_000))


async def test_errors_and_what_has_no_answer(kernel: Kernel) -> None:
    for number, opcode in enumerate((FORGET, REFUSE, BREAK, BREAK_LATER)):
        kernel.ask(opcode, number)
    found = [await kernel.answer() for _ in range(3)]
    assert sorted(found) == [(1, errno.ENOSPC, b""), (2, errno.EIO, b""), (3, errno.EROFS, b"")]
    assert kernel.served == [0, 1, 2, 3]


async def test_many_wait_at_once_and_few_tasks_stay(kernel: Kernel) -> None:
    count = 10 * IDLE_TASKS
    for number in range(count):
        kernel.ask(LATER, number)
        await trio.lowlevel.checkpoint()
    while len(kernel.served) < count:
        await trio.lowlevel.checkpoint()
    kernel.go.set()
    assert {(await kernel.answer())[0] for _ in range(count)} == set(range(count))
    await trio.testing.wait_all_tasks_blocked()
    assert len(kernel.device._idle) == IDLE_TASKS


async def test_other_tasks_have_their_turn(kernel: Kernel) -> None:
    """However many requests there are."""
    turns = 0
    for number in range(3 * REQUESTS_PER_TURN):
        kernel.ask(SOON, number)
    while len(kernel.served) < 3 * REQUESTS_PER_TURN:
        turns += 1
        await trio.lowlevel.checkpoint()
    # One between the first and the second, one before the third; in which order tasks run is chance.
    assert turns >= 2


async def test_the_end_waits_for_what_is_in_progress(kernel: Kernel, nursery: trio.Nursery) -> None:
    own = Kernel()
    ended = trio.Event()

    async def run() -> None:
        await own.device.run()
        ended.set()

    nursery.start_soon(run)
    own.ask(LATER, 1)
    while not own.served:
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()
    own.device.stop()
    own.ask(SOON, 2)
    await trio.testing.wait_all_tasks_blocked()
    assert not ended.is_set()
    own.go.set()
    assert (await own.answer())[0] == 1
    with trio.fail_after(5):
        await ended.wait()
    assert own.served == [1]
    own.close()


async def test_the_kernel_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()

    def gone(*_: object) -> int:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    assert not kernel.device.ended
    monkeypatch.setattr(os, "readv", gone)
    with trio.fail_after(5):
        await kernel.device.run()
    assert kernel.device.ended
    kernel.close()


async def test_an_answer_that_nobody_waits_for_is_no_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "writev", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOENT, "gone")))
    kernel.ask(SOON, 1)
    while not kernel.served:
        await trio.lowlevel.checkpoint()
    monkeypatch.undo()
    kernel.ask(SOON, 2)
    assert (await kernel.answer())[0] == 2
