"""Whose directory this is: ``identity.json`` in the data directory, made durably by the first start.

Fields: ``format`` (1), ``cluster_id``, ``role`` ("metaserver"), ``checksum`` (CRC-32C of the others, in hexadecimal;
absent where older versions or an operator wrote the file).
"""

import errno
import os
import uuid
from pathlib import Path

import msgspec
from crc32c import crc32c

FILE = "identity.json"
ROLE = "metaserver"
FORMAT = 1
# What a directory may hold without being anybody's.
_HARMLESS = frozenset({"lost+found", "lock", "cluster.key", "cluster.key.new", FILE + ".new"})


class DataDirectoryError(Exception):
    """The data directory cannot be used; the text is one line that says why and what to do."""


class DamagedIdentity(DataDirectoryError):
    """Somebody has to restore the file."""


class Identity(msgspec.Struct):
    """``role`` is absent in a chunkserver's file, which has another shape anyway."""

    format: int
    cluster_id: str
    role: str = ""
    checksum: str = ""

    @property
    def expected(self) -> str:
        """The checksum that belongs to the other fields."""
        return f"{crc32c(f'{self.format} {self.cluster_id} {self.role}'.encode()):08x}"


def open_directory(path: Path) -> Identity:
    """Makes the directory a metaserver's if it is empty; raises :class:`DataDirectoryError`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        identity = load(path)
        if identity is None:
            identity = _create(path)
    except OSError as error:
        raise DataDirectoryError(f"cannot use the data directory {path}: {_reason(error)}") from None
    return identity


def load(path: Path) -> Identity | None:
    """None if the directory has none yet."""
    try:
        data = (path / FILE).read_bytes()
    except FileNotFoundError:
        return None
    try:
        identity = msgspec.json.decode(data, type=Identity)
        uuid.UUID(identity.cluster_id)
        if identity.checksum and identity.checksum != identity.expected:
            raise ValueError("its checksum is of something else")
    except (msgspec.DecodeError, ValueError) as error:
        if b'"server"' in data:
            raise DataDirectoryError(_foreign(path)) from None
        text = f"{path}/{FILE} is damaged ({error}): restore it from a backup, or write it anew with the cluster_id of"
        raise DamagedIdentity(f"{text} any chunkserver's {FILE}") from None
    if identity.role != ROLE:
        raise DataDirectoryError(_foreign(path))
    if identity.format != FORMAT:
        text = f"{path} has format {identity.format}, this program knows {FORMAT}: use a newer metaserver"
        raise DataDirectoryError(text)
    return identity


def _create(path: Path) -> Identity:
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in _HARMLESS)
    if others:
        raise DataDirectoryError(f"{path} is not empty ({others[0]}) and not a metaserver's: choose an empty directory")
    return create(path, str(uuid.uuid4()))


def create(path: Path, cluster_id: str) -> Identity:
    """Writes the identity durably: from then on the directory is a metaserver's. Raises ``OSError``."""
    identity = Identity(FORMAT, cluster_id, ROLE)
    identity.checksum = identity.expected
    temporary = path / (FILE + ".new")
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(identity) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path / FILE)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return identity


def _foreign(path: Path) -> str:
    return f"the data directory {path} belongs to a chunkserver: check the path"


def _reason(error: OSError) -> str:
    if error.errno == errno.EROFS:
        return "the filesystem is read-only"
    return error.strerror or str(error)
