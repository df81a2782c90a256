"""HTTP/1.1 in: uvicorn's protocol, with limits on the heads of requests, and errors of our shape."""

import asyncio
import re
from typing import Any

import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from proxy.units import new_id
from proxy.wire.objects import error_body

HEAD_BYTES_MAX = 65_536
"""Of a request line and its header fields together: several times what any SDK sends."""

HEAD_S_MAX = 10.0
"""How long a client may take for them, from its connection or from their first byte."""

ABORT = "abort"
"""Where a request's `state` has the function that cuts its connection off."""

_UPGRADE = re.compile(rb"(?i)(?<=\n)upgrade(?=[ \t]*:)")
_NO_UPGRADE = b"ignored"

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def server_config(app: ASGIApp, *, drain_s: int) -> uvicorn.Config:
    """How uvicorn is to serve `app`, with `drain_s` seconds for calls in flight at the end."""
    return uvicorn.Config(
        app,
        loop="none",
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=drain_s,
    )


class LimitedProtocol(HttpToolsProtocol):
    """One client's connection.

    An offer to upgrade (Java's client and `curl --http2` make one for h2c) may be ignored (RFC 9110, section 7.8), but
    the parser would stop there and lose the body: the field is renamed before the parser sees it.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._is_in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the limits."""
        if self._is_in_head:
            self._head_bytes += len(data)
            if b"pgrade" in data.lower():
                end = data.find(b"\r\n\r\n")
                head, rest = (data, b"") if end < 0 else (data[:end], data[end:])
                data = _UPGRADE.sub(_NO_UPGRADE, head) + rest
        super().data_received(data)
        if self._is_in_head and self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self._refuse(431, "The request's head is too large.", "head_too_large")

    def on_message_begin(self) -> None:
        """Begin a request, which may be the connection's second."""
        super().on_message_begin()
        self.scope["state"][ABORT] = self.transport.abort
        self._is_in_head = True
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is there: from here on the request's own limits hold."""
        self._stop_waiting()
        self._is_in_head = False
        self._head_bytes = 0
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEAD_BYTES_MAX:
            raise ValueError("the head is too large")  # the parser turns it into its own error, and that into a 400
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in OpenAI's shape."""
        self._refuse(400, msg, "invalid_http")

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S_MAX, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if self._head_bytes:
            self._refuse(408, "The request's head did not arrive in time.", "head_timeout")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        body = error_body(message, "invalid_request_error", None, code)
        self.transport.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
            b"connection: close\r\n\r\n%b" % (status, _REASONS[status], len(body), new_id("req").encode(), body)
        )
        self.transport.close()
