import asyncio
import ssl

import pytest
import uvloop

from proxy.upstream.httpx import HttpxClient
from proxy.upstream.lean import LeanClient
from tests.upstream.servers import TLS_CERTIFICATE, TLS_KEY


def pytest_asyncio_loop_factories(config, item):
    """The tests over sockets run under both loops: ours in production, and the one that developers may have."""
    factories = {"uvloop": uvloop.new_event_loop}
    if item.path.stem in {"test_client", "test_lean"}:
        factories["asyncio"] = asyncio.new_event_loop
    return factories


@pytest.fixture(params=[LeanClient, HttpxClient], ids=["lean", "httpx"])
def client_class(request):
    return request.param


@pytest.fixture
async def client(client_class):
    client = client_class()
    yield client
    await client.aclose()


@pytest.fixture
def server_tls(tmp_path):
    pem = tmp_path / "server.pem"
    blocks = (("PRIVATE KEY", TLS_KEY), ("CERTIFICATE", TLS_CERTIFICATE))
    pem.write_text("".join(f"-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n" for kind, text in blocks))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context
