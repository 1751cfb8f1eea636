"""The frame format of the data plane, and the typed methods that travel in it. Pure: no I/O here.

A frame is a 24-byte little-endian header, a body and a payload::

    offset  size  field
         0     4  body_length     at most 1 MiB
         4     4  payload_length  at most 4 MiB
         8     4  request_id      chosen by the side that asks; 0 in HELLO and PUSH
        12     1  kind            see Kind
        13     1  method          which Method of the protocol; 0 in HELLO, ERROR and CANCEL
        14     2  flags           0; reserved
        16     4  trace_id        follows one request of an application through all programs and logs; 0: not traced
        20     4  crc32c          of bytes 0 to 19 and the body

The body is msgpack: a :class:`Request`, :class:`Response`, :class:`Hello` or :class:`Failure`, structs as arrays.
New fields go at the end with a default, so that old and new programs of one protocol version understand each other.
The payload is raw: blocks of a file, which carry their own checksums in the index entries of the body.
"""

import struct
from enum import IntEnum
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
from crc32c import crc32c

from metaserver.errors import DfsError, ErrorCode

PROTOCOL_VERSION = 1

HEADER = struct.Struct("<IIIBBHII")
HEADER_BYTES = 24
assert HEADER.size == HEADER_BYTES
_CHECKED_HEADER = struct.Struct("<IIIBBHI")
_CHECKED_BYTES = _CHECKED_HEADER.size
_CRC = struct.Struct("<I")

# A longer answer pages: a listing, an extent map. Both bounds are checked before memory is allocated.
BODY_LIMIT = 1 << 20
PAYLOAD_LIMIT = 4 << 20

Buffer: TypeAlias = bytes | bytearray | memoryview


class Kind(IntEnum):
    HELLO = 1
    REQUEST = 2
    RESPONSE = 3
    ERROR = 4
    PUSH = 5
    CANCEL = 6


class Header(NamedTuple):
    body_length: int
    payload_length: int
    request_id: int
    kind: int
    method: int
    flags: int
    trace_id: int
    crc: int


class Message(msgspec.Struct, array_like=True, gc=False):
    """Base of everything in a body: encoded as a msgpack array, never changed once made."""


class Empty(Message):
    """A request or reply that says nothing but that it happened."""


MessageT = TypeVar("MessageT")
RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


class Replay(Message):
    """The first answer to a change whose durable record was lost: applied again with exactly these results."""

    epoch: int
    number: int
    time_ns: int
    ids: tuple[int, ...]


class Request(msgspec.Struct, Generic[MessageT], array_like=True, gc=False):
    """The envelope of a request or a push.

    ``deadline_ms`` is the time the asking side will wait, 0 for the receiver's default. ``epoch`` is the metaserver's
    life the asking side believes in, 0 if it does not matter. ``operation`` numbers the changes of a session from 1
    without gaps in meaning: a change that arrives twice under one number happens once; 0 in reads. ``expires_ms`` is
    when the asking side will have given a change up, in ms of the metaserver's steady clock; 0: never.
    """

    deadline_ms: int
    epoch: int
    operation: int
    message: MessageT
    replay: Replay | None = None
    expires_ms: int = 0


class Response(msgspec.Struct, Generic[MessageT], array_like=True, gc=False):
    """The envelope of an answer.

    ``number`` is the changelog number of the newest change the answer depends on (the change itself, for a change),
    ``durable`` the newest number that is on stable storage. ``time_ns`` and ``ids`` are what a :class:`Replay` needs.
    A chunkserver leaves all four at 0.
    """

    number: int
    durable: int
    message: MessageT
    time_ns: int = 0
    ids: tuple[int, ...] = ()


class Hello(Message):
    """First frame of each direction, and the client's second; see ``connection.py`` for the exchange."""

    version: int
    cluster_id: str
    role: str
    session: int
    nonce: bytes
    proof: bytes


class Failure(Message):
    """Body of an ERROR frame; an unknown code (from a newer program) reads as INTERNAL."""

    code: int
    text: str


class Method(Generic[RequestT, ReplyT]):
    """One thing that can be asked: a number on the wire and the types of both directions."""

    __slots__ = ("_reply", "_request", "name", "number")

    def __init__(self, number: int, name: str, request: type[RequestT], reply: type[ReplyT]) -> None:
        self.number = number
        self.name = name
        self._request = msgspec.msgpack.Decoder(Request[request])  # type: ignore[valid-type]
        self._reply = msgspec.msgpack.Decoder(Response[reply])  # type: ignore[valid-type]

    def __repr__(self) -> str:
        return f"<method {self.name}>"

    def decode_request(self, body: Buffer) -> Request[RequestT]:
        return decode(self._request, body)

    def decode_reply(self, body: Buffer) -> Response[ReplyT]:
        return decode(self._reply, body)


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
_hello = msgspec.msgpack.Decoder(Hello)
_failure = msgspec.msgpack.Decoder(Failure)


def decode(decoder: "msgspec.msgpack.Decoder[MessageT]", body: Buffer) -> MessageT:
    """Decodes a body; anything malformed is a PROTOCOL error, never another exception."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DfsError(ErrorCode.PROTOCOL, f"malformed message: {error}") from None


def decode_hello(body: Buffer) -> Hello:
    return decode(_hello, body)


def decode_failure(body: Buffer) -> DfsError:
    """The exception that an ERROR frame stands for."""
    failure = decode(_failure, body)
    try:
        code = ErrorCode(failure.code)
    except ValueError:
        code = ErrorCode.INTERNAL
    return DfsError(code, failure.text)


def encode_header(
    kind: Kind, method: int, request_id: int, body: Buffer, payload_length: int = 0, trace_id: int = 0
) -> bytes:
    """The header of a frame. Raises PROTOCOL if the frame would break a bound, so that it is never sent."""
    if len(body) > BODY_LIMIT or payload_length > PAYLOAD_LIMIT:
        raise DfsError(ErrorCode.PROTOCOL, f"a frame of {len(body)} + {payload_length} bytes is over the limit")
    checked = _CHECKED_HEADER.pack(len(body), payload_length, request_id, kind, method, 0, trace_id)
    return checked + _CRC.pack(crc32c(body, crc32c(checked)))


def decode_header(buffer: Buffer, offset: int = 0) -> Header:
    """Reads a header and checks its bounds; the checksum is for :func:`check_frame` once the body is there."""
    header = Header._make(HEADER.unpack_from(buffer, offset))
    if header.body_length > BODY_LIMIT or header.payload_length > PAYLOAD_LIMIT:
        raise DfsError(
            ErrorCode.PROTOCOL, f"a frame of {header.body_length} + {header.payload_length} bytes is over the limit"
        )
    if not Kind.HELLO <= header.kind <= Kind.CANCEL:
        raise DfsError(ErrorCode.PROTOCOL, f"frame of unknown kind {header.kind}")
    return header


def check_frame(header_bytes: Buffer, header: Header, body: Buffer) -> None:
    """Raises PROTOCOL if header and body do not have the checksum they claim."""
    if crc32c(body, crc32c(memoryview(header_bytes)[:_CHECKED_BYTES])) != header.crc:
        raise DfsError(ErrorCode.PROTOCOL, "frame with a wrong checksum")


def method_table(*methods: Method[Any, Any]) -> dict[int, Method[Any, Any]]:
    """Methods by number; a number used twice is a mistake in the protocol itself."""
    table: dict[int, Method[Any, Any]] = {}
    for method in methods:
        if method.number in table:
            raise ValueError(f"{method!r} and {table[method.number]!r} share the number {method.number}")
        table[method.number] = method
    return table
