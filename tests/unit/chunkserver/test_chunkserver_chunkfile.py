"""Golden bytes of the on-disk format and of every wire message; a change here is a new format or protocol version."""

from pathlib import Path
from uuid import UUID

import pytest
from crc32c import crc32c

from chunkserver import chunkfile, protocol
from chunkserver.chunkfile import Entry, FormatError, Header
from chunkserver.protocol import Peer, Progress, ReplicaFailure
from metaserver import wire

GOLDEN = Path(__file__).parents[2] / "golden"
CLUSTER = UUID("00112233-4455-6677-8899-aabbccddeeff")
CHUNK = 0x0102030405060708


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def entries() -> bytes:
    first, chain = chunkfile.encode_entry(
        chunkfile.first_chain(CLUSTER, CHUNK), 0, 5, crc32c(b"hello"), 0x1111, 0x2222, 0x3333, 0x4444
    )
    second, _ = chunkfile.encode_entry(chain, 5, 6, crc32c(b"world!"), 0x5555, -1 & 0x7FFFFFFFFFFFFFFF, 1, 2)
    return first + second


HEADERS = {
    "chunk_header_open.bin": Header(CLUSTER, CHUNK, 1_700_000_000_123_456_789),
    "chunk_header_sealed.bin": Header(CLUSTER, CHUNK, -1, chunkfile.FLAG_SEALED, 11, 2, 0xDEADBEEF),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header(name: str) -> None:
    assert chunkfile.encode_header(HEADERS[name]) == golden(name)
    assert chunkfile.decode_header(golden(name)) == HEADERS[name]


@pytest.mark.parametrize("at", [0, 8, 12, 20, 40, 63, 64, 2000, 4091, 4092])
def test_header_with_a_flipped_bit_is_refused(at: int) -> None:
    data = bytearray(golden("chunk_header_sealed.bin"))
    data[at] ^= 0x40
    with pytest.raises(FormatError):
        chunkfile.decode_header(data)


def test_header_of_another_format_is_refused_by_its_number() -> None:
    data = bytearray(golden("chunk_header_open.bin"))
    data[8] = 2
    data[4092:] = crc32c(data[:4092]).to_bytes(4, "little")
    with pytest.raises(FormatError, match="chunk format 2"):
        chunkfile.decode_header(data)


def test_entries() -> None:
    assert entries() == golden("chunk_entries.bin")
    first, second = chunkfile.check_entries(golden("chunk_entries.bin"), chunkfile.first_chain(CLUSTER, CHUNK), 0)
    assert first == Entry(0, 0, 5, 5, 0, 0, 0, crc32c(b"hello"), 0x1111, 0x2222, 0x3333, 0x4444, 0, first.chain)
    assert (second.stored_offset, second.file_offset) == (5, 0x7FFFFFFFFFFFFFFF)


def test_entries_of_another_chunk_or_place_do_not_continue() -> None:
    for chain, offset in [(chunkfile.first_chain(CLUSTER, CHUNK + 1), 0), (chunkfile.first_chain(CLUSTER, CHUNK), 1)]:
        with pytest.raises(FormatError):
            chunkfile.check_entries(entries(), chain, offset)


PEERS = (Peer(7, "10.0.0.7", 9422), Peer(8, "host", 1))
PROGRESS = Progress(11, 12, 2, 0xDEADBEEF)
REPLY = protocol.AppendReply(PROGRESS, (ReplicaFailure(8, 106, "gone"),))
REQUESTS = {
    "append": (protocol.APPEND, protocol.Append(CHUNK, 1, 5, 0xFFFFFFFF, entries(), PEERS, True), REPLY),
    "sync": (protocol.SYNC, protocol.Sync(CHUNK, 11, 0xDEADBEEF, PEERS), REPLY),
    "read": (protocol.READ, protocol.Read(CHUNK, 3, 65536), protocol.ReadReply(entries())),
    "read_index": (
        protocol.READ_INDEX,
        protocol.ReadIndex(CHUNK, 0, 1000),
        protocol.ReadIndexReply(entries(), PROGRESS),
    ),
    "stat": (protocol.STAT, protocol.Stat(CHUNK), protocol.StatReply(PROGRESS, "SEALED", "/srv/a", -1)),
    "verify": (protocol.VERIFY, protocol.Verify(CHUNK), protocol.VerifyReply(PROGRESS, (0, 5))),
    "list_chunks": (
        protocol.LIST_CHUNKS,
        protocol.ListChunks(CHUNK, 5000),
        protocol.ListChunksReply(
            (protocol.Listed(CHUNK + 1, 11, 2, 0xDEADBEEF, True, "IO", -1),), True, 3, CHUNK + 9, 33, "a", "/srv/a"
        ),
    ),
    "read_raw": (protocol.READ_RAW, protocol.ReadRaw(CHUNK, 4096, 65536), wire.Empty()),
    "ping": (protocol.PING, wire.Empty(), protocol.Pong(250)),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_messages(name: str) -> None:
    method, request, reply = REQUESTS[name]
    assert method.name == name
    body = wire.encode(wire.Request(5000, 1, 0, request, None))
    assert body == golden(f"chunk_{name}_request.bin")
    assert method.decode_request(golden(f"chunk_{name}_request.bin")).message == request
    body = wire.encode(wire.Response(0, 0, reply))
    assert body == golden(f"chunk_{name}_reply.bin")
    assert method.decode_reply(golden(f"chunk_{name}_reply.bin")).message == reply


def test_every_method_is_covered() -> None:
    methods = {value for value in vars(protocol).values() if isinstance(value, wire.Method)}
    assert {method for method, _, _ in REQUESTS.values()} == methods
