"""The control plane as the `dfs` command uses it: blocking HTTP with the cluster's token, every answer typed."""

from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from chunkserver.protocol import ScrubReport
from dfsmount.dfs_find import Access
from dfsmount.dfs_layout import Problem
from metaserver.protocol import (
    CheckReport,
    CopiesStatus,
    Draining,
    EntryPage,
    FileStatus,
    Garbage,
    JoinTokenStatus,
    MakeJoinToken,
    MissingFile,
    Planned,
    QuotaStatus,
    Rebalance,
    RebalanceStatus,
    Removal,
    ServerStatus,
    SetCopies,
    SetQuota,
    Status,
    TrashEmptied,
    TrashEmpty,
    TrashPage,
    TrashRestore,
    TrashRestored,
    TreeStatus,
)

AnswerT = TypeVar("AnswerT")
# A busy metaserver answers late, but not later than this; `check` reads every row and has a bound of its own.
TIMEOUT_SECONDS = 15.0
CHECK_SECONDS = 900.0


class _Failure(msgspec.Struct):
    code: str
    text: str


def health(address: str, timeout_seconds: float = 2.0) -> bool:
    """Whether the server whose control plane is at HOST:PORT says that it works."""
    try:
        return httpx.get(f"http://{address}/health", timeout=timeout_seconds, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class ReplicaListing(msgspec.Struct):
    """One replica as a chunkserver lists it; lengths in bytes, ids and chains hexadecimal."""

    chunk: str
    state: str
    stored_length: int
    chain: str
    error: str
    path: str


class SnapshotMade(msgspec.Struct):
    """A snapshot file of the metaserver: where it is on its host, and the newest change it contains (epoch, number)."""

    path: str
    position: str


class _Page(msgspec.Struct):
    chunks: list[ReplicaListing]
    next: str


class Api:
    """One metaserver, and the chunkservers it names; :class:`Problem` if one cannot be reached or refuses."""

    def __init__(self, access: Access, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {access.key().http_token}"}
        self._access = access
        self._client = httpx.Client(
            base_url=f"http://{access.http}",
            headers=headers,
            timeout=TIMEOUT_SECONDS,
            trust_env=False,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def status(self, timeout_seconds: float = TIMEOUT_SECONDS) -> Status:
        return self._get("/v1/status", Status, timeout_seconds)

    def file(self, ino: int) -> FileStatus:
        return self._get(f"/v1/chunks/{ino}", FileStatus)

    def missing(self) -> list[MissingFile]:
        """Files with chunks of which there is no good copy on a server that is up; not all if they are many."""
        return self._get("/v1/missing", list[MissingFile], CHECK_SECONDS)

    def drain(self, server: str, *, force: bool) -> Planned:
        return self._post(f"/v1/servers/{quote(server, safe='')}/drain", Draining(force), Planned, CHECK_SECONDS)

    def undrain(self, server: str) -> Planned:
        return self._post(f"/v1/servers/{quote(server, safe='')}/undrain", Draining(), Planned)

    def remove(self, server: str, *, lose: bool) -> Planned:
        return self._post(f"/v1/servers/{quote(server, safe='')}/remove", Removal(lose), Planned, CHECK_SECONDS)

    def rebalance(self, *, stop: bool) -> RebalanceStatus:
        return self._post("/v1/rebalance", Rebalance(stop), RebalanceStatus)

    def rebalance_status(self) -> RebalanceStatus:
        return self._get("/v1/rebalance", RebalanceStatus)

    def copies(self, ino: int) -> CopiesStatus:
        return self._get(f"/v1/copies/{ino}", CopiesStatus)

    def set_copies(self, ino: int, copies: int) -> CopiesStatus:
        return self._post(f"/v1/copies/{ino}", SetCopies(copies), CopiesStatus)

    def join_tokens(self) -> list[JoinTokenStatus]:
        return self._get("/v1/join-tokens", list[JoinTokenStatus])

    def make_join_token(self, seconds: float, *, once: bool) -> JoinTokenStatus:
        return self._post("/v1/join-tokens", MakeJoinToken(seconds, once), JoinTokenStatus)

    def revoke_join_token(self, token_id: str) -> JoinTokenStatus:
        return self._ask("DELETE", f"/v1/join-tokens/{quote(token_id, safe='')}", JoinTokenStatus)

    def snapshot(self) -> SnapshotMade:
        return self._ask("POST", "/v1/snapshot", SnapshotMade, CHECK_SECONDS)

    def garbage(self, *, collect: bool = False) -> Garbage:
        """``collect``: has what is there deleted now, as far as that may be."""
        return self._ask("POST" if collect else "GET", "/v1/garbage", Garbage, CHECK_SECONDS)

    def entries(self, ino: int, after: int = 0, *, itself: bool = False) -> EntryPage:
        """A page of a directory; one entry for a file, or with ``itself`` for a directory."""
        return self._get(f"/v1/entries/{ino}?after={after}&itself={int(itself)}", EntryPage, CHECK_SECONDS)

    def tree(self, ino: int) -> TreeStatus:
        """What is in a directory and below."""
        return self._get(f"/v1/trees/{ino}", TreeStatus, CHECK_SECONDS)

    def quotas(self) -> list[QuotaStatus]:
        return self._get("/v1/quotas", list[QuotaStatus])

    def quota(self, ino: int) -> QuotaStatus:
        return self._get(f"/v1/quotas/{ino}", QuotaStatus)

    def set_quota(self, ino: int, told: SetQuota) -> QuotaStatus:
        return self._post(f"/v1/quotas/{ino}", told, QuotaStatus, CHECK_SECONDS)

    def remove_quota(self, ino: int) -> QuotaStatus:
        return self._post(f"/v1/quotas/{ino}/remove", SetQuota(), QuotaStatus)

    def trash(self, below: str, position: str) -> TrashPage:
        """Some of what was deleted at or below a path, from where the last page's ``next`` says."""
        return self._get(f"/v1/trash?path={quote(below, safe='')}&after={position}", TrashPage)

    def trash_restore(self, told: TrashRestore) -> list[TrashRestored]:
        return self._post("/v1/trash/restore", told, list[TrashRestored])

    def trash_empty(self, told: TrashEmpty) -> TrashEmptied:
        return self._post("/v1/trash/empty", told, TrashEmptied, CHECK_SECONDS)

    def check(self) -> CheckReport:
        return self._get("/v1/check", CheckReport, CHECK_SECONDS)

    def replicas(self, server: ServerStatus) -> list[ReplicaListing]:
        """Everything that a chunkserver has."""
        found: list[ReplicaListing] = []
        path = f"http://{server.host}:{server.http_port}/chunks"
        page = self._get(path, _Page)
        while page.next:
            found += page.chunks
            page = self._get(f"{path}?after={page.next}", _Page)
        return found + page.chunks

    def scrub(self, server: ServerStatus, *, begin: bool) -> ScrubReport:
        """How far a chunkserver's scrubber is; ``begin``: it starts a pass."""
        return self._ask("POST" if begin else "GET", f"http://{server.host}:{server.http_port}/scrub", ScrubReport)

    def trace(self, server: ServerStatus, trace: str) -> list[tuple[str, float]]:
        """What a chunkserver did for a request that is traced, and how long each took in seconds."""
        return self._get(f"http://{server.host}:{server.http_port}/trace/{trace}", list[tuple[str, float]])

    def _get(self, path: str, type_: type[AnswerT], timeout_seconds: float = TIMEOUT_SECONDS) -> AnswerT:
        return self._ask("GET", path, type_, timeout_seconds)

    def _post(
        self, path: str, message: msgspec.Struct, type_: type[AnswerT], timeout_seconds: float = TIMEOUT_SECONDS
    ) -> AnswerT:
        return self._ask("POST", path, type_, timeout_seconds, msgspec.json.encode(message))

    def _ask(
        self,
        method: str,
        path: str,
        type_: type[AnswerT],
        timeout_seconds: float = TIMEOUT_SECONDS,
        content: bytes | None = None,
    ) -> AnswerT:
        request = self._client.build_request(method, path, content=content, timeout=timeout_seconds)
        address = f"{request.url.host}:{request.url.port}"
        try:
            response = self._client.send(request)
        except httpx.HTTPError as error:
            raise Problem(self._unreachable(address, error)) from None
        if response.status_code >= 400:
            raise Problem(self._refused(address, response))
        try:
            return msgspec.json.decode(response.content, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Problem(f"{address} does not answer as expected: is it the HTTP port of a dfs server?") from None

    def _unreachable(self, address: str, error: httpx.HTTPError) -> str:
        if isinstance(error, httpx.RemoteProtocolError):
            return f"{address} does not speak HTTP: is it the HTTP port of a dfs server?"
        if isinstance(error, httpx.TimeoutException):
            return f"the server at {address} does not answer in time"
        if address != self._access.http:
            return f"no chunkserver at {address}"
        hint = f" (`dfs up MOUNTPOINT --data {self._access.data}` starts it)" if self._access.data else ""
        return f"no metaserver at {address}{hint}"

    def _refused(self, address: str, response: httpx.Response) -> str:
        try:
            failure = msgspec.json.decode(response.content, type=_Failure)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return f"{address} answered HTTP status {response.status_code}: is it the port of a dfs server?"
        if failure.code == "BAD_KEY":
            return f"the server at {address} has another cluster key than {self._access.key_file}"
        return failure.text
