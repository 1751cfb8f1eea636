"""Names in URLs: nothing that leads out of the tree becomes one."""

from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfsmount import gateway_paths
from dfsmount.gateway_paths import HIDDEN, MAX_DEPTH, Place
from metaserver.errors import DfsError, ErrorCode

NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..") and not name.startswith(HIDDEN)
)


@given(st.lists(NAMES, max_size=5), st.booleans())
def test_every_name_survives_its_address(names: list[bytes], directory: bool) -> None:
    if names:
        url = gateway_paths.to_url(tuple(names), directory=directory).encode()
        assert url.isascii()
        assert gateway_paths.from_url(url.removeprefix(b"/files/")) == Place(tuple(names), directory)


@pytest.mark.parametrize(
    "path",
    [
        b"..", b"a/../b", b"%2e%2e/b", b".%2E", b"a/%2e", b".", b"a%2fb", b"a%2Fb", b"%2f", b"a%00", b"%00", b"a//b",
        b"/a", b"a//", b"a%", b"a%2", b"%zz", b"a/%2e%2e/%2e%2e/etc", quote_from_bytes(HIDDEN).encode() + b"x",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused(path: bytes) -> None:
    with pytest.raises(DfsError) as raised:
        gateway_paths.from_url(path)
    assert raised.value.code in (ErrorCode.INVALID, ErrorCode.NOT_PERMITTED)


@given(st.binary(max_size=80))
def test_whatever_comes_is_names_or_an_error(path: bytes) -> None:
    try:
        place = gateway_paths.from_url(path)
    except DfsError:
        return
    for name in place.names:
        assert name not in (b"", b".", b"..")
        assert b"/" not in name
        assert b"\0" not in name


@given(st.text(max_size=80))
def test_names_in_queries_are_as_safe(path: str) -> None:
    try:
        place = gateway_paths.from_text(path)
    except (DfsError, UnicodeEncodeError):
        return
    assert all(name not in (b"", b".", b"..") and not set(name) & {0, ord("/")} for name in place.names)


def test_lengths_are_bounded() -> None:
    assert gateway_paths.from_url(b"x" * 255).names == (b"x" * 255,)
    with pytest.raises(DfsError, match="255 bytes"):
        gateway_paths.from_url(b"x" * 256)
    with pytest.raises(DfsError, match="deep"):
        gateway_paths.from_url(b"x/" * (MAX_DEPTH + 1))


def test_the_exported_directory_has_no_name() -> None:
    assert gateway_paths.to_url((), directory=True) == "/files/"
    assert str(Place((), True)) == "/"


def test_links_stay_inside() -> None:
    assert gateway_paths.link_parts(b"../a/./b//c") == (b"..", b"a", b"b", b"c")
    for target in (b"/etc/passwd", b"a/" + HIDDEN + b"x"):
        with pytest.raises(DfsError):
            gateway_paths.link_parts(target)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        (b"a b.txt", 'attachment; filename="a b.txt"'),
        ("für.txt".encode(), "attachment; filename=\"f_r.txt\"; filename*=UTF-8''f%C3%BCr.txt"),
        (b'"\r\nx: y', "attachment; filename=\"___x_ y\"; filename*=UTF-8''%22%0D%0Ax%3A%20y"),
    ],
)
def test_a_name_cannot_break_out_of_its_header(name: bytes, header: str) -> None:
    assert gateway_paths.disposition(name) == header


@given(st.binary(min_size=1, max_size=60))
def test_every_disposition_is_one_header(name: bytes) -> None:
    header = gateway_paths.disposition(name)
    assert header.isascii()
    assert header.isprintable()
    assert header.count('"') == 2
