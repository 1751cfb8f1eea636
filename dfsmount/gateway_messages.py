"""What the gateway says in JSON; ``gateway_openapi`` has the same for the readers of its description."""

import stat
from datetime import UTC, datetime

import msgspec

from dfsmount import gateway_paths
from dfsmount.gateway_paths import Place
from dfsmount.gateway_tree import NANOSECONDS, Node
from dfsmount.gateway_uploads import Upload, Uploaded
from metaserver.protocol import Attributes, DirectoryEntry


class Entry(msgspec.Struct, omit_defaults=True):
    """What listings say of an entry. ``href`` is its address here; ``name`` has U+FFFD for what is not UTF-8."""

    name: str
    href: str
    type: str
    size: int
    mtime: str
    mode: str
    etag: str = ""


class Page(msgspec.Struct):
    """``next`` is the address of what follows; "" at the end."""

    path: str
    entries: list[Entry]
    next: str


class Stored(msgspec.Struct):
    """A file that was uploaded."""

    path: str
    href: str
    size: int
    etag: str
    created: bool


class Replica(msgspec.Struct):
    server: int
    host: str
    port: int
    rack: str


class Piece(msgspec.Struct):
    """``length`` bytes of a file from ``offset`` on are in ``chunk`` from ``chunk_offset`` on."""

    offset: int
    length: int
    chunk: str
    chunk_offset: int
    replicas: list[Replica]


class ChunkMap(msgspec.Struct):
    """``next`` is the address of what follows; "" at the end."""

    path: str
    size: int
    etag: str
    pieces: list[Piece]
    next: str


_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


def entry_of(place: Place, entry: DirectoryEntry) -> Entry:
    attributes = entry.attributes
    assert attributes is not None
    directory = stat.S_ISDIR(attributes.mode)
    return Entry(
        entry.name.decode(errors="replace"),
        gateway_paths.to_url((*place.names, entry.name), directory=directory),
        _KINDS.get(stat.S_IFMT(attributes.mode), "other"),
        0 if directory else attributes.size,
        _time(attributes),
        f"{stat.S_IMODE(attributes.mode):04o}",
        Node(0, entry.name, attributes).version.etag if stat.S_ISREG(attributes.mode) else "",
    )


def _time(attributes: Attributes) -> str:
    seconds, nanoseconds = divmod(attributes.mtime_ns, NANOSECONDS)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def stored_of(names: tuple[bytes, ...], upload: Upload, done: Uploaded) -> Stored:
    path = str(Place(names, False))
    return Stored(path, gateway_paths.to_url(names, directory=False), upload.size, done.version.etag, done.created)
