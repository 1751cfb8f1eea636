"""Completion of `dfs` in shells: Typer's scripts and protocol, and names of servers where a cluster answers at once.

The shell calls `dfs` with _DFS_COMPLETE in its environment for every press of the Tab key: it must be quick, and say
nothing but completions.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

VARIABLE = "_DFS_COMPLETE"
# A person waits for it, and does not know for what.
ASK_SECONDS = 0.5


def script(shell: str) -> str:
    """What a shell has to read."""
    from typer._completion_shared import get_completion_script

    return get_completion_script(prog_name="dfs", complete_var=VARIABLE, shell=shell)


def begin() -> None:
    """Lets Typer answer the shell, if it is one that asks; nothing it meets is to appear between somebody's words."""
    if VARIABLE in os.environ:
        from typer._completion_classes import completion_init

        completion_init()
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until this process ends)


def server_names(incomplete: str) -> list[str]:
    """Names of chunkservers that begin so; none if no cluster is found or it does not answer at once."""
    with contextlib.suppress(Exception):  # whatever is wrong: the command itself will say it
        return [name for name in _asked() if name.startswith(incomplete)]
    return []


def _asked() -> Iterator[str]:
    import httpx

    from dfsmount import dfs_find

    access = dfs_find.find(dfs_find.Choice())
    headers = {"Authorization": f"Bearer {access.key().http_token}"}
    answer = httpx.get(f"http://{access.http}/servers", headers=headers, timeout=ASK_SECONDS, trust_env=False)
    for server in answer.raise_for_status().json():
        yield server["name"]
