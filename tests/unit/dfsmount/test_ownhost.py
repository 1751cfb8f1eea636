"""By which names this host is known; tests/hosts counts what follows from that on several hosts."""

import socket

from dfsmount.ownhost import own_names


def test_the_name_and_the_address_of_the_route() -> None:
    assert own_names("127.0.0.1", 9400) == {socket.gethostname(), "127.0.0.1"}


def test_an_unknown_metaserver_leaves_the_name() -> None:
    assert own_names("no-such-host.invalid", 9400) == {socket.gethostname()}
