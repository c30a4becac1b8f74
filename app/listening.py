"""The socket that callers connect to, made before anything heavy is imported: they wait meanwhile, and are not refused."""

from __future__ import annotations

import errno
import socket

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket: on `host`, or on every address of IPv4 and IPv6 when it is empty.

    Raises `OSError` when the address cannot be had.
    """
    if host not in ("", "::"):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise  # compiled in, but switched off in this kernel or container: IPv4 alone, then
    return socket.create_server(("", port), backlog=BACKLOG)
