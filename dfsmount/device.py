"""The mount's end of /dev/fuse: takes the kernel's requests, has them served, writes the answers.

One task reads. A request that can be answered at once is answered there, before the next is read; any other is given
to a task of its own, of which some are kept waiting. libfuse and pyfuse3's session loop did the same with 20 us of CPU
for each request more (26 us instead of 6.5 us for a getxattr that is answered from memory, measured in turns).
"""

import errno
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import structlog
import trio
from outcome import Value

from dfsmount import fusewire
from dfsmount.errors import errno_of
from dfsmount.fusewire import Request
from dfsmount.operations import FUSEError
from metaserver.errors import DfsError

log = structlog.get_logger(__name__)

# So many requests may be taken without a look at the other tasks (answers from the servers, timers).
REQUESTS_PER_TURN = 8
# Tasks that wait for work; starting one costs more than many a request.
IDLE_TASKS = 8
# Longer answers are not copied to put the header before them.
COPIED_BYTES = 16 << 10

Data: TypeAlias = bytes | bytearray | memoryview | None
# What becomes of a request: an answer (None: without data), no answer at all, or what is to be awaited for an answer.
Served: TypeAlias = Data | Coroutine[Any, Any, Data]


class NoAnswer(Exception):
    """Raised by whoever serves a request that the kernel expects no answer to."""


Serve: TypeAlias = Callable[[Request, memoryview], Served]


class Device:
    """The open device ``descriptor``, which stays its owner's. :meth:`run` once.

    ``serve`` gets a request and what follows its header, valid until it returns. It may raise
    :class:`metaserver.errors.DfsError`, ``FUSEError`` or :class:`NoAnswer`; so may what is to be awaited.
    """

    def __init__(self, descriptor: int, serve: Serve) -> None:
        self._descriptor = descriptor
        self._serve = serve
        self._buffer = bytearray(fusewire.REQUEST_BYTES)
        self._view = memoryview(self._buffer)
        self._idle: list[trio.lowlevel.Task] = []
        self._nursery: trio.Nursery | None = None
        self._stopped = False
        # The kernel has nothing to ask any more: unmounted, or all its requests were given up.
        self.ended = False
        os.set_blocking(descriptor, False)

    async def run(self) -> None:
        """Serves until the end of the mount or :meth:`stop`, and then until all requests are answered."""
        async with trio.open_nursery() as self._nursery:
            await self._read()
            self._stopped = True
            for task in self._idle:
                trio.lowlevel.reschedule(task, Value(None))
            self._idle.clear()

    def stop(self) -> None:
        """Takes no more requests."""
        if not self._stopped:
            self._stopped = True
            trio.lowlevel.notify_closing(self._descriptor)

    def tell(self, message: bytes) -> None:
        """Sends a message that is no answer. Raises OSError; ENOENT: what it is about is not known to the kernel."""
        os.write(self._descriptor, message)

    # -- taking ------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        taken = 0
        while not self._stopped:
            if not self._take():
                taken = 0
                if self._stopped:
                    return
                try:
                    await trio.lowlevel.wait_readable(self._descriptor)
                except trio.ClosedResourceError:
                    return
                continue
            taken += 1
            if taken == REQUESTS_PER_TURN:
                taken = 0
                await trio.lowlevel.checkpoint()

    def _take(self) -> bool:
        """Takes one request, if there is one."""
        try:
            size = os.readv(self._descriptor, [self._buffer])
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ENOENT:
                # It was given up at this moment.
                return True
            if error.errno == errno.ENODEV:
                self.ended = self._stopped = True
                return False
            raise
        request = Request._make(fusewire.HEADER.unpack_from(self._buffer))
        self._begin(request, self._view[fusewire.HEADER_BYTES : size])
        return True

    def _begin(self, request: Request, body: memoryview) -> None:
        unique = request.unique
        try:
            served = self._serve(request, body)
        except NoAnswer:
            return
        except Exception as error:
            self._answer_error(unique, self._errno(request.opcode, error))
            return
        if isinstance(served, Coroutine):
            self._hand_over(request, served)
        else:
            self._answer(unique, served)

    # -- what takes longer -------------------------------------------------------------------------------------

    def _hand_over(self, request: Request, work: Coroutine[Any, Any, Data]) -> None:
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop(), Value((request, work)))
        else:
            assert self._nursery is not None
            self._nursery.start_soon(self._work, (request, work))

    async def _work(self, job: tuple[Request, Coroutine[Any, Any, Data]] | None) -> None:
        while job is not None:
            await self._finish(*job)
            job = await self._next_job()

    async def _finish(self, request: Request, work: Coroutine[Any, Any, Data]) -> None:
        try:
            answer = await work
        except Exception as error:
            self._answer_error(request.unique, self._errno(request.opcode, error))
        else:
            self._answer(request.unique, answer)

    async def _next_job(self) -> tuple[Request, Coroutine[Any, Any, Data]] | None:
        if self._stopped or len(self._idle) >= IDLE_TASKS:
            return None
        task = trio.lowlevel.current_task()
        self._idle.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            if task in self._idle:
                self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        job: tuple[Request, Coroutine[Any, Any, Data]] | None = await trio.lowlevel.wait_task_rescheduled(abort)
        return job

    # -- answering ---------------------------------------------------------------------------------------------

    @staticmethod
    def _errno(opcode: int, error: Exception) -> int:
        if isinstance(error, DfsError):
            return errno_of(error)
        if isinstance(error, FUSEError):
            number: int = error.errno
            return number
        log.error("handler failed", opcode=opcode, exc_info=error)
        return errno.EIO

    def _answer(self, unique: int, data: Data) -> None:
        if not data:
            self._write([fusewire.answer(unique, 0)])
        elif len(data) <= COPIED_BYTES:
            self._write([fusewire.answer(unique, len(data)) + data])
        else:
            self._write([fusewire.answer(unique, len(data)), data])

    def _answer_error(self, unique: int, number: int) -> None:
        self._write([fusewire.answer(unique, 0, number)])

    def _write(self, parts: list[Any]) -> None:
        try:
            os.writev(self._descriptor, parts)
        except OSError as error:
            # ENOENT: nobody waits for it any more.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.error("the kernel did not take an answer", error=error.strerror)
