"""What the HTTP clients cost: CPU of this process per call and per streamed chunk, the provider in another process.

    python -m tests.bench.upstream [--rounds 3] [--calls 3000] [--connections 64]

Plain calls, and streams of 100 chunks that come 5 ms apart, on 64 connections, under uvloop. `floor` is a protocol
that writes fixed bytes and looks for the end of the answer: no pool, no parser, no time-outs. The clients take turns in
every round; each figure is the median of the rounds, and only the ratios within one run mean something.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable

import uvloop

from proxy.upstream.client import HttpClient, Timeouts
from proxy.upstream.httpx import HttpxClient
from proxy.upstream.lean import LeanClient

CHUNKS = 100
PACE_S = 0.005
ROUND_S_MAX = 60
TEXT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"token"}}]}\n\n'
ANSWER = b'{"choices": [{"message": {"content": "' + b"word " * 100 + b'"}}], "usage": {"total_tokens": 120}}'
HEADERS = [
    (b"authorization", b"Bearer sk-0123456789"),
    (b"content-type", b"application/json"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"identity"),
    (b"user-agent", b"tollgate/bench"),
]
HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 23 Nov 2026 10:00:00 GMT\r\nserver: bench\r\nx-request-id: req_0123456789\r\n"
    b"openai-processing-ms: 12\r\nopenai-version: 2020-10-01\r\n"
)
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "' + b"word " * 40 + b'"}]}'
TIMEOUTS = Timeouts()


class Provider(asyncio.Protocol):
    """Answers every request at once, or with a stream when its path says so."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.received.endswith(BODY):
            return
        is_stream = b"/stream" in self.received[:20]
        self.received = b""
        if is_stream:
            self.transport.write(HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            self.next_chunk(CHUNKS)
        else:
            self.transport.write(HEAD + b"content-length: %d\r\n\r\n" % len(ANSWER) + ANSWER)

    def next_chunk(self, left: int) -> None:
        if not left:
            self.transport.write(b"0\r\n\r\n")
            return
        self.transport.write(b"%x\r\n%b\r\n" % (len(TEXT), TEXT))
        asyncio.get_running_loop().call_later(PACE_S, self.next_chunk, left - 1)


class Floor(asyncio.Protocol):
    """The least that a client can do."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    async def call(self, request: bytes, end: bytes) -> int:
        self.end = end
        self.pieces = 0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self.done
        return self.pieces

    def data_received(self, data: bytes) -> None:
        self.pieces += 1
        if data.endswith(self.end):
            self.done.set_result(None)


async def call_floor(port: int, path: str, idle: deque[Floor]) -> int:
    """One call on a connection of `idle`, or on a new one; the number of pieces that came."""
    if idle:
        floor = idle.pop()
    else:
        _, floor = await asyncio.get_running_loop().create_connection(Floor, "127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()
    pieces = await floor.call(head + BODY, b"0\r\n\r\n" if path == "/stream" else ANSWER)
    idle.append(floor)
    return pieces


async def call_client(port: int, path: str, client: HttpClient) -> int:
    """One call through `client`; the number of pieces that came."""
    response = await client.send(
        provider="bench",
        method="POST",
        url=f"http://127.0.0.1:{port}{path}",
        headers=HEADERS,
        body=BODY,
        timeouts=TIMEOUTS,
    )
    pieces = 0
    try:
        async for _ in response.chunks():
            pieces += 1
    finally:
        await response.aclose()
    return pieces


async def measure(call: Callable[[], Awaitable[int]], calls: int, connections: int) -> tuple[float, int]:
    """CPU seconds of `calls` calls, `connections` of them at a time, and the pieces that came in all of them."""
    left = iter(range(calls))

    async def work() -> int:
        pieces = 0
        for _ in left:
            pieces += await call()
        return pieces

    begun_s = time.process_time()
    async with asyncio.timeout(ROUND_S_MAX):
        pieces = await asyncio.gather(*(work() for _ in range(connections)))
    return time.process_time() - begun_s, sum(pieces)


async def compare(port: int, rounds: int, calls: int, connections: int) -> None:
    """Print the table."""
    lean, httpx, idle = LeanClient(), HttpxClient(), deque[Floor]()
    clients: dict[str, Callable[[str], Awaitable[int]]] = {
        "floor": lambda path: call_floor(port, path, idle),
        "lean": lambda path: call_client(port, path, lean),
        "httpx2": lambda path: call_client(port, path, httpx),
    }
    plain: dict[str, list[float]] = {name: [] for name in clients}
    chunk: dict[str, list[float]] = {name: [] for name in clients}
    pieces_per_stream = dict.fromkeys(clients, 0.0)
    streams = 2 * connections
    for name, call in clients.items():
        await measure(lambda call=call: call("/"), connections, connections)
        sys.stderr.write(f"warmed {name}\n")
    for _ in range(rounds):
        for name, call in clients.items():
            cpu_s, _ = await measure(lambda call=call: call("/"), calls, connections)
            plain[name].append(cpu_s / calls * 1e6)
            cpu_s, pieces = await measure(lambda call=call: call("/stream"), streams, connections)
            chunk[name].append(cpu_s / streams / CHUNKS * 1e6)
            pieces_per_stream[name] = pieces / streams
    sys.stdout.write(f"{'':8}{'µs a call':>12}{'÷ lean':>9}{'µs a chunk':>12}{'÷ lean':>9}{'pieces a stream':>17}\n")
    for name in clients:
        ratios = [statistics.median(costs[name]) / statistics.median(costs["lean"]) for costs in (plain, chunk)]
        sys.stdout.write(
            f"{name:8}{statistics.median(plain[name]):12.1f}{ratios[0]:9.2f}"
            f"{statistics.median(chunk[name]):12.1f}{ratios[1]:9.2f}{pieces_per_stream[name]:17.1f}\n"
        )
    await lean.aclose()
    await httpx.aclose()
    for floor in idle:
        floor.transport.abort()


async def provide() -> None:
    """Serve until standard input ends."""
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Start the provider as a process and compare the clients."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.upstream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3000, help="plain calls of each client in each round")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--provider", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provider:
        uvloop.run(provide())
        return
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.upstream", "--provider"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as provider:
        assert provider.stdin is not None
        assert provider.stdout is not None
        port = int(provider.stdout.readline())
        uvloop.run(compare(port, options.rounds, options.calls, options.connections))
        provider.stdin.close()


if __name__ == "__main__":
    main()
