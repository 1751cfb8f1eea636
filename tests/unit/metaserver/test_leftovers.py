"""What a kill, a nearly full disk or an unwritable directory leaves behind or stands in the way of."""

from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing
from engine_rows import create, prepare
from msgspec.structs import replace
from running_metaserver import SMALL, inline

from metaserver import serve, upkeep
from metaserver.commit import open_committer
from metaserver.files import Files
from metaserver.snapshot import list_snapshots
from metaserver.start import NEW_SNAPSHOT_NAME, PROBE_NAME, SNAPSHOTS_NAME
from metaserver.store import StoreFull


async def test_a_start_removes_what_a_kill_has_left(tmp_path: Path) -> None:
    async with open_committer(tmp_path, options=SMALL) as committer:
        prepare(committer)
    probe, snapshot = tmp_path / PROBE_NAME, tmp_path / SNAPSHOTS_NAME / NEW_SNAPSHOT_NAME
    probe.write_bytes(bytes(4096))
    snapshot.write_bytes(bytes(4096))
    async with open_committer(tmp_path, options=SMALL):
        assert not probe.exists()
        assert not snapshot.exists()


class Nearly(Files):
    """A disk on which so much is free."""

    left = 1 << 40

    def free(self, path: Path) -> int:
        return self.left


async def test_a_snapshot_that_would_fill_the_disk_is_not_begun(tmp_path: Path) -> None:
    steps: list[str] = []
    files = Nearly(steps.append)
    async with open_committer(tmp_path, options=SMALL, files=files) as committer:
        prepare(committer)
        await committer.snapshot()
        assert "snapshot:before-copy" in steps
        (made,) = list_snapshots(tmp_path / SNAPSHOTS_NAME)
        size = made.path.stat().st_size
        assert size // 2 <= committer.store.copy_bytes() <= 2 * size
        files.left = SMALL.segment_bytes + size // 4
        steps.clear()
        with pytest.raises(StoreFull):
            await committer.snapshot()
        assert "snapshot:before-copy" not in steps
        files.left = SMALL.segment_bytes + 2 * size
        await committer.snapshot()


async def test_snapshots_in_vain_do_not_follow_each_other_quickly(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []

    async def full(engine: object) -> None:
        times.append(trio.current_time())
        raise StoreFull

    async with open_committer(tmp_path, options=replace(SMALL, checkpoint_seconds=1.0), run_sync=inline) as committer:
        prepare(committer)
        create(committer, b"a")
        committer.log.recycled = 1
        monkeypatch.setattr(upkeep, "snapshot", full)
        await trio.sleep(2000)
        pauses = [after - before for before, after in pairwise(times)]
        assert pauses == sorted(pauses)
        assert pauses[-1] == upkeep.LONGEST_PAUSE_SECONDS
        assert len(times) < 20


def test_a_marker_that_cannot_be_written_does_not_prevent_serving(tmp_path: Path) -> None:
    (tmp_path / serve.identity.FILE).write_text("{}")
    (tmp_path / serve.CRASH_NAME).mkdir()
    with serve._noting_fatal_signals(tmp_path) as ended_by_one:
        assert ended_by_one, "what cannot be read may say that it was"
