"""Conditions and ranges, as RFC 9110 has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaserver.httpranges import MAX_RANGES, Span, Verdict, Version, http_date, judge, wanted

V = Version('"a-1"', 1_000_000_000)
DATE, EARLIER, LATER = (http_date(1_000_000_000 + seconds) for seconds in (0, -5, 5))


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("bytes=0-0", [Span(0, 1)]),
        ("bytes=2-", [Span(2, 10)]),
        ("bytes=-3", [Span(7, 10)]),
        ("bytes=-30", [Span(0, 10)]),
        ("bytes=5-99999999999999", [Span(5, 10)]),
        ("bytes=0-1,4-5 , -1", [Span(0, 2), Span(4, 6), Span(9, 10)]),
        ("BYTES=1-1", [Span(1, 2)]),
        # Of several, those that exist.
        ("bytes=100-,2-3", [Span(2, 4)]),
        # None exists: 416.
        ("bytes=10-", []),
        ("bytes=-0", []),
        ("bytes=10-11,12-", []),
        # Malformed, or not of bytes, or more work than the file: all of it.
        ("bytes=3-2", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=1", None),
        ("bytes=a-b", None),
        ("bytes=1-2,", None),
        ("bytes 1-2", None),
        ("lines=1-2", None),
        ("bytes=0-9,0-9", None),
        ("bytes=" + ",".join(["0-0"] * (MAX_RANGES + 1)), None),
        ("bytes=" + "9" * 20 + "-", None),
    ],
)
def test_ranges(text: str, spans: list[Span] | None) -> None:
    assert wanted({"range": text}, V, 10) == spans


def test_an_empty_file_has_no_ranges() -> None:
    assert wanted({"range": "bytes=0-"}, V, 0) == []
    assert wanted({}, V, 0) is None


@pytest.mark.parametrize(
    ("if_range", "part"),
    [('"a-1"', True), ('"b"', False), ('W/"a-1"', False), (DATE, True), (EARLIER, False), (LATER, False), ("?", False)],
)
def test_a_range_only_of_what_it_was(if_range: str, part: bool) -> None:
    assert (wanted({"range": "bytes=0-0", "if-range": if_range}, V, 10) is not None) == part


@given(st.text(alphabet="bytes=0123456789-, ", max_size=40), st.integers(0, 1000))
def test_ranges_lie_in_the_file(text: str, size: int) -> None:
    for span in wanted({"range": text}, V, size) or []:
        assert 0 <= span.start < span.stop <= size


OK, NOT_MODIFIED, FAILED = Verdict.GO_ON, Verdict.NOT_MODIFIED, Verdict.FAILED


@pytest.mark.parametrize(
    ("headers", "reading", "writing"),
    [
        ({}, OK, OK),
        ({"if-match": '"a-1"'}, OK, OK),
        ({"if-match": '"x", "a-1"'}, OK, OK),
        ({"if-match": "*"}, OK, OK),
        ({"if-match": '"x"'}, FAILED, FAILED),
        ({"if-match": 'W/"a-1"'}, FAILED, FAILED),
        ({"if-match": "a-1"}, FAILED, FAILED),
        ({"if-none-match": '"a-1"'}, NOT_MODIFIED, FAILED),
        ({"if-none-match": 'W/"a-1"'}, NOT_MODIFIED, FAILED),
        ({"if-none-match": "*"}, NOT_MODIFIED, FAILED),
        ({"if-none-match": '"x"'}, OK, OK),
        ({"if-unmodified-since": DATE}, OK, OK),
        ({"if-unmodified-since": EARLIER}, FAILED, FAILED),
        ({"if-unmodified-since": "yesterday"}, OK, OK),
        # The tag decides if there is one.
        ({"if-match": '"a-1"', "if-unmodified-since": EARLIER}, OK, OK),
        ({"if-modified-since": DATE}, NOT_MODIFIED, OK),
        ({"if-modified-since": EARLIER}, OK, OK),
        ({"if-none-match": '"x"', "if-modified-since": DATE}, OK, OK),
    ],
)
def test_conditions(headers: dict[str, str], reading: Verdict, writing: Verdict) -> None:
    assert judge(headers, V, reading=True) is reading
    assert judge(headers, V, reading=False) is writing


@pytest.mark.parametrize(
    ("headers", "verdict"),
    [({}, OK), ({"if-match": "*"}, FAILED), ({"if-match": '"a"'}, FAILED), ({"if-none-match": "*"}, OK)],
)
def test_conditions_on_what_is_not_there(headers: dict[str, str], verdict: Verdict) -> None:
    assert judge(headers, None, reading=False) is verdict


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_header_is_too_strange(one: str, other: str) -> None:
    headers = {"if-match": one, "if-none-match": other, "if-modified-since": one, "if-unmodified-since": other}
    judge(headers, V, reading=True)
    judge({"if-unmodified-since": one}, V, reading=False)
    wanted({"range": one, "if-range": other}, V, 100)


@pytest.mark.parametrize("seconds", [-(1 << 40), 0, 1 << 40])
def test_dates_beyond_the_calendar(seconds: int) -> None:
    assert http_date(seconds).endswith("GMT")
