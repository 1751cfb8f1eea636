"""Everything that decodes what may have been made up by somebody else, each as a function of any bytes.

A target returns whether the bytes were accepted. It raises nothing: an exception that leaves it is a finding, because
what calls the decoder there only expects the one that it documents.
"""

from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

from crc32c import crc32c

import chunkserver.protocol as chunk_protocol
import metaserver.protocol as meta_protocol
from chunkserver import chunkfile
from dfsmount import gateway_paths
from dfsmount.gateway_forms import FormReader
from metaserver import logrecord, wire
from metaserver.errors import DfsError
from metaserver.httpranges import Version, judge, wanted

CLUSTER = UUID(int=7)
METHODS: list["wire.Method[object, object]"] = [
    value
    for module in (meta_protocol, chunk_protocol)
    for value in vars(module).values()
    if isinstance(value, wire.Method)
]


def frame(data: bytes) -> bool:
    """The header as it comes, and with a right checksum: otherwise hardly anything would get behind it."""
    if len(data) < wire.HEADER_BYTES:
        return False
    try:
        header = wire.decode_header(data)
        assert header.body_length <= wire.BODY_LIMIT
        assert header.payload_length <= wire.PAYLOAD_LIMIT
        body = data[wire.HEADER_BYTES :][: header.body_length]
        with suppress(DfsError):
            wire.check_frame(data, header, body)
        right = data[:20] + crc32c(body, crc32c(data[:20])).to_bytes(4, "little")
        wire.check_frame(right, wire.decode_header(right), body)
        (wire.decode_hello if header.kind == wire.Kind.HELLO else wire.decode_failure)(body)
    except DfsError:
        return False
    return True


def message(data: bytes) -> bool:
    """A body of any method, in either direction; what was decoded can be encoded and is the same again."""
    if len(data) < 2:
        return False
    method = METHODS[data[0] % len(METHODS)]
    decode = method.decode_reply if data[1] & 1 else method.decode_request
    try:
        found = decode(data[2:])
    except DfsError:
        return False
    assert repr(decode(wire.encode(found))) == repr(found)
    return True


def chunk_header(data: bytes) -> bool:
    """As it comes, and with a right checksum."""
    padded = data[: chunkfile.HEADER_BYTES - 4].ljust(chunkfile.HEADER_BYTES - 4, b"\0")
    with suppress(chunkfile.FormatError):
        chunkfile.decode_header(data)
    try:
        chunkfile.decode_header(padded + crc32c(padded).to_bytes(4, "little"))
    except chunkfile.FormatError:
        return False
    return True


def chunk_entries(data: bytes) -> bool:
    """An index, as it comes and with a right chain."""
    chain = chunkfile.first_chain(CLUSTER, 1)
    with suppress(chunkfile.FormatError):
        chunkfile.check_entries(data, chain, 0)
    chained = b""
    running = chain
    for start in range(0, len(data) - 59, 60):
        part = data[start : start + 60]
        running = crc32c(part, running)
        chained += part + running.to_bytes(4, "little")
    try:
        entries = chunkfile.check_entries(chained, chain, 0)
    except chunkfile.FormatError:
        return False
    assert all(0 < entry.logical_length <= chunkfile.BLOCK_BYTES for entry in entries)
    return bool(entries)


def log_segment(data: bytes) -> bool:
    """A segment of the changelog, whole."""
    logrecord.SegmentHeader.unpack(data)
    found = list(logrecord.find_records(data, 1))
    assert all(end <= len(data) + logrecord.ALIGNMENT for _, end in found)
    return bool(list(logrecord.decode_segment(data, 1)))


def form(data: bytes) -> bool:
    """A multipart form that comes in pieces; the first byte says how large they are."""
    if not data:
        return False
    reader = FormReader("multipart/form-data; boundary=b")
    step = data[0] + 1
    try:
        for start in range(1, len(data), step):
            for _ in reader.feed(data[start : start + step]):
                pass
    except DfsError:
        return False
    return reader.complete


def form_type(data: bytes) -> bool:
    try:
        FormReader(data.decode("latin-1"))
    except DfsError:
        return False
    return True


_CONDITIONS = ("range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since")


def conditions(data: bytes) -> bool:
    """Headers of a request for (a part of) a file: one a line."""
    lines = data.decode("latin-1").split("\n")
    headers = dict(zip(_CONDITIONS, lines, strict=False))
    version = Version('"1-2"', 1_700_000_000)
    judge(headers, version, reading=True)
    judge(headers, None, reading=False)
    spans = wanted(headers, version, 1000)
    assert spans is None or all(0 <= span.start < span.stop <= 1000 for span in spans)
    return bool(spans)


def path(data: bytes) -> bool:
    """No name leads out, whatever was escaped how often."""
    accepted = False
    for read in (gateway_paths.from_url, lambda raw: gateway_paths.from_text(raw.decode("utf-8", "surrogateescape"))):
        with suppress(DfsError):
            place = read(data)
            for name in place.names:
                assert name not in (b"", b".", b"..")
                assert not {*b"/\0"} & {*name}
                assert not gateway_paths.is_hidden(name)
                gateway_paths.disposition(name)
            again = gateway_paths.to_url(place.names, directory=place.directory).removeprefix("/files/")
            assert not place.names or gateway_paths.from_url(again.encode()).names == place.names
            accepted = True
    with suppress(DfsError):
        gateway_paths.link_parts(data)
    return accepted


TARGETS: dict[str, Callable[[bytes], bool]] = {
    target.__name__: target
    for target in (
        frame, message, chunk_header, chunk_entries, log_segment, form, form_type, conditions, path,
    )
}  # fmt: skip
