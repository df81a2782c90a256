"""HTTP/1.1 in: uvicorn's protocol, with limits on the heads of requests, errors of our shape, and a direct way.

ASGI's messages and the framework's routes cost as much as all the rest of a paid call. So an application may have
`ways` beside its ASGI: a `POST` to one of these paths goes to its handler with nothing in between (`DirectCycle`),
whose answers are written as they are on the wire. Every other request takes ASGI's way, and so does one that came
before the answer to the one before it, one of HTTP/1.0, and a browser's from another origin.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from typing import Any, Self, cast

import structlog
import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from proxy.deadline import within
from proxy.edge.answer import BodyLimits, Headers, WatchedAnswer, check_body_headers
from proxy.errors import BadRequest, BodyTooLarge
from proxy.outbox import Outbox, outbox_of
from proxy.units import new_id
from proxy.wire.objects import error_body

log = structlog.get_logger(__name__)

HEAD_BYTES_MAX = 65_536
"""Of a request line and its header fields together: several times what any SDK sends."""

HEAD_S_MAX = 10.0
"""How long a client may take for them, from its connection or from their first byte."""

CONNECTION = "connection"
"""Where a request's `state` has its connection."""

IDLE_S = 75
"""How long a connection may be idle between two requests: longer than the minute for which nginx and others keep one.

A proxy whose connection is closed just as it sends a call cannot know whether the call was read.
"""

IDLE_S_MIN = 0.1
"""As long as a connection is idle at least before a stopping server closes it: a request may be on its way."""

_UPGRADE = re.compile(rb"(?i)(?<=\n)upgrade(?=[ \t]*:)")
_NO_UPGRADE = b"ignored"

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class ServerConfig(uvicorn.Config):
    """What all connections of a server share."""

    is_stopping = False
    """Whether the server ends: every answer that begins now closes its connection."""


def server_config(app: ASGIApp, *, drain_s: int) -> ServerConfig:
    """How uvicorn is to serve `app`, with `drain_s` seconds for calls in flight at the end."""
    return ServerConfig(
        app,
        loop="none",
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=drain_s,
    )


Way = Callable[["LimitedProtocol", "DirectCycle"], Awaitable[None]]
"""Answers one request. Raises what it cannot say any more: its connection is cut off then."""


class DirectCycle:
    """One request that takes the direct way, and its answer: what uvicorn's `RequestResponseCycle` is for ASGI's.

    The protocol and uvicorn's server know it by the attributes of that.
    """

    def __init__(self, way: Way, headers: Headers, *, keep_alive: bool, expects_continue: bool) -> None:
        self.way = way
        self.headers = headers
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self.is_begun = False
        self.is_body_wanted = False
        self.pieces: list[bytes] = []
        self.size_bytes = 0
        self.task: asyncio.Task[None] | None = None
        """That answers it, while it does."""
        self._expects_continue = expects_continue
        self._waiter: asyncio.Future[None] | None = None

    @property
    def message_event(self) -> Self:
        """What uvicorn sets: the cycle itself, which holds no reference to itself, or it would wait to be collected."""
        return self

    def set(self) -> None:
        """Something has come, or nothing will any more."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def body(self, connection: "LimitedProtocol", limits: BodyLimits) -> bytes:
        """The request's body; raises as `read_body` does."""
        check_body_headers(self.headers, limits.bytes_max)
        if self.more_body:
            self.is_body_wanted = True
            connection.flow.resume_reading()
            if self._expects_continue:
                connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            try:
                with within(limits.wait_s):
                    await self._received(limits.bytes_max)
            except TimeoutError as exc:
                message = f"The body did not arrive within {limits.wait_s:g} seconds."
                raise BadRequest(message, code="body_timeout") from exc
        pieces, self.pieces = self.pieces, []
        if self.size_bytes > limits.bytes_max:
            raise BodyTooLarge(limits.bytes_max)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _received(self, bytes_max: int) -> None:
        while self.more_body and self.size_bytes <= bytes_max:
            if self.disconnected:
                raise BadRequest("The client left before it had sent its request.")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


class DirectAnswer(WatchedAnswer):
    """`exchange.Answer` on the direct way.

    Nothing fails or waits once the client has gone, so that a call goes on to its own end, and what is left to say is
    dropped. A client that takes nothing for `stall_s` seconds has gone as well, and its connection is cut off.
    """

    def __init__(self, request_id: str, connection: "LimitedProtocol", cycle: DirectCycle, *, stall_s: float) -> None:
        super().__init__(connection)
        self._connection: LimitedProtocol = connection
        self._request_id = request_id.encode()
        self._cycle = cycle
        self._stall_s = stall_s
        self._is_chunked = False
        self._head = b""
        """What is sent with the first piece of the body."""
        self.is_started = False
        self.is_waiting = False

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the answer, together with what is sent next; the request id is added to it."""
        self.is_started = self._cycle.response_started = True
        names = [name for name, _ in headers]
        self._is_chunked = b"content-length" not in names
        if HEADER_RE.search(b"".join(names)):
            raise RuntimeError("not the name of a header field")
        if HEADER_VALUE_RE.search(b"".join([value for _, value in headers])):
            raise RuntimeError("not the value of a header field")
        lines = [b"%b: %b\r\n" % header for header in headers]
        lines.append(b"x-request-id: %b\r\n" % self._request_id)
        if self._is_chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        if not self._cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        self._head = b"%b%b\r\n" % (STATUS_LINE[status], b"".join(lines))

    async def write(self, chunk: bytes) -> None:
        """Send `chunk`; returns when the client's connection can take more."""
        data = self._framed(chunk)
        if data and not self._has_sent(data):
            await self._send_later(data)

    async def end(self, chunk: bytes = b"") -> None:
        """Send `chunk` and the end of the answer."""
        data = self._framed(chunk) + b"0\r\n\r\n" if self._is_chunked else self._framed(chunk)
        if data and not self._has_sent(data):
            await self._send_later(data)
        self._connection.answered(self._cycle)

    def _has_sent(self, data: bytes) -> bool:
        """Send `data` if that need not wait, or nobody is there to take it."""
        connection = self._connection
        if self._is_gone or connection.wire.is_closing():
            return True
        if connection.flow.write_paused:
            return False
        connection.write_soon(data)
        return True

    def _framed(self, chunk: bytes) -> bytes:
        head, self._head = self._head, b""
        if self._is_chunked and chunk:
            return b"%b%x\r\n%b\r\n" % (head, len(chunk), chunk)
        return head + chunk

    async def _send_later(self, data: bytes) -> None:
        """Send `data` once the client takes what was sent before."""
        connection = self._connection
        self.is_waiting = True
        try:
            with within(self._stall_s):
                await connection.flow.drain()
        except TimeoutError:
            connection.abort()
            self._lose()
            return
        finally:
            self.is_waiting = False
        if not connection.wire.is_closing():
            connection.write_soon(data)


class _Joining:
    """A transport that can hold what is written, to send it together with what follows: each write is a system call."""

    def __init__(self, transport: asyncio.Transport, outbox: Outbox) -> None:
        self._transport = transport
        self._held: list[bytes] | None = None
        self._soon: list[bytes] = []
        """What goes out at the end of this tick, or before anything else does."""
        self._soon_bytes = 0
        self._outbox = outbox
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send `data`, or hold it."""
        if self._soon:
            self._write_now()
        if self._held is None:
            self._transport.write(data)
        else:
            self._held.append(data)

    def write_soon(self, data: bytes) -> None:
        """Send `data` at the end of this tick of the loop, together with what others send.

        As much as the connection would make its writer wait for goes out at once, so that it does.
        """
        self._soon.append(data)
        self._soon_bytes += len(data)
        if self._soon_bytes >= HIGH_WATER_LIMIT:
            self._write_now()
        elif len(self._soon) == 1:
            self._outbox.add(self._write_now)

    def _write_now(self) -> None:
        soon, self._soon, self._soon_bytes = self._soon, [], 0
        if soon and not self.is_closing():
            self._transport.write(soon[0] if len(soon) == 1 else b"".join(soon))

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
        self._write_now()
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

    cycle: Any
    """The request that came last: a `DirectCycle` or uvicorn's own; None before the first."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._is_in_head = True
        self._has_begun = False
        """Whether a part of a head has come, and not all of it."""
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._ways: Mapping[bytes, Way] = getattr(self.app, "ways", {})
        self._idle_since: float | None = None
        self._cycles: list[DirectCycle | RequestResponseCycle] = []
        """The requests that have not been answered, of which the first is being answered."""
        self._is_finishing = False
        self.on_lost: Callable[[], None] | None = None
        """Whom to call when the connection is lost: the call that is being answered on it."""

    @property
    def has_request(self) -> bool:
        """Whether the whole request has come, so that receiving it does not wait."""
        return self.cycle is None or not self.cycle.more_body

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
        self.wire = transport
        self._joining = _Joining(transport, outbox_of(self.loop))
        self.write_soon = self._joining.write_soon
        super().connection_made(cast("asyncio.Transport", self._joining))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer, and tell the call; uvicorn tells only the last of those that came one after the other."""
        self._stop_waiting()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()
        # A request that takes ASGI's way knows its connection: both would wait for the garbage collector.
        self.cycle = None
        self.scope = None  # type: ignore[assignment]  # nobody asks for it any more
        self._cycles = []

    def data_received(self, data: bytes) -> None:
        """Feed the parser, within the limits."""
        if self._is_in_head:
            self._head_bytes += len(data)
            end = data.find(b"\r\n\r\n")
            head = data if end < 0 else data[:end]
            if b"pgrade" in head.lower():
                data = _UPGRADE.sub(_NO_UPGRADE, head) + data[len(head) :]
        super().data_received(data)
        if self._has_begun:
            if self._head_timer is None:
                self._expect_head()
            if self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
                self._refuse(431, "The request's head is too large.", "head_too_large")
        elif isinstance(self.cycle, DirectCycle) and not self.cycle.is_begun:
            self._begin(self.cycle)
        elif self._is_idle and self._head_timer is None:
            self._expect_head()  # something came that is not yet a head, such as an empty line

    @property
    def _is_idle(self) -> bool:
        """Whether every request that has come is answered, and nothing of another is there."""
        return self._is_in_head and self.cycle is not None and self.cycle.response_complete

    def on_message_begin(self) -> None:
        """Begin a request, which may be the connection's second."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._is_in_head = True
        self._has_begun = True

    def on_headers_complete(self) -> None:
        """The head is there: from here on the request's own limits hold."""
        self._stop_waiting()
        self._is_in_head = False
        self._has_begun = False
        self._head_bytes = 0
        headers = self.headers
        if sum(map(len, chain.from_iterable(headers))) + len(self.url) > HEAD_BYTES_MAX:
            raise ValueError("the head is too large")  # the parser turns it into its own error, and that into a 400
        way = self._ways.get(self.url)
        is_stopping: bool = self.config.is_stopping  # type: ignore[attr-defined]  # it is a `ServerConfig`
        if way is not None and self._is_direct():
            self.cycle = DirectCycle(
                way,
                headers,
                keep_alive=self.parser.should_keep_alive() and not is_stopping,
                expects_continue=self.expect_100_continue,
            )
            self._cycles = [self.cycle]
            return
        url, expects_continue = self.url, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects_continue
        self.headers.extend(headers)
        self.scope["state"][CONNECTION] = self
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles.append(self.cycle)
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnframedCycle  # before its task runs for the first time
        if is_stopping:
            self.cycle.keep_alive = False

    def _is_direct(self) -> bool:
        """Whether the request, whose head has come, may take the direct way."""
        return (
            self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and (self.cycle is None or self.cycle.response_complete)
            and b"origin" not in [name for name, _ in self.headers]
        )

    def on_body(self, body: bytes) -> None:
        """A part of the body has come."""
        cycle = self.cycle
        if not isinstance(cycle, DirectCycle):
            super().on_body(body)
            return
        if cycle.response_complete:
            return
        cycle.pieces.append(body)
        cycle.size_bytes += len(body)
        if cycle.size_bytes > HIGH_WATER_LIMIT and not cycle.is_body_wanted:
            self.flow.pause_reading()
        cycle.set()

    def on_message_complete(self) -> None:
        """The request is there: what comes next is the head of another one."""
        self._is_in_head = True
        cycle = self.cycle
        if not isinstance(cycle, DirectCycle):
            super().on_message_complete()
            return
        cycle.more_body = False
        if cycle.is_begun:
            cycle.set()
        else:
            self._begin(cycle)

    def _begin(self, cycle: DirectCycle) -> None:
        """Let the request be answered."""
        cycle.is_begun = True
        cycle.task = self.loop.create_task(self._answer(cycle))
        self.tasks.add(cycle.task)

    async def _answer(self, cycle: DirectCycle) -> None:
        try:
            await cycle.way(self, cycle)
        except BaseException:
            log.exception("connection_cut_off")
        finally:
            task, cycle.task = cycle.task, None
            self.tasks.discard(task)
        if not cycle.response_complete and not self.transport.is_closing():
            self.transport.close()

    def answered(self, cycle: DirectCycle) -> None:
        """The whole answer is sent: wait for another request, unless nobody wants one."""
        cycle.response_complete = True
        cycle.pieces = []  # of a body that nobody has read; the connection keeps the cycle until the next one
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """As uvicorn has it, but one timer serves all the pauses between requests."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._idle_since = self.loop.time()
        due_at = self._idle_since + self.timeout_keep_alive
        if self.timeout_keep_alive_task is not None and self.timeout_keep_alive_task.when() > due_at:
            self.timeout_keep_alive_task.cancel()  # the server has begun to stop since then
            self.timeout_keep_alive_task = None
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_at(due_at, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that has been idle for too long; come back for one that has not."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None or self.transport.is_closing():
            return
        due_at = self._idle_since + self.timeout_keep_alive
        if self.loop.time() >= due_at:
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_at(due_at, self.timeout_keep_alive_handler)

    def finish(self, *, idle_s: float, fresh_s: float) -> None:
        """Close the connection when nobody is left to lose a call by that, since the server stops.

        That is after an answer that has not begun yet and can say so; where there is none, or it did not say so, when
        the connection has been idle for `idle_s` seconds; and after `fresh_s` seconds if no request ever came.
        """
        if self._is_finishing:
            return
        self._is_finishing = True
        idle_s = max(idle_s, IDLE_S_MIN)
        self.timeout_keep_alive = cast("int", idle_s)  # any number will do
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or self._is_idle:
            self._stop_waiting()
            self._unset_keepalive_if_required()
            self._head_timer = self.loop.call_later(max(idle_s, fresh_s) if cycle is None else idle_s, self._give_up)
        elif not cycle.response_started:
            cycle.keep_alive = False

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
