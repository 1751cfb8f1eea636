"""Files in multipart/form-data, as they come in: python-multipart finds the parts, nothing is collected."""

from collections.abc import Iterator
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dfsmount.gateway_paths import from_form
from metaserver.errors import DfsError, ErrorCode

# Each is a file of its own.
MAX_FILES = 100
# Other fields are read past; a form has few and short ones.
MAX_FIELD_BYTES = 1 << 20


class FileBegins(NamedTuple):
    name: bytes


class FileData(NamedTuple):
    data: bytes


class FileEnds(NamedTuple):
    """The part is complete."""


Event = FileBegins | FileData | FileEnds


class FormReader:
    """Takes a body piece by piece. Raises INVALID or ARGUMENT_TOO_BIG."""

    def __init__(self, content_type: str) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise DfsError(ErrorCode.INVALID, "multipart/form-data without a boundary")
        self.complete = False
        self._events: list[Event] = []
        self._field = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._in_file = False
        self._files = 0
        self._skipped = 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._part_ends,
                    "on_end": self._ends,
                },
            )
        except FormParserError as error:
            raise DfsError(ErrorCode.INVALID, f"malformed form: {error}") from None

    def feed(self, data: bytes) -> Iterator[Event]:
        """What ``data`` brings. Use it up before the next call."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise DfsError(ErrorCode.INVALID, f"malformed form: {error}") from None
        events, self._events = self._events, []
        return iter(events)

    # -- what the parser calls -----------------------------------------------------------------------------------

    def _part_begins(self) -> None:
        self._disposition = b""
        self._in_file = False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        if b"filename" not in options:
            return
        self._files += 1
        if self._files > MAX_FILES:
            raise DfsError(ErrorCode.ARGUMENT_TOO_BIG, f"more than {MAX_FILES} files in a form")
        # Browsers escape these three and nothing else.
        name = options[b"filename"].replace(b"%22", b'"').replace(b"%0D", b"\r").replace(b"%0A", b"\n")
        self._in_file = True
        self._events.append(FileBegins(from_form(name)))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._events.append(FileData(data[start:end]))
            return
        self._skipped += end - start
        if self._skipped > MAX_FIELD_BYTES:
            raise DfsError(ErrorCode.ARGUMENT_TOO_BIG, f"more than {MAX_FIELD_BYTES} bytes of fields that are no files")

    def _part_ends(self) -> None:
        if self._in_file:
            self._events.append(FileEnds())

    def _ends(self) -> None:
        self.complete = True
