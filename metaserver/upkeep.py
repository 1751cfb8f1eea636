"""What keeps the state well over days: snapshot files, and reading everything again before it is needed."""

from contextlib import suppress

import structlog
import trio

from metaserver.check import MAX_PROBLEMS, check_steps
from metaserver.engine import Engine, Recovery
from metaserver.logrecord import UNKNOWN
from metaserver.protocol import CheckReport, Problem
from metaserver.rereading import missing_changes, segment_damage, snapshot_damage
from metaserver.snapshot import Snapshot, SnapshotFailed, blame, kept_from, list_snapshots, make_snapshot
from metaserver.start import SNAPSHOTS_NAME
from metaserver.store import CorruptStore, StoreFull, View, ViewExpired
from metaserver.transaction import ViewTransaction

log = structlog.get_logger()

# Between snapshot files that were in vain: once there is space, the store is protected again within this.
LONGEST_PAUSE_SECONDS = 300.0
# Old segments of the log are read back no faster, for the first time so long after the start: a start has better things
# to do, and a metaserver that is restarted every day is to do it nevertheless.
REREAD_BYTES_PER_SECOND = 8 << 20
FIRST_REREAD_SECONDS = 1800.0


async def snapshot(engine: Engine) -> Snapshot:
    """Makes a snapshot file of everything up to now; the log that it makes superfluous is deleted. Raises
    ``StoreFull``, ``SnapshotFailed`` or :class:`EngineFailed`."""
    await engine.checkpoint()
    directory = engine.directory / SNAPSHOTS_NAME
    async with engine.map_lock:
        # One after another: of two at once each would take away what the other has made up for.
        recycled, appended = engine.log.recycled, engine.log.appended
        try:
            made: Snapshot = await engine.run_sync(
                make_snapshot, engine.store, directory, engine.files, engine.options.segment_bytes
            )
        except (CorruptStore, OSError) as error:
            raise await _whose_fault(engine, error) from error
        engine.log.appended -= appended
        # What was used again meanwhile may be what this very snapshot needs (its file may be what filled the disk).
        engine.log.recycled -= recycled
    engine.snapshot_failure = ""
    if engine.recovery is not None:
        engine.recovery = engine.recovery._replace(endangered=False)
    position = kept_from(directory)
    if position is not None:
        engine.log.drop(position)
    return made


async def _whose_fault(engine: Engine, error: CorruptStore | OSError) -> Exception:
    """What to raise for a snapshot that could not be made: no reason to end, unless the store is damaged. With the map
    locked, so that the view stays."""
    with engine.store.view() as view:
        reason: Exception = await engine.run_sync(blame, error, view)
    if isinstance(reason, CorruptStore):
        return engine.fail(reason)
    if isinstance(reason, SnapshotFailed):
        if not engine.snapshot_failure:
            log.error("a snapshot file cannot be made; trying again", reason=str(reason))
        engine.snapshot_failure = str(reason)
    return reason


async def check(engine: Engine) -> CheckReport:
    """Checks every invariant of a consistent state while requests go on. Starts again if the store has to grow."""
    began = trio.current_time()
    while True:
        try:
            with await engine.view() as view:
                problems = await _check_view(engine, view)
                return CheckReport(view.entries(), problems, trio.current_time() - began)
        except ViewExpired:
            continue


async def _check_view(engine: Engine, view: View) -> list[Problem]:
    problems: list[Problem] = []
    try:
        for problem in check_steps(ViewTransaction(view)):
            if problem is None:
                await trio.lowlevel.checkpoint()
            elif len(problems) < MAX_PROBLEMS:
                problems.append(problem)
        for _ in view.verify():
            await trio.lowlevel.checkpoint()
    except CorruptStore as error:
        raise engine.fail(error) from error
    return problems


async def verify(engine: Engine) -> int:
    """Reads every row of the store slowly and compares all with TOTALS: the number of rows. Raises
    :class:`EngineFailed` if the store is damaged."""
    while True:
        count = 0
        try:
            with engine.store.view() as view:
                for rows in view.verify():
                    count = rows
                    await trio.sleep(engine.options.verify_pause_seconds)
            return count
        except ViewExpired:
            continue
        except CorruptStore as error:
            raise engine.fail(error) from error


async def keep_snapshots(engine: Engine) -> None:
    last = trio.current_time()
    failed = False
    pause = engine.options.checkpoint_seconds
    lacking = await _lacking(engine)
    if lacking:
        # Used again on a full disk in an earlier life, for instance: it is as if that had been in this one.
        log.error("until a snapshot file is made, the store cannot be rebuilt", reason=lacking)
        engine.log.recycled = max(1, engine.log.recycled)
    while True:
        await trio.sleep(pause)
        appended = engine.log.appended
        overdue = trio.current_time() - last >= engine.options.snapshot_seconds and appended
        unprotected = engine.unprotected and not engine.is_full
        if overdue or unprotected or appended >= engine.options.snapshot_log_bytes:
            last = trio.current_time()
            try:
                await snapshot(engine)
            except StoreFull:
                if not failed:
                    log.error("no space for a snapshot file")
                failed = True
            except SnapshotFailed:
                failed = True
            else:
                failed = False
            # Each writes all of the store. On a nearly full disk one may fill it, be in vain, and be wanted again.
            hurried = failed or engine.unprotected
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if hurried else engine.options.checkpoint_seconds


async def verify_recovery(engine: Engine) -> list[str]:
    """Reads snapshot files and old segments of the log back, slowly; what is wrong with them. Then a new snapshot file
    is made (if there is space), so that what is damaged is not needed any more."""
    problems = [*await _verify_snapshots(engine), *await _verify_segments(engine)]
    lacking = await _lacking(engine)
    problems += [lacking] if lacking else []
    for problem in problems:
        log.error("what a recovery would need is damaged", problem=problem)
    engine.recovery = Recovery(trio.current_time(), problems, bool(problems))
    if problems:
        try:
            await snapshot(engine)
        except StoreFull:
            log.error("no space for a snapshot file: until there is, the store perhaps cannot be rebuilt")
        except SnapshotFailed as error:
            log.error("without a new snapshot file the store perhaps cannot be rebuilt", reason=str(error))
    return problems


async def _lacking(engine: Engine) -> str:
    """What is missing to rebuild the store; "" if nothing."""
    # Before the list: a snapshot that is made meanwhile has the log deleted that only those before it need.
    kept = tuple(engine.log.kept)
    snapshots = await engine.run_sync(list_snapshots, engine.directory / SNAPSHOTS_NAME)
    return missing_changes([snapshot.position for snapshot in snapshots], kept)


async def _verify_snapshots(engine: Engine) -> list[str]:
    problems = []
    for path, _ in list_snapshots(engine.directory / SNAPSHOTS_NAME):
        try:
            problem = await engine.run_sync(snapshot_damage, path)
        except OSError as error:
            log.warning("a snapshot file could not be read back now", path=str(path), reason=error.strerror)
            continue
        if problem and path.exists():
            problems.append(problem)
            # It would be kept in the place of an older one that is whole.
            with suppress(OSError):  # then it is found again
                await engine.run_sync(engine.files.delete, path)
    return problems


async def _verify_segments(engine: Engine) -> list[str]:
    problems = []
    kept = tuple(engine.log.kept)
    for before, segment, following in zip((None, *kept), kept, kept[1:], strict=False):
        # Not what was dropped, or used again, meanwhile.
        if segment in engine.log.kept:
            ends = (later.header.previous for later in kept if later.header.epoch > segment.header.epoch)
            problem = await engine.run_sync(segment_damage, segment, following, before, next(ends, UNKNOWN))
            if problem and segment in engine.log.kept:
                problems.append(problem)
            await trio.sleep(segment.header.size / REREAD_BYTES_PER_SECOND)
    return problems


async def keep_recoverable(engine: Engine) -> None:
    await trio.sleep(min(FIRST_REREAD_SECONDS, engine.options.verify_seconds))
    while True:
        if not await verify_recovery(engine):
            log.info("snapshot files and changelog verified", segments=len(engine.log.kept))
        await trio.sleep(engine.options.verify_seconds)


async def keep_verified(engine: Engine) -> None:
    while True:
        await trio.sleep(engine.options.verify_seconds)
        count = await verify(engine)
        log.info("store verified", rows=count)
