"""A metaserver whose storage engine has other options: ``python tuned_metaserver.py map_bytes=65536 ... metaserver
--config FILE``. Each is a field of ``metaserver.start.Options``; the rest is the metaserver's own command line."""

import sys
from functools import partial

from metaserver import cli, serve
from metaserver.commit import Options


def main(words: list[str]) -> None:
    at = words.index("metaserver")
    pairs = [word.partition("=") for word in words[:at]]
    given = {name: float(value) if "seconds" in name else int(value) for name, _, value in pairs}
    serve.Options = partial(Options, **given)  # type: ignore[assignment,misc]
    cli.app(words[at + 1 :], prog_name="metaserver")


if __name__ == "__main__":
    main(sys.argv[1:])
