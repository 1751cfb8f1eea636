"""Reading one sealed replica back from the disk itself, in slices: header, index, size and every block. Blocking."""

from uuid import UUID

from chunkserver import chunkfile, recovery
from chunkserver.chunkfile import ENTRY_BYTES, HEADER_BYTES, INDEX_OFFSET, PAYLOAD_OFFSET, FormatError
from chunkserver.disk import DIRECT_BYTES, Disk, File
from chunkserver.index import Index
from chunkserver.protocol import Progress


class Verification:
    """What is found of one replica. Each :meth:`step` reads at most ``DIRECT_BYTES`` and raises ``OSError``.

    ``problem`` says in words what is wrong with header, index or size ("": nothing yet); ``bad_blocks`` are entry
    numbers. Ends at the first problem, or at ``limit`` bad blocks. ``bytes_read`` does not count the hole after the
    index.
    """

    def __init__(self, disk: Disk, cluster: UUID, chunk: int, path: str, expected: Progress, limit: int = 1000) -> None:
        self.problem = ""
        self.bad_blocks: list[int] = []
        self.bytes_read = 0
        self._disk = disk
        self._cluster = cluster
        self._chunk = chunk
        self._path = path
        self._expected = expected
        self._limit = limit
        self._file: File | None = None
        self._region = bytearray()
        self._index: Index | None = None
        self._next = 0

    @property
    def bad(self) -> bool:
        return bool(self.problem or self.bad_blocks)

    def run(self) -> "Verification":
        """All steps."""
        while self.step():
            pass
        return self

    def step(self) -> bool:
        """Reads the next slice; False if there was none."""
        if self.problem or len(self.bad_blocks) >= self._limit:
            return False
        if self._file is None:
            self._file = self._disk.open_direct(self._path)
            self.problem = self._header(self._file)
        elif self._index is None:
            self.problem = self._index_slice(self._file)
        elif self._next < len(self._index):
            self._blocks(self._file, self._index)
        else:
            return False
        return True

    def _header(self, file: File) -> str:
        size, right = file.size(), PAYLOAD_OFFSET + self._expected.stored_length
        if size != right:
            return f"the file has {size} bytes, {right} belong there"
        data = file.read_from_disk(HEADER_BYTES, 0)
        self.bytes_read += len(data)
        try:
            header = chunkfile.decode_header(data)
        except FormatError as error:
            return str(error)
        if (header.cluster, header.chunk) != (self._cluster, self._chunk) or not header.sealed:
            return "the header speaks of another chunk"
        sealed = (header.sealed_length, header.sealed_entries, header.sealed_chain)
        expected = self._expected
        if sealed != (expected.stored_length, expected.entries, expected.chain):
            return "the header says another length, number of entries or chain"
        return ""

    def _index_slice(self, file: File) -> str:
        """One part of the index region, all of which has a meaning: after the last entry there is nothing."""
        wanted = min(DIRECT_BYTES, recovery.INDEX_BYTES - len(self._region))
        piece = file.read_from_disk(wanted, INDEX_OFFSET + len(self._region))
        if len(piece) < wanted:
            return "the index is cut off"
        self._region += piece
        if len(self._region) < recovery.INDEX_BYTES:
            return ""
        used = self._expected.entries * ENTRY_BYTES
        self.bytes_read += used
        entries = bytes(memoryview(self._region)[:used])
        first_chain = chunkfile.first_chain(self._cluster, self._chunk)
        whole = recovery.walk(entries, first_chain, self._expected.stored_length)
        if whole < self._expected.entries:
            return f"entry {whole} of the index is damaged"
        if bytes(memoryview(self._region)[used:]).strip(b"\0"):
            return "something follows the last entry of the index"
        self._index = Index(entries)
        self._region = bytearray()
        return ""

    def _blocks(self, file: File, index: Index) -> None:
        bad, following = recovery.bad_of_next(file, index, self._next)
        last = index.entry(following - 1)
        self.bytes_read += last.stored_offset + last.stored_length - index.entry(self._next).stored_offset
        self.bad_blocks += bad
        self._next = following
