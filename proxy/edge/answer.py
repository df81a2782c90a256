"""The two ends of a paid call's connection: its body in, its answer out."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec
from litestar.types import HTTPScope, Receive, Scope, Send

from proxy.deadline import within
from proxy.errors import BadRequest, BodyTooLarge, UnsupportedEncoding
from proxy.units import new_id

Headers = list[tuple[bytes, bytes]]


class BodyLimits(msgspec.Struct, frozen=True):
    """How long a body may be, and how long a client may take to send it, in bytes and seconds."""

    bytes_max: int
    wait_s: float


def identify(scope: Scope) -> str:
    """Give a request an id of our own, and return it."""
    request_id = new_id("req")
    scope.setdefault("state", {})["request_id"] = request_id
    return request_id


class Connection(Protocol):
    """The client's connection, which knows more than ASGI tells."""

    on_lost: Callable[[], None] | None
    """Called once, when the connection is lost."""

    @property
    def has_request(self) -> bool:
        """Whether the whole request has come, so that receiving it does not wait."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be sent any more."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether the client takes less than what was sent, so that sending would wait."""
        ...

    def abort(self) -> None:
        """Cut it off."""
        ...

    def hold(self) -> None:
        """Keep what is sent from now on, until `let_go`."""
        ...

    def let_go(self) -> None:
        """Send what was kept, in one piece."""
        ...


def check_body_headers(headers: Iterable[tuple[bytes, bytes]], bytes_max: int) -> None:
    """Raises `BodyTooLarge` or `UnsupportedEncoding` for what a head says of its body."""
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() != b"identity":
            raise UnsupportedEncoding(value.decode("latin-1"))
        if name == b"content-length" and int(value) > bytes_max:
            raise BodyTooLarge(bytes_max)


async def read_body(scope: HTTPScope, receive: Receive, connection: Connection, limits: BodyLimits) -> bytes:
    """The request's body.

    Raises `BodyTooLarge` for a longer one, `UnsupportedEncoding` when it is encoded, `BadRequest` when the client
    leaves or stalls before its end.
    """
    check_body_headers(scope["headers"], limits.bytes_max)
    if connection.has_request:
        return await _received(receive, limits.bytes_max)
    try:
        with within(limits.wait_s):
            return await _received(receive, limits.bytes_max)
    except TimeoutError as exc:
        raise BadRequest(f"The body did not arrive within {limits.wait_s:g} seconds.", code="body_timeout") from exc


async def _received(receive: Receive, bytes_max: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("The client left before it had sent its request.")
        if message["type"] != "http.request":
            raise BadRequest("This path speaks HTTP only.")
        part = message["body"]
        size += len(part)
        if size > bytes_max:
            raise BodyTooLarge(bytes_max)
        parts.append(part)
        if not message["more_body"]:
            return b"".join(parts)


class WatchedAnswer:
    """An answer that tells once when its client has left; see `exchange.Answer`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._on_gone: Callable[[], None] | None = None
        self._is_gone = False

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the client leaves; at once if it has left already."""
        self._on_gone = callback
        self._connection.on_lost = self._lose
        if self._connection.is_lost:
            self._lose()

    def close(self) -> None:
        """Watch the client no longer."""
        self._connection.on_lost = None

    def _lose(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            if self._on_gone is not None:
                self._on_gone()


class AsgiAnswer(WatchedAnswer):
    """`exchange.Answer` over ASGI.

    A server's `send` neither fails nor waits once the client has gone, so that a call goes on to its own end,
    and what is left to say is dropped there. A client that takes nothing for `stall_s` seconds has gone as well, and
    its connection is cut off.
    """

    def __init__(self, request_id: str, send: Send, connection: Connection, *, stall_s: float) -> None:
        super().__init__(connection)
        self._request_id = request_id.encode()
        self._to_server = send
        self._stall_s = stall_s
        self._is_waiting = False
        self._is_started = False

    @property
    def is_started(self) -> bool:
        """Whether the head has been sent."""
        return self._is_started

    @property
    def is_waiting(self) -> bool:
        """Whether the client does not take what was sent last."""
        return self._is_waiting

    async def _send(self, message: Any) -> None:
        if self._is_gone:
            return
        if not self._connection.is_full:
            await self._to_server(message)
            return
        self._is_waiting = True
        try:
            with within(self._stall_s):
                await self._to_server(message)
        except TimeoutError:
            self._connection.abort()
            self._lose()
        self._is_waiting = False

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the answer, together with what is sent next; the request id is added to it."""
        self._is_started = True
        self._connection.hold()
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"x-request-id", self._request_id)],
            }
        )

    async def write(self, chunk: bytes) -> None:
        """Send `chunk`; returns when the client's connection can take more."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._connection.let_go()

    async def end(self, chunk: bytes = b"") -> None:
        """Send `chunk` and the end of the answer."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})
        self._connection.let_go()
