"""Symbolic links that others made: those inside the tree are followed, no other is."""

from collections.abc import Iterator

import pytest
from gateway_cluster import Gateway, MountlessCluster

OUT = {
    "absolute": "/etc/passwd",
    "above": "../../../../etc/passwd",
    "beside": "../outside/secret",
    "around": "../exported/inside",
    "through": "above/x",
    "own": "../exported/.dfs-gateway-uploads",
}


@pytest.fixture(scope="module")
def part(servers: MountlessCluster, gateway: Gateway) -> Iterator[Gateway]:
    """A gateway to one directory, beside which another one lies."""
    for path in ("/files/exported/", "/files/exported/sub/", "/files/outside/"):
        assert gateway.curl(path, "-X", "PUT").status == 201
    gateway.put("/files/exported/inside", b"inside")
    gateway.put("/files/outside/secret", b"secret")
    links = [f"{name}={target}" for name, target in OUT.items()]
    links += [
        "plain=inside",
        "back=sub/../inside",
        "folder=sub",
        "chain=plain",
        "loop=loop",
        "up=sub/../../exported/inside",
    ]
    servers.script("make_links.py", servers.wanted.address, servers.layout.key_file, "exported", *links)
    with servers.gateway("--export", "/exported", name="links") as made:
        yield made


@pytest.mark.parametrize("name", [*OUT, "up"])
def test_no_link_leads_out(part: Gateway, name: str) -> None:
    for path in (f"/files/{name}", f"/download/{name}", f"/files/{name}/x", f"/files/{name}?chunks"):
        found = part.curl(path)
        assert (found.status, found.code) == (403, "NOT_PERMITTED"), path
    assert part.put(f"/files/{name}/x", b"x").status == 403
    assert b"secret" not in part.curl(f"/files/{name}").body


@pytest.mark.parametrize("name", ["plain", "back", "chain"])
def test_links_inside_are_followed(part: Gateway, name: str) -> None:
    assert part.curl(f"/files/{name}").body == b"inside"
    assert part.put("/files/folder/below", b"x").status in (200, 201)
    assert "below" in part.names("/files/sub/")


def test_a_loop_ends(part: Gateway) -> None:
    assert part.curl("/files/loop").status == 400


def test_a_link_is_removed_and_not_what_it_leads_to(part: Gateway, gateway: Gateway) -> None:
    assert {entry["type"] for entry in part.curl("/files?prefix=beside").json["entries"]} == {"symlink"}
    assert part.curl("/files/beside", "-X", "DELETE").status == 204
    assert gateway.curl("/files/outside/secret").body == b"secret"


def test_a_link_is_replaced_and_not_what_it_leads_to(part: Gateway, gateway: Gateway) -> None:
    assert part.put("/files/absolute", b"mine").status == 200
    assert part.curl("/files/absolute").body == b"mine"


def test_a_directory_that_is_not_there_cannot_be_exported(servers: MountlessCluster) -> None:
    refused = servers.dfs(
        "gateway", "--data", servers.data, "--export", "/no/such", "--listen", "127.0.0.1:1", check=False
    )
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("dfs: there is no directory /no/such")
