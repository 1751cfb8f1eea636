"""Valid-prefix recovery: a chunk file cut or damaged anywhere yields a prefix of what was written, never more."""

import tempfile
from pathlib import Path

from chunkserver_harness import CLUSTER, Writer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chunkserver import chunkfile, recovery
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET
from chunkserver.disk import LocalDisk
from chunkserver.index import Index
from chunkserver.replica import ReplicaState

CHUNK = 0x42
BLOCKS = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12)


def write_chunk(root: Path, blocks: list[bytes]) -> tuple[LocalDisk, Path, bytes]:
    """An unsealed chunk of these blocks; returns its index as well."""
    writer = Writer(CHUNK)
    index = b"".join(writer.append(block).entries for block in blocks)
    disk = LocalDisk(str(root))
    path = root / chunkfile.chunk_path(CHUNK)
    path.parent.mkdir(parents=True)
    file = disk.create(chunkfile.chunk_path(CHUNK))
    file.write([chunkfile.encode_header(chunkfile.Header(CLUSTER, CHUNK, 1)), index], 0)
    file.write([bytes(writer.data)], PAYLOAD_OFFSET)
    return disk, path, index


def ends(blocks: list[bytes]) -> list[int]:
    """Stored length after each number of blocks."""
    lengths = [0]
    for block in blocks:
        lengths.append(lengths[-1] + len(block))
    return lengths


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.data())
def test_payload_cut_anywhere_leaves_the_whole_blocks_before(blocks: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        disk, path, _ = write_chunk(Path(root), blocks)
        kept = data.draw(st.integers(0, ends(blocks)[-1]))
        with path.open("r+b") as file:
            file.truncate(PAYLOAD_OFFSET + kept)
        replica = recovery.recover(disk, CLUSTER, CHUNK, chunkfile.chunk_path(CHUNK))
        expected = max(count for count, end in enumerate(ends(blocks)) if end <= kept)
        assert replica.state is ReplicaState.FROZEN
        assert (replica.written.entries, replica.written.stored_length) == (expected, ends(blocks)[expected])


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.data())
def test_file_cut_anywhere_in_its_index_holds_nothing(blocks: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        disk, path, index = write_chunk(Path(root), blocks)
        with path.open("r+b") as file:
            file.truncate(data.draw(st.integers(0, INDEX_OFFSET + len(index))))
        replica = recovery.recover(disk, CLUSTER, CHUNK, chunkfile.chunk_path(CHUNK))
        assert replica.written.entries == 0


@settings(max_examples=100, deadline=None)
@given(BLOCKS, st.data())
@example([b"a"], None)
def test_damaged_index_byte_ends_the_prefix_there(blocks: list[bytes], data: st.DataObject | None) -> None:
    with tempfile.TemporaryDirectory() as root:
        disk, path, index = write_chunk(Path(root), blocks)
        at = data.draw(st.integers(0, len(index) - 1)) if data else 0
        with path.open("r+b") as file:
            file.seek(INDEX_OFFSET + at)
            file.write(bytes([index[at] ^ (data.draw(st.integers(1, 255)) if data else 1)]))
        replica = recovery.recover(disk, CLUSTER, CHUNK, chunkfile.chunk_path(CHUNK))
        assert replica.written.entries == at // ENTRY_BYTES


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.data())
def test_damaged_payload_byte_is_found(blocks: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        disk, path, index = write_chunk(Path(root), blocks)
        at = data.draw(st.integers(0, ends(blocks)[-1] - 1))
        with path.open("r+b") as file:
            file.seek(PAYLOAD_OFFSET + at)
            byte = file.read(1)[0]
            file.seek(PAYLOAD_OFFSET + at)
            file.write(bytes([byte ^ data.draw(st.integers(1, 255))]))
        block = next(number for number, end in enumerate(ends(blocks)[1:]) if at < end)
        assert recovery.bad_blocks(disk, chunkfile.chunk_path(CHUNK), Index(index)) == [block]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=1000).map(lambda data: data[: len(data) // ENTRY_BYTES * ENTRY_BYTES]), st.integers(0, 2**32))
def test_garbage_is_no_entry(data: bytes, available: int) -> None:
    assert recovery.walk(data, chunkfile.first_chain(CLUSTER, CHUNK), available) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=50),
    st.integers(-5, 3000),
    st.integers(-5, 3000),
    st.integers(1, 500),
)
def test_covering_is_what_a_list_says(lengths: list[int], offset: int, length: int, limit: int) -> None:
    """The oracle: look at every block."""
    limit = max(limit, 100)  # as in life: a block is smaller than the limit
    writer = Writer(CHUNK)
    index = Index(b"".join(writer.append(bytes(size)).entries for size in lengths))
    starts = ends([bytes(size) for size in lengths])
    touched = [n for n, size in enumerate(lengths) if starts[n] < offset + length and starts[n] + size > offset >= 0]
    touched = touched if length > 0 else []
    fitting = [n for n in touched if starts[n + 1] - starts[touched[0]] <= limit]
    found = index.covering(offset, length, limit)
    if not fitting:
        assert found is None
    else:
        assert found is not None
        assert found.entries == index.slice(fitting[0], len(fitting))
        assert found.position == PAYLOAD_OFFSET + starts[fitting[0]]
        assert found.length == starts[fitting[-1] + 1] - starts[fitting[0]]
    for stored in range(-1, starts[-1] + 2, 7):
        assert index.entries_at(stored) == (starts.index(stored) if stored in starts else None)
