"""One target of decoders.py under atheris: run_atheris.py TARGET [libFuzzer options, as -runs=100000] [CORPUS ...].

Ends with 0 after that many executions, otherwise the input is in crash-* of the current directory. -rss_limit_mb bounds
its memory (2048 by default), -timeout a single execution.
"""

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

with atheris.instrument_imports(include=["metaserver", "chunkserver", "dfsmount", "decoders"]):
    import decoders


def main() -> None:
    target = decoders.TARGETS[sys.argv[1]]

    def execute(data: bytes) -> None:
        target(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], execute)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
