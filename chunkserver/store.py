"""The chunks of one disk: a :class:`Table` of replicas, with what may be done to them.

Appending is in ``appends``, reading and verifying in ``reads``; here is what ends or begins a replica as a whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from chunkserver import chunkfile
from chunkserver.appends import Appends
from chunkserver.chunkfile import ENTRY_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET, Header
from chunkserver.disk import File
from chunkserver.index import Index
from chunkserver.protocol import Progress
from chunkserver.reads import Reads
from chunkserver.recovery import FAILED_SUFFIX
from chunkserver.replica import Replica, ReplicaState
from chunkserver.table import FULL_ERRNOS, Table, cancel_queue, parent
from metaserver.errors import DfsError, ErrorCode


class _NoSpaceYet(Exception):
    """A write that was refused for lack of space, before anything was synced: the file is as good as before."""


@contextmanager
def _full_is_no_failure() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            raise _NoSpaceYet from error
        raise


class Store:
    """See the module."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.appends = Appends(table)
        self.reads = Reads(table)
        # Files of deleted chunks that could not be removed: whoever asked asks again.
        self._unremoved: dict[int, str] = {}

    async def seal(self, chunk: int, length: int, entries: int, chain: int) -> Replica:
        """Ends a chunk at exactly this point, durably; appends are refused from now on whatever comes of it.

        WRONG_OFFSET if the replica is shorter, CHAIN_MISMATCH if it differs, REPLICA_FAILED if it fails now.
        """
        replica = self.table.readable(chunk)
        if replica.state is ReplicaState.SEALED:
            if (replica.written.stored_length, replica.written.chain) != (length, chain):
                raise DfsError(ErrorCode.CHAIN_MISMATCH, "sealed differently already")
            return replica
        await self._close_for_appends(replica)
        await self.reads.ensure_verified(replica)
        if replica.error:
            raise DfsError(ErrorCode.REPLICA_FAILED, f"this replica is damaged ({replica.error})")
        opened = await self.reads.load(replica)
        if entries == 0:
            chain = self.table.first_chain(chunk)  # an empty chunk has one chain only
        point = self._seal_point(replica, opened.blocks, length, entries, chain)
        header = Header(self.table.cluster, chunk, replica.created_ns, chunkfile.FLAG_SEALED, length, entries, chain)
        # Before the file is cut: a read must not take what is cut off for damage.
        replica.written = point
        self.table.open_chunks.drop(chunk)
        try:
            await self.table.run_sync(
                self._seal_file,
                replica.path,
                opened.file,
                header,
                limiter=self.table.limits.changes,
                abandon_on_cancel=True,
            )
        except _NoSpaceYet:
            # Nothing is lost and nothing is wrong with it: it takes no appends, and is sealed when there is space.
            raise DfsError(ErrorCode.DISK_FULL, "no space to seal it") from None
        except OSError as error:
            self.table.give_up(replica, error)
            raise DfsError(ErrorCode.REPLICA_FAILED, f"cannot seal: {error.strerror}") from None
        if replica.state is ReplicaState.DELETED:
            raise DfsError(ErrorCode.NO_SUCH_CHUNK, "deleted meanwhile")
        replica.move(ReplicaState.SEALED)
        writing, replica.writing = replica.writing, None
        if writing is not None:
            writing.changed.unpark_all()
        self.table.on_change(replica)
        return replica

    async def _close_for_appends(self, replica: Replica) -> None:
        """No further appends; those admitted are in the file, and no sync is under way, when this returns."""
        if replica.writing is not None:
            replica.writing.closed = True
        while replica.writing is not None and (replica.writing.draining or replica.writing.syncing):
            await replica.writing.changed.park()
        if replica.state not in (ReplicaState.OPEN, ReplicaState.FROZEN):
            raise DfsError(ErrorCode.REPLICA_FAILED, "failed or deleted meanwhile")

    def _seal_point(self, replica: Replica, index: Index, length: int, entries: int, chain: int) -> Progress:
        if entries > replica.written.entries or length > replica.written.stored_length:
            text = f"the replica has {replica.written.entries} entries and {replica.written.stored_length} bytes only"
            raise DfsError(ErrorCode.WRONG_OFFSET, text)
        point = index.progress(entries, self.table.first_chain(replica.chunk))
        if (point.stored_length, point.chain) != (length, chain):
            raise DfsError(ErrorCode.CHAIN_MISMATCH, "the replica differs before that point")
        return point

    def _seal_file(self, path: str, file: File, header: Header) -> None:
        """Cuts and syncs first, then says so: a header that says sealed is true."""
        disk = self.table.disk
        disk.step("seal:before-cut")
        with _full_is_no_failure():
            self._cut(file, header)
        disk.step("seal:before-sync")
        file.sync()
        disk.sync_directory(parent(path))
        disk.step("seal:before-header")
        with _full_is_no_failure():
            file.write([chunkfile.encode_header(header)], 0)
        disk.step("seal:before-header-sync")
        file.sync()
        disk.step("seal:after-sync")

    def _cut(self, file: File, header: Header) -> None:
        """Removes what lies past the sealed length and entries."""
        file.truncate(PAYLOAD_OFFSET + header.sealed_length)
        position = INDEX_OFFSET + header.sealed_entries * ENTRY_BYTES
        beyond = file.read(PAYLOAD_OFFSET - position, position).rstrip(b"\0")
        if beyond:
            file.write([bytes(len(beyond))], position)

    async def delete(self, chunk: int) -> None:
        """Removes a replica, first from memory, so that later appends answer NO_SUCH_CHUNK.

        Nothing happens if there is none. DISK_FULL (try again) or DISK_FAILED if the file cannot be removed.
        """
        replica = self.table.get(chunk)
        self.table.remember_deleted(chunk)
        if replica is not None:
            self._leave(replica)
        path = self._unremoved.pop(chunk, "") if replica is None else replica.path
        if not path:
            return
        try:
            await self.table.run_sync(self._unlink, path, limiter=self.table.limits.changes, abandon_on_cancel=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in FULL_ERRNOS:  # some file systems need space to remove
                self._unremoved[chunk] = path
                raise DfsError(ErrorCode.DISK_FULL, f"cannot remove {path}: {error.strerror}") from None
            self.table.disk_failed(f"cannot remove {path}: {error.strerror}")
            raise DfsError(ErrorCode.DISK_FAILED, self.table.disk_error) from None
        self.table.directory_changed(parent(path))
        self.table.on_gone(chunk)

    def _leave(self, replica: Replica) -> None:
        """Takes a replica out of memory, and ends what is under way there."""
        self.table.forget(replica.chunk)
        replica.move(ReplicaState.DELETED)
        writing, replica.writing = replica.writing, None
        if writing is not None:
            cancel_queue(writing, DfsError(ErrorCode.NO_SUCH_CHUNK, "deleted meanwhile"))
            writing.changed.unpark_all()

    def _unlink(self, path: str) -> None:
        self.table.disk.step("delete:before-unlink")
        self.table.disk.unlink(path)
        # What was given up before this one was copied here may have come back in a power cut, or been unreadable.
        with suppress(FileNotFoundError):
            self.table.disk.unlink(path + FAILED_SUFFIX)

    def adopt(self, replica: Replica) -> None:
        """Takes in a sealed replica whose file was just completed, in place of the one that was there."""
        old = self.table.get(replica.chunk)
        if old is not None:
            self._leave(old)
        self._unremoved.pop(replica.chunk, None)  # it has taken the place of that file
        self.table.add(replica)
        self.table.on_change(replica)
