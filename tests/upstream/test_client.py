"""What every HTTP client must do, over real sockets, under both loops."""

import asyncio

import pytest

from proxy.app import http_client
from proxy.errors import UpstreamBroken, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from proxy.settings import ServerSettings
from proxy.upstream.client import Timeouts
from proxy.upstream.lean import LeanClient
from tests.upstream.servers import (
    CHUNKED_HEAD,
    FAST,
    PLAIN,
    answering,
    body_of,
    chunk,
    closed_port,
    failure_of,
    full_port,
    held_by,
    read_request,
    reset,
    send,
    serving,
    stalling,
    stalling_mid_body,
    trusting,
    write_slowly,
)


async def test_status_headers_and_body_arrive(client):
    """Names come in lower case, in order, repeated ones too; the status is whatever the provider said."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 429 No\r\nRetry-After: 3\r\nX-A: 1\r\nx-a: \xff\r\nContent-Length: 4\r\n\r\n\x1f\x8b!!")

    async with serving(handler) as url:
        response = await send(client, url)
        assert response.status == 429
        assert response.headers == [
            (b"retry-after", b"3"),
            (b"x-a", b"1"),
            (b"x-a", b"\xff"),
            (b"content-length", b"4"),
        ]
        assert await body_of(response) == b"\x1f\x8b!!"


async def test_an_encoded_body_is_not_decoded(client):
    """The bytes are the provider's, even if they are no gzip at all."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc")

    async with serving(handler) as url:
        assert await body_of(await send(client, url)) == b"abc"


async def test_exactly_the_given_headers_are_sent(client):
    """Host and content-length are added, and nothing of the library's."""
    seen = []

    async def handler(reader, writer):
        seen.append(await read_request(reader))
        writer.write(PLAIN)

    async with serving(handler) as url:
        await body_of(await send(client, f"{url}/v1/x", headers=[(b"x-b", b"2"), (b"x-a", b"\xc3\xa9")], body=b"{}\n"))
    host = url.removeprefix("http://").encode()
    head = b"POST /v1/x HTTP/1.1\r\nHost: %s\r\nx-b: 2\r\nx-a: \xc3\xa9\r\nContent-Length: 3\r\n\r\n" % host
    assert seen == [(head, b"{}\n")]


async def test_credentials_in_the_address_are_not_sent(client):
    """They would replace the authorization that was given."""
    seen = []

    async def handler(reader, writer):
        seen.append((await read_request(reader))[0].lower())
        writer.write(PLAIN)

    async with serving(handler) as url:
        await body_of(await send(client, url.replace("//", "//user:secret@"), headers=[(b"authorization", b"mine")]))
    assert seen[0].count(b"authorization") == 1
    assert b"authorization: mine" in seen[0]
    assert b"secret" not in seen[0]


async def test_redirects_are_not_followed(client):
    """A provider cannot send us, and the key with us, elsewhere."""
    heads = []

    async def handler(reader, writer):
        heads.append((await read_request(reader))[0])
        writer.write(b"HTTP/1.1 307 Go\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n")

    async with serving(handler) as url:
        response = await send(client, url)
        assert (response.status, await body_of(response)) == (307, b"")
        assert len(heads) == 1


async def test_cookies_are_not_kept(client):
    """One caller's answer leaves nothing behind for the next caller's request."""
    heads = []

    async def handler(reader, writer):
        while True:
            heads.append((await read_request(reader))[0].lower())
            writer.write(b"HTTP/1.1 200 OK\r\nset-cookie: who=me; Path=/\r\ncontent-length: 0\r\n\r\n")

    async with serving(handler) as url:
        for _ in range(2):
            await body_of(await send(client, url))
    assert len(heads) == 2
    assert b"cookie" not in heads[1]


async def test_the_environment_is_not_read(client_class, monkeypatch):
    """A proxy in the environment would see every key."""
    with closed_port() as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{port}")
        client = client_class()
        async with serving(answering) as url:
            assert await body_of(await send(client, url)) == b"ok"
        await client.aclose()


async def test_refused(client):
    """No connection, so nothing was sent; and the message has nothing of the address."""
    with closed_port() as port, pytest.raises(UpstreamUnreachable) as caught:
        await send(client, f"http://user:secret@127.0.0.1:{port}/key?key=sk-1")
    assert str(caught.value) == "No connection to the provider could be made."


async def test_connect_timeout(client):
    """A host that does not answer the connection attempt was sent nothing."""
    with full_port() as port:
        assert await failure_of(client, f"http://127.0.0.1:{port}", timeouts=FAST) is UpstreamUnreachable


@pytest.mark.parametrize("url", ["ftp://host/", "host/path", "http://[::1", "http://host.invalid/"])
async def test_addresses_that_lead_nowhere(client, url):
    """They are unreachable like any other."""
    assert await failure_of(client, url) is UpstreamUnreachable


async def test_a_server_without_tls(client):
    """A failed handshake is no connection."""

    async def handler(reader, writer):
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(handler) as url:
        assert await failure_of(client, url.replace("http:", "https:")) is UpstreamUnreachable


async def test_a_handshake_that_stalls(client):
    """The time to connect covers the handshake."""

    async def handler(reader, writer):
        await reader.read()

    async with serving(handler) as url:
        assert await failure_of(client, url.replace("http:", "https:"), timeouts=FAST) is UpstreamUnreachable


async def test_an_authority_that_is_not_trusted(client, server_tls):
    """A certificate that anybody can make gets neither the request nor the key."""
    async with serving(answering, tls=server_tls) as url:
        assert await failure_of(client, url) is UpstreamUnreachable


async def test_over_tls(client_class, server_tls):
    """Answers arrive, one connection serves them all, closing early is seen."""
    requests = 0
    gone = asyncio.Event()

    async def handler(reader, writer):
        nonlocal requests
        for answer in (PLAIN, PLAIN, CHUNKED_HEAD + chunk(b"half")):
            await read_request(reader)
            requests += 1
            writer.write(answer)
        await reader.read()
        gone.set()

    client = client_class(tls=trusting())
    async with serving(handler, tls=server_tls) as url, asyncio.timeout(10):
        for _ in range(2):
            assert await body_of(await send(client, url)) == b"ok"
        response = await send(client, url)
        assert await anext(response.chunks()) == b"half"
        assert requests == 3
        await response.aclose()
        await gone.wait()
    await client.aclose()


@pytest.mark.parametrize("ends_with_reset", [False, True])
async def test_half_a_body_over_tls(client_class, server_tls, ends_with_reset):
    """What came is delivered, and the end is an error."""
    delivered = asyncio.Event()

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(CHUNKED_HEAD + chunk(b"half"))
        await delivered.wait()
        if ends_with_reset:
            reset(writer)

    client = client_class(tls=trusting())
    async with serving(handler, tls=server_tls) as url:
        chunks = (await send(client, url)).chunks()
        assert await anext(chunks) == b"half"
        delivered.set()
        with pytest.raises(UpstreamBroken):
            await anext(chunks)
    await client.aclose()


async def test_no_free_connection(client_class):
    """A call that found the pool full was sent nothing."""
    client = client_class(connections_max=1)
    async with serving(stalling_mid_body) as url:
        held = await send(client, url)
        assert await failure_of(client, url, timeouts=FAST) is UpstreamUnreachable
        await held.aclose()
    await client.aclose()


async def test_reset_before_reading(client):
    """Nobody can tell whether the request was read."""

    async def handler(reader, writer):
        reset(writer)

    async with serving(handler) as url:
        assert await failure_of(client, url) is UpstreamBroken


async def test_reset_after_reading(client):
    """The work may have been done."""

    async def handler(reader, writer):
        await read_request(reader)
        reset(writer)

    async with serving(handler) as url:
        assert await failure_of(client, url) is UpstreamBroken


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n: x\r\n\r\n"])
async def test_no_head(client, answer):
    """A connection that ends without the head of an answer, or with what is none, broke."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(answer)

    async with serving(handler) as url:
        assert await failure_of(client, url) is UpstreamBroken


async def test_a_head_without_end(client):
    """The size of a head is bounded."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x: " + b"y" * 10_000 + b"\r\n")
            await writer.drain()

    async with serving(handler) as url:
        assert await failure_of(client, url) is UpstreamBroken


async def test_stall_before_the_head(client):
    """The request was sent, so the time-out is not "unreachable"."""
    async with serving(stalling) as url:
        assert await failure_of(client, url, timeouts=FAST) is UpstreamTimeout


async def test_a_head_that_trickles(client):
    """A byte now and then does not stretch the time to the head."""

    async def handler(reader, writer):
        await read_request(reader)
        while True:
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(handler) as url:
        assert await failure_of(client, url, timeouts=FAST) is UpstreamTimeout


async def test_a_server_that_does_not_read(client):
    """Sending the body is inside the time to the head."""

    async def handler(reader, writer):
        await asyncio.Event().wait()

    async with serving(handler) as url:
        with pytest.raises(UpstreamTimeout):
            await send(client, url, body=b" " * 50_000_000, timeouts=FAST)


async def test_an_early_answer_to_an_unread_body(client):
    """A server may refuse a body without reading it, and its reason arrives."""

    async def handler(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await reader.read()

    async with serving(handler) as url:
        response = await send(client, url, body=b" " * 5_000_000)
        assert response.status == 413
        await response.aclose()


async def test_stall_inside_the_body(client):
    """What came before the silence is delivered, then the silence is an error and the provider is let go."""
    gone = asyncio.Event()

    async def handler(reader, writer):
        await stalling_mid_body(reader, writer)
        gone.set()

    async with serving(handler) as url:
        chunks = (await send(client, url, timeouts=FAST)).chunks()
        assert await anext(chunks) == b"half"
        with pytest.raises(UpstreamTimeout):
            await anext(chunks)
        await asyncio.wait_for(gone.wait(), 5)


async def test_a_slow_reader_is_not_a_stalled_provider(client):
    """Only waiting for the provider counts as its silence."""
    async with serving(answering) as url:
        chunks = (await send(client, url, timeouts=Timeouts(idle_s=0.05))).chunks()
        assert await anext(chunks) == b"ok"
        await asyncio.sleep(0.1)
        assert [chunk async for chunk in chunks] == []


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", CHUNKED_HEAD + chunk(b"half"), CHUNKED_HEAD + b"9\r\nhalf"],
)
@pytest.mark.parametrize("ends_with_reset", [False, True])
async def test_half_a_body(client, answer, ends_with_reset):
    """What came is delivered, and the end is an error."""
    delivered = asyncio.Event()

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(answer)
        await delivered.wait()
        if ends_with_reset:
            reset(writer)

    async with serving(handler) as url:
        chunks = (await send(client, url)).chunks()
        assert await anext(chunks) == b"half"
        delivered.set()
        with pytest.raises(UpstreamBroken):
            await anext(chunks)


async def test_chunks_are_not_held_back(client):
    """Each piece is delivered while the server still holds the next."""
    may_go_on = asyncio.Semaphore(0)

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(CHUNKED_HEAD)
        for piece in (b"a", b"b", b"c"):
            await may_go_on.acquire()
            writer.write(chunk(piece))
        writer.write(b"0\r\n\r\n")

    async with serving(handler) as url:
        response = await send(client, url)
        chunks = response.chunks()
        for piece in (b"a", b"b", b"c"):
            may_go_on.release()
            assert await asyncio.wait_for(anext(chunks), 5) == piece
        assert [chunk async for chunk in chunks] == []


async def test_one_byte_at_a_time(client):
    """However the bytes are cut on the wire, the body is the same."""
    text = b"data: {}\n\ndata: [DONE]\n\n"
    wire = CHUNKED_HEAD + b"".join(chunk(text[i : i + 1]) for i in range(len(text))) + b"0\r\n\r\n"

    async def handler(reader, writer):
        await read_request(reader)
        for i in range(len(wire)):
            writer.write(wire[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async with serving(handler) as url:
        assert await body_of(await send(client, url)) == text


async def test_a_body_is_read_once(client):
    """A second reading would look like an empty answer."""
    async with serving(answering) as url:
        response = await send(client, url)
        assert await body_of(response) == b"ok"
        with pytest.raises(UpstreamBroken):
            await body_of(response)


async def test_closing_early_tells_the_provider(client):
    """It sees the connection end; closing again is harmless; the closed body is an error to read."""
    gone = asyncio.Event()

    async def handler(reader, writer):
        await stalling_mid_body(reader, writer)
        gone.set()

    async with serving(handler) as url:
        response = await send(client, url)
        chunks = response.chunks()
        assert await anext(chunks) == b"half"
        await response.aclose()
        await asyncio.wait_for(gone.wait(), 5)
        await response.aclose()
        with pytest.raises(UpstreamBroken):
            await anext(chunks)


async def test_closing_unread_tells_the_provider(client):
    """Without a first chunk too."""
    gone = asyncio.Event()

    async def handler(reader, writer):
        await stalling_mid_body(reader, writer)
        gone.set()

    async with serving(handler) as url:
        response = await send(client, url)
        await response.aclose()
        await asyncio.wait_for(gone.wait(), 5)
        with pytest.raises(UpstreamBroken):
            await body_of(response)


async def test_closing_while_another_task_reads(client):
    """The reader is woken with an error instead of waiting for ever."""
    async with serving(stalling_mid_body) as url:
        response = await send(client, url)
        chunks = response.chunks()
        assert await anext(chunks) == b"half"
        reading = asyncio.create_task(anext(chunks))
        await asyncio.sleep(0)
        await response.aclose()
        with pytest.raises(UpstreamBroken):
            await asyncio.wait_for(reading, 5)


async def waiting_for_the_head(client, url, reached):
    reached.put_nowait("send")
    await send(client, url)


async def reading_the_body(client, url, reached):
    async for _ in (await send(client, url)).chunks():
        reached.put_nowait("read")


async def closing_the_body(client, url, reached):
    response = await send(client, url)
    await anext(response.chunks())
    reached.put_nowait("close")
    try:
        await asyncio.Event().wait()
    finally:
        await response.aclose()


@pytest.mark.parametrize("ticks", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(
    ("caller", "sent", "marks"),
    [
        # Four callers and three connections: one waits for the pool.
        (waiting_for_the_head, b"", ["request"] * 3 + ["send"] * 4),
        (reading_the_body, CHUNKED_HEAD + chunk(b"half"), ["read"] * 3 + ["request"] * 3),
        (closing_the_body, CHUNKED_HEAD + chunk(b"half"), ["close"] * 3 + ["request"] * 3),
    ],
)
async def test_cancelled_calls_leak_no_connection(client_class, caller, sent, marks, ticks):
    """After 20 calls were cancelled, once or a second time `ticks` later, all connections can be had again."""
    is_stalling = True
    reached, gone = asyncio.Queue(), asyncio.Queue()

    async def handler(reader, writer):
        if not is_stalling:
            await answering(reader, writer)
            return
        await read_request(reader)
        reached.put_nowait("request")
        writer.write(sent)
        await reader.read()
        gone.put_nowait(writer)

    client = client_class(connections_max=3)
    async with serving(handler) as url, asyncio.timeout(20):
        for _ in range(5):
            calls = [asyncio.create_task(caller(client, url, reached)) for _ in range(4)]
            assert sorted([await reached.get() for _ in marks]) == marks
            for call in calls:
                call.cancel()
            if ticks is not None:
                for _ in range(ticks):
                    await asyncio.sleep(0)
                for call in calls:
                    call.cancel()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(end) for end in ends] == [asyncio.CancelledError] * 4
            for _ in range(3):
                await gone.get()
        assert held_by(client) == 0
        is_stalling = False
        responses = [await send(client, url) for _ in range(3)]
        assert [await body_of(response) for response in responses] == [b"ok"] * 3
        bodies = [body_of(await send(client, url)) for _ in range(3)]
        assert await asyncio.gather(*bodies) == [b"ok"] * 3
    await client.aclose()


async def test_a_call_cancelled_in_the_handshake_closes_its_connection(client):
    """At once, and not when the garbage collector comes by."""
    began, gone = asyncio.Event(), asyncio.Event()

    async def handler(reader, writer):
        await reader.read(1)
        began.set()
        await reader.read()
        gone.set()

    async with serving(handler) as url, asyncio.timeout(5):
        call = asyncio.create_task(send(client, url.replace("http:", "https:")))
        await began.wait()
        call.cancel()
        await gone.wait()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_connection_is_used_again(client):
    """A body read to its end gives its connection back."""
    connected = 0

    async def handler(reader, writer):
        nonlocal connected
        connected += 1
        await answering(reader, writer)

    async with serving(handler) as url:
        for _ in range(3):
            assert await body_of(await send(client, url)) == b"ok"
    assert connected == 1


async def test_a_connection_closed_while_idle_is_not_used(client):
    """A close that has arrived is noticed before the next request."""
    closed = asyncio.Event()

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(PLAIN)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        closed.set()

    async with serving(handler) as url:
        for _ in range(3):
            assert await body_of(await send(client, url)) == b"ok"
            await closed.wait()
            closed.clear()


async def test_a_connection_closed_on_reuse_is_broken_and_not_tried_again(client):
    """The provider may have read the second request, so it is sent once."""
    requests = 0

    async def handler(reader, writer):
        nonlocal requests
        await read_request(reader)
        requests += 1
        writer.write(PLAIN)
        await read_request(reader)
        requests += 1

    async with serving(handler) as url:
        assert await body_of(await send(client, url)) == b"ok"
        assert await failure_of(client, url) is UpstreamBroken
    assert requests == 2


async def test_those_who_wait_for_a_connection_are_served_in_turn(client_class):
    """First come, first served, and one connection is enough."""
    served = []

    async def handler(reader, writer):
        while True:
            served.append(int((await read_request(reader))[1]))
            writer.write(PLAIN)

    client = client_class(connections_max=1)
    async with serving(handler) as url, asyncio.timeout(10):
        held = await send(client, url, body=b"0")
        calls = []
        for number in range(1, 21):
            calls.append(asyncio.create_task(send(client, url, body=b"%d" % number)))
            await asyncio.sleep(0)
        for call in [held, *calls]:
            response = call if call is held else await call
            assert await body_of(response) == b"ok"
        assert served == list(range(21))
    await client.aclose()


async def test_an_idle_connection_makes_room_for_another_provider(client_class):
    """The bound counts idle connections too, and does not let them stand in the way."""
    gone = asyncio.Event()

    async def handler(reader, writer):
        try:
            await answering(reader, writer)
        finally:
            gone.set()

    client = client_class(connections_max=1)
    async with serving(handler) as first, serving(answering) as second, asyncio.timeout(5):
        assert await body_of(await send(client, first)) == b"ok"
        assert await body_of(await send(client, second)) == b"ok"
        await gone.wait()
    await client.aclose()


async def test_a_certificate_for_another_host(client_class, server_tls):
    """It gets neither the request nor the key."""
    requests = []

    async def handler(reader, writer):
        requests.append(await read_request(reader))

    client = client_class(tls=trusting())
    async with serving(handler, tls=server_tls) as url:
        assert await failure_of(client, url.replace("127.0.0.1", "localhost")) is UpstreamUnreachable
    assert requests == []
    await client.aclose()


async def test_an_idle_connection_expires(client_class):
    """Then the next call makes a new one."""
    connected = 0
    gone = asyncio.Event()

    async def handler(reader, writer):
        nonlocal connected
        connected += 1
        try:
            await answering(reader, writer)
        finally:
            gone.set()

    client = client_class(keepalive_s=0.02)
    async with serving(handler) as url, asyncio.timeout(5):
        for expected in (1, 1, 2):
            if expected == 2:
                await asyncio.sleep(0.05)
            assert await body_of(await send(client, url)) == b"ok"
            assert connected == expected
        await gone.wait()
    await client.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
)
async def test_answers_after_which_a_connection_is_not_used(client, answer):
    """Because the provider says so."""
    connected = 0

    async def handler(reader, writer):
        nonlocal connected
        connected += 1
        while True:
            await read_request(reader)
            writer.write(answer)

    async with serving(handler) as url, asyncio.timeout(5):
        for _ in range(3):
            assert await body_of(await send(client, url)) == b"ok"
    assert connected == 3


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN,
        CHUNKED_HEAD + chunk(b"ok") + b"0\r\nx-trailer: 1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + PLAIN,
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx: " + b"y" * 60_000 + b"\r\n\r\nok",
    ],
)
async def test_answers_after_which_a_connection_is_used(client, answer):
    """Trailers, informational answers and long heads are in order."""
    connected = 0

    async def handler(reader, writer):
        nonlocal connected
        connected += 1
        while True:
            await read_request(reader)
            writer.write(answer)

    async with serving(handler) as url, asyncio.timeout(5):
        for _ in range(3):
            response = await send(client, url)
            assert (response.status, await body_of(response)) == (200, b"ok")
            assert b"x-trailer" not in dict(response.headers)
    assert connected == 1


async def test_a_body_that_ends_with_the_connection(client):
    """Without any other framing a clean end is the end."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(10):
            writer.write(b"x" * 10_000)
            await writer.drain()

    async with serving(handler) as url:
        assert await body_of(await send(client, url)) == b"x" * 100_000


async def test_a_long_request_arrives_whole(client):
    """Byte for byte, although the provider reads more slowly than we write."""
    body = bytes(range(256)) * 40_000
    seen = []

    async def handler(reader, writer):
        seen.append(await read_request(reader))
        writer.write(PLAIN)
        await reader.read()

    async with serving(handler) as url, asyncio.timeout(20):
        assert await body_of(await send(client, url, body=body)) == b"ok"
    assert seen[0][1] == body


async def test_a_long_answer_to_a_slow_reader(client):
    """It arrives byte for byte, and the provider is held back meanwhile."""
    body = bytes(range(256)) * 160_000
    held_back = asyncio.Event()

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
        await write_slowly(writer, body, held_back)
        await reader.read()

    async with serving(handler) as url, asyncio.timeout(60):
        response = await send(client, url)
        await held_back.wait()
        assert await body_of(response) == body


@pytest.mark.parametrize(
    "header", [(b"x-a", b"1\r\nx-evil: 1"), (b"x-a", b"1\nx"), (b"x-a: 1\r\nx-evil", b"1"), (b"x a", b"1"), (b"", b"1")]
)
async def test_headers_that_would_be_other_lines(client, header):
    """Nothing of the call is sent."""
    requests = []

    async def handler(reader, writer):
        requests.append(await read_request(reader))

    async with serving(handler) as url:
        with pytest.raises(UpstreamFailed):
            await send(client, url, headers=[header])
    assert requests == []


async def test_an_ipv6_address(client):
    """It is written in brackets, in the address and in `host`."""
    heads = []

    async def handler(reader, writer):
        heads.append((await read_request(reader))[0])
        writer.write(PLAIN)

    async with serving(handler, host="::1") as url:
        assert url.startswith("http://[::1]:")
        assert await body_of(await send(client, url)) == b"ok"
        assert b"\r\nHost: %s\r\n" % url.removeprefix("http://").encode() in heads[0]


async def test_the_setting_chooses(client_class):
    """`[server] http_client` names one of the two, and ours is the default."""
    chosen = http_client("lean" if client_class is LeanClient else "httpx")
    assert type(chosen) is client_class
    await chosen.aclose()
    assert ServerSettings().http_client == "lean"
