"""Golden bytes of everything that travels to and from a metaserver.

Every field gets a value of its own, made from its type, so that fields that change places are noticed. The files are
``lines()`` of this module, one message a line; a line that changes is a change of the protocol.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from metaserver import protocol, wire
from metaserver.protocol import Json
from metaserver.wire import Message, Method, Replay, Request, Response

GOLDEN = Path(__file__).parents[2] / "golden"
METHODS = [value for value in vars(protocol).values() if isinstance(value, Method)]
STRUCTS = [
    value
    for value in vars(protocol).values()
    if isinstance(value, type) and issubclass(value, Json) and value is not Json
]


def sample(kind: msgspec.inspect.Type, numbers: Iterator[int]) -> Any:
    """A value of a type; numbers take turns in being small, large and negative."""
    match kind:
        case msgspec.inspect.IntType():
            number = next(numbers)
            return [number, (1 << 40) + number, -number][number % 3] if number % 7 else (1 << 63) - number
        case msgspec.inspect.EnumType(cls):
            return list(cls)[next(numbers) % len(cls)]
        case msgspec.inspect.BytesType(min_length, max_length):
            return (b"bytes \xff%d" % next(numbers)).ljust(min_length or 0, b".")[:max_length]
        case msgspec.inspect.StrType():
            return f"text é {next(numbers)}"
        case msgspec.inspect.BoolType():
            return next(numbers) % 2 == 0
        case msgspec.inspect.FloatType():
            return next(numbers) + 0.5
        case msgspec.inspect.VarTupleType(item):
            return (sample(item, numbers), sample(item, numbers))
        case msgspec.inspect.TupleType(items):
            return tuple(sample(item, numbers) for item in items)
        case msgspec.inspect.ListType(item):
            return [sample(item, numbers), sample(item, numbers)]
        case msgspec.inspect.UnionType(types):
            return sample(next(each for each in types if not isinstance(each, msgspec.inspect.NoneType)), numbers)
        case msgspec.inspect.StructType(cls, fields):
            return cls(*(sample(field.type, numbers) for field in fields))
        case _:
            raise AssertionError(f"no sample of {kind}")


def sample_of(struct: type) -> Any:
    return sample(msgspec.inspect.type_info(struct), count(1))


def messages(method: Method[Any, Any]) -> tuple[type[Message], type[Message]]:
    """The types of both directions, found again through the names of the protocol."""
    request = method._request.type.__args__[0]
    reply = method._reply.type.__args__[0]
    return request, reply


def lines() -> dict[str, str]:
    """Name of each message to its bytes in hexadecimal (data plane) or its JSON (control plane)."""
    found = {}
    for method in METHODS:
        request, reply = messages(method)
        asked = Request(1000, 2, 3, sample_of(request), Replay(4, 5, -6, (7, 8)))
        answered = Response(9, 10, sample_of(reply), -11, (12,))
        found[f"{method.number} {method.name} request"] = wire.encode(asked).hex()
        found[f"{method.number} {method.name} reply"] = wire.encode(answered).hex()
    for struct in STRUCTS:
        found[f"http {struct.__name__}"] = msgspec.json.encode(sample_of(struct)).decode()
    return found


def golden() -> dict[str, str]:
    text = (GOLDEN / "wire_messages.txt").read_text()
    return dict(line.split(": ", 1) for line in text.splitlines())


def test_every_message_has_its_golden_line_and_no_other() -> None:
    assert list(golden()) == list(lines())


@pytest.mark.parametrize("name", list(lines()))
def test_messages_have_these_bytes(name: str) -> None:
    assert lines()[name] == golden()[name]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_golden_bytes_are_understood(method: Method[Any, Any]) -> None:
    request, reply = messages(method)
    asked = method.decode_request(bytes.fromhex(golden()[f"{method.number} {method.name} request"]))
    assert asked.message == sample_of(request)
    assert asked.replay == Replay(4, 5, -6, (7, 8))
    answered = method.decode_reply(bytes.fromhex(golden()[f"{method.number} {method.name} reply"]))
    assert answered.message == sample_of(reply)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_golden_json_is_understood(struct: type) -> None:
    data = golden()[f"http {struct.__name__}"].encode()
    assert msgspec.json.decode(data, type=struct) == sample_of(struct)
    # A newer program may say more.
    assert msgspec.json.decode(data[:-1] + b',"later":1}', type=struct) == sample_of(struct)


def test_numbers_are_used_once_and_changes_are_known() -> None:
    assert len({method.number for method in METHODS}) == len(METHODS)
    changing = {method.name for method in METHODS if method.number in protocol.CHANGES}
    assert changing == {
        "set_attributes", "make", "unlink", "rename", "link", "set_xattr", "remove_xattr", "allocate", "commit", "seal",
    }  # fmt: skip


def test_the_largest_pages_fit_into_a_frame() -> None:
    """Bounds of the protocol against bounds of the wire."""
    big = (1 << 63) - 1
    attributes = protocol.Attributes(*[big] * 16)
    entry = protocol.DirectoryEntry(b"n" * protocol.NAME_MAX, big, 8, big, attributes)
    page = protocol.DirectoryPage((entry,) * protocol.PAGE_ENTRIES, False)
    assert len(wire.encode(Response(big, big, page))) < wire.BODY_LIMIT
    extent = protocol.Extent(big, big, big, big)
    places = tuple(protocol.ChunkPlace(big, (1 << 32,) * 16) for _ in range(protocol.PAGE_ENTRIES))
    file_map = protocol.FileMap((extent,) * protocol.PAGE_ENTRIES, places, big)
    assert len(wire.encode(Response(big, big, file_map))) < wire.BODY_LIMIT
    names = protocol.XattrNames((b"n" * 255,) * (protocol.XATTR_LIST_MAX // 256))
    assert len(wire.encode(Response(big, big, names))) < wire.BODY_LIMIT
    committed = protocol.Committed((attributes,) * protocol.COMMIT_EXTENTS, ())
    assert len(wire.encode(Response(big, big, committed))) < wire.BODY_LIMIT


def test_the_routes_of_the_docstring_are_served() -> None:
    files = ("http.py", "admin.py", "treecontrol.py", "trash_admin.py")
    source = Path(protocol.__file__).read_text()
    served = "".join(Path(protocol.__file__).with_name(name).read_text() for name in files)
    for route in re.findall(r"^# (?:GET|POST)\s+(/[^\s?]+)", source, re.MULTILINE):
        assert f'"{route}"' in served, route
