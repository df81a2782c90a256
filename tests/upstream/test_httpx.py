import logging
import ssl

import httpx2
import pytest

from proxy.errors import UpstreamBroken, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from proxy.upstream.httpx import HttpxClient, quiet_library_loggers
from tests.upstream.servers import body_of, failure_of, send


class Failing(httpx2.AsyncBaseTransport, httpx2.AsyncByteStream):
    """Fails with `error`, before the head or inside the body."""

    def __init__(self, error, *, has_head):
        self.error = error
        self.has_head = has_head

    async def handle_async_request(self, request):
        if self.has_head:
            return httpx2.Response(200, stream=self)
        raise self.error

    async def __aiter__(self):
        yield b"half"
        raise self.error


def library_errors():
    kinds = [httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError]
    for kind in kinds:
        kinds += [kind for kind in kind.__subclasses__() if kind not in kinds]
    return kinds


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize(
    "kind", [*library_errors(), ssl.SSLError, ConnectionResetError], ids=lambda kind: kind.__name__
)
async def test_no_error_of_the_library_comes_through(kind, has_head):
    """Each becomes one of ours, before the head and inside the body, and says nothing of its own."""
    error = kind.__new__(kind)
    Exception.__init__(error, "sk-secret")
    client = HttpxClient(transport=Failing(error, has_head=has_head))
    with pytest.raises(UpstreamFailed) as caught:
        await body_of(await send(client, "http://host/"))
    assert caught.value.__cause__ is error
    assert "sk-secret" not in str(caught.value)
    await client.aclose()


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (httpx2.ConnectTimeout(""), UpstreamUnreachable),
        (httpx2.PoolTimeout(""), UpstreamUnreachable),
        (httpx2.ConnectError(""), UpstreamUnreachable),
        (httpx2.WriteTimeout(""), UpstreamTimeout),
        (httpx2.ReadTimeout(""), UpstreamTimeout),
        (httpx2.WriteError(""), UpstreamBroken),
        (httpx2.ReadError(""), UpstreamBroken),
        (httpx2.CloseError(""), UpstreamBroken),
        (httpx2.RemoteProtocolError(""), UpstreamBroken),
        (httpx2.LocalProtocolError(""), UpstreamBroken),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
async def test_what_each_error_means(error, failure):
    """Only an error from before the request was sent is "unreachable"."""
    client = HttpxClient(transport=Failing(error, has_head=False))
    assert await failure_of(client, "http://host/") is failure
    await client.aclose()


def test_the_library_logs_no_addresses():
    """Its INFO lines hold URLs."""
    logging.getLogger("httpx2").setLevel(logging.DEBUG)
    quiet_library_loggers()
    for name in ("httpx", "httpx2", "httpcore", "httpcore2", "httpcore2.http11"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)
