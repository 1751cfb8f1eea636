"""What the command line makes of a gateway: HTTPS, tokens, owners, and what it refuses."""

import os
import shutil
from pathlib import Path

import pytest
from gateway_cluster import MountlessCluster
from mount_cluster import run


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_https_and_tokens_of_a_file(servers: MountlessCluster, tmp_path: Path) -> None:
    cert, key, tokens = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "tokens"
    run(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *(
            "-keyout",
            key,
            "-out",
            cert,
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ),
    )
    tokens.write_text("# two of them\none-token\nother-token\n")
    words = ("--cert", str(cert), "--private-key", str(key), "--token-file", str(tokens))
    with servers.gateway(*words, name="https") as gateway:
        assert gateway.url.startswith("https://")
        file = tmp_path / "file"
        file.write_bytes(os.urandom(1_000_000))
        stored = gateway.curl("/files/over-tls", "-T", file, "--cacert", cert, token="one-token")
        assert stored.status == 201
        assert gateway.curl("/files/over-tls", "--cacert", cert, token="other-token").body == file.read_bytes()
        # The token of another gateway is none here.
        assert gateway.curl("/files/over-tls", "--cacert", cert).status == 401


def test_new_files_have_the_owner_that_was_said(servers: MountlessCluster, tmp_path: Path) -> None:
    with servers.gateway("--owner", "1234:567", "--mode", "0640", name="owner") as gateway:
        gateway.put("/files/owned", b"x")
        assert gateway.curl("/files?prefix=owned").json["entries"][0]["mode"] == "0640"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--listen", "nowhere"], "give HOST:PORT"),
        (["--listen", "0.0.0.0:1", "--anonymous"], "everybody could write"),
        (["--listen", "127.0.0.1:0"], "needs a name"),
        (["--mode", "9"], "octal"),
        (["--owner", "me"], "UID:GID"),
        (["--max-upload", "much"], "number of bytes"),
        (["--cert", "x"], "belong together"),
        (["--export", "/a/../b"], "without .."),
        (["--log-level", "loud"], "one of"),
    ],
)
def test_what_cannot_be_meant_is_one_line(servers: MountlessCluster, words: list[str], text: str) -> None:
    refused = servers.dfs("gateway", "--data", servers.data, *words, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("dfs: ")
    assert text in refused.stderr
