"""The metaserver's side of joining: which join tokens there are, and the routes of ``joining.py``'s exchange.

Kept in ``join-tokens.json`` in the data directory, replaced durably before an answer that depends on it leaves. Not in
the store: tokens live for an hour and belong to no file. A metaserver that is put back from a snapshot file has none,
and neither has one whose file is damaged: whoever wants to join asks for a new one.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from metaserver import joining
from metaserver.errors import DfsError, ErrorCode
from metaserver.files import is_full
from metaserver.httpserver import json_reply, read_json
from metaserver.joining import JoinError
from metaserver.key import ClusterKey
from metaserver.protocol import JoinReply, JoinRequest, JoinTokenStatus, MakeJoinToken

log = structlog.get_logger(__name__)

FILE = "join-tokens.json"
# Without the control plane's token: who joins does not have the key yet.
OPEN_PATH = "/v1/join"
MOST_TOKENS = 1000
MOST_HOSTS = 1000
# An expired token is remembered for so long, so that who comes late is told why.
REMEMBERED_NS = 24 * 3600 * 10**9


class _Token(msgspec.Struct):
    """``used_by``: SHA-256 of the public key that a token for one host was used with: the same host may ask again, if
    the answer was lost."""

    id: str
    expires_ns: int
    once: bool
    hosts: list[str] = []
    used_by: str = ""


class Joins:
    """All tokens of a cluster. What changes them is in memory at once, and answered when it is durable."""

    def __init__(
        self, directory: Path, key: ClusterKey, cluster_id: str, now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._path = directory / FILE
        self._key = key
        self._cluster_id = cluster_id
        self._now_ns = now_ns
        self._saving = trio.Lock()
        self._tokens = {token.id: token for token in _load(self._path)}

    def list(self) -> list[JoinTokenStatus]:
        """Those that can still be used, the one that ends first first."""
        valid = [token for token in self._tokens.values() if not self._why_not(token, b"")]
        return [self._status(token) for token in sorted(valid, key=lambda token: token.expires_ns)]

    async def make(self, wanted: MakeJoinToken) -> JoinTokenStatus:
        self._forget_old()
        if len(self._tokens) >= MOST_TOKENS:
            raise DfsError(ErrorCode.BUSY, f"there are {MOST_TOKENS} join tokens already: revoke some")
        expires_ns = self._now_ns() + int(wanted.seconds * 1e9)
        token = _Token(secrets.token_bytes(joining.ID_BYTES).hex(), expires_ns, wanted.once)
        self._tokens[token.id] = token
        try:
            await self._save()
        except BaseException:
            self._tokens.pop(token.id, None)
            raise
        log.info("join token made", token=token.id, seconds=wanted.seconds, once=wanted.once)
        return self._status(token)

    async def revoke(self, token_id: str) -> JoinTokenStatus:
        token = self._tokens.pop(token_id, None)
        if token is None:
            raise DfsError(ErrorCode.NOT_FOUND, f"there is no join token {token_id[:40]!r}")
        await self._save()
        log.info("join token revoked", token=token_id)
        return self._status(token)

    async def join(self, request: JoinRequest) -> JoinReply:
        """The cluster key for a host that proves that it has a valid token, sealed for that host alone."""
        known = joining.make(self._key, request.id, self._cluster_id)
        if not request.name.isprintable() or not joining.accepts(known, request.public, request.name, request.proof):
            raise DfsError(ErrorCode.NOT_PERMITTED, "that join token is not one of this cluster")
        token = self._tokens.get(request.id.hex())
        reason = "was revoked, or ended long ago" if token is None else self._why_not(token, request.public)
        if token is None or reason:
            raise DfsError(ErrorCode.NOT_PERMITTED, f"the join token {reason}: make a new one with `dfs join-token`")
        try:
            public, sealed = joining.seal(self._key, known, request.public)
        except JoinError as error:
            raise DfsError(ErrorCode.INVALID, str(error)) from None
        token.used_by = _digest(request.public) if token.once else ""
        if request.name not in token.hosts:
            token.hosts = [*token.hosts, request.name][-MOST_HOSTS:]
        await self._save()
        log.info("a host got the cluster key", token=token.id, host=request.name)
        return JoinReply(public, sealed)

    def _why_not(self, token: _Token, public: bytes) -> str:
        """Why a token cannot be used (any more) with that public key; "" if it can."""
        if self._now_ns() >= token.expires_ns:
            return "has expired"
        if token.once and token.used_by and token.used_by != _digest(public):
            return f"was for one host, and {token.hosts[-1]} has used it"
        return ""

    def _status(self, token: _Token) -> JoinTokenStatus:
        return JoinTokenStatus(token.id, self._cluster_id, token.expires_ns, token.once, token.hosts)

    def _forget_old(self) -> None:
        limit = self._now_ns() - REMEMBERED_NS
        self._tokens = {token.id: token for token in self._tokens.values() if token.expires_ns > limit}

    async def _save(self) -> None:
        """Returns when what is in memory now is on stable storage; NO_SPACE or IO if it cannot be put there."""
        async with self._saving:
            data = msgspec.json.encode(list(self._tokens.values()))
            try:
                await trio.to_thread.run_sync(_replace, self._path, data)
            except OSError as error:
                code = ErrorCode.NO_SPACE if is_full(error) else ErrorCode.IO
                raise DfsError(code, f"cannot write {self._path}: {error.strerror}") from None


def _digest(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()


def _load(path: Path) -> list[_Token]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[_Token])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        log.warning("join tokens cannot be read; all of them are void", path=str(path), reason=str(error))
        return []


def _replace(path: Path, data: bytes) -> None:
    """Durably: the old contents or the new ones are there whatever happens."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def routes(joins: Joins) -> list[Route]:
    async def join(request: Request) -> Response:
        return json_reply(await joins.join(await read_json(request, JoinRequest)))

    async def show(request: Request) -> Response:
        return json_reply(joins.list())

    async def make(request: Request) -> Response:
        return json_reply(await joins.make(await read_json(request, MakeJoinToken)))

    async def revoke(request: Request) -> Response:
        return json_reply(await joins.revoke(request.path_params["token"]))

    return [
        Route(OPEN_PATH, join, methods=["POST"]),
        Route("/v1/join-tokens", show),
        Route("/v1/join-tokens", make, methods=["POST"]),
        Route("/v1/join-tokens/{token}", revoke, methods=["DELETE"]),
    ]
