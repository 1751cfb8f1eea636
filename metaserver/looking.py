"""Routes that look into what is stored: garbage, and the entries of directories with their copies. Decodes, calls."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from metaserver.admin import Admin, parse_ino
from metaserver.errors import DfsError, ErrorCode
from metaserver.garbage import GarbageReader
from metaserver.httpserver import json_reply
from metaserver.listing import Listing


def routes(garbage: GarbageReader, listing: Listing, admin: Admin) -> list[Route]:
    async def show_garbage(request: Request) -> Response:
        return json_reply(await garbage.read())

    async def collect(request: Request) -> Response:
        admin.require_changes()
        return json_reply(await garbage.read(hurry=True))

    async def entries(request: Request) -> Response:
        after = request.query_params.get("after", "0")
        if not after.isdecimal() or not 0 <= int(after) < (1 << 64) - 1:
            raise DfsError(ErrorCode.INVALID, f"{after[:40]!r} is no cookie")
        itself = request.query_params.get("itself") == "1"
        return json_reply(await listing.page(parse_ino(request), int(after), itself=itself))

    return [
        Route("/v1/garbage", show_garbage),
        Route("/v1/garbage", collect, methods=["POST"]),
        Route("/v1/entries/{ino}", entries),
    ]
