"""Small files of JSON that notice their own damage: a second line has the checksum of the first. Pure."""

from typing import TypeVar

import msgspec
from crc32c import crc32c

StructT = TypeVar("StructT", bound=msgspec.Struct)

_MARK = b"#crc32c "


class DamagedFile(Exception):
    """Bytes that are not what was written; the text says what is wrong."""


def encode(value: msgspec.Struct) -> bytes:
    line = msgspec.json.encode(value) + b"\n"
    return line + _MARK + b"%08x\n" % crc32c(line)


def decode(data: bytes, type_: type[StructT], *, unchecked: bool = False) -> StructT:
    """Raises :class:`DamagedFile`. ``unchecked``: a file without a second line is from before there was one."""
    line, newline, rest = data.partition(b"\n")
    line += newline
    if (rest or not unchecked) and rest != _MARK + b"%08x\n" % crc32c(line):
        raise DamagedFile("its checksum is wrong")
    try:
        return msgspec.json.decode(line, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(str(error)) from None
