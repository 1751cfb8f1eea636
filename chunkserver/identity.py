"""Whose directory this is: ``identity.json`` in the data directory, and the same again in ``identity.copy.json``; each
has a checksum and is replaced atomically. One that is damaged is written anew from the other.

Fields: ``format`` (1), ``server`` (random, not 0, made at the first start), ``name``, ``cluster_id`` ("" until the
first registration), ``highest_epoch`` (no order of an older life of the metaserver is carried out), ``highest_chunk``
(the largest chunk id seen up to the last time this file was written).
"""

import errno
import os
import secrets
from collections.abc import Callable

import msgspec
import structlog

from chunkserver import checked
from chunkserver.disk import DataDisk, Disk, LocalDisk, chunk_directories, prepare_directory

FILE = "identity.json"
COPY = "identity.copy.json"
FORMAT = 1
_DAMAGED = "is damaged"
# What a directory may hold without being anybody's.
_HARMLESS = {"lost+found", "chunks", FILE + ".new", COPY + ".new"}


log = structlog.get_logger(__name__)


class DataDirectoryError(Exception):
    """The data directory cannot be used; the text is one line that says why and what to do."""


class DamagedIdentity(DataDirectoryError):
    """Both copies are: somebody has to restore one."""


class Identity(msgspec.Struct, forbid_unknown_fields=True):
    """See the module. Changed only through :func:`save`."""

    format: int
    server: int
    name: str
    cluster_id: str
    highest_epoch: int = 0
    highest_chunk: int = 0


def save(disk: Disk, identity: Identity) -> None:
    """Durably, twice; blocking."""
    data = checked.encode(identity)
    disk.write_atomically(FILE, data)
    disk.write_atomically(COPY, data)


def load(disk: Disk) -> Identity | None:
    """The newer of two copies; None if the directory has none yet. :class:`DataDirectoryError` if both are damaged."""
    found = [_load(disk, name) for name in (FILE, COPY)]
    whole = [identity for identity in found if isinstance(identity, Identity)]
    if whole:
        other = next((identity.format for identity in whole if identity.format != FORMAT), FORMAT)
        if other != FORMAT:
            text = f"{disk.root} has format {other}, this program knows {FORMAT}: use a newer chunkserver"
            raise DataDirectoryError(text)
        return max(whole, key=lambda identity: (identity.highest_epoch, identity.highest_chunk))
    problems = [problem for problem in found if isinstance(problem, str)]
    if problems:
        damaged = len(problems) == len(found) and all(problem.startswith(_DAMAGED) for problem in problems)
        kind = DamagedIdentity if damaged else DataDirectoryError
        raise kind(f"{disk.root}/{FILE} {problems[0]}: if the disk is whole, restore it from a backup")
    return None


def lost(disk: Disk, identity: Identity) -> str:
    """Why the directory is not this server's any more (emptied, unmounted, or another in its place); "" if it is.

    What cannot be read may still be there: that is for those to find out who read chunks.
    """
    try:
        found = load(disk)
    except (DataDirectoryError, OSError):
        return ""
    if found is None:
        return f"{disk.root} was emptied or unmounted: this server's {FILE} is gone"
    if found.server != identity.server:
        return f"{disk.root} is the directory of server {found.server} now"
    return ""


def _load(disk: Disk, name: str) -> Identity | str | None:
    """One copy, or what is wrong with it; None if it is not there."""
    try:
        data = disk.read_small(name)
        return None if data is None else checked.decode(data, Identity, unchecked=True)
    except checked.DamagedFile as error:
        assert data is not None
        if name == FILE and b'"role"' in data:
            text = f"{disk.root} is the data directory of a metaserver: give this chunkserver one of its own"
            raise DataDirectoryError(text) from None
        problem = f"{_DAMAGED} ({error})"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    log.error("a copy of this server's identity cannot be used", path=f"{disk.root}/{name}", reason=problem)
    return problem


def open_directory(path: str, name: str, make_disk: Callable[[str], DataDisk] = LocalDisk) -> tuple[DataDisk, Identity]:
    """Takes a data directory for this process, making it one if it is empty; raises :class:`DataDirectoryError`.

    ``name`` is the server's configured name, "" for whatever the directory says.
    """
    try:
        prepare_directory(path)
        disk = make_disk(os.path.realpath(path))
        if not disk.lock():
            raise DataDirectoryError(f"the data directory {path} is in use by another process: stop that one first")
        try:
            return disk, _take(disk, path, name)
        except BaseException:
            disk.unlock()
            raise
    except OSError as error:
        raise DataDirectoryError(f"cannot use the data directory {path}: {_reason(error)}") from None


def _take(disk: Disk, path: str, name: str) -> Identity:
    """The identity, written anew in any case: a directory that cannot be written to is no use, unless it is full."""
    known = load(disk)
    identity = known or _new_identity(disk, name)
    if name and identity.name and name != identity.name:
        text = f"the data directory {path} belongs to the server {identity.name!r}, not {name!r}: check the path"
        raise DataDirectoryError(text)
    identity.name = identity.name or name or f"server-{identity.server:08x}"
    try:
        for directory in chunk_directories():
            disk.make_directory(directory)
        disk.sync_directory("chunks")
        save(disk, identity)
    except OSError as error:
        if known is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("the disk is full: only reading and deleting are possible", directory=path)
    return identity


def _new_identity(disk: Disk, name: str) -> Identity:
    present = set(disk.names(""))
    if present - _HARMLESS:
        example = sorted(present - _HARMLESS)[0]
        text = f"{disk.root} is no chunkserver's data directory, but not empty ({example!r}): give an empty one"
        raise DataDirectoryError(text)
    if "chunks" in present and any(disk.names(f"chunks/{name}") for name in disk.names("chunks")):
        raise DataDirectoryError(f"{disk.root} has chunks but no {FILE}: restore that file from a backup")
    return Identity(FORMAT, secrets.randbelow(0xFFFFFFFE) + 1, name, "")


def _reason(error: OSError) -> str:
    if error.errno == errno.EROFS:
        return "it is read-only: mount it writable"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"permission denied ({error.filename}): it must belong to this user"
    return f"{error.strerror} ({error.filename})"
