"""The cluster key: who may speak to whom, from the first day.

The key is 32 random bytes in a file of mode 0600 (hexadecimal, one line), made by the metaserver's first start and
copied by the operator to the other hosts. It is never an argument and never logged.

* Data plane: both sides of a HELLO prove that they have it: HMAC-SHA-256 over role and both nonces (RFC 2104).
* Control plane: HTTP needs ``Authorization: Bearer <token>``, the token being an HMAC of a constant, so that a token
  seen in a trace does not reveal the key.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

KEY_BYTES = 32


class KeyFileError(Exception):
    """The key file is missing, malformed or readable by others; the text says which and what to do."""


class DamagedKey(KeyFileError):
    """It is there, but it is no key: somebody has to copy it again."""


class ClusterKey:
    """The secret itself; ``repr`` does not show it."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a cluster key has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = secret

    def __repr__(self) -> str:
        return "ClusterKey(...)"

    def proof(self, role: str, own_nonce: bytes, peer_nonce: bytes) -> bytes:
        """What a side that plays ``role`` sends to show that it has the key."""
        message = b"dfs hello\0" + role.encode() + b"\0" + own_nonce + peer_nonce
        return hmac.digest(self._secret, message, hashlib.sha256)

    def accepts(self, proof: bytes, role: str, own_nonce: bytes, peer_nonce: bytes) -> bool:
        """Whether ``proof`` is what :meth:`proof` gives for these arguments; takes the same time either way."""
        return hmac.compare_digest(proof, self.proof(role, own_nonce, peer_nonce))

    @property
    def text(self) -> str:
        """What its file contains. For that file only."""
        return self._secret.hex() + "\n"

    def derive(self, purpose: bytes) -> bytes:
        """A secret for one purpose, from which nothing about the key follows."""
        return hmac.digest(self._secret, purpose, hashlib.sha256)

    def secret_for_sealing(self) -> bytes:
        """The key itself, for an answer that only a host with a join token can open."""
        return self._secret

    @property
    def http_token(self) -> str:
        """The bearer token of the control plane."""
        return hmac.digest(self._secret, b"dfs http token", hashlib.sha256).hex()

    def write_right(self, chunk: int) -> str:
        """Whoever shows this may write that chunk over HTTP; who knows only the token cannot make it."""
        return hmac.digest(self._secret, b"dfs chunk write\0%d" % chunk, hashlib.sha256).hex()

    def accepts_write_right(self, right: str, chunk: int) -> bool:
        return hmac.compare_digest(right.encode(), self.write_right(chunk).encode())


def load_key(path: Path) -> ClusterKey:
    """Reads a key file; raises :class:`KeyFileError` with one line that says what to do."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(1024)
    except FileNotFoundError:
        raise KeyFileError(f"no cluster key at {path}: copy it from the metaserver's data directory") from None
    except OSError as error:
        raise KeyFileError(f"cannot read the cluster key {path}: {error.strerror}") from None
    if mode & 0o077:
        raise KeyFileError(f"the cluster key {path} is readable by others (mode {mode:04o}): chmod 600 it")
    try:
        return ClusterKey(bytes.fromhex(text.strip().decode("ascii")))
    except ValueError:
        raise DamagedKey(f"{path} is not a cluster key ({2 * KEY_BYTES} hexadecimal digits): copy it again") from None


def load_or_create_key(path: Path) -> ClusterKey:
    """Reads the key, or makes one durably if there is none; only the metaserver's first start does the latter."""
    if not path.exists():
        save_key(path, ClusterKey(secrets.token_bytes(KEY_BYTES)))
    return load_key(path)


def save_key(path: Path, key: ClusterKey) -> None:
    """Writes a key file durably, for its owner only."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key.text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
