"""What our own client does beyond the common tests: httpx2 differs, or there is nothing of the kind in it.

httpx2 was seen to fail three of these: a second answer, or garbage, behind an answer breaks the next call
(`UpstreamBroken`); under asyncio an answer that comes while a connection is idle is taken for the next call's.
"""

import asyncio
import os
import random
import socket
import subprocess
import sys

import pytest

from proxy.errors import UpstreamBroken, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from proxy.upstream.client import Timeouts
from proxy.upstream.lean import BUFFER_BYTES, LeanClient
from tests.upstream.servers import (
    CHUNKED_HEAD,
    FAST,
    PATIENT,
    PLAIN,
    answering,
    body_of,
    chunk,
    failure_of,
    full_port,
    held_by,
    read_request,
    reset,
    send,
    serving,
    stalling_mid_body,
    trusting,
    write_slowly,
)

READ_BYTES_MAX = 262_144
"""What one read of asyncio or uvloop brings at most."""


@pytest.fixture
def client_class():
    return LeanClient


@pytest.mark.parametrize("ticks", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("phase", ["connecting", "handshake"])
async def test_calls_cancelled_before_they_are_sent_leak_nothing(client_class, phase, ticks):
    """Once, or a second time `ticks` later: the slots are free again, and the sockets closed."""
    arrived = asyncio.Queue()

    async def handler(reader, writer):
        arrived.put_nowait(writer)
        await reader.read()

    client = client_class(connections_max=3)
    async with serving(handler) as url, asyncio.timeout(10):
        with full_port() as port:
            where = url.replace("http:", "https:") if phase == "handshake" else f"http://127.0.0.1:{port}/"
            calls = [asyncio.create_task(send(client, where)) for _ in range(4)]
            if phase == "handshake":
                for _ in range(3):
                    await arrived.get()
            else:
                await asyncio.sleep(0)
            for _ in range(1 if ticks is None else 2):
                for call in calls:
                    call.cancel()
                for _ in range(ticks or 0):
                    await asyncio.sleep(0)
            ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 4
        assert held_by(client) == 0
    await client.aclose()


async def test_bytes_on_an_idle_connection(client):
    """They are nobody's answer: the connection is not used again."""
    connected = 0
    spoken = asyncio.Event()

    async def handler(reader, writer):
        nonlocal connected
        connected += 1
        await read_request(reader)
        writer.write(PLAIN)
        await writer.drain()
        await asyncio.sleep(0)
        writer.write(b"HTTP/1.1 408 Timeout\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        spoken.set()
        await reader.read()

    async with serving(handler) as url, asyncio.timeout(5):
        for _ in range(3):
            response = await send(client, url)
            assert (response.status, await body_of(response)) == (200, b"ok")
            await spoken.wait()
            spoken.clear()
    assert connected == 3


@pytest.mark.parametrize("excess", [b"garbage", PLAIN, b"HTTP/1.1 200"])
@pytest.mark.parametrize("answer", [PLAIN, CHUNKED_HEAD + chunk(b"ok") + b"0\r\n\r\n"])
async def test_bytes_behind_an_answer(client, answer, excess):
    """The answer is good, and its connection is not used again."""
    connected = 0

    async def handler(reader, writer):
        nonlocal connected
        connected += 1
        while True:
            await read_request(reader)
            writer.write(answer + excess)

    async with serving(handler) as url, asyncio.timeout(5):
        for _ in range(3):
            response = await send(client, url)
            assert (response.status, await body_of(response)) == (200, b"ok")
    assert connected == 3


async def test_a_connection_is_free_before_its_answer_is_read(client_class):
    """A complete answer does not keep the next call waiting."""
    client = client_class(connections_max=1)
    async with serving(answering) as url, asyncio.timeout(5):
        responses = [await send(client, url) for _ in range(3)]
        assert client._pool.in_use == 0
        assert [await body_of(response) for response in responses] == [b"ok"] * 3
    await client.aclose()


async def test_memory_behind_a_slow_reader(client):
    """However long the answer, no more than the bound and one read of the loop are held."""
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
        assert 0 < sum(map(len, response.pieces)) <= BUFFER_BYTES + READ_BYTES_MAX
        read = bytearray()
        async for piece in response.chunks():
            assert len(piece) <= BUFFER_BYTES + READ_BYTES_MAX
            read += piece
            await asyncio.sleep(0)
        assert read == body
        assert client._pool.in_use == 0


REFUSING = """
import asyncio, sys

async def refuse(reader, writer):
    await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 413 Too Large\\r\\ncontent-length: 6\\r\\n\\r\\nsorry!")
    writer.close()

async def main():
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
async def refusing_url():
    """A server that answers without reading the body, and closes: the kernel resets the connection.

    In a process of its own, so that the reset may come at any moment of our loop.
    """
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", REFUSING, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    yield f"http://127.0.0.1:{int(await server.stdout.readline())}"
    server.stdin.close()
    await server.wait()


async def test_a_refusal_whose_server_leaves_the_body_unread(client, refusing_url):
    """The reason is read, although the connection is reset while we are still sending."""

    async def call():
        response = await send(client, refusing_url, body=b" " * 5_000_000)
        return response.status, await body_of(response)

    async with asyncio.timeout(60):
        for _ in range(50):
            assert await asyncio.gather(*(call() for _ in range(10))) == [(413, b"sorry!")] * 10
    assert client._pool.in_use == 0


async def test_an_early_answer_does_not_stop_the_request(client):
    """A provider may answer while it reads; the connection is closed only if its answer ends before our request."""
    seen = []

    async def handler(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED_HEAD + chunk(b"early"))
        await writer.drain()
        seen.append(await reader.readexactly(5_000_000))
        writer.write(b"0\r\n\r\n")

    async with serving(handler) as url, asyncio.timeout(10):
        response = await send(client, url, body=b"x" * 5_000_000)
        assert await body_of(response) == b"early"
    assert seen == [b"x" * 5_000_000]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nraw",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 103 Hints\r\n\r\n" * 5000 + PLAIN,
    ],
)
async def test_answers_that_are_refused(client, answer):
    """They break the call and their connection."""
    gone = asyncio.Event()

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(answer)
        await reader.read()
        gone.set()

    async with serving(handler) as url, asyncio.timeout(5):
        assert await failure_of(client, url) is UpstreamBroken
        await gone.wait()
        assert client._pool.in_use == 0


async def test_trailers_without_end(client):
    """They do not fill the memory until the time is up."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(CHUNKED_HEAD + chunk(b"ok") + b"0\r\n")
        while True:
            writer.write(b"x: " + b"y" * 10_000)
            await writer.drain()

    async with serving(handler) as url, asyncio.timeout(5):
        assert await failure_of(client, url) is UpstreamBroken


async def test_answers_without_a_body(client):
    """To a HEAD request, and with a status that says so: the call is over with the head."""

    async def handler(reader, writer):
        while True:
            head, _ = await read_request(reader)
            status = b"204 No" if b"x-none" in head else b"200 OK"
            writer.write(b"HTTP/1.1 %b\r\n%b\r\n" % (status, b"" if b"x-none" in head else b"content-length: 9\r\n"))

    async with serving(handler) as url, asyncio.timeout(5):
        response = await client.send(provider="acme", method="HEAD", url=url, headers=[], body=b"", timeouts=PATIENT)
        assert (response.status, await body_of(response)) == (200, b"")
        response = await send(client, url, headers=[(b"x-none", b"1")])
        assert (response.status, await body_of(response)) == (204, b"")


async def test_a_body_that_ends_with_the_connection_over_tls(client_class, server_tls):
    """A peer that says that it is the end is believed."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")

    client = client_class(tls=trusting())
    async with serving(handler, tls=server_tls) as url, asyncio.timeout(5):
        assert await body_of(await send(client, url)) == b"all of it"
    await client.aclose()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\nhalf"])
async def test_an_end_without_close_notify(client_class, server_tls, answer):
    """Over TLS only the peer itself can say that a body without a length is over."""

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(answer)
        await writer.drain()
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as raw:
            raw.shutdown(socket.SHUT_WR)
        await reader.read()

    client = client_class(tls=trusting())
    async with serving(handler, tls=server_tls) as url, asyncio.timeout(5):
        assert await failure_of(client, url) is UpstreamBroken
    await client.aclose()


async def test_a_second_address_is_tried(client, monkeypatch):
    """When the first one refuses at once, and when it does not answer; the loser's socket is closed."""
    with full_port() as port:
        async with serving(answering, host="127.0.0.2", port=port), asyncio.timeout(5):

            async def look_up(host, port, **_):
                first = {"silent.test": "127.0.0.1", "refusing.test": "127.0.0.3"}[host]
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in (first, "127.0.0.2")]

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
            for host in ("silent.test", "refusing.test"):
                response = await send(client, f"http://{host}:{port}/", headers=[])
                assert await body_of(response) == b"ok"
        await client.aclose()
        assert held_by(client) == 0


async def test_closing_the_client(client_class):
    """Calls end with an error in every phase, nothing stays open, and nothing can be sent any more."""
    reached = asyncio.Queue()

    async def handler(reader, writer):
        await read_request(reader)
        reached.put_nowait(None)
        await reader.read()
        reached.put_nowait(None)

    client = client_class(connections_max=3)
    with full_port() as port:
        async with serving(stalling_mid_body) as body_url, serving(handler) as head_url, asyncio.timeout(5):
            chunks = (await send(client, body_url)).chunks()
            assert await anext(chunks) == b"half"
            connecting = asyncio.create_task(send(client, f"http://127.0.0.1:{port}", timeouts=FAST))
            sent = asyncio.create_task(send(client, head_url))
            await reached.get()
            waiting = asyncio.create_task(send(client, head_url))
            reading = asyncio.create_task(anext(chunks))
            await asyncio.sleep(0)
            await client.aclose()
            ends = await asyncio.gather(reading, sent, waiting, connecting, return_exceptions=True)
            assert [type(end) for end in ends] == [
                UpstreamBroken,
                UpstreamBroken,
                UpstreamUnreachable,
                UpstreamUnreachable,
            ]
            await reached.get()
            assert held_by(client) == 0
            assert await failure_of(client, head_url) is UpstreamUnreachable


async def test_the_time_to_the_head_covers_waiting_and_connecting(client_class):
    """It may be shorter than the time to connect; nothing was sent, so the provider is unreachable."""
    hasty = Timeouts(connect_s=10, first_byte_s=0.1, idle_s=10)
    client = client_class(connections_max=1)
    with full_port() as port:
        async with asyncio.timeout(5):
            assert await failure_of(client, f"http://127.0.0.1:{port}", timeouts=hasty) is UpstreamUnreachable
    async with serving(stalling_mid_body) as url, asyncio.timeout(5):
        held = await send(client, url)
        assert await failure_of(client, url, timeouts=hasty) is UpstreamUnreachable
        await held.aclose()
    assert held_by(client) == 0
    await client.aclose()


async def test_silence_is_measured_anew_after_each_chunk(client):
    """A stream may last longer than the longest silence in it, and the silence at its end is not cut short."""
    idle_s = 0.1

    async def handler(reader, writer):
        await read_request(reader)
        writer.write(CHUNKED_HEAD)
        for _ in range(8):
            writer.write(chunk(b"x"))
            await asyncio.sleep(0.04)
        await reader.read()

    async with serving(handler) as url, asyncio.timeout(10):
        response = await send(client, url, timeouts=Timeouts(idle_s=idle_s))
        loop = asyncio.get_running_loop()
        chunks = response.chunks()
        read = 0
        while read < 8:
            read += len(await anext(chunks))
        silent_from = loop.time()
        with pytest.raises(UpstreamTimeout):
            await anext(chunks)
        assert loop.time() - silent_from >= idle_s * 0.9


async def test_two_readers(client):
    """The second one is told so instead of both waiting for ever."""
    async with serving(stalling_mid_body) as url, asyncio.timeout(5):
        chunks = (await send(client, url)).chunks()
        assert await anext(chunks) == b"half"
        reading = asyncio.create_task(anext(chunks))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await anext(chunks)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_idle_connections_are_closed_in_time(client_class):
    """Without any further call: the provider sees them end, and we hold no more of them than we may."""
    opened, gone = [], asyncio.Queue()
    all_here = asyncio.Event()

    async def handler(reader, writer):
        opened.append(writer)
        await read_request(reader)
        if len(opened) == 5:
            all_here.set()
        await all_here.wait()
        writer.write(PLAIN)
        await reader.read()
        gone.put_nowait(writer)

    client = client_class(keepalive_max=3, keepalive_s=0.1)
    async with serving(handler) as url, asyncio.timeout(5):
        responses = await asyncio.gather(*(send(client, url) for _ in range(5)))
        assert [await body_of(response) for response in responses] == [b"ok"] * 5
        for _ in range(2):
            await gone.get()
        assert client._pool._idle_count == 3
        for _ in range(3):
            await gone.get()
        assert client._pool._idle_count == 0
        assert client._pool._idle == {}
    await client.aclose()


WIRE = CHUNKED_HEAD + chunk(b"one") + chunk(b"two" * 100) + b"0\r\n\r\n"


async def misbehaving_once(writer, dice):
    """Answer one request somehow; whether the connection goes on."""
    cut = dice.randrange(len(WIRE))
    fault = dice.choice(["none", "none", "reset", "half", "excess", "reset half", "nonsense", "two parts"])
    if fault in {"half", "reset half", "two parts"}:
        writer.write(WIRE[:cut])
        await writer.drain()
    if fault == "nonsense":
        writer.write(dice.randbytes(20) + b"\r\n\r\n")
    if fault == "two parts":
        await asyncio.sleep(0)
        writer.write(WIRE[cut:])
    if fault in {"none", "excess"}:
        writer.write(WIRE + (b"garbage" if fault == "excess" else b""))
    if fault.startswith("reset"):
        reset(writer)
    return fault not in {"reset", "half", "reset half"}


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_faults_leaks_nothing(client_class, seed):
    """After 300 calls to a server that misbehaves, a third of them cancelled, the pool is as new."""
    dice = random.Random(seed)  # noqa: S311 - faults, no secrets

    async def handler(reader, writer):
        if dice.random() < 0.05:
            reset(writer)
            return
        is_going_on = True
        while is_going_on:
            await read_request(reader)
            is_going_on = await misbehaving_once(writer, dice)

    async def call(url):
        try:
            response = await send(client, url)
            try:
                return await body_of(response) if dice.random() < 0.8 else None
            finally:
                await response.aclose()
        except UpstreamFailed as exc:
            return type(exc)

    async def cancelled(task):
        for _ in range(dice.randrange(8)):
            await asyncio.sleep(0)
        for _ in range(dice.randrange(3)):
            task.cancel()
            await asyncio.sleep(0)

    client = client_class(connections_max=5)
    async with serving(handler) as url, asyncio.timeout(30):
        ends = []
        for _ in range(15):
            calls = [asyncio.create_task(call(url)) for _ in range(20)]
            await asyncio.gather(*(cancelled(task) for task in calls[::3]))
            ends += await asyncio.gather(*calls, return_exceptions=True)
        kinds = {type(end) if isinstance(end, BaseException) else end for end in ends}
        # A connection that is reset before anything was written is no connection.
        assert kinds - {UpstreamUnreachable} == {None, b"one" + b"two" * 100, UpstreamBroken, asyncio.CancelledError}
        assert client._pool.in_use == 0
        assert not client._pool._waiting
    await client.aclose()
    assert held_by(client) == 0
