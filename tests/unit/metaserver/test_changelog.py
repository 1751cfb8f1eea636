"""The changelog's format, its files, and which of its records count after a crash."""

import errno
import os
from pathlib import Path

import pytest
from engine_rows import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from metaserver.changelog import Changelog, KeptSegment, LogFull, epoch_logs, find_firsts, list_segments, trim
from metaserver.files import Files
from metaserver.logrecord import (
    FIRST_RECORD,
    UNKNOWN,
    Position,
    Record,
    SegmentHeader,
    checksum_seed,
    decode_record,
    decode_segment,
    encode_record,
)
from metaserver.overlay import row_key
from metaserver.replay import CorruptLog, EpochLog, Replayed, replay
from metaserver.schema import Table

SMALL_SEGMENT = 16384
START = Position(0, 0)
GOLDEN_RECORDS = {
    "changelog_record_empty.bin": Record(1, 2, 1, 0, 0, -5, {}),
    "changelog_record_put.bin": Record(3, 7, 6, 8, 9, 10**18, {row_key(Table.XATTRS, b"key"): b"value"}),
    "changelog_record_delete.bin": Record(3, 8, 6, 8, 10, 10**18 + 1, {row_key(Table.DENTRIES, b"name"): None}),
    "changelog_record_mixed.bin": Record(
        2**40,
        2**33,
        2**32,
        2**41,
        2**42,
        2**62,
        {row_key(Table.INODES, b"12345678"): bytes(range(40)), row_key(Table.ORPHANS, b"o" * 16): None, b"\x0a12": b""},
    ),
}
GOLDEN_SEED = checksum_seed(0x1234)


def encode(record: Record, seed: int = GOLDEN_SEED) -> bytes:
    return encode_record(seed, *record)


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_records_are_as_they_always_were(name: str) -> None:
    record = GOLDEN_RECORDS[name]
    assert encode(record) == golden(name)
    assert decode_record(golden(name), 0, GOLDEN_SEED) == (record, len(golden(name)))


def test_a_segment_starts_as_it_always_did() -> None:
    header = SegmentHeader(0x1234, 5, Position(4, 99))
    assert header.pack() == golden("changelog_segment.bin").ljust(FIRST_RECORD, b"\0")
    assert SegmentHeader.unpack(header.pack()) == header


KEYS = st.tuples(st.sampled_from(sorted(set(Table) - {Table.TOTALS})), st.binary(max_size=12)).map(
    lambda pair: row_key(*pair)
)
ROWS = st.dictionaries(KEYS, st.none() | st.binary(max_size=30), max_size=4)


def chain(contents: list[dict[bytes, bytes | None]], lag: int = 2) -> list[Record]:
    """Records 1, 2, ...; each says that what is ``lag`` before it is durable."""
    return [
        Record(1, number, max(0, number - lag), number % 3, number, number * 10, rows)
        for number, rows in enumerate(contents, 1)
    ]


def segment_of(records: list[Record], segment: int = 1) -> bytes:
    seed = checksum_seed(segment)
    header = SegmentHeader(segment, 1, Position(0, 0)).pack()
    return header + b"".join(encode(record, seed) for record in records) + bytes(64)


@given(st.lists(ROWS, max_size=6))
def test_what_was_written_is_read(contents: list[dict[bytes, bytes | None]]) -> None:
    records = chain(contents)
    assert list(decode_segment(segment_of(records), 1)) == records
    assert list(decode_segment(segment_of(records), 2)) == [], "another segment's records are not ours"


def replayed(data: bytes, start: Position = START) -> tuple[list[Record], Replayed]:
    found: list[Record] = []
    outcome = replay(start, [EpochLog(1, Position(0, 0), decode_segment(data, 1))], found.append)
    return found, outcome


@settings(max_examples=300)
@given(st.lists(ROWS, min_size=1, max_size=6), st.integers(0, 3), st.data())
def test_truncation_leaves_a_prefix(contents: list[dict[bytes, bytes | None]], lag: int, data: st.DataObject) -> None:
    records = chain(contents, lag)
    whole = segment_of(records)
    cut = data.draw(st.integers(FIRST_RECORD, len(whole)))
    found, outcome = replayed(whole[:cut])
    assert found == records[: len(found)]
    assert outcome.end.number == len(found)
    assert outcome.cut == 0


@settings(max_examples=300)
@given(st.lists(ROWS, min_size=1, max_size=6), st.integers(0, 3), st.integers(1, 255), st.data())
def test_a_damaged_byte_leaves_a_prefix_or_is_refused(
    contents: list[dict[bytes, bytes | None]], lag: int, change: int, data: st.DataObject
) -> None:
    records = chain(contents, lag)
    ends, end = [], FIRST_RECORD
    for record in records:
        end += len(encode(record))
        ends.append(end)
    whole = bytearray(segment_of(records))
    position = data.draw(st.integers(FIRST_RECORD, end - 1))
    whole[position] ^= change
    hit = next(index for index, stop in enumerate(ends) if position < stop)
    promised = any(record.durable > hit for record in records[hit + 1 :])
    if promised:
        with pytest.raises(CorruptLog, match=f"change 1/{hit + 1} is damaged"):
            replayed(bytes(whole))
    else:
        found, outcome = replayed(bytes(whole))
        assert found == records[:hit]
        assert outcome.cut == len(records) - hit - 1
    # What the store has already is not needed any more.
    found, outcome = replayed(bytes(whole), Position(1, len(records)))
    assert (found, outcome.end) == ([], Position(1, len(records)))


def logs(*epochs: tuple[int, tuple[int, int], int]) -> list[EpochLog]:
    """Epoch, previous position and number of records each."""
    return [
        EpochLog(epoch, Position(*previous), [Record(epoch, n, 0, 0, 0, n, {}) for n in range(1, count + 1)])
        for epoch, previous, count in epochs
    ]


def test_epochs_follow_one_another() -> None:
    outcome = replay(Position(1, 3), logs((1, (0, 0), 5), (2, (1, 5), 0), (3, (2, 0), 4)), lambda _: None)
    assert outcome.end == Position(3, 4)
    assert outcome.ends == {1: 5, 2: 0, 3: 4}
    assert outcome.changes == 2 + 4


def test_what_an_older_epoch_cut_stays_cut() -> None:
    found: list[Record] = []
    replay(Position(0, 0), logs((1, (0, 0), 5), (2, (1, 3), 1)), found.append)
    assert [(record.epoch, record.number) for record in found] == [(1, 1), (1, 2), (1, 3), (2, 1)]


@pytest.mark.parametrize(
    ("start", "epochs"),
    [
        (Position(1, 0), logs((1, (0, 0), 4), (2, (1, 5), 1))),
        (Position(1, 5), logs((3, (2, 7), 1))),
        (Position(2, 5), logs((1, (0, 0), 9))),
        (Position(2, 5), []),
        (Position(1, 9), logs((1, (0, 0), 9), (2, (1, 8), 1))),
    ],
    ids=["end is gone", "epoch is gone", "own epoch is gone", "all is gone", "store is ahead"],
)
def test_missing_history_is_refused(start: Position, epochs: list[EpochLog]) -> None:
    with pytest.raises(CorruptLog):
        replay(start, epochs, lambda _: None)


# -- files ---------------------------------------------------------------------------------------------------------


def make_log(directory: Path, epoch: int = 1, previous: Position = START, files: Files | None = None) -> Changelog:
    kept = list_segments(directory)
    find_firsts(kept)
    return Changelog(directory, kept, epoch, previous, files or Files(), SMALL_SEGMENT)


def append(log: Changelog, first: int, count: int, size: int = 1000) -> None:
    for number in range(first, first + count):
        if not log.prepared:
            log.prepare()
        log.append(number, number - 1, 0, 0, number, {row_key(Table.XATTRS, b"%d" % number): bytes(size)})


def all_records(directory: Path, start: Position = START) -> list[int]:
    kept = list_segments(directory)
    find_firsts(kept)
    return [record.number for log in epoch_logs(kept, start) for record in log.records]


def test_segments_are_zeroed_rotated_and_read_back(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, 1, 40)
    assert len(log.unsynced()) == len(log.kept) == 4
    batch = log.unsynced()
    log.sync(batch)
    log.synced(batch)
    assert len(log.unsynced()) == 1
    log.close()
    assert all_records(tmp_path) == list(range(1, 41))
    assert all(path.stat().st_size == SMALL_SEGMENT for path in tmp_path.iterdir())
    firsts = [segment.first for segment in log.kept]
    assert all_records(tmp_path, Position(1, firsts[2])) == list(range(firsts[2], 41)), "older segments are skipped"


def test_what_is_appended_during_a_sync_still_has_to_be_synced(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, 1, 5)
    batch = log.unsynced()
    append(log, 6, 20)
    log.sync(batch)
    log.synced(batch)
    assert [segment.header.segment for segment, _ in log.unsynced()] == [1, 2, 3]
    batch = log.unsynced()
    log.sync(batch)
    log.synced(batch)
    assert [segment.header.segment for segment, _ in log.unsynced()] == [3]
    log.close()


def test_a_burst_does_not_depend_on_what_was_made_ahead(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    for number in range(1, 41):
        log.append(number, 0, 0, 0, 0, {row_key(Table.XATTRS, b"a"): bytes(1000)})
    log.close()
    assert all_records(tmp_path) == list(range(1, 41))


def test_a_record_larger_than_a_segment_is_a_mistake(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.prepare()
    with pytest.raises(ValueError, match="does not fit"):
        log.append(1, 0, 0, 0, 0, {row_key(Table.XATTRS, b"a"): bytes(SMALL_SEGMENT)})
    log.close()


class FullDisk(Files):
    def create(self, path: Path, head: bytes, size: int) -> int:
        if path.name != "0000000000000001.log":
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path, head, size)


def test_a_full_disk_is_noticed_before_it_matters(tmp_path: Path) -> None:
    log = make_log(tmp_path, files=FullDisk())
    with pytest.raises(LogFull):
        log.prepare()
    count = 0
    with pytest.raises(LogFull):
        while True:
            log.append(count + 1, 0, 0, 0, 0, {row_key(Table.XATTRS, b"a"): bytes(1000)})
            count += 1
    log.close()
    assert count > 10
    assert all_records(tmp_path) == list(range(1, count + 1))


def test_only_segments_that_nothing_needs_are_deleted(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, 1, 40)
    firsts = [segment.first for segment in log.kept]
    assert log.drop(Position(1, 40)) == 0, "a power cut may still take the first records of those that follow"
    batch = log.unsynced()
    log.sync(batch)
    log.synced(batch)
    assert log.drop(Position(1, firsts[1] - 2)) == 0
    assert log.drop(Position(1, firsts[1] - 1)) == 1
    assert log.drop(Position(1, firsts[2])) == 1
    assert all_records(tmp_path)[0] == firsts[2]
    assert log.drop(Position(9, 0)) == 1
    assert len(log.kept) == 1, "the current one always stays"
    log.close()


def test_older_epochs_are_trimmed_and_dropped(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, 1, 15)
    log.prepare()
    log.close()
    kept = list_segments(tmp_path)
    find_firsts(kept)
    left = trim(kept, Files())
    assert len(left) == len(kept) - 1, "the segment made ahead said nothing"
    assert left[-1].path.stat().st_size == SMALL_SEGMENT, "what is shorter has lost something"
    assert left[-1].path.stat().st_blocks * 512 < SMALL_SEGMENT
    assert trim(list_segments(tmp_path), Files()) is not None
    second = make_log(tmp_path, 2, Position(1, 15))
    second.close()
    third = make_log(tmp_path, 3, Position(2, 0))
    assert all_records(tmp_path) == list(range(1, 16))
    assert third.drop(Position(1, 14)) == 1
    assert third.drop(Position(1, 15)) == 1, "an epoch without changes is still part of the chain"
    assert third.drop(Position(2, 0)) == 1
    third.close()


def test_a_segment_that_a_power_cut_has_emptied_leaves_no_gap_in_the_names(tmp_path: Path) -> None:
    """Nothing of the second was written yet, some of the third was."""
    log = make_log(tmp_path)
    append(log, 1, 30)
    log.close()
    kept = list_segments(tmp_path)
    find_firsts(kept)
    last = kept[1].first - 1
    second = kept[1].path
    second.write_bytes(second.read_bytes()[:FIRST_RECORD].ljust(SMALL_SEGMENT, b"\0"))
    # Nobody was promised any of them.
    third = kept[2]
    header = third.path.read_bytes()[:FIRST_RECORD]
    seed = checksum_seed(third.header.segment)
    records = b"".join(encode(record._replace(durable=last), seed) for record in third.records())
    third.path.write_bytes((header + records).ljust(SMALL_SEGMENT, b"\0"))
    left = trim(kept, Files())
    Changelog(tmp_path, left, 2, Position(1, last), Files(), SMALL_SEGMENT).close()
    kept = list_segments(tmp_path)
    find_firsts(kept)
    assert replay(START, epoch_logs(kept, START), lambda _: None).end == (2, 0)


def test_changes_whose_segment_was_used_again_are_missed_by_an_older_snapshot(tmp_path: Path) -> None:
    """Also if all that is left of the log was written before they were known to be durable."""
    log = make_log(tmp_path)
    for number in range(1, 31):
        log.append(number, 0, 0, 0, number, {row_key(Table.XATTRS, b"%d" % number): bytes(1000)})
    log.close()
    kept = list_segments(tmp_path)
    find_firsts(kept)
    second = kept[1].first
    kept[0].path.unlink()
    with pytest.raises(CorruptLog, match="lacks the changes"):
        epoch_logs(kept[1:], Position(1, 5))
    logs = epoch_logs(kept[1:], Position(1, second - 1))
    assert replay(Position(1, second - 1), logs, lambda _: None).end == (1, 30)


def test_behind_damaged_headers_the_records_count(tmp_path: Path) -> None:
    log = make_log(tmp_path, 3, Position(2, 7))
    append(log, 1, 15)
    log.prepare()
    log.close()
    first, second, *_, ahead = (segment.header for segment in list_segments(tmp_path))
    assert (first.size, second.previous) == (SMALL_SEGMENT, Position(2, 7))

    def damaged(header: SegmentHeader, position: int) -> list[SegmentHeader]:
        path = tmp_path / f"{header.segment:016x}.log"
        whole = path.read_bytes()
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        found = [segment.header for segment in list_segments(tmp_path)]
        path.write_bytes(whole)
        return found

    for position in (0, 9, 13, 17, 25, 33, 41):
        assert damaged(first, position)[0] == SegmentHeader(1, 3, UNKNOWN)
        assert damaged(second, position)[1] == SegmentHeader(2, 3, Position(2, 7))
        assert damaged(ahead, position)[-1] != ahead, "nothing is in it"
    path = tmp_path / "0000000000000002.log"
    path.rename(tmp_path / "0000000000000009.log")
    with pytest.raises(CorruptLog, match="has renamed it"):
        list_segments(tmp_path)
    path.write_bytes(b"\1" * 10_000)
    unusable: list[str] = []
    assert 9 not in {segment.header.segment for segment in list_segments(tmp_path, unusable)}
    assert len(unusable) == 2


def test_what_is_missing_at_the_end_of_the_log_is_noticed(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, 1, 15)
    log.prepare()
    log.close()
    kept = list_segments(tmp_path)
    find_firsts(kept)
    last = kept[-2]
    os.truncate(last.path, last.path.stat().st_size - 8)
    with pytest.raises(CorruptLog, match=f"{last.path.name} is cut off at {SMALL_SEGMENT - 8} of {SMALL_SEGMENT}"):
        epoch_logs(kept, Position(0, 0))
    last.path.unlink()
    with pytest.raises(CorruptLog, match=f"{last.path.name} is missing"):
        epoch_logs([segment for segment in kept if segment is not last], Position(0, 0))
    assert epoch_logs([kept[-1]], Position(9, 1)) != [], "nobody needs what is stored already"


def test_segments_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    for segment, epoch in ((1, 2), (2, 1)):
        header = SegmentHeader(segment, epoch, Position(0, 0))
        (tmp_path / f"{segment:016x}.log").write_bytes(header.pack())
    with pytest.raises(CorruptLog, match="older epoch"):
        list_segments(tmp_path)


def test_an_interrupted_creation_is_no_segment(tmp_path: Path) -> None:
    def stop(step: str) -> None:
        if step == "segment:before-rename":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_log(tmp_path, files=Files(stop))
    assert list_segments(tmp_path) == []


def test_first_numbers_are_found_behind_damage(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    append(log, 1, 3, size=8)
    log.close()
    path = log.kept[0].path
    data = bytearray(path.read_bytes())
    data[FIRST_RECORD + 4] ^= 1
    path.write_bytes(data)
    kept: list[KeptSegment] = list_segments(tmp_path)
    find_firsts(kept)
    assert kept[0].first == 2


def test_a_failed_sync_says_of_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", fail)
    for sync, path in ((Files().sync_directory, tmp_path), (Files().sync_path, tmp_path / "file")):
        with pytest.raises(OSError, match="Input/output error") as caught:
            sync(path)
        assert caught.value.filename == str(path)
