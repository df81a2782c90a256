"""The limits on what may be sent before a request is known, on raw sockets."""

import asyncio
import gc
import json
import socket
import time
import weakref

import pytest
from uvicorn.server import ServerState

from proxy.edge.protocol import (
    CONNECTION,
    HEAD_BYTES_MAX,
    HEAD_S_MAX,
    DirectAnswer,
    DirectCycle,
    LimitedProtocol,
    server_config,
)
from tests.serving import SQLITE, serving

BODY = b'{"model": "demo-chat", "messages": [{"role": "user", "content": "hi"}]}'


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), SQLITE, "http://127.0.0.1:9/v1") as server:
        yield server


@pytest.fixture(scope="module")
def key(served) -> str:
    return served.customer("someone@example.com")


def connected(served) -> socket.socket:
    return socket.create_connection(served.address, timeout=HEAD_S_MAX + 10)


def everything(client: socket.socket) -> bytes:
    """What is read until the server closes."""
    pieces = []
    with client:
        while piece := client.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def error_of(answer: bytes) -> dict:
    """The error in an answer, which has a request id."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head
    return json.loads(body)["error"]


def test_what_is_no_http_is_refused_in_openais_shape(served):
    """400, with a request id, and the connection is closed."""
    client = connected(served)
    client.sendall(b"hello\r\n\r\n")
    answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert error_of(answer)["code"] == "invalid_http"


@pytest.mark.parametrize("pieces", [1, 50])
def test_a_head_has_a_limit(served, pieces):
    """However it is sent, it never takes more memory than that."""
    client = connected(served)
    client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
    field = b"x-%d: " + b"a" * (2 * HEAD_BYTES_MAX // pieces) + b"\r\n"
    try:
        for number in range(pieces):
            client.sendall(field % number)
            time.sleep(0.001)
        answer = everything(client)
    except ConnectionError:
        client.close()
        return
    assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    error_of(answer)


@pytest.mark.parametrize(
    ("before", "dribbled"),
    [(b"", b"GET /health/live HTTP/1.1\r\nHost: "), (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n")],
    ids=["fresh", "used"],
)
def test_a_head_has_its_time(served, before, dribbled):
    """A client that dribbles its head is told so and let go, on a used connection by an empty line as well."""
    client = connected(served)
    if before:
        client.sendall(before)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    client.sendall(dribbled)
    begun = time.monotonic()
    answer = everything(client)
    assert error_of(answer)["code"] == "head_timeout"
    assert time.monotonic() - begun < HEAD_S_MAX + 5


@pytest.mark.parametrize("field", [b"Upgrade: h2c", b"UPGRADE:h2c", b"Upgrade: websocket"])
def test_an_offer_to_upgrade_is_ignored(served, key, field):
    """Java's client makes one with every request; the body is read all the same."""
    client = connected(served)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        + field
        + b"\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nAuthorization: Bearer "
        + key.encode()
    )
    client.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
    assert everything(client).startswith(b"HTTP/1.1 200 ")


def test_an_offer_to_upgrade_is_ignored_on_a_used_connection(served, key):
    """As on a new one: with every request."""
    client = connected(served)
    client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (key.encode(), len(BODY), BODY)
    )
    assert b"HTTP/1.1 200 " in everything(client)


@pytest.mark.parametrize("stream", [b"", b', "stream": true'])
def test_an_old_client_gets_no_chunks(served, key, stream):
    """HTTP/1.0 (nginx speaks it by default) has none: what has no length ends with the connection."""
    body = BODY[:-1] + stream + b"}"
    client = connected(served)
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\nAuthorization: Bearer %b\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (key.encode(), len(body), body)
    )
    head, _, answer = everything(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    if stream:
        assert answer.startswith(b"data: {")
        assert answer.endswith(b"}\n\ndata: [DONE]\n\n")
    else:
        assert json.loads(answer)["choices"]


def test_a_body_that_speaks_of_upgrades_is_left_alone(served, key):
    """Only a header field is renamed."""
    body = BODY.replace(b"hi", b"\\n\nUpgrade: now").replace(b"\\n\n", b"\\n")
    client = connected(served)
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %b\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (key.encode(), len(body), body)
    )
    answer = everything(client)
    assert b"Upgrade: now" in answer


# ---- requests that a proxy in front may cut up otherwise than we do (RFC 9112, sections 6.1, 6.3 and 11.2)

SMUGGLED = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
SIZE = len(BODY)
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5", CHUNKS),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", CHUNKS),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", CHUNKS),
        (b"Transfer-Encoding: chunked, identity", CHUNKS),
        (b"Transfer-Encoding: xchunked", CHUNKS),
        (b"Transfer-Encoding: \x0bchunked", CHUNKS),
        (b"Transfer-Encoding : chunked", CHUNKS),
        (b"X-A: a\r\n Transfer-Encoding: chunked", CHUNKS),
        (b"X-A: a\rTransfer-Encoding: chunked", CHUNKS),
        (b"X-A: a\nTransfer-Encoding: chunked", CHUNKS),
        (b"X-A: a\x00b\r\nContent-Length: %d" % SIZE, BODY),
        (b"Content-Length: %d\r\nContent-Length: %d" % (SIZE, SIZE), BODY),
        (b"Content-Length: %d, %d" % (SIZE, SIZE), BODY),
        (b"Content-Length: +%d" % SIZE, BODY),
        (b"Content-Length: 0x%x" % SIZE, BODY),
        (b"Transfer-Encoding: chunked", b"0x" + CHUNKS),
        (b"Transfer-Encoding: chunked", b"fffffffffffffffff1\r\n" + BODY),
        (b"Transfer-Encoding: chunked", b"%x;a\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
        (b"Transfer-Encoding: chunked", b"%x\r\n%bXX0\r\n\r\n" % (SIZE, BODY)),
    ],
    ids=lambda value: value[:40].decode("ascii", "backslashreplace"),
)
def test_nothing_can_be_hidden_behind_a_request(served, key, fields, body):
    """What has two readings is refused, and what follows it on the connection is not read."""
    client = connected(served)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n%b\r\n\r\n"
    client.sendall(head % (key.encode(), fields) + body + SMUGGLED)
    answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert error_of(answer)["code"] == "invalid_http"


def test_chunks_of_an_old_client_end_its_connection(served, key):
    """HTTP/1.0 has none, so that whoever sends them has passed through something that may read them otherwise."""
    client = connected(served)
    head = b"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer %b\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.sendall(head % key.encode() + CHUNKS + SMUGGLED)
    assert everything(client).count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("is_answered", [True, False])
async def test_a_connection_that_is_lost_is_freed(is_answered):
    """With its requests, and at once: none of them waits for the collector, whether it was answered by then or not."""
    known, begun, left = [], asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        known.append(weakref.ref(scope["state"][CONNECTION], lambda _: left.set()))
        await receive()
        begun.set()
        if is_answered:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        await receive()

    loop, state = asyncio.get_running_loop(), ServerState()
    config = server_config(app, drain_s=1)
    gc.disable()
    try:
        server = await loop.create_server(lambda: LimitedProtocol(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await begun.wait()
        if is_answered:
            await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        async with asyncio.timeout(5):
            await left.wait()
        assert known[0]() is None
        server.close()
    finally:
        gc.enable()


async def test_a_client_that_reads_nothing_holds_up_its_writer_within_one_tick():
    """What is to be sent soon does not pile up: the writer waits, and the client has gone in the end."""

    async def app(_scope, _receive, _send):
        raise AssertionError("this connection takes the direct way")

    config = server_config(app, drain_s=1)
    config.load()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        _, connection = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: LimitedProtocol(config=config, server_state=ServerState(), app_state={}), ours
        )
        cycle = connection.cycle = DirectCycle(None, [], keep_alive=True, expects_continue=False)
        answer, gone = DirectAnswer("req", connection, cycle, stall_s=0.2), []
        answer.on_gone(lambda: gone.append(True))
        await answer.start(200, [(b"content-type", b"text/event-stream")])
        pieces = 0
        while not gone and pieces < 1000:
            await answer.write(b"x" * 20_000)
            pieces += 1
    assert gone
    assert pieces * 20_000 < 2_000_000, "no more than the kernel and the connection hold"
