"""What the data path needs of the metaserver's client, so that tests can play that part."""

from typing import Protocol, TypeVar

from metaserver.protocol import ServerAddress
from metaserver.wire import Method

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")


class Meta(Protocol):
    """See ``metaserver.client.MetaClient``, which is one."""

    session: int
    cluster_id: str
    copies: int
    # Whether the metaserver said of late that there is little space left.
    space_short: bool

    async def call(self, method: Method[RequestT, ReplyT], message: RequestT, *, timeout: float = ...) -> ReplyT: ...

    def now_ns(self) -> int: ...

    def peer(self, server: int) -> ServerAddress | None: ...

    async def servers(self) -> dict[int, ServerAddress]: ...
