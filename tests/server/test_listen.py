"""Listening sockets: a port that is taken is said once and at once, and addresses share a port."""

import socket
import subprocess
import sys

import pytest

from outdraft.errors import OutdraftError
from outdraft.server.listen import listening
from tests.server.live import ROOT


def test_a_taken_port_is_one_error_and_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "outdraft", "serve", "demo", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: 127.0.0.1:{port} cannot be listened on: Address already in use",
        "  choose another --port",
    ]


def test_a_port_is_had_as_soon_as_it_is_asked_for() -> None:
    (first,) = listening("127.0.0.1", 0)
    with first, pytest.raises(OutdraftError, match="already in use"):
        listening("127.0.0.1", first.getsockname()[1])


def test_all_addresses_of_a_name_have_the_same_port() -> None:
    sockets = listening("", 0)
    try:
        assert len({s.getsockname()[1] for s in sockets}) == 1
        assert len({s.family for s in sockets}) == len(sockets) >= 1
        with socket.create_connection(("127.0.0.1", sockets[0].getsockname()[1]), 5):
            pass
    finally:
        for sock in sockets:
            sock.close()


def test_a_host_that_is_not_there() -> None:
    with pytest.raises(OutdraftError, match="no such host"):
        listening("no-such-host.invalid", 0)
    with pytest.raises(OutdraftError, match="cannot be listened on"):
        listening("192.0.2.1", 0)  # of no machine: for documents only
