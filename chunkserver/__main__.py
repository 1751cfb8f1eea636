"""`python -m chunkserver`: the same as the console script."""

from chunkserver.cli import main

main()
