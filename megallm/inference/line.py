"""What the two sides of `megallm chat` say to each other: JSON lines over a socket. No torch.

The front end sends {"do": "answer", "messages", "number"} and {"do": "stop"}; rank 0 sends
{"ready", "template"}, {"piece"}, {"error"} and {"done", "text", "tokens"}.
"""

from __future__ import annotations

import json
import select
import socket
from collections import deque
from typing import Any

STOP, QUIT = "stop", "quit"


class Line:
    """One end. When the other is gone, `receive` gives {"do": "quit"} and sending does nothing."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unread = b""
        self.messages: deque[dict[str, Any]] = deque()
        self.closed = False

    def send(self, **message: Any) -> None:
        """Send one message."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def receive(self, timeout: float | None) -> dict[str, Any] | None:
        """Returns the next message, or None when none came within `timeout` seconds (None: wait for
        it).

        An interrupt while it waits loses nothing.
        """
        while not self.messages and not self.closed:
            if not select.select([self.connection], [], [], timeout)[0]:
                return None
            self._read()
        return self.messages.popleft() if self.messages else {"do": QUIT}

    def _read(self) -> None:
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            data = b""
        self.closed = not data
        *lines, self.unread = (self.unread + data).split(b"\n")
        self.messages.extend(json.loads(line) for line in lines)
