"""The description of the gateway's interface (OpenAPI 3.1), served as ``/openapi.json``. Tests hold it to what is."""

from typing import Any

from metaserver.version import VERSION

Json = dict[str, Any]


def _parameter(name: str, where: str, text: str, schema: Json | None = None, *, required: bool = False) -> Json:
    return {
        "name": name,
        "in": where,
        "description": text,
        "required": required or where == "path",
        "schema": schema or {"type": "string"},
    }


def _answer(text: str, schema: str = "", media: str = "application/json") -> Json:
    if media != "application/json":
        return {"description": text, "content": {media: {"schema": {"type": "string", "format": "binary"}}}}
    return {"description": text, "content": {media: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


_MEANINGS = {
    400: "What was sent makes no sense: a path with .., an escaped slash or NUL, a number out of its range",
    401: "A token is needed",
    403: "Not allowed: read-only, a link that leads out of the exported tree, a page of another site",
    404: "There is nothing of that name",
    405: "There is no such method here; Allow says which are",
    408: "Nothing came for a minute",
    409: "The state of things is against it: the name exists, the directory does not, or is not empty",
    411: "An upload needs a Content-Length, or Transfer-Encoding: chunked",
    412: "If-Match, If-None-Match or If-Unmodified-Since does not hold",
    413: "More than this gateway takes",
    415: "Neither a filename nor a form; or a Content-Encoding",
    416: "None of the ranges exists; Content-Range says how long the file is",
    417: "Expect with something else than 100-continue",
    500: "The gateway met an unexpected condition",
    503: "The cluster cannot be reached: try again later",
    504: "The cluster did not answer in time",
    507: "The cluster is full",
}
# Whatever is asked, these may be the answer.
_ALWAYS = (400, 401, 403, 404, 500, 503, 504)


def _operation(text: str, answers: Json, failures: tuple[int, ...] = (), **more: Any) -> Json:
    failed = {str(status): _answer(_MEANINGS[status], "Failure") for status in sorted({*_ALWAYS, *failures})}
    return {"summary": text, "responses": {**answers, **failed}, **more}


_PATH = _parameter("path", "path", "Names below the exported directory, divided by slashes, each percent-encoded")
_FILENAME = _parameter("filename", "query", "Path of the file below the exported directory", required=True)
_COUNT = {"type": "integer", "minimum": 1, "maximum": 1000}
_PAGING = [
    _parameter("prefix", "query", "Only names that begin so"),
    _parameter("limit", "query", "At most so many entries (1000)", _COUNT),
    _parameter("after", "query", "Where to go on; see `next`", {"type": "integer", "minimum": 0}),
]
_CHUNKS = _parameter("chunks", "query", "Instead of the contents: where the bytes are")
_READING = [
    _parameter("Range", "header", "bytes=FIRST-LAST, several divided by commas"),
    _parameter("If-Range", "header", "The range only if the file is still this (ETag or date)"),
    _parameter("If-None-Match", "header", "304 if the file still has one of these ETags"),
    _parameter("If-Match", "header", "412 unless the file has one of these ETags"),
]
_WRITING = [
    _parameter("If-Match", "header", "412 unless what is replaced has one of these ETags"),
    _parameter("If-None-Match", "header", "*: 412 if there is something of that name"),
]
_REPLACE = _parameter("replace", "query", "1: replace what has the name", {"type": "string", "enum": ["", "0", "1"]})
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_FORM = {
    "multipart/form-data": {
        "schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
    }
}

_CONTENTS: Json = {
    "200": _answer("All of it", media="*/*"),
    "206": _answer("The ranges; several as multipart/byteranges", media="*/*"),
    "304": {"description": "Not modified"},
}
_READ_FAILURES = (412, 416)
_STORE_FAILURES = (405, 408, 409, 411, 412, 413, 415, 417, 507)
_MISSING_TOKEN: list[Json] = [{}]

_SCHEMAS: Json = {
    "Failure": {
        "type": "object",
        "required": ["code", "text"],
        "properties": {"code": {"type": "string"}, "text": {"type": "string", "description": "One line for people"}},
    },
    "Entry": {
        "type": "object",
        "required": ["name", "href", "type", "size", "mtime", "mode"],
        "properties": {
            "name": {"type": "string"},
            "href": {"type": "string", "description": "Its address here"},
            "type": {"enum": ["file", "directory", "symlink", "other"]},
            "size": {"type": "integer"},
            "mtime": {"type": "string", "description": "UTC, with nanoseconds"},
            "mode": {"type": "string", "pattern": "^[0-7]{4}$"},
            "etag": {"type": "string"},
        },
    },
    "Page": {
        "type": "object",
        "required": ["path", "entries", "next"],
        "properties": {
            "path": {"type": "string"},
            "entries": {"type": "array", "items": {"$ref": "#/components/schemas/Entry"}},
            "next": {"type": "string", "description": 'Address of the page that follows; "" at the end'},
        },
    },
    "Stored": {
        "type": "object",
        "required": ["files"],
        "properties": {
            "files": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["path", "href", "size", "etag", "created"],
                    "properties": {
                        "path": {"type": "string"},
                        "href": {"type": "string"},
                        "size": {"type": "integer"},
                        "etag": {"type": "string"},
                        "created": {"type": "boolean", "description": "False: it replaced something"},
                    },
                },
            }
        },
    },
    "ChunkMap": {
        "type": "object",
        "required": ["path", "size", "etag", "pieces", "next"],
        "properties": {
            "path": {"type": "string"},
            "size": {"type": "integer"},
            "etag": {"type": "string"},
            "pieces": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["offset", "length", "chunk", "chunk_offset", "replicas"],
                    "properties": {
                        "offset": {"type": "integer"},
                        "length": {"type": "integer"},
                        "chunk": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
                        "chunk_offset": {"type": "integer"},
                        "replicas": {"type": "array", "items": {"type": "object"}},
                    },
                },
            },
            "next": {"type": "string"},
        },
    },
    "Object": {"type": "object"},
}

DESCRIPTION: Json = {
    "openapi": "3.1.0",
    "info": {
        "title": "Files of a dfs cluster",
        "version": VERSION,
        "description": "What is uploaded becomes visible when it is complete and durable.",
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    },
    "security": [{"bearer": []}, {"basic": []}],
    "paths": {
        "/": {"get": _operation("Where everything is", {"200": _answer("Addresses", "Object")})},
        "/upload": {
            "post": _operation(
                "Upload a file (with filename), or those of a form",
                {"201": _answer("Stored; visible and durable now", "Stored")},
                _STORE_FAILURES,
                parameters=[{**_FILENAME, "required": False}, _REPLACE, *_WRITING],
                requestBody={"content": {**_BYTES["content"], **_FORM}},
            )
        },
        "/files": {
            "get": _operation(
                "List the exported directory; the prefix may name directories",
                {"200": _answer("A page", "Page")},
                parameters=_PAGING,
            )
        },
        "/files/{path}": {
            "parameters": [_PATH],
            "get": _operation(
                "A file's contents; with a slash at the end, a directory's entries",
                {
                    **_CONTENTS,
                    "200": {
                        "description": "Contents, a page, or a chunk map",
                        "content": {
                            "*/*": {"schema": {"type": "string", "format": "binary"}},
                            "application/json": {
                                "schema": {
                                    "anyOf": [
                                        {"$ref": "#/components/schemas/Page"},
                                        {"$ref": "#/components/schemas/ChunkMap"},
                                        # A file of this type.
                                        {},
                                    ]
                                }
                            },
                        },
                    },
                    "308": {"description": "A directory: its address ends with a slash"},
                },
                _READ_FAILURES,
                parameters=[_CHUNKS, *_PAGING, *_READING],
            ),
            "put": _operation(
                "Store a file, new or instead of another; with a slash at the end, make a directory",
                {
                    "200": _answer("Stored, instead of what was there", "Stored"),
                    "201": {"description": "Made; for a file with the same as 200"},
                },
                _STORE_FAILURES,
                parameters=_WRITING,
                requestBody=_BYTES,
            ),
            "delete": _operation(
                "Remove a file or an empty directory", {"204": {"description": "Gone"}}, (409, 412), parameters=_WRITING
            ),
        },
        "/download/{path}": {
            "parameters": [_PATH],
            "get": _operation("A file, to be saved", _CONTENTS, _READ_FAILURES, parameters=_READING),
        },
        "/delete": {
            "delete": _operation(
                "Remove a file",
                {"204": {"description": "Gone"}},
                (409, 412),
                parameters=[_FILENAME, *_WRITING],
            )
        },
        "/openapi.json": {
            "get": _operation("This description", {"200": _answer("OpenAPI", "Object")}, security=_MISSING_TOKEN)
        },
        "/health": {
            "get": _operation("Whether it runs", {"200": _answer("It does", "Object")}, security=_MISSING_TOKEN)
        },
        "/metrics": {"get": _operation("For Prometheus", {"200": _answer("Metrics", media="text/plain")})},
    },
    "components": {
        "schemas": _SCHEMAS,
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic", "description": "Any name; the token is the password"},
        },
    },
}
