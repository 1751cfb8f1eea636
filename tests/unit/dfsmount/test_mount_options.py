"""Sources and -o lists."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfsmount.config import HARD_SECONDS, Options, Source, UsageError, parse_options, parse_source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("host", Source("host", 9400)),
        ("host:9500", Source("host", 9500)),
        ("host/", Source("host", 9400)),
        ("host:9500/a//b/./c/", Source("host", 9500, "/a/b/c")),
        ("host:/a", Source("host", 9400, "/a")),
        ("127.0.0.1:1", Source("127.0.0.1", 1)),
        ("[::1]", Source("::1", 9400)),
        ("[::1]:65535/x", Source("::1", 65535, "/x")),
        ("host/w\u00e4hrung", Source("host", 9400, "/w\u00e4hrung")),
    ],
)
def test_sources(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":9400",
        "/path",
        "host:0",
        "host:65536",
        "host:x",
        "host:-1",
        "host:9 00",
        "::1",
        "[::1",
        "[::1]9400",
        "host/../x",
        "host:\u0664",
        "a b:1",
    ],
)
def test_sources_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("defaults,noauto,nofail,_netdev,user,relatime,x-systemd.automount,X-mine=1,comment=hello", {}),
        ("ro", {"read_only": True}),
        ("ro,rw", {"read_only": False}),
        ("allow_other,default_permissions,sync_close", {"allow_other": True, "sync_close": True}),
        ("key_file=/k,log_file=/l", {"key_file": Path("/k"), "log_file": Path("/l")}),
        ("attr_timeout=0,entry_timeout=2.5,timeout=7", {"attr_timeout": 0.0, "entry_timeout": 2.5, "timeout": 7.0}),
        ("cache_mib=64,dirty_mib=8", {"cache_mib": 64, "dirty_mib": 8}),
        ("driver=libfuse", {"driver": "libfuse"}),
        ("driver=libfuse,driver=direct", {}),
        ("hard", {"timeout": HARD_SECONDS}),
        ("hard,timeout=5", {"timeout": 5.0}),
        ("debug", {"debug": True}),
        ("nosuid,nodev,noexec,noatime", {"kernel": ("nosuid", "nodev", "noexec", "noatime")}),
        ("noatime,nodiratime,nodev,relatime,diratime", {"kernel": ("nodev",)}),
        ("nodiratime", {"nodiratime": True}),
        ("atime,noatime,lazytime", {"kernel": ("noatime",)}),
    ],
)
def test_lists(text: str, expected: dict[str, object]) -> None:
    options = parse_options([text])
    default = Options()
    for name in default.__struct_fields__:
        assert getattr(options, name) == expected.get(name, getattr(default, name)), name


def test_several_lists_are_one() -> None:
    assert parse_options(["ro,timeout=5", "timeout=6"]) == Options(read_only=True, timeout=6.0)


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_options(["key_file=k"]).key_file == tmp_path / "k"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("allow_otter", "allow_otter"),
        ("ro,frob=1", "frob"),
        ("ro=1", "ro takes no value"),
        ("nosuid=x", "nosuid takes no value"),
        ("timeout", "timeout=..."),
        ("timeout=", "timeout"),
        ("timeout=0", "timeout=0"),
        ("timeout=nan", "timeout=nan"),
        ("timeout=inf", "timeout=inf"),
        ("attr_timeout=-1", "attr_timeout=-1"),
        ("cache_mib=7", "cache_mib=7"),
        ("cache_mib=1e3", "cache_mib=1e3"),
        ("dirty_mib=x", "dirty_mib=x"),
        ("key_file=", "key_file"),
        ("driver=fast", "driver=fast: it must be a word: direct or libfuse"),
        ("driver", "driver=..."),
    ],
)
def test_lists_that_make_no_sense(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options([text])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sloppy_passes_over_what_is_unknown_only() -> None:
    assert parse_options(["frob,ro,frob=1"], sloppy=True) == Options(read_only=True)
    with pytest.raises(UsageError):
        parse_options(["timeout=x"], sloppy=True)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_source, lambda text: parse_options([text])):
        try:
            parse(text)
        except UsageError as error:
            assert str(error)
