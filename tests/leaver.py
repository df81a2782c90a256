"""Clients that leave in the middle of a call, and what became of it."""

import json
import re
import socket
import struct
import time
from contextlib import suppress

from tests.waiting import until


class Leaver:
    """A client on a bare socket, that reads what it wants and leaves when it wants."""

    def __init__(self, served, key, endpoint, body, *, buffer_bytes=None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(20)
        if buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.socket.connect(served.address)
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = endpoint if endpoint.startswith("/") else f"/v1/{endpoint}"
        self.client_id = f"leaver-{time.monotonic_ns()}"
        self.request = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            f"X-Client-Request-Id: {self.client_id}\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        self.read = b""
        self.ask()

    def ask(self) -> None:
        """Send the request, be it once more."""
        self.socket.sendall(self.request)

    def read_until(self, text: bytes) -> None:
        """Read on until `text` has come."""
        while text not in self.read:
            piece = self.socket.recv(65536)
            assert piece, self.read
            self.read += piece

    def read_to_its_end(self) -> bytes:
        """Everything up to where the connection is closed or cut off."""
        with suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                self.read += piece
        return self.read

    @property
    def request_id(self) -> str:
        """The server's id of the call, of the answer's head."""
        self.read_until(b"\r\n\r\n")
        return re.search(rb"x-request-id: (\S+)", self.read)[1].decode()

    def leave(self, *, is_abrupt: bool = False) -> None:
        """Close the connection, or reset it."""
        if is_abrupt:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def awaited_charge(served, key):
    """A function that waits for the receipt of the customer's next call that is charged."""

    def newest() -> str | None:
        with served.client(key) as http:
            items = http.get("/api/v1/credits/transactions?limit=1").json()["items"]
        return items[0]["request_id"]

    before = newest()

    def charge() -> dict:
        charged = until(lambda: (found := newest()) != before and found, "nothing was charged", within_s=12)
        return served.ended(key, charged)

    return charge


def paid(charge) -> tuple:
    """How a call ended, and how sure its usage is."""
    return charge["state"], charge["outcome"], charge["usage_source"]
