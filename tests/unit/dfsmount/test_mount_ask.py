"""What a mount asks of itself it must not wait for itself: killed meanwhile, neither process nor mount would end."""

import os
from pathlib import Path

import pytest

from dfsmount.mount import _ask_mount


def refuse(*_: object) -> None:
    raise AssertionError("asked in the mount's own process")


def test_the_mount_is_asked_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path.stat().st_dev
    monkeypatch.setattr(os, "statvfs", refuse)
    assert _ask_mount(tmp_path) == device


def test_a_mount_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        _ask_mount(tmp_path / "nothing")
