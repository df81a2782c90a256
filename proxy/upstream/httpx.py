"""An `HttpClient` over the library httpx2: the one module that knows it.

It costs twenty to thirty times the CPU of `proxy.upstream.lean`. It is kept for what that one does not do (HTTP/2,
proxies, other transports), and as a second opinion: both pass the same tests.

Library errors are translated here, by one table, while the head is awaited and while the body is read.

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

from proxy.errors import UpstreamBroken, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from proxy.upstream import Headers, UpstreamResponse
from proxy.upstream.client import (
    ALL_IN_USE,
    BROKE,
    CONNECTIONS_MAX,
    KEEPALIVE_MAX,
    KEEPALIVE_S,
    NO_ADDRESS,
    NOT_CONNECTED,
    NOT_CONNECTED_IN_TIME,
    NOT_HTTP,
    SILENT,
    SPENT,
    Timeouts,
)

_FAILURES: dict[type[Exception], tuple[type[UpstreamFailed], str]] = {
    httpx.ConnectError: (UpstreamUnreachable, NOT_CONNECTED),
    httpx.ConnectTimeout: (UpstreamUnreachable, NOT_CONNECTED_IN_TIME),
    httpx.PoolTimeout: (UpstreamUnreachable, ALL_IN_USE),
    httpx.ProxyError: (UpstreamUnreachable, NOT_CONNECTED),
    httpx.UnsupportedProtocol: (UpstreamUnreachable, NO_ADDRESS),
    httpx.InvalidURL: (UpstreamUnreachable, NO_ADDRESS),
    httpx.TimeoutException: (UpstreamTimeout, SILENT),
    TimeoutError: (UpstreamTimeout, SILENT),
    httpx.ProtocolError: (UpstreamBroken, NOT_HTTP),
    httpx.StreamError: (UpstreamBroken, SPENT),
    httpx.HTTPError: (UpstreamBroken, BROKE),
    # TLS errors in the middle of a body come through httpx2 as they are.
    OSError: (UpstreamBroken, BROKE),
}
"""By the nearest class."""

_TRANSLATED = tuple(_FAILURES)


class HttpxClient:
    """See `HttpClient`. It speaks HTTP/1.1.

    `tls` replaces the default trust in the system's authorities; `transport` replaces the network, for tests.
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
        """Send one request; see `HttpClient.send`."""
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
        """Close all connections; see `HttpClient.aclose`."""
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
