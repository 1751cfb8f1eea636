"""One mount from beginning to end: checks, session, kernel, signals, and an orderly end.

The order matters: whatever can be wrong is found before the kernel is asked to mount; success is reported only when
the mounted directory has answered; and the end writes everything before the session is closed.
"""

import errno
import gc
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Protocol

import pyfuse3
import structlog
import trio

from dfsmount import dfs_mounts, fuseloop, fusewire, guardian, killed
from dfsmount.assembly import Client, ClientOptions, open_client
from dfsmount.config import DEFAULT_KEY_FILE, MountPlan, Options
from dfsmount.device import Device
from dfsmount.driver import Driver
from dfsmount.operations import Operations
from dfsmount.opstats import OpStats
from dfsmount.telling import Telling
from dfsmount.vfs import Vfs
from dfsmount.vfs_core import VfsOptions
from dfsmount.virtual import Virtual
from dfsmount.virtual_driver import VirtualDriver
from dfsmount.waiting import DIRECT_LIMIT, LIMIT, Waiting
from metaserver import systemd
from metaserver.connection import keep_large_buffers
from metaserver.controlsocket import Control
from metaserver.errors import DfsError, ErrorCode
from metaserver.key import ClusterKey, KeyFileError, load_key

log = structlog.get_logger(__name__)

FUSE_DEVICE = Path("/dev/fuse")
FUSE_CONFIG = Path("/etc/fuse.conf")
# 99 waiting handlers stop a mount with pyfuse3's default; see also waiting.LIMIT.
MAX_TASKS = 2000
# Idle handlers beyond these end: starting one costs about as much as a request.
IDLE_TASKS = 8
# At the default of 128 KiB two requests are in flight; at this eight, of 1 MiB each.
READ_AHEAD_KIB = 4096
# After SIGTERM, how long requests in progress may go on once everything is flushed.
DRAIN_SECONDS = 5.0
# How often it is looked whether the kernel has ended the connection.
ENDED_SECONDS = 0.5
# Writing out what is left takes as long as it takes, but a cluster that does not answer must not hold up a shutdown.
# systemd waits for 90 s before it kills.
FINISH_SECONDS = 70.0


class MountError(Exception):
    """The mount cannot be made, or could not be ended cleanly; one line that says what to do."""


# -- before anything is asked of anybody ---------------------------------------------------------------------------


def prepare(plan: MountPlan) -> MountPlan:
    """Checks everything on this host; the plan with an absolute mountpoint."""
    _check_fuse(plan.options)
    mountpoint = Path(os.path.abspath(plan.mountpoint))
    _check_mountpoint(mountpoint)
    return MountPlan(plan.source, mountpoint.resolve(), plan.options, plan.foreground)


def _check_fuse(options: Options) -> None:
    if not FUSE_DEVICE.exists():
        raise MountError(f"there is no {FUSE_DEVICE}: modprobe fuse, or give the container that device")
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is not installed: without root it is needed (package fuse3)")
    if options.allow_other and not _others_allowed():
        raise MountError(f"allow_other is not allowed: add the line user_allow_other to {FUSE_CONFIG}, or be root")


def _others_allowed() -> bool:
    try:
        return any(line.strip() == "user_allow_other" for line in FUSE_CONFIG.read_text().splitlines())
    except OSError:
        return False


def _check_mountpoint(path: Path) -> None:
    mount = dfs_mounts.mount_at(str(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise MountError(f"the mountpoint {path} does not exist: mkdir it") from None
    except OSError as error:
        if mount is not None and dfs_mounts.is_dead(str(path)):
            raise MountError(f"the process of an earlier mount on {path} is gone: umount -l {path} first") from None
        raise MountError(f"cannot use the mountpoint {path}: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"the mountpoint {path} is not a directory")
    mount = mount or dfs_mounts.mount_at(str(path.resolve()))
    if mount is not None and mount.type.startswith("fuse"):
        raise MountError(f"{path} is busy: {mount.source} is already mounted there")


def find_key(options: Options) -> ClusterKey | None:
    """The key that was named, or the one at the usual place; None if there is none there."""
    path = options.key_file
    if path is None:
        if not DEFAULT_KEY_FILE.exists():
            return None
        path = DEFAULT_KEY_FILE
    try:
        return load_key(path)
    except KeyFileError as error:
        raise MountError(str(error)) from None


# -- from the first connection to the last -------------------------------------------------------------------------


def run(plan: MountPlan, ready: Callable[[], None]) -> int:
    """Mounts and serves until the unmount; calls ``ready`` once the mount answers. Returns the exit code.

    Raises :class:`MountError` if it comes to nothing.
    """
    key = find_key(plan.options)
    _raise_limits()
    keep_large_buffers()
    try:
        return trio.run(_serve, plan, key, ready)
    except* MountError as group:
        _raise_first(group)
    except* DfsError as group:
        raise MountError(_first(group)) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _raise_first(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    raise _first(group) from None


def _raise_limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(plan: MountPlan, key: ClusterKey | None, ready: Callable[[], None]) -> int:
    options = plan.options
    vfs_options = VfsOptions(
        options.attr_timeout,
        options.entry_timeout,
        options.sync_close,
        options.read_only,
        noatime="noatime" in options.kernel,
        nodiratime=options.nodiratime,
    )
    client_options = ClientOptions(
        str(plan.mountpoint), vfs_options, options.timeout, options.cache_mib, options.dirty_mib
    )
    try:
        caches = KernelCaches()
        async with open_client(plan.source, key, client_options, caches.of) as client:
            return await Mounted(plan, client, caches).run(ready)
    except DfsError as error:
        raise MountError(_explain(error, plan)) from None


def _explain(error: DfsError, plan: MountPlan) -> str:
    """One line for what the metaserver or the network answered to the attempt to begin."""
    if error.code in (ErrorCode.NOT_FOUND, ErrorCode.NOT_DIRECTORY):
        return f"there is no directory {plan.source.subdirectory} in the cluster at {plan.source.host}"
    if error.code is ErrorCode.BAD_KEY and plan.options.key_file is None:
        return f"{error.text} (-o key_file=PATH; {DEFAULT_KEY_FILE} is used if it exists)"
    return error.text


class KernelCaches:
    """Tells the kernel what to drop. ``driver`` is what it is told through, None before there is a mount."""

    def __init__(self) -> None:
        self._root = 0
        self.driver: KernelDriver | None = None

    def of(self, root: int) -> "KernelCaches":
        """These, of a filesystem with that root."""
        self._root = root
        return self

    def forget_attributes(self, ino: int) -> None:
        self._invalidate(ino, attr_only=True)

    def forget_contents(self, inos: Sequence[int]) -> None:
        for ino in inos:
            self._invalidate(ino, attr_only=False)

    def _invalidate(self, ino: int, *, attr_only: bool) -> None:
        # ENOENT: the kernel does not know the inode; anything else means that the mount is ending.
        with suppress(OSError):
            if self.driver is not None:
                self.driver.invalidate(pyfuse3.ROOT_INODE if ino == self._root else ino, attr_only=attr_only)


class KernelDriver(Protocol):
    """Takes the requests of the kernel until the mount ends."""

    async def run(self) -> None: ...

    def stop(self) -> None:
        """Takes no more requests; :meth:`run` then returns when those in progress are answered."""

    def is_ended(self) -> bool:
        """Whether the kernel has nothing to ask any more: unmounted, or all its requests were given up."""

    def invalidate(self, node: int, *, attr_only: bool) -> None:
        """Has the kernel drop attributes, or pages as well. Raises OSError."""


class Direct:
    """The driver that speaks the kernel's protocol itself; libfuse has mounted and unmounts."""

    def __init__(self, driver: VirtualDriver) -> None:
        self._device = Device(_fuse_descriptor(), driver.serve)

    async def run(self) -> None:
        await self._device.run()

    def stop(self) -> None:
        self._device.stop()

    def is_ended(self) -> bool:
        return self._device.ended

    def invalidate(self, node: int, *, attr_only: bool) -> None:
        self._device.tell(fusewire.invalidate_inode(node, -1 if attr_only else 0, 0))


class Libfuse:
    """The driver of libfuse and pyfuse3."""

    def __init__(self, loop: fuseloop.Readiness) -> None:
        self._loop = loop

    async def run(self) -> None:
        await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=MAX_TASKS)

    def stop(self) -> None:
        pyfuse3.terminate()

    def is_ended(self) -> bool:
        return self._loop.is_ended()

    def invalidate(self, node: int, *, attr_only: bool) -> None:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(node), attr_only=attr_only)


def _fuse_descriptor() -> int:
    """The open /dev/fuse of this process, which has one mount; pyfuse3 does not tell."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(entry) == str(FUSE_DEVICE):
                return int(entry.name)
    raise MountError("the mount has no open /dev/fuse")


class Mounted:
    """The parts of a running mount."""

    def __init__(self, plan: MountPlan, client: Client, caches: KernelCaches) -> None:
        self.plan = plan
        self._caches = caches
        self.client = client
        self.vfs = client.vfs
        limit = LIMIT if plan.options.driver == "libfuse" else DIRECT_LIMIT
        self._waiting = Waiting(plan.options.timeout, limit=limit, victims=self._victims)
        self._stats = OpStats()
        self._telling = Telling(client, self._waiting, self._stats, str(plan.mountpoint))
        # What the end waits for, and a second signal does not: writing while the mount works, requests in progress, and
        # the last writing.
        self._writing = trio.CancelScope()
        self._draining = trio.CancelScope()
        self._finishing = trio.CancelScope(shield=True)
        self._driver: KernelDriver | None = None
        self._serving = True
        # Of the mounted filesystem; not known before it answers.
        self._device = 0
        self._main_scope = trio.CancelScope()
        self._guardian: subprocess.Popen[bytes] | None = None

    async def run(self, ready: Callable[[], None]) -> int:
        """Mounts and serves until the end; the exit code."""
        clean = True
        async with trio.open_nursery() as nursery:
            driver = self._driver = self._caches.driver = _begin(
                self.vfs, self._waiting, self._stats, self._telling, self.plan
            )
            try:
                nursery.start_soon(self.client.run)
                nursery.start_soon(self._waiting.watch)
                nursery.start_soon(Control("dfsmount", self._telling.commands()).run)
                nursery.start_soon(self._await_signals)
                nursery.start_soon(self._await_abort)
                nursery.start_soon(self._announce, ready)
                nursery.start_soon(systemd.feed_watchdog)
                # What exists now stays: the collector need not look at it again.
                gc.collect()
                gc.freeze()
                with self._main_scope:
                    await driver.run()
            finally:
                self._serving = False
                clean = await self._finish()
                pyfuse3.close(unmount=True)
                if self._guardian is not None:
                    self._guardian.kill()
                    self._guardian.wait()
            nursery.cancel_scope.cancel()
        return 0 if clean else 1

    async def _announce(self, ready: Callable[[], None]) -> None:
        mountpoint = self.plan.mountpoint
        device = await trio.to_thread.run_sync(_ask_mount, mountpoint, abandon_on_cancel=True)
        self._device = device
        _raise_read_ahead(device)
        self._guardian = _start_guardian(mountpoint, device)
        log.info("mounted", source=str(self.plan.source), mountpoint=str(mountpoint))
        systemd.notify("READY=1")
        ready()

    def _victims(self) -> list[killed.Victim]:
        return killed.find_victims(self._device) if self._device else []

    async def _await_signals(self) -> None:
        """SIGTERM, SIGINT, SIGHUP: writes everything while the mount still works, then ends it. A second signal ends it
        without what is not written by then. Further ones do nothing: a process that dies of them leaves its mount."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            number = await anext(aiter(signals))
            log.info("unmounting", signal=signal.Signals(number).name)
            systemd.notify("STOPPING=1")
            self._finishing.deadline = self._writing.deadline = trio.current_time() + FINISH_SECONDS
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hasten, signals)
                await self._stop_serving()

    async def _stop_serving(self) -> None:
        with self._writing, suppress(DfsError):
            await self.vfs.write_everything()
        # Once the loop has ended there may be no session any more.
        if self._serving and self._driver is not None:
            self._driver.stop()
        with self._draining:
            await trio.sleep(DRAIN_SECONDS)
        self._main_scope.cancel()

    async def _hasten(self, signals: AsyncIterator[int]) -> None:
        """Until cancelled: hears all further signals."""
        number = await anext(aiter(signals))
        log.warning("unmounting at once", signal=signal.Signals(number).name)
        for scope in (self._finishing, self._writing, self._draining):
            scope.cancel()
        async for _ in signals:
            pass

    async def _await_abort(self) -> None:
        """After ``umount -f`` nobody waits for the requests in progress, which may wait for servers themselves."""
        ended = False
        while not ended:
            await trio.sleep(ENDED_SECONDS)
            ended = self._driver is not None and self._driver.is_ended()
        self._main_scope.cancel()

    async def _finish(self) -> bool:
        """Writes out what is left; whether everything is durable. Cannot be cancelled, but is bounded."""
        problem = "no answer in time"
        self._finishing.deadline = min(self._finishing.deadline, trio.current_time() + FINISH_SECONDS)
        with self._finishing:
            try:
                await self.vfs.finish()
            except DfsError as error:
                problem = str(error)
            else:
                log.info("unmounted", mountpoint=str(self.plan.mountpoint))
                return True
        log.error("not everything could be written before the end", error=problem)
        return False


# -- the kernel's side ---------------------------------------------------------------------------------------------


def _begin(vfs: Vfs, waiting: Waiting, stats: OpStats, telling: Telling, plan: MountPlan) -> KernelDriver:
    """Mounts, and has the driver that was chosen ready. Only our own has ``.dfs``."""
    if plan.options.driver == "libfuse":
        loop = fuseloop.Readiness()
        pyfuse3.trio = fuseloop.stand_in(loop)  # type: ignore[attr-defined]
        _init_fuse(Operations(vfs, waiting, stats), plan)
        return Libfuse(loop)
    driver = Driver(vfs, waiting, stats)
    _init_fuse(driver, plan)
    return Direct(VirtualDriver(driver, Virtual(telling.files(), time.time_ns()), stats))


def _init_fuse(operations: Operations, plan: MountPlan) -> None:
    """Mounts; raises :class:`MountError` with what libfuse printed to standard error."""
    with _captured_errors() as said:
        try:
            pyfuse3.init(operations, str(plan.mountpoint), _fuse_options(plan))
        except RuntimeError:
            failed = True
        else:
            failed = False
    if failed:
        reason = said[0] or "the kernel refused"
        raise MountError(f"cannot mount on {plan.mountpoint}: {reason}")


def _fuse_options(plan: MountPlan) -> set[str]:
    options = plan.options
    name = str(plan.source).encode("ascii", "replace").decode().replace(",", "?").replace("\\", "?")
    words = {f"fsname={name}", "subtype=dfs", "default_permissions", *options.kernel}
    if options.allow_other or (options.allow_other is None and os.geteuid() == 0):
        words.add("allow_other")
    if options.read_only:
        words.add("ro")
    return words


@contextmanager
def _captured_errors() -> Iterator[list[str]]:
    """Afterwards the list has the last line that was written to standard error meanwhile, "" if none."""
    said = [""]
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines = file.read().decode(errors="replace").strip().splitlines()
            said[0] = lines[-1].strip() if lines else ""


# Also has the kernel know ``.dfs``; see virtual.
_ASK = (
    "import os, sys; os.statvfs(sys.argv[1]); os.path.lexists(sys.argv[1] + '/.dfs'); "
    "print(os.stat(sys.argv[1]).st_dev)"
)


def _ask_mount(mountpoint: Path) -> int:
    """Makes sure that the mount answers; its device number.

    Asked by a process of its own: a thread of ours that waits in the kernel for our own answer would outlive SIGKILL,
    keep /dev/fuse open, and leave a mount on which everything hangs and a process that nothing ends.
    """
    command = [sys.executable, "-I", "-S", "-c", _ASK, str(mountpoint)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(errno.EIO, (done.stderr.strip().splitlines() or ["the mount does not answer"])[-1])
    return int(done.stdout)


def _start_guardian(mountpoint: Path, device: int) -> "subprocess.Popen[bytes]":
    """See ``guardian``. Called by the main thread, whose death it waits for."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
    )  # fmt: skip
    assert child.stdin is not None
    with suppress(BrokenPipeError), child.stdin:
        child.stdin.write(b"%d %d %s" % (device, os.getpid(), os.fsencode(mountpoint)))
    return child


def _raise_read_ahead(device: int) -> None:
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        path.write_text(f"{READ_AHEAD_KIB}\n")
    except OSError as error:
        # Not root, or a container's read-only /sys: reading is slower, nothing else.
        log.debug("read-ahead stays as it is", path=str(path), error=error.strerror)
