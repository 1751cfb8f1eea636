"""The verifying load itself: it finds whatever is lost, and goes on after every error without a false alarm."""

from pathlib import Path
from random import Random

from load_kinds import KINDS
from load_manifest import Directory, LocalFilesystem, Manifest
from verifying_load import Load


class Unsynced(LocalFilesystem):
    """Nothing crashes here: syncs would only take time."""

    def fsync(self, handle: int) -> None:
        pass

    def sync_directory(self, path: str) -> None:
        pass


def _filled(root: Path) -> tuple[Path, Load]:
    """A directory that a load has worked in, and that load."""
    (root / "work").mkdir()
    load = Load(Unsynced(root / "work"), Manifest(root / "manifest"), 1)
    load.prepare()
    for kind in load.kinds:
        for _ in range(25):
            kind.step()
    assert load.verify(Directory(root / "work")) == []
    return root / "work", load


def _files(directory: Path) -> list[Path]:
    """Some of each kind."""
    choose = Random(7)
    found: list[Path] = []
    for top in sorted(directory.iterdir()):
        below = sorted(path for path in [top, *top.rglob("*")] if path.is_file() and path.stat().st_size)
        found += choose.sample(below, min(5, len(below)))
    return found


def test_the_load_notices_a_changed_byte_anywhere(tmp_path: Path) -> None:
    """A verifier that cannot find anything would prove nothing."""
    directory, load = _filled(tmp_path)
    choose = Random(3)
    for path in _files(directory):
        whole = path.read_bytes()
        used = [at for at in range(len(whole)) if whole[at]]
        at = choose.choice(used)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load.verify(Directory(directory)), f"byte {at} of {path}"
        path.write_bytes(whole)


def test_the_load_notices_what_is_gone_or_cut_off(tmp_path: Path) -> None:
    directory, load = _filled(tmp_path)
    for path in _files(directory):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert load.verify(Directory(directory)), f"half of {path} is missing"
        path.unlink()
        assert load.verify(Directory(directory)), f"{path} is missing"
        path.write_bytes(whole)


def test_the_load_notices_what_has_come_back(tmp_path: Path) -> None:
    """Older versions and removed files: a state from before what was acknowledged."""
    directory, load = _filled(tmp_path)
    before = {path: path.read_bytes() for path in _files(directory)}
    for kind in load.kinds:
        for _ in range(70):
            kind.step()
    assert load.verify(Directory(directory)) == []
    noticed = set()
    for path, old in before.items():
        now = path.read_bytes() if path.exists() else None
        if old != now:
            path.write_bytes(old)
            if load.verify(Directory(directory)):
                noticed.add(path.relative_to(directory).parts[0])
            path.unlink() if now is None else path.write_bytes(now)
    assert noticed == {
        "documents",
        "journals",
        "table",
        "ledger",
        "truncated",
        "streams",
        "scratch",
        "links",
        "left",
        "right",
    }


def test_every_kind_goes_on_after_an_error(tmp_path: Path) -> None:
    """A step that failed half way leaves something from which the next goes on."""
    load = _filled(tmp_path)[1]
    choose = Random(5)
    for kind in KINDS:
        for name in ("write", "fsync", "rename", "link", "unlink", "sync_directory", "truncate"):
            broken = Breaking(Unsynced(tmp_path / "work"), name, choose.randrange(3))
            one = kind(broken, load.manifest, choose)
            for _ in range(12):
                try:
                    one.step()
                except OSError:
                    assert list(one.verify(Directory(tmp_path / "work"))) == []
            assert one.broken == []
    assert load.verify(Directory(tmp_path / "work")) == []


class Breaking:
    """A filesystem one of whose calls fails now and then, before or after it was done."""

    def __init__(self, fs: LocalFilesystem, name: str, countdown: int) -> None:
        self._fs = fs
        self._name = name
        self._countdown = countdown

    def __getattr__(self, name: str) -> object:
        method = getattr(self._fs, name)
        if name != self._name:
            return method

        def call(*arguments: object) -> object:
            self._countdown -= 1
            if self._countdown % 4 == 3:
                raise OSError("before")
            result = method(*arguments)
            if self._countdown % 4 == 1:
                raise OSError("after")
            return result

        return call
