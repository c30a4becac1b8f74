"""Messages between the processes of one service: JSON over a pair of connected sockets, and now and then an open file.

A channel ends with the process that has its other end, however that process ended. For that, nobody else may have that
end open: whoever forks closes in the child what is not the child's.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections import deque
from typing import Any

LENGTH_BYTES = 4
PIECE_BYTES = 64 * 1024
MAX_FILES = 8  # of all messages that one read may bring

Message = dict[str, Any]


class Closed(Exception):
    """The process at the other end has ended, or has closed the channel."""


class Channel:
    """One end. What is sent arrives whole and in order. Neither end ever waits for the other, but in `send_now`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        # Bytes, the file that goes with the first of them, and the kind of what a later message of it makes needless.
        self._unsent: deque[tuple[bytes, int | None, str | None]] = deque()
        self._received = bytearray()
        self._files: deque[int] = deque()

    def fileno(self) -> int:
        """Return the number to wait on."""
        return self._sock.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether the other end has not taken everything yet: then `flush` is to be called when it may be written to."""
        return bool(self._unsent)

    def send(self, kind: str, *, file: int | None = None, latest: bool = False, **fields: Any) -> None:
        """Send a message, and an open file with it, as far as the other end takes it now.

        Of `latest` ones of a kind, an end that takes nothing for long is left the last: they would pile up without end.
        The file is the caller's again, to be closed, when nothing is unsent. To an end that has gone, nothing is sent.
        """
        message = {"kind": kind, **fields} | ({"has_file": True} if file is not None else {})
        body = json.dumps(message).encode("ascii")
        if latest:
            self._unsent = deque(entry for entry in self._unsent if entry[2] != kind)
        self._unsent.append((len(body).to_bytes(LENGTH_BYTES, "big") + body, file, kind if latest else None))
        self.flush()

    def send_now(self, kind: str, *, file: int | None = None, **fields: Any) -> None:
        """Send a message, and wait until the other end has taken it. For a process that has nothing else to do."""
        self.send(kind, file=file, **fields)
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while self._unsent:
            poll.poll()
            self.flush()

    def flush(self) -> None:
        """Send what the other end takes now of what is unsent."""
        while self._unsent:
            body, file, _ = self._unsent[0]
            try:
                files = [] if file is None else [file]
                sent = socket.send_fds(self._sock, [body], files) if files else self._sock.send(body)
            except BlockingIOError:
                return
            except OSError:  # it has gone; whoever reads will see it
                self._unsent.clear()
                return
            if sent == len(body):
                self._unsent.popleft()
            else:
                self._unsent[0] = body[sent:], None, None  # begun: the rest must follow

    def receive(self) -> list[Message]:
        """Return the messages that have arrived, those with a file with its number as `file`. Raises `Closed`."""
        while True:
            try:
                piece, files, _, _ = socket.recv_fds(self._sock, PIECE_BYTES, MAX_FILES)
            except BlockingIOError:
                break
            except OSError:
                piece, files = b"", []
            self._files.extend(files)
            if not piece:
                if messages := self._decoded():
                    return messages  # its end is seen by the next call
                raise Closed
            self._received += piece
        return self._decoded()

    def close(self) -> None:
        """Close this end, and the files that came and that nobody took."""
        self._sock.close()
        for file in self._files:
            with contextlib.suppress(OSError):
                os.close(file)
        self._files.clear()

    def _decoded(self) -> list[Message]:
        messages = []
        while len(self._received) >= LENGTH_BYTES:
            stop = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES], "big")
            if len(self._received) < stop:
                break
            message: Message = json.loads(self._received[LENGTH_BYTES:stop])
            del self._received[:stop]
            if message.pop("has_file", False):
                message["file"] = self._files.popleft()
            messages.append(message)
        return messages
