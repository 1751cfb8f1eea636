"""Tests with several hosts need root, network namespaces and /dev/fuse; they are skipped elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def _able() -> bool:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        return False
    try:
        return subprocess.run(["unshare", "--net", "--uts", "ip", "link"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    able = bool(mine) and _able()
    for item in mine:
        item.add_marker(pytest.mark.mount)
        if not able:
            item.add_marker(pytest.mark.skip(reason="needs root, network namespaces and /dev/fuse"))
