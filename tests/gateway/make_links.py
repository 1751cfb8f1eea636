"""Makes symbolic links: ``make_links.py HOST:PORT KEYFILE FOLDER NAME=TARGET...``. FOLDER is below the root."""

import stat
import sys
from pathlib import Path

import trio

from dfsmount.config import parse_source
from metaserver import protocol
from metaserver.client import Hooks, SessionIdentity, open_meta
from metaserver.key import load_key
from metaserver.protocol import Lookup, Make


async def main() -> None:
    source = parse_source(sys.argv[1])

    async def flush(inos: object) -> None:
        """There is nothing to write."""

    hooks = Hooks(flush, lambda inos: None, list, lambda: None)
    identity = SessionIdentity("localhost", "make_links", 1)
    async with open_meta(source.host, source.port, load_key(Path(sys.argv[2])), identity, hooks) as meta:
        folder = await meta.call(protocol.LOOKUP, Lookup(meta.root.ino, sys.argv[3].encode()))
        for word in sys.argv[4:]:
            name, _, target = word.partition("=")
            make = Make(folder.attributes.ino, name.encode(), stat.S_IFLNK | 0o777, 0, 0, target=target.encode())
            await meta.change(protocol.MAKE, make)


trio.run(main)
