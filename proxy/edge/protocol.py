"""HTTP/1.1 in: uvicorn's protocol, with limits on the heads of requests, and errors of our shape."""

import asyncio
import re
from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy.units import new_id
from proxy.wire.objects import error_body

HEAD_BYTES_MAX = 65_536
"""Of a request line and its header fields together: several times what any SDK sends."""

HEAD_S_MAX = 10.0
"""How long a client may take for them, from its connection or from their first byte."""

CONNECTION = "connection"
"""Where a request's `state` has its connection."""

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


class _Joining:
    """A transport that can hold what is written, to send it together with what follows: each write is a system call."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held: list[bytes] | None = None
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data`, or hold it."""
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def hold(self) -> None:
        """Send nothing until `let_go`."""
        if self._held is None:
            self._held = []

    def let_go(self) -> None:
        """Send what is held, if there is still somebody to send it to."""
        held, self._held = self._held, None
        if held and not self.is_closing():
            self._transport.write(b"".join(held))

    def close(self) -> None:
        """Close, once everything is sent."""
        self.let_go()
        self._transport.close()


class _UnframedCycle(RequestResponseCycle):
    """The answer to a client of HTTP/1.0, which knows no chunks: without a length it ends with the connection."""

    async def send(self, message: Any) -> None:
        """Let uvicorn take each piece for the last one of a body of known length."""
        if message["type"] == "http.response.start":
            is_sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            self.chunked_encoding = None if is_sized else False
            self._is_unframed = not is_sized
        elif self._is_unframed:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


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
        self._cycles: list[RequestResponseCycle] = []
        """The requests that have not been answered, of which the first is being answered."""
        self.on_lost: Callable[[], None] | None = None
        """Whom to call when the connection is lost: the call that is being answered on it."""

    @property
    def has_request(self) -> bool:
        """Whether the whole request has come, so that receiving it does not wait."""
        return not self.cycle.more_body

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.transport.is_closing()

    @property
    def is_full(self) -> bool:
        """Whether the client takes less than what was sent, so that sending would wait."""
        return self.flow.write_paused

    def abort(self) -> None:
        """Cut the connection off."""
        self.transport.abort()

    def hold(self) -> None:
        """Keep what is sent from now on, until `let_go`."""
        self._joining.hold()

    def let_go(self) -> None:
        """Send what was kept, in one piece."""
        self._joining.let_go()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start to wait for the first request."""
        self._joining = _Joining(transport)
        super().connection_made(cast("asyncio.Transport", self._joining))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer, and tell the call; uvicorn tells only the last of those that came one after the other."""
        self._stop_waiting()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the limits."""
        if self._is_in_head:
            self._head_bytes += len(data)
            end = data.find(b"\r\n\r\n")
            head = data if end < 0 else data[:end]
            if b"pgrade" in head.lower():
                data = _UPGRADE.sub(_NO_UPGRADE, head) + data[len(head) :]
        super().data_received(data)
        if self._is_in_head and self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self._refuse(431, "The request's head is too large.", "head_too_large")

    def on_message_begin(self) -> None:
        """Begin a request, which may be the connection's second."""
        super().on_message_begin()
        self.scope["state"][CONNECTION] = self
        self._is_in_head = True
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is there: from here on the request's own limits hold."""
        self._stop_waiting()
        self._is_in_head = False
        self._head_bytes = 0
        if sum(map(len, chain.from_iterable(self.headers))) + len(self.url) > HEAD_BYTES_MAX:
            raise ValueError("the head is too large")  # the parser turns it into its own error, and that into a 400
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles.append(self.cycle)
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnframedCycle  # before its task runs for the first time

    def on_message_complete(self) -> None:
        """The request is there: what comes next is the head of another one."""
        super().on_message_complete()
        self._is_in_head = True

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
