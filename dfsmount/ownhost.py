"""By which names chunkservers on this host are known: the first copy of what is written goes there, and reads do."""

import socket


def own_names(host: str, port: int) -> frozenset[str]:
    """The host's name, and its address on the way to the metaserver at HOST:PORT: one of them is what a chunkserver
    here advertises (`dfs join` takes the latter). Sends nothing; blocks for as long as looking a name up takes."""
    names = {socket.gethostname()}
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)
            names.add(str(sock.getsockname()[0]))
    except OSError:
        pass  # whoever connects there says what is wrong; this is only a preference
    return frozenset(names)
