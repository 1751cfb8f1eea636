"""How the cluster key reaches a new host: what a join token is, and the exchange that it permits. Both sides of it.

A **join token** is text for people to copy: ``dfsjoin1-`` and 90 characters (base32, RFC 4648, without padding) of

====== ===== =====================================================================================================
offset bytes
====== ===== =====================================================================================================
0      8     id, random, made by the metaserver, which remembers until when it is valid and whether it was used
8      16    cluster id (UUID)
24     32    secret = HMAC-SHA-256(cluster key, ``dfs join token`` 0 id): both sides have it, it never travels
====== ===== =====================================================================================================

The exchange is one HTTP request and its answer, without the control plane's token, which the new host cannot have:

1. The new host makes an X25519 key pair (RFC 7748) and sends id, its public key, its name, and a proof:
   HMAC-SHA-256(secret, ``dfs join request`` 0 id public-key name).
2. The metaserver checks the proof, then that the token is valid (durably noting that it is used, if it is for one
   host), makes a key pair of its own, and answers with its public key and the sealed cluster key: ChaCha20-Poly1305
   (RFC 8439) under HKDF-SHA-256(X25519(...), salt = secret, info = ``dfs join key`` 0 id both-public-keys), nonce 0
   since no key is used twice, the info being authenticated as well.

Only who knows the secret can ask, and only who knows it can have answered. Who listens sees id, name and public keys,
and learns nothing of the key even from a token that he finds later: the key pairs are gone by then. A request that is
sent again gets an answer that only the first sender can open.
"""

import base64
import hashlib
import hmac
import re
import uuid
from typing import NamedTuple

from metaserver.key import KEY_BYTES, ClusterKey

PREFIX = "dfsjoin1-"
ID_BYTES = 8
_TEXT = re.compile(PREFIX + "[a-z2-7]{90}")
_NONCE = bytes(12)


class JoinError(Exception):
    """A token that is none, or an answer that cannot be opened; the text is one line."""


class JoinToken(NamedTuple):
    """See the module. ``repr`` does not show the secret."""

    id: bytes
    cluster_id: str
    secret: bytes

    def __repr__(self) -> str:
        return f"JoinToken({self.id.hex()})"

    @property
    def text(self) -> str:
        packed = self.id + uuid.UUID(self.cluster_id).bytes + self.secret
        return PREFIX + base64.b32encode(packed).decode().rstrip("=").lower()


def make(key: ClusterKey, token_id: bytes, cluster_id: str) -> JoinToken:
    """The token of that id; who has the cluster key can make it."""
    return JoinToken(token_id, cluster_id, key.derive(b"dfs join token\0" + token_id))


def parse(text: str) -> JoinToken:
    """Reads what a person has copied; raises :class:`JoinError`."""
    text = "".join(text.split()).lower()
    if not _TEXT.fullmatch(text):
        raise JoinError("that is no join token: `dfs join-token` makes one, on a host that has the cluster key")
    packed = base64.b32decode(text.removeprefix(PREFIX).upper() + "======")
    return JoinToken(packed[:8], str(uuid.UUID(bytes=packed[8:24])), packed[24:])


def _proof(secret: bytes, token_id: bytes, public: bytes, name: str) -> bytes:
    message = b"dfs join request\0" + token_id + public + name.encode()
    return hmac.digest(secret, message, hashlib.sha256)


class Asking:
    """The new host's side: one exchange."""

    def __init__(self, token: JoinToken, name: str) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._token = token
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()
        self.proof = _proof(token.secret, token.id, self.public, name)

    def open(self, public: bytes, sealed: bytes) -> ClusterKey:
        """The cluster key out of the answer; :class:`JoinError` if it does not come from who knows the secret."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(public))
            sealing, info = _sealing_key(shared, self._token.secret, self._token.id, self.public, public)
            return ClusterKey(ChaCha20Poly1305(sealing).decrypt(_NONCE, sealed, info))
        except (InvalidTag, ValueError):
            raise JoinError("the answer does not come from the metaserver that the token is for") from None


def accepts(token: JoinToken, public: bytes, name: str, proof: bytes) -> bool:
    """Whether a request comes from who knows the token's secret; takes the same time either way."""
    return hmac.compare_digest(proof, _proof(token.secret, token.id, public, name))


def seal(key: ClusterKey, token: JoinToken, public: bytes) -> tuple[bytes, bytes]:
    """The metaserver's answer to an accepted request: its public key, and the cluster key for who has the private key
    to ``public``. :class:`JoinError` if that is no usable key."""
    # Imported here: half a tenth of a second that only joining needs.
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    private = X25519PrivateKey.generate()
    own = private.public_key().public_bytes_raw()
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise JoinError("the request has no usable public key") from None
    sealing, info = _sealing_key(shared, token.secret, token.id, public, own)
    return own, ChaCha20Poly1305(sealing).encrypt(_NONCE, key.secret_for_sealing(), info)


def _sealing_key(shared: bytes, secret: bytes, token_id: bytes, asking: bytes, answering: bytes) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"dfs join key\0" + token_id + asking + answering
    return HKDF(SHA256(), KEY_BYTES, salt=secret, info=info).derive(shared), info
