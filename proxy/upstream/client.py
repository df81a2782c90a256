"""HTTP out: what an HTTP client is to the providers, and the rule by which its failures get their names.

    UpstreamUnreachable   nothing was sent: another candidate costs nothing
    UpstreamTimeout       connected, but no answer in time: the work may have been done, and billed
    UpstreamBroken        anything else: the request may have been read

Where it cannot be told, the answer is the dearer one. Nothing is ever sent a second time here. There are two clients:
`proxy.upstream.lean`, our own, and `proxy.upstream.httpx`, a library's; `[server] http_client` chooses.
"""

from typing import Protocol

import msgspec

from proxy.upstream import Headers, UpstreamResponse

CONNECTIONS_MAX = 1000
"""Streams are long, so this is about the number of calls at once; it fits the usual limit of 1,024 open files."""

KEEPALIVE_MAX = 100

KEEPALIVE_S = 4.0
"""Below the 5 s of uvicorn and Node, the shortest patience among common servers: a connection that the provider closes
just when our next request is under way costs that call, since nobody can tell whether it was read."""

# What the errors say. No message says more, since addresses and errors of libraries may hold credentials.
NOT_CONNECTED = "No connection to the provider could be made."
NOT_CONNECTED_IN_TIME = "The connection to the provider was not made in time."
ALL_IN_USE = "All connections to providers are in use."
NO_ADDRESS = "The provider's address is not one of HTTP."
NOT_SENDABLE = "The request cannot be sent as HTTP."
SILENT = "The provider did not answer in time."
NOT_HTTP = "The provider broke the connection, or what it sent is not HTTP."
SPENT = "The provider's answer was already read or closed."
BROKE = "The connection to the provider broke."


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


class HttpClient(Protocol):
    """The process's connections to all providers.

    It follows no redirects, keeps no cookies, reads no environment (no proxies, no .netrc) and adds no header but
    `host` and `content-length`.
    """

    async def send(  # noqa: PLR0913 - a request has this many parts
        self, *, provider: str, method: str, url: str, headers: Headers, body: bytes, timeouts: Timeouts
    ) -> UpstreamResponse:
        """Send one request and return when the head of its answer is there, whatever the status.

        `provider` is the name that errors carry. Credentials inside `url` are not sent. If the awaiting task is
        cancelled, the connection is closed.

        Raises `UpstreamUnreachable`, `UpstreamBroken`, `UpstreamTimeout`: see the module.
        """
        ...

    async def aclose(self) -> None:
        """Close all connections; answers still being read end in `UpstreamBroken`."""
        ...
