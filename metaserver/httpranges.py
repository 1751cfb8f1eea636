"""Conditions and ranges of HTTP (RFC 9110, sections 13 and 14). Pure: headers in, decisions out."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from enum import Enum
from typing import NamedTuple

# More of them are answered with the whole file: RFC 9110, 14.2 warns of requests that cost more than they fetch.
MAX_RANGES = 32

_ETAG = re.compile(r'\s*((?:W/)?"[\x21\x23-\x7e\x80-\xff]*")\s*(?:,|$)')
_RANGE = re.compile(r"(\d{0,19})-(\d{0,19})")


class Version(NamedTuple):
    """What a file is at present. ``etag`` is a strong one with its quotes; ``mtime`` in whole seconds."""

    etag: str
    mtime: int


class Span(NamedTuple):
    """Bytes [start, stop)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class Verdict(Enum):
    """What conditions come to."""

    GO_ON = 200
    NOT_MODIFIED = 304
    FAILED = 412


# -- conditions ----------------------------------------------------------------------------------------------------


def judge(headers: Mapping[str, str], version: Version | None, *, reading: bool) -> Verdict:
    """Whether to do what was asked, given what is there (None: nothing), in the order of RFC 9110, 13.2.2."""
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if match is not None:
        if not _matches(match, version, strong=True):
            return Verdict.FAILED
    elif _is_after(version, headers.get("if-unmodified-since")) is True:
        return Verdict.FAILED
    if none_match is not None:
        if _matches(none_match, version, strong=False):
            return Verdict.NOT_MODIFIED if reading else Verdict.FAILED
    elif reading and _is_after(version, headers.get("if-modified-since")) is False:
        return Verdict.NOT_MODIFIED
    return Verdict.GO_ON


def _matches(text: str, version: Version | None, *, strong: bool) -> bool:
    if version is None:
        return False
    if text.strip() == "*":
        return True
    tags = _etags(text)
    return version.etag in (tags if strong else [tag.removeprefix("W/") for tag in tags])


def _etags(text: str) -> list[str]:
    found, at = [], 0
    while match := _ETAG.match(text, at):
        found.append(match[1])
        at = match.end()
    return found


def _is_after(version: Version | None, date: str | None) -> bool | None:
    """Whether the file changed after a date; None if that cannot be said."""
    seconds = None if date is None else _seconds(date)
    return None if version is None or seconds is None else version.mtime > seconds


def _seconds(date: str) -> int | None:
    try:
        moment = parsedate_to_datetime(date)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def http_date(seconds: int) -> str:
    """A date as HTTP writes it; the nearest possible one for times beyond the calendar."""
    latest = 253402300799
    return format_datetime(datetime.fromtimestamp(min(max(seconds, -62135596800), latest), UTC), usegmt=True)


# -- ranges --------------------------------------------------------------------------------------------------------


def wanted(headers: Mapping[str, str], version: Version, size: int) -> list[Span] | None:
    """The ranges to send, in the order asked for; None: the whole file; empty: none of them exists (416)."""
    text = headers.get("range")
    if text is None or not _still_wanted(headers.get("if-range"), version):
        return None
    unit, equals, specs = text.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    spans = []
    parts = [part.strip() for part in specs.split(",")]
    for part in parts:
        match = _RANGE.fullmatch(part)
        if match is None or not (match[1] or match[2]) or (match[1] and match[2] and int(match[1]) > int(match[2])):
            # A malformed header is as good as none.
            return None
        span = _span(match[1], match[2], size)
        if span.length > 0:
            spans.append(span)
    return None if len(parts) > MAX_RANGES or _costly(spans, size) else spans


def _span(first: str, last: str, size: int) -> Span:
    if not first:
        return Span(max(0, size - int(last)), size) if int(last) else Span(0, 0)
    start = int(first)
    return Span(start, min(size, int(last) + 1 if last else size)) if start < size else Span(0, 0)


def _costly(spans: list[Span], size: int) -> bool:
    """Whether several ranges come to more than the file: then they overlap, and nobody needs that."""
    return len(spans) > 1 and sum(span.length for span in spans) > size


def _still_wanted(if_range: str | None, version: Version) -> bool:
    if if_range is None:
        return True
    if if_range.lstrip().startswith(('"', "W/")):
        return if_range.strip() == version.etag
    # A date is a strong validator only if it is exact.
    return _seconds(if_range) == version.mtime
