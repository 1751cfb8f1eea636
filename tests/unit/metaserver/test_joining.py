"""Join tokens and the exchange that brings the cluster key to a new host: what is accepted, and what nobody learns."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from metaserver import joining, joins
from metaserver.errors import DfsError, ErrorCode
from metaserver.httpserver import protected
from metaserver.joining import Asking, JoinError, JoinToken
from metaserver.joins import Joins
from metaserver.key import ClusterKey
from metaserver.protocol import JoinReply, JoinRequest, JoinTokenStatus, MakeJoinToken

KEY = ClusterKey(b"k" * 32)
CLUSTER = "f67c88ae-9a2f-494b-a665-87edc9a5563c"
SECOND = 10**9


class Clock:
    def __init__(self) -> None:
        self.ns = 1_800_000_000 * SECOND

    def __call__(self) -> int:
        return self.ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def known(tmp_path: Path, clock: Clock) -> Joins:
    return Joins(tmp_path, KEY, CLUSTER, clock)


def token_of(made: JoinTokenStatus, key: ClusterKey = KEY) -> JoinToken:
    return joining.make(key, bytes.fromhex(made.id), made.cluster_id)


def request(token: JoinToken, asking: Asking, name: str = "storage1") -> JoinRequest:
    return JoinRequest(token.id, asking.public, name, asking.proof)


async def refusal(known: Joins, message: JoinRequest) -> str:
    with pytest.raises(DfsError) as caught:
        await known.join(message)
    assert caught.value.code is ErrorCode.NOT_PERMITTED
    return caught.value.text


# -- tokens --------------------------------------------------------------------------------------------------------


def test_a_token_is_what_the_page_says() -> None:
    token = joining.make(KEY, bytes(range(8)), CLUSTER)
    assert token.text == "dfsjoin1-" + base64.b32encode(
        bytes(range(8)) + bytes.fromhex(CLUSTER.replace("-", "")) + KEY.derive(b"dfs join token\0" + bytes(range(8)))
    ).decode().lower().rstrip("=")
    assert len(token.text) == 99
    assert joining.parse(f"  {token.text.upper()}\n") == token
    assert token.secret.hex() not in repr(token)


@pytest.mark.parametrize(
    "text", ["", "dfsjoin1-", "dfsjoin2-" + "a" * 90, "dfsjoin1-" + "a" * 89, "dfsjoin1-" + "0" * 90, "ä" * 99]
)
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(JoinError, match="that is no join token"):
        joining.parse(text)


# -- the exchange --------------------------------------------------------------------------------------------------


async def test_a_host_with_a_token_gets_the_key(known: Joins) -> None:
    token = token_of(await known.make(MakeJoinToken()))
    asking = Asking(token, "storage1")
    reply = await known.join(request(token, asking))
    assert asking.open(reply.public, reply.sealed).text == KEY.text
    assert known.list()[0].hosts == ["storage1"]


async def test_the_key_is_not_in_what_is_sent(known: Joins) -> None:
    token = token_of(await known.make(MakeJoinToken()))
    asking = Asking(token, "storage1")
    sent = msgspec.json.encode(request(token, asking))
    answer = msgspec.json.encode(await known.join(request(token, asking)))
    for secret in (bytes.fromhex(KEY.text), token.secret):
        for form in (secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"=")):
            assert form not in sent + answer


async def test_who_listened_learns_nothing_from_the_token_later(known: Joins) -> None:
    """Nor does who sends the same request again: the answer is for the first sender's private key."""
    token = token_of(await known.make(MakeJoinToken()))
    asking = Asking(token, "storage1")
    reply = await known.join(request(token, asking))
    again = await known.join(request(token, asking))
    listener = Asking(token, "storage1")
    for heard in (reply, again):
        with pytest.raises(JoinError, match="does not come from the metaserver"):
            listener.open(heard.public, heard.sealed)
    assert reply.sealed != again.sealed


@pytest.mark.parametrize("what", ["id", "public", "name", "proof"])
async def test_a_changed_request_is_refused(known: Joins, what: str) -> None:
    token = token_of(await known.make(MakeJoinToken()))
    message = request(token, Asking(token, "storage1"))
    old = getattr(message, what)
    changed = "storage2" if what == "name" else bytes([old[0] ^ 1]) + old[1:]
    text = await refusal(known, msgspec.structs.replace(message, **{what: changed}))
    assert text == "that join token is not one of this cluster"


@pytest.mark.parametrize("what", ["public", "sealed"])
async def test_a_changed_answer_is_not_believed(known: Joins, what: str) -> None:
    token = token_of(await known.make(MakeJoinToken()))
    asking = Asking(token, "storage1")
    reply = await known.join(request(token, asking))
    old = getattr(reply, what)
    changed: JoinReply = msgspec.structs.replace(reply, **{what: bytes([old[0] ^ 1]) + old[1:]})
    with pytest.raises(JoinError):
        asking.open(changed.public, changed.sealed)


async def test_an_impostor_cannot_hand_out_a_key_of_his_own(known: Joins) -> None:
    token = token_of(await known.make(MakeJoinToken()))
    asking = Asking(token, "storage1")
    his = joining.make(ClusterKey(b"x" * 32), token.id, CLUSTER)
    public, sealed = joining.seal(ClusterKey(b"x" * 32), his, asking.public)
    with pytest.raises(JoinError):
        asking.open(public, sealed)


async def test_a_public_key_that_fixes_the_secret_is_refused(known: Joins) -> None:
    """A point of low order: whatever the private key, the shared secret is 0."""
    token = token_of(await known.make(MakeJoinToken()))
    public = bytes(32)
    proof = joining._proof(token.secret, token.id, public, "storage1")
    with pytest.raises(DfsError) as caught:
        await known.join(JoinRequest(token.id, public, "storage1", proof))
    assert caught.value.code is ErrorCode.INVALID
    assert known.list()[0].hosts == []


# -- how long, how often -------------------------------------------------------------------------------------------


async def test_a_token_ends(known: Joins, clock: Clock) -> None:
    token = token_of(await known.make(MakeJoinToken(60.0)))
    clock.ns += 60 * SECOND - 1
    await known.join(request(token, Asking(token, "storage1")))
    clock.ns += 1
    assert known.list() == []
    assert "has expired" in await refusal(known, request(token, Asking(token, "storage1")))
    clock.ns += joins.REMEMBERED_NS
    await known.make(MakeJoinToken())
    assert "was revoked, or ended long ago" in await refusal(known, request(token, Asking(token, "storage1")))


async def test_a_token_for_one_host_is_for_one_host(known: Joins) -> None:
    token = token_of(await known.make(MakeJoinToken(once=True)))
    asking = Asking(token, "storage1")
    await known.join(request(token, asking))
    # The answer may have been lost on its way.
    reply = await known.join(request(token, asking))
    assert asking.open(reply.public, reply.sealed).text == KEY.text
    text = await refusal(known, request(token, Asking(token, "storage2"), "storage2"))
    assert "was for one host, and storage1 has used it" in text


async def test_a_revoked_token_is_useless(known: Joins) -> None:
    made = await known.make(MakeJoinToken())
    await known.revoke(made.id)
    assert "was revoked" in await refusal(known, request(token_of(made), Asking(token_of(made), "storage1")))
    with pytest.raises(DfsError) as caught:
        await known.revoke(made.id)
    assert caught.value.code is ErrorCode.NOT_FOUND


async def test_another_clusters_token_is_refused_whatever_its_id(known: Joins) -> None:
    made = await known.make(MakeJoinToken())
    other = token_of(made, ClusterKey(b"x" * 32))
    assert "not one of this cluster" in await refusal(known, request(other, Asking(other, "storage1")))


async def test_tokens_outlive_the_process(known: Joins, tmp_path: Path, clock: Clock) -> None:
    used, fresh = [await known.make(MakeJoinToken(once=True)) for _ in range(2)]
    await known.join(request(token_of(used), Asking(token_of(used), "storage1")))
    again = Joins(tmp_path, KEY, CLUSTER, clock)
    assert [token.id for token in again.list() if not token.hosts] == [fresh.id]
    assert "has used it" in await refusal(again, request(token_of(used), Asking(token_of(used), "storage1")))
    assert (tmp_path / joins.FILE).stat().st_mode & 0o777 == 0o600


async def test_a_damaged_file_makes_all_tokens_void(known: Joins, tmp_path: Path, clock: Clock) -> None:
    made = await known.make(MakeJoinToken())
    (tmp_path / joins.FILE).write_bytes(b"[{")
    again = Joins(tmp_path, KEY, CLUSTER, clock)
    assert "was revoked" in await refusal(again, request(token_of(made), Asking(token_of(made), "storage1")))


async def test_nothing_is_answered_that_is_not_durable(known: Joins, tmp_path: Path) -> None:
    made = await known.make(MakeJoinToken(once=True))
    (tmp_path / (joins.FILE + ".new")).mkdir()
    for call in (known.join(request(token_of(made), Asking(token_of(made), "storage1"))), known.make(MakeJoinToken())):
        with pytest.raises(DfsError) as caught:
            await call
        assert caught.value.code is ErrorCode.IO
    assert len(known.list()) == 0 or known.list()[0].id == made.id


async def test_there_is_a_bound(known: Joins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joins, "MOST_TOKENS", 2)
    for _ in range(2):
        await known.make(MakeJoinToken())
    with pytest.raises(DfsError) as caught:
        await known.make(MakeJoinToken())
    assert caught.value.code is ErrorCode.BUSY


# -- over HTTP -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def client(known: Joins, token: str) -> AsyncIterator[httpx.AsyncClient]:
    app = protected(joins.routes(known), KEY, ("/health", joins.OPEN_PATH))
    headers = {"authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://metaserver", headers=headers
    ) as made:
        yield made


async def test_only_the_exchange_is_open(known: Joins) -> None:
    async with client(known, KEY.http_token) as operator, client(known, "") as stranger:
        made = msgspec.json.decode(
            (await operator.post("/v1/join-tokens", content=b"{}")).content, type=JoinTokenStatus
        )
        for method, path in (("GET", "/v1/join-tokens"), ("POST", "/v1/join-tokens"), ("DELETE", "/v1/join-tokens/1")):
            assert (await stranger.request(method, path)).status_code == 401
        token = token_of(made)
        asking = Asking(token, "storage1")
        answer = await stranger.post("/v1/join", content=msgspec.json.encode(request(token, asking)))
        reply = msgspec.json.decode(answer.content, type=JoinReply)
        assert asking.open(reply.public, reply.sealed).text == KEY.text
        assert (await operator.delete(f"/v1/join-tokens/{made.id}")).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[" * 10000, b'{"id": 3}', b'{"id":"AAAAAAAAAAA=","public":"AA==","name":"x","proof":"AA=="}'],
)
async def test_malformed_requests_are_refused(known: Joins, body: bytes) -> None:
    async with client(known, "") as stranger:
        assert (await stranger.post("/v1/join", content=body)).status_code == 400


@pytest.mark.parametrize("seconds", ["0", "-1", "1e9", '"x"', "NaN"])
async def test_times_out_of_bounds_are_refused(known: Joins, seconds: str) -> None:
    async with client(known, KEY.http_token) as operator:
        answer = await operator.post("/v1/join-tokens", content=f'{{"seconds": {seconds}}}')
        assert answer.status_code == 400
    assert known.list() == []


async def test_a_name_that_would_spoil_the_log_is_refused(known: Joins) -> None:
    token = token_of(await known.make(MakeJoinToken()))
    asking = Asking(token, "a\nb")
    await refusal(known, request(token, asking, "a\nb"))
