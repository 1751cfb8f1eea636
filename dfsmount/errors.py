"""From what went wrong in the cluster to the errno a program sees: one table, total over :class:`ErrorCode`."""

import errno

from metaserver.errors import DfsError, ErrorCode

# Answers to a file operation (1 to 99) have an errno of their own; what concerns the cluster reads as EIO, since no
# program knows how to handle more.
ERRNO: dict[ErrorCode, int] = {
    ErrorCode.NOT_FOUND: errno.ENOENT,
    ErrorCode.EXISTS: errno.EEXIST,
    ErrorCode.NOT_DIRECTORY: errno.ENOTDIR,
    ErrorCode.IS_DIRECTORY: errno.EISDIR,
    ErrorCode.NOT_EMPTY: errno.ENOTEMPTY,
    ErrorCode.INVALID: errno.EINVAL,
    ErrorCode.NOT_PERMITTED: errno.EPERM,
    ErrorCode.ACCESS_DENIED: errno.EACCES,
    ErrorCode.NAME_TOO_LONG: errno.ENAMETOOLONG,
    ErrorCode.TOO_MANY_LINKS: errno.EMLINK,
    ErrorCode.NO_SPACE: errno.ENOSPC,
    ErrorCode.NO_ATTRIBUTE: errno.ENODATA,
    ErrorCode.CROSS_DEVICE: errno.EXDEV,
    ErrorCode.READ_ONLY: errno.EROFS,
    ErrorCode.FILE_TOO_BIG: errno.EFBIG,
    ErrorCode.RANGE: errno.ERANGE,
    ErrorCode.NOT_SUPPORTED: errno.EOPNOTSUPP,
    # The kernel looks the name up again once when an operation answers ESTALE.
    ErrorCode.STALE_INODE: errno.ESTALE,
    ErrorCode.BUSY: errno.EBUSY,
    ErrorCode.IO: errno.EIO,
    ErrorCode.ARGUMENT_TOO_BIG: errno.E2BIG,
    ErrorCode.QUOTA_EXCEEDED: errno.EDQUOT,
    ErrorCode.PROTOCOL: errno.EIO,
    ErrorCode.WRONG_VERSION: errno.EIO,
    ErrorCode.WRONG_CLUSTER: errno.EIO,
    ErrorCode.BAD_KEY: errno.EIO,
    ErrorCode.WRONG_ROLE: errno.EIO,
    ErrorCode.INTERNAL: errno.EIO,
    ErrorCode.UNAVAILABLE: errno.EIO,
    ErrorCode.TIMEOUT: errno.EIO,
    ErrorCode.CANCELLED: errno.EIO,
    ErrorCode.STALE_SESSION: errno.EIO,
    ErrorCode.STALE_EPOCH: errno.EIO,
    ErrorCode.WITHDRAWN: errno.EIO,
    ErrorCode.UNKNOWN_METHOD: errno.EIO,
    ErrorCode.NO_SUCH_CHUNK: errno.EIO,
    ErrorCode.CHUNK_FROZEN: errno.EIO,
    ErrorCode.CHUNK_SEALED: errno.EIO,
    ErrorCode.CHUNK_FULL: errno.EIO,
    ErrorCode.WRONG_OFFSET: errno.EIO,
    ErrorCode.CHAIN_MISMATCH: errno.EIO,
    ErrorCode.BAD_CHECKSUM: errno.EIO,
    ErrorCode.REPLICA_FAILED: errno.EIO,
    ErrorCode.DISK_FAILED: errno.EIO,
    # P6: a full disk is never an input/output error.
    ErrorCode.DISK_FULL: errno.ENOSPC,
    ErrorCode.NOT_OWNER: errno.EIO,
    ErrorCode.CHUNK_BUSY: errno.EIO,
}


def errno_of(error: DfsError) -> int:
    """The errno for ``error``."""
    return ERRNO.get(error.code, errno.EIO)
