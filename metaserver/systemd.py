"""Living under systemd: sd_notify(3), and the watchdog that restarts a process whose event loop stands still."""

import os
import socket

import structlog
import trio

log = structlog.get_logger(__name__)


def notify(state: str) -> None:
    """Tells the service manager, if there is one: ``READY=1``, ``STOPPING=1``, ``WATCHDOG=1`` (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), socket.MSG_DONTWAIT, address)
        except OSError as error:
            log.warning("cannot reach the service manager", error=error.strerror)


async def feed_watchdog() -> None:
    """Reports at half the interval systemd asks for; ends at once if it asks for none, otherwise when cancelled."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    while interval > 0:
        notify("WATCHDOG=1")
        await trio.sleep(interval)
