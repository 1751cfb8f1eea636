"""Programs that use the mounts of a simulation, one operation after another, and check every answer.

A :class:`Program` has a directory of its own and a model of it; it survives the mount it works on and goes on with the
next one. Others' files are read, too, and compared with their owners' models.
"""

import os
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import trio
from simmodel import FileModel, Model, Names, Place, Tree
from simnodes import DIRECTORY_MODE, FILE_MODE, ClientNode, Gone
from simtrace import Trace, Violation

from dfsmount.vfs_names import Caller
from dfsmount.waiting import Kind
from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import SetAttributes

ME = Caller(0, 0)
FILES = ("a", "b", "c", "d/a", "d/b")
DIRECTORY = "d"
READ_BYTES = 64 << 10
# An operation ends within the mount's timeout and this (promise P5).
GRACE_SECONDS = 5.0
# What says that an operation has not happened, rather than that nobody knows.
DEFINITE = frozenset(code for code in ErrorCode if code < 100 and code is not ErrorCode.IO)


class Unsure(Exception):
    """An operation has failed in a way that the state of the world excuses; what it did is not known."""


class Program:
    """``excused`` says why an operation may fail at present; "" if it may not."""

    def __init__(
        self,
        name: str,
        client: ClientNode,
        model: Model,
        random: Random,
        trace: Trace,
        cuts: Callable[[], int],
        excused: Callable[[float, ErrorCode], str],
        pace: float,
    ) -> None:
        self.name = name
        self.client = client
        self.tree = Tree()
        self.others: list[Program] = []
        self.stopping = False
        self.operations = 0
        self.longest = 0.0
        self._model = model
        self._random = random
        self._trace = trace
        self._cuts = cuts
        self._cuts_seen = 0
        self._excused = excused
        self._pace = pace
        self._open: dict[str, tuple[int, FileModel]] = {}
        self._session: tuple[int, int] = (0, 0)
        self._stamp = 0
        self._ready = False
        self._idle = trio.Event()

    # -- asking the mount ----------------------------------------------------------------------------------------

    async def _do(self, kind: Kind, what: str, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """One request. Raises what it was answered with: DfsError if that says what has happened, else Unsure."""
        started = trio.current_time()
        self.operations += 1
        frozen = self.client.frozen_seconds
        try:
            result = await self.client.do(kind, what, function, *arguments)
        except DfsError as error:
            self._trace.add(f"{self.name} {what} -> {error.code.name}")
            if error.code in DEFINITE and error.code is not ErrorCode.NO_SPACE:
                raise
            self._may_fail(started, what, str(error), error.code)
            raise Unsure(str(error)) from error
        except TimeoutError as error:
            self._may_fail(started, what, str(error), ErrorCode.TIMEOUT)
            raise Unsure(str(error)) from error
        finally:
            took = trio.current_time() - started - (self.client.frozen_seconds - frozen)
            self.longest = max(self.longest, took)
            if took > self.client.world.timeout + GRACE_SECONDS:
                self._trace.violation(f"{self.name}: {what} took {took:.1f} s")
        return result

    def _may_fail(self, started: float, what: str, error: str, code: ErrorCode) -> None:
        reason = self._excused(started, code)
        if not reason:
            self._trace.violation(f"{self.name}: {what} failed without a reason: {error}")
        self._trace.counts[f"failed: {reason}"] += 1

    @property
    def _vfs(self) -> Any:
        if self.client.vfs is None:
            raise Gone
        return self.client.vfs

    async def _lookup(self, path: str) -> int:
        """The ino of a path below the mount's root."""
        vfs = self._vfs
        ino: int = vfs.root
        for name in path.split("/"):
            shown = await self._do(Kind.NAMES, f"lookup {path}", vfs.names.lookup, ino, name.encode())
            vfs.forget(shown.ino, 1)
            ino = shown.ino
        return ino

    def _path(self, path: str) -> str:
        return f"{self.name}/{path}"

    async def _parent(self, path: str) -> tuple[int, bytes]:
        parent, _, name = self._path(path).rpartition("/")
        return await self._lookup(parent), name.encode()

    async def list_path(self, path: str) -> list[str]:
        vfs = self._vfs
        ino = await self._lookup(path)
        number = vfs.names.open_directory(ino)
        found: list[str] = []
        start = 0
        while True:
            taken = 0
            for listed in await self._do(Kind.NAMES, f"list {path}", vfs.names.list_directory, number, start):
                vfs.names.took(listed)
                if listed.inode is not None:
                    vfs.forget(listed.inode.ino, 1)
                    found.append(listed.name.decode())
                start = listed.cookie
                taken += 1
            if not taken:
                vfs.names.release_directory(number)
                return found

    async def read_path(self, path: str) -> tuple[int, bytes]:
        """The ino and all bytes of a file below the mount's root, through a handle of its own."""
        vfs = self._vfs
        ino = await self._lookup(path)
        opened = await self._do(Kind.NAMES, f"open {path}", vfs.files.open, ino, os.O_RDONLY)
        try:
            return ino, await self._read_all(opened.number, path)
        finally:
            if self.client.vfs is vfs:
                vfs.files.release(opened.number)

    async def _read_all(self, number: int, path: str) -> bytes:
        vfs = self._vfs
        parts = []
        at = 0
        while True:
            piece = await self._do(Kind.READING, f"read {path}", vfs.files.read, number, at, READ_BYTES)
            parts.append(piece)
            at += len(piece)
            if len(piece) < READ_BYTES:
                return b"".join(parts)

    # -- the program ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until :meth:`stop`."""
        while not self.stopping:
            try:
                await self._mounted()
                await self._step()
            except Unsure as error:
                self._trace.add(f"{self.name} unsure: {error}")
                self._ready = False
            except Gone:
                self._ready = False
                await trio.sleep(0.05)
            except DfsError as error:
                self._trace.violation(f"{self.name}: unexpected answer {error}")
                self._ready = False
            except Violation as error:
                self._trace.violation(f"{self.name}: {error}")
                self._ready = False
                break
            await trio.sleep(self._random.random() * 2 * self._pace)
        self._idle.set()

    async def stop(self) -> None:
        self.stopping = True
        await self._idle.wait()

    async def _mounted(self) -> None:
        """Waits for a mount and finds out what is there, unless that is known."""
        await self.client.mounted.wait()
        session = (self.client.lives, self._vfs and self.client.meta.session)  # type: ignore[union-attr]
        if self._ready and session == self._session:
            return
        if session[0] != self._session[0]:
            self._open.clear()
        self._session = session
        await self.resync()
        self._ready = True

    async def resync(self) -> None:
        """What is there must be what may be there; from then on that is how it is."""
        await self._close_all()
        lost_tail = self._cuts() != self._cuts_seen
        if not await self._directory_exists():
            if lost_tail and self.tree.states[0] == {}:
                self.tree = Tree()
                self._made = False
            return await self._make_directory()
        names = self.tree.found(frozenset(await self._listing()), lost_tail=lost_tail)
        for path, place in names.items():
            if place.file is not None:
                await self._check_own(path, place.file, place.floor, adopt=True)
        self._trace.add(f"{self.name} goes on with {sorted(names)}")
        return None

    _made = False

    async def _directory_exists(self) -> bool:
        try:
            await self._lookup(self.name)
        except DfsError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            if self._made:
                raise Violation("the program's directory is gone") from None
            return False
        return True

    async def _make_directory(self) -> None:
        vfs = self._vfs
        await self._do(Kind.NAMES, "mkdir", vfs.names.make, vfs.root, self.name.encode(), DIRECTORY_MODE, ME)
        await self._do(Kind.WRITING, "fsync /", vfs.sync_names)
        self._made = True
        self._durable()

    async def _listing(self) -> list[str]:
        self._made = True
        top = await self.list_path(self.name)
        inner = await self.list_path(self._path(DIRECTORY)) if DIRECTORY in top else []
        return [*top, *(f"{DIRECTORY}/{name}" for name in inner)]

    async def _close_all(self) -> None:
        vfs = self._vfs
        for path in list(self._open):
            number, _ = self._open.pop(path)
            try:
                await self._do(Kind.NAMES, f"close {path}", vfs.files.flush, number)
            except (Unsure, DfsError):
                pass
            finally:
                if self.client.vfs is vfs:
                    vfs.files.release(number)

    def _durable(self) -> None:
        self.tree.durable()
        self._cuts_seen = self._cuts()

    async def _check_own(self, path: str, file: FileModel, floor: int, *, adopt: bool = False) -> None:
        """Reads one of its files; ``adopt``: a loss is possible, and this is how it is from now on."""
        session = self._session
        ino, content = await self.read_path(self._path(path))
        if file.ino and ino != file.ino:
            raise Violation(f"{path} is inode {ino}, {file} belongs there")
        self._model.learn(file, ino)
        if adopt:
            if not file.allows(content, floor):
                raise Violation(f"{path}: {describe(content, file.since(floor))}")
            file.adopt(content)
        elif content != file.newest:
            if self.client.vfs is None or self._session_now() != session:
                raise Gone
            if self._excused(0.0, ErrorCode.NO_SPACE) and file.allows(content, 0, mixed=True):
                # What was not synced was lost on its way: whoever had it open has been told, or nobody had.
                self._trace.add(f"{self.name} {path} has lost what was written last")
                self._trace.counts["losses of what was not synced"] += 1
                file.adopt(content)
                return
            raise Violation(f"{path}: {describe(content, [file.newest])}")

    def _session_now(self) -> tuple[int, int]:
        return (self.client.lives, self.client.meta.session if self.client.meta is not None else 0)

    async def _step(self) -> None:
        random = self._random
        steps: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self._create, 6), (self._write, 14), (self._fsync, 5), (self._close, 3), (self._rename, 3),
            (self._unlink, 2), (self._truncate, 2), (self._check_one, 3), (self._check_names, 2),
            (self._read_others, 4), (self._sync_names, 1), (self._make_inner, 1), (self._remove_inner, 1),
        ]  # fmt: skip
        step = random.choices([step for step, _ in steps], [weight for _, weight in steps])[0]
        await step()

    def _files(self) -> list[tuple[str, FileModel]]:
        return [(path, place.file) for path, place in self.tree.now.items() if place.file is not None]

    def _some_file(self) -> tuple[str, FileModel] | None:
        files = self._files()
        return self._random.choice(files) if files else None

    # -- changing names ------------------------------------------------------------------------------------------

    async def _change_names(self, names: Names, what: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """A change that leads to ``names`` if it happens."""
        self.tree.maybe = names
        result = await self._do(Kind.NAMES, what, function, *args)
        self.tree.maybe = None
        self.tree.change(names)
        self._trace.add(f"{self.name} {what}")
        return result

    async def _create(self) -> None:
        free = [path for path in FILES if path not in self.tree.now]
        free = [path for path in free if "/" not in path or DIRECTORY in self.tree.now]
        if not free:
            return
        path = self._random.choice(free)
        file = self._model.make()
        parent, name = await self._parent(path)
        create = self._vfs.files.create
        flags = os.O_RDWR | os.O_CREAT | self._random.choice((0, os.O_EXCL))
        names = {**self.tree.now, path: Place(file)}
        opened, shown = await self._change_names(names, f"create {path}", create, parent, name, FILE_MODE, flags, ME)
        self._vfs.forget(shown.ino, 1)
        self._model.learn(file, shown.ino)
        self._open[path] = (opened.number, file)

    async def _unlink(self) -> None:
        chosen = self._some_file()
        if chosen is None:
            return
        path, _ = chosen
        if self._random.random() < 0.7:
            await self._close_path(path)
        parent, name = await self._parent(path)
        names = {key: place for key, place in self.tree.now.items() if key != path}
        unlink = self._vfs.names.unlink
        await self._change_names(names, f"unlink {path}", lambda: unlink(parent, name, directory=False))
        await self._close_path(path)

    async def _rename(self) -> None:
        chosen = self._some_file()
        if chosen is None:
            return
        path, file = chosen
        targets = [each for each in FILES if "/" not in each or DIRECTORY in self.tree.now]
        target = self._random.choice(targets)
        if target == path:
            return
        await self._close_path(target)
        old_parent, old_name = await self._parent(path)
        new_parent, new_name = await self._parent(target)
        names = {key: place for key, place in self.tree.now.items() if key != path}
        names[target] = Place(file, file.number_of_newest)
        rename = self._vfs.names.rename
        await self._change_names(
            names, f"rename {path} {target}", rename, old_parent, old_name, new_parent, new_name, 0
        )
        if path in self._open:
            self._open[target] = self._open.pop(path)

    async def _make_inner(self) -> None:
        if DIRECTORY in self.tree.now:
            return
        parent, name = await self._parent(DIRECTORY)
        names = {**self.tree.now, DIRECTORY: Place(None)}
        shown = await self._change_names(names, "mkdir d", self._vfs.names.make, parent, name, DIRECTORY_MODE, ME)
        self._vfs.forget(shown.ino, 1)

    async def _remove_inner(self) -> None:
        if DIRECTORY not in self.tree.now:
            return
        parent, name = await self._parent(DIRECTORY)
        unlink = self._vfs.names.unlink
        if any(path.startswith(f"{DIRECTORY}/") for path in self.tree.now):
            try:
                await self._do(Kind.NAMES, "rmdir d", lambda: unlink(parent, name, directory=True))
            except DfsError as error:
                if error.code is not ErrorCode.NOT_EMPTY:
                    raise
                return
            raise Violation("a directory was removed that is not empty")
        names = {key: place for key, place in self.tree.now.items() if key != DIRECTORY}
        await self._change_names(names, "rmdir d", lambda: unlink(parent, name, directory=True))

    # -- contents ------------------------------------------------------------------------------------------------

    async def _handle(self, path: str, file: FileModel) -> int:
        if path not in self._open:
            ino = await self._lookup(self._path(path))
            opened = await self._do(Kind.NAMES, f"open {path}", self._vfs.files.open, ino, os.O_RDWR)
            self._open[path] = (opened.number, file)
        return self._open[path][0]

    async def _close_path(self, path: str) -> None:
        if path in self._open:
            vfs = self._vfs
            number, file = self._open.pop(path)
            try:
                await self._do(Kind.NAMES, f"close {path}", vfs.files.flush, number)
            except Unsure:
                file.torn = True
                raise
            finally:
                if self.client.vfs is vfs:
                    vfs.files.release(number)

    async def _close(self) -> None:
        if self._open:
            await self._close_path(self._random.choice(list(self._open)))

    def _data(self, file: FileModel) -> bytes:
        random = self._random
        self._stamp += 1
        sizes = (random.randint(1, 200), random.randint(200, 9000), random.randint(9000, 150_000))
        size = random.choices(sizes, (5, 4, 1))[0]
        stamp = b"%s.%d.%d;" % (self.name.encode(), file.number, self._stamp)
        return (stamp * (size // len(stamp) + 1))[:size]

    async def _write(self) -> None:
        chosen = self._some_file()
        if chosen is None:
            return
        path, file = chosen
        number = await self._handle(path, file)
        old = file.newest
        data = self._data(file)
        if self._random.random() < 0.5:
            offset = len(old)
        else:
            offset = self._random.randint(0, len(old) + 2000)
        new = old.ljust(offset, b"\0")[:offset] + data + old[offset + len(data) :]
        if len(new) > 400_000:
            return
        file.change(new)
        try:
            await self._do(Kind.WRITING, f"write {path}", self._vfs.files.write, number, offset, data)
        except Unsure:
            file.torn = True
            raise
        self._trace.add(f"{self.name} write {path} {offset}+{len(data)} -> {file.number_of_newest}")

    async def _truncate(self) -> None:
        chosen = self._some_file()
        if chosen is None:
            return
        path, file = chosen
        # With a handle it is ftruncate(2).
        number = await self._handle(path, file) if self._random.random() < 0.7 else None
        ino = await self._lookup(self._path(path))
        old = file.newest
        size = self._random.choice((0, len(old) // 2, self._random.randint(0, len(old) + 5000)))
        file.change(old[:size].ljust(size, b"\0"))
        changes = SetAttributes(ino, size=size)
        try:
            await self._do(Kind.NAMES, f"truncate {path}", self._vfs.set_attributes, changes, number)
        except Unsure:
            file.torn = True
            raise
        self._trace.add(f"{self.name} truncate {path} {size} -> {file.number_of_newest}")

    async def _fsync(self) -> None:
        chosen = self._some_file()
        if chosen is None:
            return
        path, file = chosen
        number = await self._handle(path, file)
        newest = file.number_of_newest
        session = self._session_now()
        try:
            await self._do(Kind.WRITING, f"fsync {path}", self._vfs.files.fsync, number)
        except Unsure:
            file.torn = True
            raise
        if self._session_now() != session:
            return
        file.durable(newest)
        self._durable()
        self._trace.add(f"{self.name} fsync {path} = {newest}")

    async def _sync_names(self) -> None:
        session = self._session_now()
        await self._do(Kind.WRITING, "fsync directory", self._vfs.sync_names)
        if self._session_now() == session:
            self._durable()
            self._trace.add(f"{self.name} fsync directory")

    # -- checking ------------------------------------------------------------------------------------------------

    async def _check_one(self) -> None:
        chosen = self._some_file()
        if chosen is not None:
            await self._check_own(*chosen, 0)

    async def _check_names(self) -> None:
        listing = await self._listing()
        if sorted(listing) != sorted(self.tree.now):
            if self._session_now() != self._session:
                raise Gone
            raise Violation(f"names {sorted(listing)} found, {sorted(self.tree.now)} must be there")

    async def _read_others(self) -> None:
        """A file of another program: each byte must be one that its owner has written there."""
        if not self.others:
            return
        other = self._random.choice(self.others)
        files = other._files()
        if not files:
            return
        path, file = self._random.choice(files)
        first = file.first
        try:
            ino, content = await self.read_path(other._path(path))
        except DfsError as error:
            if error.code in (ErrorCode.NOT_FOUND, ErrorCode.STALE_INODE):
                return
            raise
        found = self._model.by_ino.get(ino)
        if found is not file:
            return
        self._trace.add(f"{self.name} read {other.name}/{path}")
        if file.first == first and not file.allows(content, first, mixed=True):
            raise Violation(f"{other.name}/{path}: {describe(content, file.since(first))}")

    async def finish(self) -> None:
        """Everything healed: writes out what is pending, and all of it must be there."""
        for _ in range(20):
            try:
                await self._mounted()
                await self._close_all()
                await self._do(Kind.WRITING, "flush", self._vfs.write_everything)
                if self._session_now() != self._session:
                    continue
                break
            except (Unsure, Gone) as error:
                self._trace.add(f"{self.name} not finished: {error!r}")
                self._ready = False
                await trio.sleep(1.0)
        else:
            raise Violation("cannot finish although everything is healed")
        self._durable()
        await self._check_names()
        for path, file in self._files():
            await self._check_own(path, file, 0)
            file.durable(file.number_of_newest)

    async def check_others(self) -> None:
        """Once everybody has finished."""
        for other in self.others:
            for path, file in other._files():
                _, content = await self.read_path(other._path(path))
                if content != file.newest:
                    raise Violation(f"{other.name}/{path} from {self.name}: {describe(content, [file.newest])}")


def describe(content: bytes, allowed: list[bytes]) -> str:
    """What is wrong with a file, in a line."""
    newest = allowed[-1] if allowed else b""
    at = next((at for at, pair in enumerate(zip(content, newest, strict=False)) if pair[0] != pair[1]), None)
    where = ""
    if at is not None:
        where = f"; differs from the newest at {at}: {content[at : at + 20]!r}, {newest[at : at + 20]!r}"
    return f"{len(content)} bytes found, one of {[len(each) for each in allowed]} must be there{where}"
