"""Sorting more records than fit into memory: sorted runs in files, then merged. Blocking."""

from collections.abc import Iterator
from heapq import merge
from pathlib import Path

# Records of one run: 60 bytes each and as much again for Python, about 60 MiB.
RUN_RECORDS = 500_000
_READ_RECORDS = 4096


class Sorter:
    """Takes records of one size, gives them back in order of their bytes. Its files are in ``directory``."""

    def __init__(self, directory: Path, record_bytes: int, run_records: int = RUN_RECORDS) -> None:
        self._directory = directory
        self._record_bytes = record_bytes
        self._run_records = run_records
        self._records: list[bytes] = []
        self._runs: list[Path] = []
        self.count = 0

    def add(self, record: bytes) -> None:
        """Raises ``OSError`` if a run cannot be written."""
        self._records.append(record)
        self.count += 1
        if len(self._records) >= self._run_records:
            self._write_run()

    def _write_run(self) -> None:
        self._records.sort()
        path = self._directory / f"run{len(self._runs)}"
        with path.open("wb") as file:
            file.writelines(self._records)
        self._runs.append(path)
        self._records = []

    def sorted(self) -> Iterator[bytes]:
        """All records; add none any more."""
        self._records.sort()
        return merge(*(self._read(path) for path in self._runs), self._records)

    def _read(self, path: Path) -> Iterator[bytes]:
        size = self._record_bytes
        with path.open("rb") as file:
            while data := file.read(_READ_RECORDS * size):
                if len(data) % size:
                    raise OSError(f"{path} is cut off")
                for start in range(0, len(data), size):
                    yield data[start : start + size]
