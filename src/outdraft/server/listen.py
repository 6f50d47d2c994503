"""The sockets that the server listens on, had before anything is loaded.

Here: an address and a port become listening sockets, or an error that says what to do. Not here:
what is served on them (run.py).
"""

import os
import socket

from outdraft.errors import OutdraftError

BACKLOG = 1024


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on all addresses of a host; with port 0 on one free port of all.

    Raises:
        OutdraftError: the host is unknown, or an address cannot be had.
    """
    made: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, address in dict.fromkeys(found):
            port = made[0].getsockname()[1] if made else port
            made.append(_listening(family, (address[0], port, *address[2:])))
    except OSError as error:
        for sock in made:
            sock.close()
        number = error.errno or 0
        why = f": {os.strerror(number)}" if number > 0 else ""
        unknown = isinstance(error, socket.gaierror)
        raise OutdraftError(
            f"{host}:{port} cannot be listened on{': no such host' if unknown else why}",
            "choose another --host" if unknown else "choose another --port",
        ) from None
    return made


def _listening(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # a port whose last connections linger; elsewhere it takes others'
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 has a socket of its own
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # now: two that only bind could have the same port
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock
