import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from metaserver import systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@{tmp_path.name}-{tmp_path.parent.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(name.replace("@", "\0", 1) if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        systemd.notify("READY=1")
        assert notified.recv(100) == b"READY=1"
    systemd.notify("STOPPING=1")  # nobody listens any more: not our problem
    monkeypatch.delenv("NOTIFY_SOCKET")
    systemd.notify("STOPPING=1")


async def test_watchdog_is_fed_at_half_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    await systemd.feed_watchdog()  # not asked for: ends at once
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "10000000")
        with trio.move_on_after(14):
            await systemd.feed_watchdog()
        assert [notified.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        with pytest.raises(BlockingIOError):
            notified.recv(100, socket.MSG_DONTWAIT)
