"""``python -m metaserver``: the same as the console script."""

from metaserver.cli import main

main()
