"""Names in URLs: from the bytes of a request to the names of directory entries, and back. Pure.

Nothing that could lead out of the exported tree becomes a name: ``..``, a slash or NUL that was escaped, an empty name;
nor does anything that begins with :data:`HIDDEN`, which is the gateway's own.
"""

import re
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from metaserver.errors import DfsError, ErrorCode
from metaserver.protocol import NAME_MAX

# Uploads in progress, and the directory that says where some are.
HIDDEN = b".dfs-gateway-"
# Deeper trees exist, but no URL of 64 KiB names anything in them.
MAX_DEPTH = 1024

_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Place(NamedTuple):
    """Names from the exported directory down; none: that directory. ``directory``: it was written with a slash."""

    names: tuple[bytes, ...]
    directory: bool

    @property
    def name(self) -> bytes:
        return self.names[-1] if self.names else b""

    def __str__(self) -> str:
        return "/" + "/".join(name.decode(errors="replace") for name in self.names)


def from_url(path: bytes) -> Place:
    """What the part of a URL's path behind ``/files/`` names, still escaped. Raises INVALID or NAME_TOO_LONG."""
    if _BROKEN_ESCAPE.search(path):
        raise DfsError(ErrorCode.INVALID, "a % in a path must be followed by two hexadecimal digits")
    return _place([unquote_to_bytes(part) for part in path.split(b"/")])


def from_text(path: str) -> Place:
    """The same for a name in a query or a form, where nothing is escaped any more: slashes separate."""
    return _place([part.encode(errors="surrogateescape") for part in path.split("/")])


def from_form(filename: bytes) -> bytes:
    """The name of a file in a form; it may not be a path."""
    if b"/" in filename:
        raise DfsError(ErrorCode.INVALID, "a file name in a form must not contain a slash")
    _check(filename)
    return filename


def _place(parts: list[bytes]) -> Place:
    directory = parts[-1] == b""
    names = tuple(parts[:-1] if directory else parts)
    if len(names) > MAX_DEPTH:
        raise DfsError(ErrorCode.INVALID, f"more than {MAX_DEPTH} directories deep")
    for name in names:
        _check(name)
    return Place(names, directory)


def _check(name: bytes) -> None:
    if not name:
        raise DfsError(ErrorCode.INVALID, "an empty name")
    if name in (b".", b".."):
        raise DfsError(ErrorCode.INVALID, f"{name.decode()} is no name")
    if b"/" in name or b"\0" in name:
        raise DfsError(ErrorCode.INVALID, "a name must not contain a slash or NUL, escaped or not")
    if len(name) > NAME_MAX:
        raise DfsError(ErrorCode.NAME_TOO_LONG, f"a name of more than {NAME_MAX} bytes")
    if is_hidden(name):
        raise DfsError(ErrorCode.NOT_PERMITTED, f"names that begin with {HIDDEN.decode()} are the gateway's own")


def is_hidden(name: bytes) -> bool:
    return name.startswith(HIDDEN)


def is_text(name: bytes) -> bool:
    """Whether a name is UTF-8 without control characters and what else XML does not carry."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return False
    return not any(letter < " " or "\x7f" <= letter < "\xa0" or letter in "\ufffe\uffff" for letter in text)


def to_url(names: tuple[bytes, ...], *, directory: bool) -> str:
    """The address of a place, with everything escaped that has to be."""
    path = "/files/" + "/".join(quote_from_bytes(name, safe="") for name in names)
    return path + "/" if directory and names else path


# -- symbolic links ------------------------------------------------------------------------------------------------


def link_parts(target: bytes) -> tuple[bytes, ...]:
    """The steps of a symbolic link's target; only those within the tree can be taken, so absolute ones cannot."""
    if target.startswith(b"/"):
        raise DfsError(ErrorCode.NOT_PERMITTED, "an absolute symbolic link: it leads out of the exported tree")
    parts = tuple(part for part in target.split(b"/") if part not in (b"", b"."))
    if any(is_hidden(part) for part in parts):
        raise DfsError(ErrorCode.NOT_PERMITTED, "a symbolic link to what is the gateway's own")
    return parts


# -- what is saved under which name --------------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z0-9 !#$&+.^_`|~()\[\]{}@,;=-]+")


def disposition(name: bytes) -> str:
    """A Content-Disposition that has browsers save a file under its name (RFC 6266)."""
    text = name.decode("utf-8", errors="replace")
    if _PLAIN.fullmatch(text):
        return f'attachment; filename="{text}"'
    ascii_only = "".join(letter if _PLAIN.fullmatch(letter) else "_" for letter in text)
    return f"attachment; filename=\"{ascii_only}\"; filename*=UTF-8''{quote_from_bytes(text.encode(), safe='')}"
