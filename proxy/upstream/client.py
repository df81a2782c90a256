"""HTTP out: the one module that knows the HTTP client's library.

Library errors are translated here, by one table, while the head is awaited and while the body is read:

    UpstreamUnreachable   no connection: nothing was sent, another candidate costs nothing
    UpstreamTimeout       connected, but no answer in time: the work may have been done, and billed
    UpstreamBroken        anything else: the request may have been read

Where the library cannot tell, the answer is the dearer one. Nothing is ever sent a second time here.

**Connections that the provider closed while they were idle.** httpx2 asks the kernel whether an idle connection is
readable before it uses it again; a close that has arrived by then is found, and a new connection is made. What
remains is the close that is still on its way while our request is: it ends as a read error or as "disconnected
without a response", exactly like a provider that read the request and died. The two cannot be told apart, so both
are `UpstreamBroken`. `keepalive_s` makes it rare: we let go of a connection before the usual servers do.
"""

import asyncio
import contextlib
import http.cookiejar
import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx2 as httpx
import msgspec

from proxy.errors import UpstreamBroken, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from proxy.upstream import Headers, UpstreamResponse

CONNECTIONS_MAX = 1000
"""Streams are long, so this is about the number of calls at once; it fits the usual limit of 1,024 open files."""

KEEPALIVE_MAX = 100

KEEPALIVE_S = 4.0
"""Below the 5 s of uvicorn and Node, the shortest patience among common servers (see the module's docstring)."""

_FAILURES: dict[type[Exception], tuple[type[UpstreamFailed], str]] = {
    httpx.ConnectError: (UpstreamUnreachable, "No connection to the provider could be made."),
    httpx.ConnectTimeout: (UpstreamUnreachable, "The connection to the provider was not made in time."),
    httpx.PoolTimeout: (UpstreamUnreachable, "All connections to providers are in use."),
    httpx.ProxyError: (UpstreamUnreachable, "No connection to the provider could be made."),
    httpx.UnsupportedProtocol: (UpstreamUnreachable, "The provider's address is not one of HTTP."),
    httpx.InvalidURL: (UpstreamUnreachable, "The provider's address is not one of HTTP."),
    httpx.TimeoutException: (UpstreamTimeout, "The provider did not answer in time."),
    TimeoutError: (UpstreamTimeout, "The provider did not answer in time."),
    httpx.ProtocolError: (UpstreamBroken, "The provider broke the connection, or what it sent is not HTTP."),
    httpx.StreamError: (UpstreamBroken, "The provider's answer was already read or closed."),
    httpx.HTTPError: (UpstreamBroken, "The connection to the provider broke."),
    # TLS errors in the middle of a body come through httpx2 as they are.
    OSError: (UpstreamBroken, "The connection to the provider broke."),
}
"""By the nearest class; no message says more, since addresses and errors of libraries may hold credentials."""

_TRANSLATED = tuple(_FAILURES)


class Timeouts(msgspec.Struct, frozen=True):
    """How long to wait for one provider, in seconds.

    `connect_s` bounds each of: a free connection in the pool, the TCP connection, the TLS handshake.
    `first_byte_s` is the time from the call of `send()` to the complete head of the answer, connecting and
    sending the body included. `idle_s` is the longest silence within a body; time that our own reader takes
    between two chunks does not count.
    """

    connect_s: float = 5
    first_byte_s: float = 120
    idle_s: float = 60


class HttpClient:
    """The process's connections to all providers.

    It speaks HTTP/1.1, follows no redirects, keeps no cookies, reads no environment (no proxies, no .netrc)
    and adds no header but `host` and `content-length`. `tls` replaces the default trust in the system's
    authorities; `transport` replaces the network, for tests.
    """

    def __init__(
        self,
        *,
        connections_max: int = CONNECTIONS_MAX,
        keepalive_max: int = KEEPALIVE_MAX,
        keepalive_s: float = KEEPALIVE_S,
        tls: ssl.SSLContext | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        quiet_library_loggers()
        self._client = httpx.AsyncClient(
            http1=True,
            http2=False,
            verify=tls or True,
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=connections_max,
                max_keepalive_connections=keepalive_max,
                keepalive_expiry=keepalive_s,
            ),
            transport=transport,
        )

    async def send(  # noqa: PLR0913 - a request has this many parts
        self, *, provider: str, method: str, url: str, headers: Headers, body: bytes, timeouts: Timeouts
    ) -> UpstreamResponse:
        """Send one request and return when the head of its answer is there, whatever the status.

        `provider` is the name that errors carry. Credentials inside `url` are not sent. If the awaiting task is
        cancelled, the connection is closed.

        Raises `UpstreamUnreachable`, `UpstreamBroken`, `UpstreamTimeout`: see the module.
        """
        # The deadlines here and in `chunks()` stand in for the library's time-outs on reads and writes, which begin
        # anew with every byte.
        waits = httpx.Timeout(connect=timeouts.connect_s, pool=timeouts.connect_s, read=None, write=None)
        try:
            async with asyncio.timeout(timeouts.first_byte_s), _closing_half_open() as trace:
                # Built here and not by the client, which would add its default headers.
                request = httpx.Request(
                    method, url, headers=headers, content=body, extensions={"timeout": waits.as_dict(), "trace": trace}
                )
                # Without `auth`, credentials in the URL would replace the authorization that we were given.
                response = await self._client.send(request, stream=True, auth=httpx.Auth())
        except _TRANSLATED as exc:
            raise _failure(exc, provider=provider) from exc
        return _HttpResponse(response, provider=provider, idle_s=timeouts.idle_s)

    async def aclose(self) -> None:
        """Close all connections; answers still being read end in `UpstreamBroken`."""
        await self._client.aclose()


class _HttpResponse:
    """An `UpstreamResponse` over a connection of the pool."""

    def __init__(self, response: httpx.Response, *, provider: str, idle_s: float) -> None:
        self.status = response.status_code
        self.headers: Headers = [(name.lower(), value) for name, value in response.headers.raw]
        self._response = response
        self._provider = provider
        self._idle_s = idle_s
        self._closing: asyncio.Task[None] | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        raw = self._response.aiter_raw()
        try:
            while True:
                try:
                    async with asyncio.timeout(self._idle_s):
                        chunk = await anext(raw, None)
                except _TRANSLATED as exc:
                    raise _failure(exc, provider=self._provider) from exc
                if chunk is None:
                    return
                yield chunk
        finally:
            await self.aclose()
            await raw.aclose()

    async def aclose(self) -> None:
        # httpx2 takes a request out of its pool only after it has awaited the closing of the socket, and shields that
        # from anyio's cancellation but not from asyncio's. In a task of its own it cannot be interrupted.
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        # A connection that fails to close is gone all the same.
        with contextlib.suppress(*_TRANSLATED):
            await self._response.aclose()


def quiet_library_loggers() -> None:
    """Keep the library's loggers, and those of its ancestor, from logging URLs (at INFO) and headers (at DEBUG)."""
    for name in ("httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.asynccontextmanager
async def _closing_half_open() -> AsyncGenerator[Callable[[str, dict[str, Any]], Awaitable[None]]]:
    """A `trace` for one request, which closes its connection when the request ends during the TLS handshake.

    A cancelled handshake is the one place where httpx2 leaves an open connection to the garbage collector.
    """
    half_open: list[Any] = []

    async def trace(event: str, info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            half_open.append(info["return_value"])
        elif event == "connection.start_tls.complete":
            half_open.clear()

    try:
        yield trace
    except BaseException:
        for stream in half_open:
            await stream.aclose()
        raise


def _failure(exc: Exception, *, provider: str) -> UpstreamFailed:
    """The error of ours for `exc`, by the nearest of its classes in the table."""
    failure, message = next(_FAILURES[kind] for kind in type(exc).__mro__ if kind in _FAILURES)
    return failure(message, provider=provider)
