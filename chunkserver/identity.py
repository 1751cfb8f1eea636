"""Whose directory this is: ``identity.json`` in the data directory, replaced atomically.

Fields: ``format`` (1), ``server`` (random, not 0, made at the first start), ``name``, ``cluster_id`` ("" until the
first registration), ``highest_epoch`` (no order of an older life of the metaserver is carried out), ``highest_chunk``
(the largest chunk id seen up to the last time this file was written).
"""

import errno
import os
import secrets
from collections.abc import Callable

import msgspec

from chunkserver.disk import DataDisk, Disk, LocalDisk, chunk_directories, prepare_directory

FILE = "identity.json"
FORMAT = 1
# What a directory may hold without being anybody's.
_HARMLESS = {"lost+found", "chunks", FILE + ".new"}


class DataDirectoryError(Exception):
    """The data directory cannot be used; the text is one line that says why and what to do."""


class Identity(msgspec.Struct, forbid_unknown_fields=True):
    """See the module. Changed only through :func:`save`."""

    format: int
    server: int
    name: str
    cluster_id: str
    highest_epoch: int = 0
    highest_chunk: int = 0


def save(disk: Disk, identity: Identity) -> None:
    """Durably; blocking."""
    disk.write_atomically(FILE, msgspec.json.encode(identity) + b"\n")


def load(disk: Disk) -> Identity | None:
    """None if the directory has none yet."""
    data = disk.read_small(FILE)
    if data is None:
        return None
    try:
        identity = msgspec.json.decode(data, type=Identity)
    except msgspec.DecodeError as error:
        if b'"role"' in data:
            text = f"{disk.root} is the data directory of a metaserver: give this chunkserver one of its own"
            raise DataDirectoryError(text) from None
        raise DataDirectoryError(f"{disk.root}/{FILE} is damaged ({error}): restore it from a backup") from None
    if identity.format != FORMAT:
        text = f"{disk.root} has format {identity.format}, this program knows {FORMAT}: use a newer chunkserver"
        raise DataDirectoryError(text)
    return identity


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
    """The identity, written anew in any case: a directory that cannot be written to is no use."""
    identity = load(disk) or _new_identity(disk, name)
    if name and identity.name and name != identity.name:
        text = f"the data directory {path} belongs to the server {identity.name!r}, not {name!r}: check the path"
        raise DataDirectoryError(text)
    identity.name = identity.name or name or f"server-{identity.server:08x}"
    for directory in chunk_directories():
        disk.make_directory(directory)
    disk.sync_directory("chunks")
    save(disk, identity)
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
