"""The status page of a running cluster, as a browser and as a script sees it."""

import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from mount_cluster import RealCluster, wait_until

pytestmark = pytest.mark.timeout(120)

# Nothing but the page: a browser's own requests do not get out of a closed network, and take long over it.
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def token(cluster: RealCluster) -> str:
    return cluster.dfs("token", "--data", cluster.data).stdout.strip()


def get(cluster: RealCluster, password: str) -> httpx.Response:
    url = f"http://127.0.0.1:{cluster.wanted.http_port}/"
    return httpx.get(url, auth=("anyone", password), timeout=20, trust_env=False)


def test_the_token_of_the_command_line_opens_the_page(cluster: RealCluster) -> None:
    assert get(cluster, "wrong").status_code == 401
    wait_until(lambda: "All is well" in get(cluster, token(cluster)).text, "the page says that all is well")
    text = get(cluster, token(cluster)).text
    assert all(f"<b>chunkserver{number}</b>" in text for number in (1, 2, 3))
    assert f"<b>{cluster.mnt}</b>" in text
    assert "the metaserver started" in text


@pytest.mark.soak
def test_a_browser_shows_what_happens_without_a_reload(own_cluster: RealCluster, tmp_path: Path) -> None:
    """With the `chromium` of the distribution; seven seconds of its own time, in which the script asks again."""
    os.kill(own_cluster.pid("chunkserver3"), signal.SIGKILL)
    port = own_cluster.wanted.http_port
    url = f"http://anyone:{token(own_cluster)}@127.0.0.1:{port}/"
    shot = tmp_path / "page.png"
    command = ["chromium", *QUIET, f"--user-data-dir={tmp_path}/profile", "--window-size=390,1600", "--timeout=20000"]
    found = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "chunkserver3 is DOWN, was UP" in found
    assert 'id="note" class="foot" role="status"></p>' in found
    subprocess.run([*command, f"--screenshot={shot}", url], capture_output=True, timeout=60, check=True)
    assert shot.read_bytes().startswith(b"\x89PNG")
