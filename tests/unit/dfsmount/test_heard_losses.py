"""Who is told that a change was lost in a crash of the metaserver: everybody whose change it may have been, once."""

import pytest

from dfsmount.remote import Remote
from metaserver.client import LostChange
from metaserver.errors import ErrorCode


class Meta:
    """As much of ``MetaClient`` as this takes."""

    lost_changes = lost_told = 0

    async def sync(self, heard: int | None = None, *, timeout: float = 0.0) -> None:
        if self.lost_changes > (self.lost_told if heard is None else heard):
            self.lost_told = self.lost_changes
            raise LostChange(ErrorCode.IO, "lost")


async def test_each_descriptor_hears_of_each_loss_once() -> None:
    meta = Meta()
    remote = Remote(meta, 30.0)  # type: ignore[arg-type]
    first, second = remote.heard_losses(), remote.heard_losses()
    meta.lost_changes += 1
    opened_after = remote.heard_losses()
    for losses in (first, second, opened_after):
        with pytest.raises(LostChange):
            await remote.sync(losses)
        await remote.sync(losses)
    # Somebody has heard of it before this one was opened.
    await remote.sync(remote.heard_losses())
    meta.lost_changes += 1
    with pytest.raises(LostChange):
        await remote.sync()
    await remote.sync()
    for losses in (first, second):
        with pytest.raises(LostChange):
            await remote.sync(losses)
