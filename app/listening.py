"""The socket that callers connect to, made before anything heavy is imported: they wait meanwhile, and are not refused."""

from __future__ import annotations

import array
import contextlib
import errno
import socket
import struct
import sys

BACKLOG = 2048
_SO_ATTACH_FILTER = 26
# The kernel's packet filter (classic BPF), as <linux/filter.h> has it; what it looks at begins with the header of TCP.
_DROP_SYN = b"".join(
    struct.pack("@HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of the flags
        (0x45, 0, 1, 0x02),  # with SYN go on, else skip one
        (0x06, 0, 0, 0),  # drop it
        (0x06, 0, 0, 0xFFFFFFFF),  # keep it whole
    )
)


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


def drop_newcomers(sock: socket.socket) -> None:
    """Have the kernel pass over who wants to connect from here on, in every process that listens on `sock`. Only Linux can.

    To be called before the last connections are accepted. Who connects between that and the end of the socket would be
    reset, maybe with a request on its way; a client that hears nothing asks again a second later, and is refused.
    """
    if sys.platform == "linux":
        program = array.array("B", _DROP_SYN)
        count = len(_DROP_SYN) // struct.calcsize("@HBBI")
        with contextlib.suppress(OSError):  # not every sandbox has it
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", count, program.buffer_info()[0]))
