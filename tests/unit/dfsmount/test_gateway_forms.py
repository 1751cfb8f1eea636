"""Forms, however they are cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfsmount.gateway_forms import MAX_FIELD_BYTES, MAX_FILES, FileBegins, FileData, FileEnds, FormReader
from metaserver.errors import DfsError, ErrorCode

TYPE = "multipart/form-data; boundary=XX"


def part(disposition: str, data: bytes) -> bytes:
    return b"--XX\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (disposition.encode(), data)


def read(body: bytes, size: int = 1 << 20) -> dict[bytes, bytes]:
    """The files of a form that comes in pieces of ``size``."""
    reader = FormReader(TYPE)
    files: dict[bytes, bytes] = {}
    ended: list[bytes] = []
    name = b""
    for at in range(0, len(body), size):
        for event in reader.feed(body[at : at + size]):
            match event:
                case FileBegins():
                    name = event.name
                    files[name] = b""
                case FileData():
                    files[name] += event.data
                case FileEnds():
                    ended.append(name)
    assert reader.complete
    assert ended == list(files)
    return files


@given(st.binary(max_size=300), st.integers(1, 50))
def test_files_come_out_as_they_went_in(data: bytes, size: int) -> None:
    body = part('name="t"', b"some text") + part('name="f"; filename="a b"', data) + b"--XX--\r\n"
    assert read(body, size) == {b"a b": data}


def test_several_files_and_an_empty_one() -> None:
    body = part('name="f"; filename="1"', b"one") + part('name="f"; filename="2"', b"") + b"--XX--"
    assert read(body) == {b"1": b"one", b"2": b""}


def test_names_are_as_browsers_send_them() -> None:
    body = part('name="f"; filename="für%22.txt"', b"") + b"--XX--"
    assert read(body) == {'für".txt'.encode(): b""}


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\0"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(DfsError) as raised:
        read(part(f'name="f"; filename="{name}"', b"") + b"--XX--")
    assert raised.value.code is ErrorCode.INVALID


def test_bounds() -> None:
    with pytest.raises(DfsError, match="files in a form"):
        read(b"".join(part(f'name="f"; filename="{number}"', b"") for number in range(MAX_FILES + 1)))
    with pytest.raises(DfsError, match="no files"):
        read(part('name="f"', bytes(MAX_FIELD_BYTES + 1)))


@pytest.mark.parametrize("body", [b"nothing like it", b"--XX\r\nbroken header\r\n\r\n", b"--YY\r\n\r\n"])
def test_what_is_no_form_is_refused(body: bytes) -> None:
    with pytest.raises(DfsError) as raised:
        read(body)
    assert raised.value.code is ErrorCode.INVALID


def test_a_form_that_ends_in_the_middle_is_not_complete() -> None:
    reader = FormReader(TYPE)
    list(reader.feed(part('name="f"; filename="x"', b"data")))
    assert not reader.complete


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", "x; boundary=" + "b" * 500])
def test_no_boundary(kind: str) -> None:
    with pytest.raises(DfsError):
        FormReader(kind)


@given(st.binary(max_size=200), st.integers(1, 20))
def test_anything_is_a_form_or_an_error(body: bytes, size: int) -> None:
    reader = FormReader(TYPE)
    try:
        for at in range(0, len(body), size):
            list(reader.feed(body[at : at + size]))
    except DfsError as error:
        assert error.code in (ErrorCode.INVALID, ErrorCode.ARGUMENT_TOO_BIG)
