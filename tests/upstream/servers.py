"""Servers on loopback sockets that misbehave, and calls to them: what the tests of the HTTP clients share."""

import asyncio
import contextlib
import socket
import ssl
import struct
from base64 import b64decode

import pytest

from proxy.errors import UpstreamFailed
from proxy.upstream.client import Timeouts
from proxy.upstream.httpx import HttpxClient

FAST = Timeouts(connect_s=0.2, first_byte_s=0.3, idle_s=0.3)
PATIENT = Timeouts(connect_s=10, first_byte_s=10, idle_s=10)
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

# A self-signed certificate of 127.0.0.1 for a hundred years, made for these tests.
TLS_CERTIFICATE = (
    "MIIBqjCCAVCgAwIBAgIUCw7bQJ2K7ldHszPbpSx9A6lHL6AwCgYIKoZIzj0EAwIwGTEXMBUGA1UEAwwOdG9sbGdhdGUgdGVzdHMw"
    "IBcNMjYxMTIzMTAyODIxWhgPMjEyNjEwMzAxMDI4MjFaMBkxFzAVBgNVBAMMDnRvbGxnYXRlIHRlc3RzMFkwEwYHKoZIzj0CAQYI"
    "KoZIzj0DAQcDQgAEHkTIFyLg/sWRY1x82DoQy0ed+Gz5GXzLNFQeHECiS5wNfQOuU2JqjpqsepK1Km7wIAzD/zElZSzlYyluUBoD"
    "FKN0MHIwHQYDVR0OBBYEFBcKuQaGYLlxFGKdfwmzz+i/wPS5MB8GA1UdIwQYMBaAFBcKuQaGYLlxFGKdfwmzz+i/wPS5MA8GA1Ud"
    "EwEB/wQFMAMBAf8wDwYDVR0RBAgwBocEfwAAATAOBgNVHQ8BAf8EBAMCAoQwCgYIKoZIzj0EAwIDSAAwRQIhAK4VajCdyggRecwn"
    "7EaterkSqIWwH/wp1lp/wPdpNV80AiA24I5jo+AiUODLpV7PuJ8fOJJ75rlDKC+hC9ez/tJ9JA=="
)
TLS_KEY = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgrSeED4Fo6Nxd94KmsuEcl1YWbdT+Kjd2Sbn0v4D3bJyhRANCAAQe"
    "RMgXIuD+xZFjXHzYOhDLR534bPkZfMs0VB4cQKJLnA19A65TYmqOmqx6krUqbvAgDMP/MSVlLOVjKW5QGgMU"
)


@contextlib.asynccontextmanager
async def serving(handler, *, tls=None, host="127.0.0.1", port=0):
    """The address of a server that gives each connection to `handler(reader, writer)` and then closes it."""
    tasks = set()

    async def connected(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(connected, host, port, ssl=tls)
    try:
        authority = f"[{host}]" if ":" in host else host
        yield f"http{'s' if tls else ''}://{authority}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_request(reader):
    """The head and the body of the next request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
    )
    return head, await reader.readexactly(length)


def reset(writer):
    """End the connection with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


async def answering(reader, writer):
    while True:
        await read_request(reader)
        writer.write(PLAIN)
        await writer.drain()


async def stalling(reader, writer):
    await read_request(reader)
    await reader.read()


async def stalling_mid_body(reader, writer):
    await read_request(reader)
    writer.write(CHUNKED_HEAD + chunk(b"half"))
    await reader.read()


@contextlib.contextmanager
def closed_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextlib.contextmanager
def full_port():
    """A port that answers no attempt to connect, since nobody accepts and its queue is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield full.getsockname()[1]


async def write_slowly(writer, body, held_back):
    """Write `body`, and set `held_back` once the other side has not read for a tenth of a second."""
    for start in range(0, len(body), 100_000):
        writer.write(body[start : start + 100_000])
        try:
            async with asyncio.timeout(0.1):
                await writer.drain()
        except TimeoutError:
            held_back.set()
            await writer.drain()


async def send(client, url, *, timeouts=PATIENT, headers=(), body=b"{}"):
    return await client.send(
        provider="acme", method="POST", url=url, headers=list(headers), body=body, timeouts=timeouts
    )


def trusting():
    """A context that trusts the certificate of these tests."""
    return ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(b64decode(TLS_CERTIFICATE)))


def held_by(client):
    """How many calls and connections the client's pool still knows of."""
    if isinstance(client, HttpxClient):
        pool = client._client._transport._pool
        return len(pool._requests) + len(pool._connections)
    return client._pool.in_use + len(client._pool._waiting) + client._pool._idle_count + len(client._pool._open)


async def body_of(response):
    return b"".join([chunk async for chunk in response.chunks()])


async def failure_of(client, url, *, timeouts=PATIENT):
    """The error that a whole call ends with."""
    with pytest.raises(UpstreamFailed) as caught:
        await body_of(await send(client, url, timeouts=timeouts))
    assert caught.value.provider == "acme"
    return type(caught.value)
