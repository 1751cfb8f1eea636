"""Asking the processes of this host about themselves, for the commands that look."""

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dfsmount.dfs_layout import Problem
from dfsmount.dfs_mounts import mounts, our_mount_of
from metaserver import controlsocket
from metaserver.controlsocket import Process

AnswerT = TypeVar("AnswerT")


def process_of(path: Path) -> Process:
    """The process behind the mount that a path lies in; nothing is asked of the mounted filesystem itself, which may
    hang."""
    point = our_mount_of(Path(os.path.abspath(path)), mounts()).point
    for process in controlsocket.processes():
        if process.program == "dfsmount":
            try:
                about = controlsocket.ask(process, "about")
            except controlsocket.Refused:
                continue
            if isinstance(about, dict) and about.get("mountpoint") == point:
                return process
    raise Problem(f"the process that serves {point} cannot be asked: be root or the user who mounted it, on this host")


def ask(process: Process, command: str, type_: type[AnswerT], timeout: float = 5.0, **arguments: Any) -> AnswerT:
    try:
        return msgspec.convert(controlsocket.ask(process, command, timeout, **arguments), type_)
    except controlsocket.Refused as refused:
        raise Problem(str(refused)) from None
    except msgspec.ValidationError:
        raise Problem(f"process {process.pid} is of another version") from None
