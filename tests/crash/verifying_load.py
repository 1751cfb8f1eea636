"""A load that knows what must survive: every acknowledged fsync goes into a manifest outside the tested file system.

``python verifying_load.py run DIRECTORY MANIFEST SECONDS SEED`` works in DIRECTORY until SECONDS have passed. When a
call fails (the mount was killed) it waits until the directory answers again, checks what it finds and goes on.
``python verifying_load.py verify DIRECTORY MANIFEST`` reads everything and prints one line for each broken promise;
its exit code is 1 if there is one.

The kinds of file, and what is promised of each, are in ``load_kinds``; what is known of them in ``load_manifest``.
"""

import errno
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from load_kinds import KINDS, WEIGHTS, Kind
from load_manifest import Directory, Filesystem, LocalFilesystem, Manifest, Tree

# How long a load waits for a directory that does not answer.
PATIENCE_SECONDS = 90.0


class Load:
    """All kinds in one directory. ``errors`` counts the calls that failed, by errno; ``broken`` is what was found."""

    def __init__(self, fs: Filesystem, manifest: Manifest, seed: int) -> None:
        self.fs = fs
        self.manifest = manifest
        self.random = Random(seed)
        self.kinds: list[Kind] = [kind(fs, manifest, self.random) for kind in KINDS]
        self.steps = 0
        self.errors: Counter[str] = Counter()

    def prepare(self) -> None:
        """Makes the directories, durably."""
        for kind in self.kinds:
            for path in kind.directories:
                self.fs.make_directory(path)
        self.fs.sync_directory("")

    def step(self) -> None:
        self.random.choices(self.kinds, WEIGHTS)[0].step()
        self.steps += 1

    def run(self, go_on: Callable[[], bool]) -> None:
        """Steps as long as ``go_on``; after an error it waits until the directory answers."""
        while go_on():
            try:
                self.step()
            except OSError as error:
                self.errors[errno.errorcode.get(error.errno or 0, str(error))] += 1
                self.wait_until_back()

    def wait_until_back(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                self.fs.sync_directory("")
                return
            except OSError:
                time.sleep(0.1)

    @property
    def broken(self) -> list[str]:
        return [line for kind in self.kinds for line in kind.broken]

    def verify(self, tree: Tree) -> list[str]:
        """Every broken promise, in words."""
        broken: list[str] = []
        for kind in self.kinds:
            try:
                broken += kind.verify(tree)
            except OSError as error:
                broken.append(f"{type(kind).__name__.lower()} cannot be read: {error}")
        return broken


def main(arguments: list[str]) -> int:
    verb, directory, manifest = arguments[0], Path(arguments[1]), Manifest(Path(arguments[2]))
    seed = int(arguments[4]) if verb == "run" else 0
    load = Load(LocalFilesystem(directory), manifest, seed)
    if verb == "run":
        load.prepare()
        end = time.monotonic() + float(arguments[3])
        load.run(lambda: time.monotonic() < end)
        broken = load.broken
        print(f"{load.steps} steps, {manifest.acknowledgements} acknowledged, errors {dict(load.errors)}")
    else:
        broken = load.verify(Directory(directory))
        print(f"{len(manifest.acknowledged)} facts checked, {len(broken)} broken")
    for line in broken:
        print("BROKEN", line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
