"""What an upload becomes when it gets its name, over a real metaserver."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

from vfs_harness import ME, open_plant

from dfsmount.gateway_tree import Node
from dfsmount.gateway_uploads import Upload

HIDDEN_NAME = b".upload"


async def test_what_replaces_a_program_of_roots_is_none(tmp_path: Path) -> None:
    async with open_plant(tmp_path) as plant, plant.mount() as mount:
        ino, handle = await mount.create(b"program", b"as it was")
        await mount.close(handle)
        await mount.set(ino, mode=stat.S_IFREG | 0o6755, uid=0, gid=0)
        await mount.core.flush(ino)
        before = SimpleNamespace(attributes=(await mount.core.remote.get_attributes(ino)).attributes)
        assert stat.S_IMODE(before.attributes.mode) == 0o6755
        mode = stat.S_IFREG | 0o600
        opened, shown = await mount.files.create(mount.root, HIDDEN_NAME, mode, os.O_WRONLY | os.O_CREAT, ME)
        tree = SimpleNamespace(client=mount)
        upload = Upload(tree, mount.root, HIDDEN_NAME, opened.number, shown.ino)  # type: ignore[arg-type]
        await upload.write(b"somebody else's")
        await upload.complete()
        node: Node = before  # type: ignore[assignment]
        await upload.place(b"program", node, replace=True)
        found = await mount.stat(b"program")
        assert found.ino == shown.ino
        assert (stat.S_IMODE(found.mode), found.uid, found.gid) == (0o755, 0, 0)
        mount.files.release(opened.number)
