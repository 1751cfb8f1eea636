"""Errors that cross the wire: an enum code plus text. Programs branch on the code, people read the text."""

from enum import IntEnum


class ErrorCode(IntEnum):
    """What went wrong. Values are part of the wire format: never renumber, only append.

    1 to 99 are answers to a file operation and map to one errno each (``dfsmount/errors.py``);
    100 and above concern the cluster and are dealt with by clients and servers themselves.
    """

    NOT_FOUND = 1
    EXISTS = 2
    NOT_DIRECTORY = 3
    IS_DIRECTORY = 4
    NOT_EMPTY = 5
    INVALID = 6
    NOT_PERMITTED = 7
    ACCESS_DENIED = 8
    NAME_TOO_LONG = 9
    TOO_MANY_LINKS = 10
    NO_SPACE = 11
    NO_ATTRIBUTE = 12
    CROSS_DEVICE = 13
    READ_ONLY = 14
    FILE_TOO_BIG = 15
    RANGE = 16
    NOT_SUPPORTED = 17
    STALE_INODE = 18
    BUSY = 19
    IO = 20
    ARGUMENT_TOO_BIG = 21
    QUOTA_EXCEEDED = 22

    PROTOCOL = 100
    WRONG_VERSION = 101
    WRONG_CLUSTER = 102
    BAD_KEY = 103
    WRONG_ROLE = 104
    INTERNAL = 105
    UNAVAILABLE = 106
    TIMEOUT = 107
    CANCELLED = 108
    STALE_SESSION = 109
    STALE_EPOCH = 110
    WITHDRAWN = 111
    UNKNOWN_METHOD = 112

    NO_SUCH_CHUNK = 130
    CHUNK_FROZEN = 131
    CHUNK_SEALED = 132
    CHUNK_FULL = 133
    WRONG_OFFSET = 134
    CHAIN_MISMATCH = 135
    BAD_CHECKSUM = 136
    REPLICA_FAILED = 137
    DISK_FAILED = 138
    DISK_FULL = 139
    NOT_OWNER = 140
    CHUNK_BUSY = 141


class DfsError(Exception):
    """A failure with a code; the only exception that handlers turn into an ERROR frame on purpose."""

    def __init__(self, code: ErrorCode, text: str = "") -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text or code.name.lower().replace("_", " ")

    def __str__(self) -> str:
        return f"{self.text} ({self.code.name})"


class ConnectionLost(DfsError):
    """The connection ended, or never came to be: the request may or may not have been carried out."""

    def __init__(self, text: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, text)


class ProcessEnds(Exception):
    """This process is about to end by itself, and answers nobody any more: what was asked may have happened, and will
    be answered by its next life."""
