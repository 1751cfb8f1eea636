"""Prints every name of a cluster: ``list_all.py HOST:PORT KEYFILE``. A client of its own, that hides nothing."""

import sys
from pathlib import Path

import trio

from dfsmount.config import parse_source
from metaserver import protocol
from metaserver.client import Hooks, MetaClient, SessionIdentity, open_meta
from metaserver.key import load_key
from metaserver.protocol import ReadDirectory


async def walk(meta: MetaClient, ino: int, path: str) -> None:
    cookie, end = 0, False
    while not end:
        page = await meta.call(protocol.READ_DIRECTORY, ReadDirectory(ino, cookie, 1000, False))
        for entry in page.entries:
            name = f"{path}/{entry.name.decode(errors='replace')}"
            print(name)
            if entry.type == 4:
                await walk(meta, entry.ino, name)
            cookie = entry.cookie
        end = page.end


async def main() -> None:
    source = parse_source(sys.argv[1])

    async def flush(inos: object) -> None:
        """There is nothing to write."""

    hooks = Hooks(flush, lambda inos: None, list, lambda: None)
    identity = SessionIdentity("localhost", "list_all", 1)
    async with open_meta(source.host, source.port, load_key(Path(sys.argv[2])), identity, hooks) as meta:
        await walk(meta, meta.root.ino, "")


trio.run(main)
