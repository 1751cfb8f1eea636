"""Small files of JSON that notice their own damage: the last field, ``crc32c``, is of everything before it. Pure."""

from typing import TypeVar

import msgspec
from crc32c import crc32c

StructT = TypeVar("StructT", bound=msgspec.Struct)

_MARK = b',"crc32c":"'


class DamagedFile(Exception):
    """Bytes that are not what was written; the text says what is wrong."""


def encode(value: msgspec.Struct) -> bytes:
    """``value`` has at least one field."""
    body = msgspec.json.encode(value)[:-1]
    return body + _MARK + b'%08x"}\n' % crc32c(body)


def decode(data: bytes, type_: type[StructT], *, unchecked: bool = False) -> StructT:
    """A ``type_``, which must forbid unknown fields. Raises :class:`DamagedFile`.

    ``unchecked``: a file without a checksum is one from before there was any.
    """
    body, mark, rest = data.rpartition(_MARK)
    if mark and rest != b'%08x"}\n' % crc32c(body):
        raise DamagedFile("its checksum is wrong")
    if not mark and not unchecked:
        raise DamagedFile("it has no checksum")
    try:
        return msgspec.json.decode(body + b"}" if mark else data, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(str(error)) from None
