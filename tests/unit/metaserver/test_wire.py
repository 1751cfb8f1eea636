"""Frames: golden bytes, bounds before allocation, and damage of any byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaserver import wire
from metaserver.errors import DfsError, ErrorCode
from metaserver.wire import Hello, Kind


def test_a_header_has_these_bytes() -> None:
    header = wire.encode_header(Kind.REQUEST, 7, 0x01020304, b"body", 5, 0x0A0B0C0D)
    assert header.hex() == "0400000005000000040302010207" + "0000" + "0d0c0b0a" + header[20:].hex()
    assert wire.decode_header(header) == (4, 5, 0x01020304, 2, 7, 0, 0x0A0B0C0D, int.from_bytes(header[20:], "little"))
    wire.check_frame(header, wire.decode_header(header), b"body")


def test_messages_have_these_bytes() -> None:
    hello = Hello(1, "c", "client", 2, b"n", b"p")
    assert wire.encode(hello).hex() == "9601a163a6636c69656e7402c4016ec40170"
    request = wire.Request(1000, 3, 9, wire.Empty(), wire.Replay(1, 2, -3, (4,)))
    assert wire.encode(request).hex() == "96cd03e803099094" + "0102fd9104" + "00"
    assert wire.encode(wire.Response(5, 4, wire.Empty(), 6, (7,))).hex() == "950504900691" + "07"
    assert wire.encode(wire.Failure(ErrorCode.NO_SPACE, "full")).hex() == "920ba466756c6c"


@given(st.binary(max_size=64), st.integers(0, 2**32 - 1), st.integers(0, 200))
def test_any_damage_to_header_or_body_is_found(body: bytes, request_id: int, position: int) -> None:
    header = wire.encode_header(Kind.RESPONSE, 3, request_id, body)
    frame = bytearray(header + body)
    frame[position % len(frame)] ^= 0x10
    with pytest.raises(DfsError) as caught:
        wire.check_frame(frame[:24], wire.decode_header(frame), bytes(frame[24:]))
    assert caught.value.code is ErrorCode.PROTOCOL


@pytest.mark.parametrize(("body", "payload"), [(wire.BODY_LIMIT + 1, 0), (0, wire.PAYLOAD_LIMIT + 1)])
def test_lengths_are_bounded_both_ways(body: int, payload: int) -> None:
    with pytest.raises(DfsError, match="over the limit"):
        wire.encode_header(Kind.REQUEST, 1, 1, bytes(body), payload)
    header = wire.HEADER.pack(body, payload, 1, Kind.REQUEST, 1, 0, 0, 0)
    with pytest.raises(DfsError, match="over the limit"):
        wire.decode_header(header)


@given(st.binary(max_size=200))
def test_garbage_bodies_are_protocol_errors(body: bytes) -> None:
    method = wire.Method(1, "m", Hello, Hello)
    for decode in (method.decode_request, method.decode_reply, wire.decode_hello):
        try:
            decode(body)
        except DfsError as error:
            assert error.code is ErrorCode.PROTOCOL


def test_deeply_nested_bodies_are_protocol_errors() -> None:
    method = wire.Method(1, "m", Hello, Hello)
    with pytest.raises(DfsError):
        method.decode_request(b"\x91" * 100_000)


def test_unknown_error_codes_read_as_internal() -> None:
    error = wire.decode_failure(wire.encode(wire.Failure(9999, "from the future")))
    assert (error.code, error.text) == (ErrorCode.INTERNAL, "from the future")


def test_a_method_number_is_used_once() -> None:
    with pytest.raises(ValueError, match="share the number"):
        wire.method_table(wire.Method(1, "a", Hello, Hello), wire.Method(1, "b", Hello, Hello))


@pytest.mark.parametrize("body", [b"\x96\x00\xa1\x80", b"\xa1\xff"])
def test_text_that_is_none_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(DfsError, match="malformed"):
        wire.decode_hello(body)
