"""A provider and a load for `calls`, each a process of its own: as little as can be, so that they do not set the pace.

python -m tests.bench.load provider       prints its port, serves until its standard input ends
python -m tests.bench.load driver         reads one `Load` as JSON a line, prints one `Measured` a line
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Callable
from statistics import median

import msgspec
import uvloop

CHUNKS = 100
PACE_S = 0.01
LOAD_S_MAX = 60

_ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1764000000,"model":"bench-model","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"' + b"word " * 20 + b'","refusal":null},"logprobs":null,"finish_reason":'
    b'"stop"}],"usage":{"prompt_tokens":19,"completion_tokens":21,"total_tokens":40,"prompt_tokens_details":'
    b'{"cached_tokens":0,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0}},'
    b'"service_tier":"default","system_fingerprint":"fp_1"}'
)
_PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_ANSWER), _ANSWER)
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_START = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,"model":"bench-model","choices":'
)


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


_CHUNK = _framed(
    _START + b'[{"index":0,"delta":{"content":" @ word"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
_LAST = (
    _framed(_START + b'[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n')
    + _framed(
        _START
        + b'[],"usage":{"prompt_tokens":19,"completion_tokens":%d,"total_tokens":%d}}\n\n' % (CHUNKS, 19 + CHUNKS)
    )
    + _framed(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)
_MARK = b" @ "
"""In each chunk with content, and nowhere else."""


class Load(msgspec.Struct, frozen=True):
    """Calls to `path` on `port` for `seconds`, after `warming_s` that do not count.

    On `connections` at once; with `rate`, so many calls a second at even distances instead, as connections are free,
    each timed from the instant at which it was due.
    """

    port: int
    path: str
    headers: dict[str, str]
    body: str
    connections: int
    seconds: float
    warming_s: float = 0.3
    rate: int = 0


class Measured(msgspec.Struct, frozen=True):
    """What came of a load. `calls` and `chunks` count all of them, the medians those after the warming."""

    calls: int
    chunks: int
    errors: int
    p50_ms: float
    first_p50_ms: float
    """To the first chunk with content."""


# ---- the provider


class _Provider(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received = received = self.received + data
        head, end, body = received.partition(b"\r\n\r\n")
        if not end or len(body) < _content_length(head):
            return
        self.received = b""
        if b'"stream": true' in body:
            self.transport.write(_STREAM)
            self.next_chunk(CHUNKS, asyncio.get_running_loop().time())
        else:
            self.transport.write(_PLAIN)

    def next_chunk(self, left: int, due_at: float) -> None:
        if self.transport.is_closing():
            return
        if not left:
            self.transport.write(_LAST)
            return
        self.transport.write(_CHUNK)
        asyncio.get_running_loop().call_at(due_at + PACE_S, self.next_chunk, left - 1, due_at + PACE_S)


def _content_length(head: bytes) -> int:
    found = head.lower().partition(b"content-length:")[2]
    return int(found.partition(b"\r\n")[0] or 0)


async def provide() -> None:
    """Serve until standard input ends."""
    server = await asyncio.get_running_loop().create_server(_Provider, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


# ---- the driver


class _Client(asyncio.Protocol):
    """One connection; `ask` sends the request again, `on_answer` is called when its answer is there."""

    def __init__(self, request: bytes, on_answer: Callable[..., None]) -> None:
        self.request = request
        self.on_answer = on_answer
        self.chunks = 0
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, _exc: Exception | None) -> None:
        self.lost.set_result(None)

    def ask(self, since: float) -> None:
        self.since = since
        self.first_at = 0.0
        self.received = b""
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        found = data.count(_MARK)
        if found:
            self.chunks += found
            self.first_at = self.first_at or time.perf_counter()
        self.received += data
        if self._is_whole():
            self.on_answer(self, is_good=self.received.startswith(b"HTTP/1.1 200 "))

    def _is_whole(self) -> bool:
        if self.received.endswith(b"0\r\n\r\n"):
            return True
        head, end, body = self.received.partition(b"\r\n\r\n")
        return bool(end) and b"chunked" not in head and len(body) >= _content_length(head)


class _Drive:
    """One load, while it is on."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._now = time.perf_counter  # uvloop's own clock counts milliseconds
        self._counted_from = self._now() + load.warming_s
        self._ends_at = self._counted_from + load.seconds
        self._durations: list[float] = []
        self._firsts: list[float] = []
        self._idle: list[_Client] = []
        self._late: list[float] = []
        self._calls = self._errors = self._open_calls = 0
        self._is_done = asyncio.Event()

    async def run(self) -> Measured:
        """Begin and end all calls."""
        loop = asyncio.get_running_loop()
        request = _request(self._load)
        clients = [
            (await loop.create_connection(lambda: _Client(request, self._answered), "127.0.0.1", self._load.port))[1]
            for _ in range(self._load.connections)
        ]
        async with asyncio.timeout(LOAD_S_MAX):
            if self._load.rate:
                await self._pace(clients)
            else:
                for client in clients:
                    self._begin(client, self._now())
            while self._open_calls:
                self._is_done.clear()
                await self._is_done.wait()
        for client in clients:
            client.transport.abort()
            await client.lost
        return Measured(
            calls=self._calls,
            chunks=sum(client.chunks for client in clients),
            errors=self._errors,
            p50_ms=median(self._durations or [0]) * 1000,
            first_p50_ms=median(self._firsts or [0]) * 1000,
        )

    async def _pace(self, clients: list[_Client]) -> None:
        self._idle += clients
        begun = self._now()
        for number in itertools.count():
            due_at = begun + number / self._load.rate
            if due_at >= self._ends_at:
                return
            await asyncio.sleep(due_at - self._now())
            if self._idle:
                self._begin(self._idle.pop(), due_at)
            else:
                self._late.append(due_at)

    def _begin(self, client: _Client, since: float) -> None:
        self._open_calls += 1
        client.ask(since)

    def _answered(self, client: _Client, *, is_good: bool) -> None:
        self._calls += 1
        self._errors += not is_good
        self._open_calls -= 1
        if client.since >= self._counted_from:
            self._durations.append(self._now() - client.since)
            if client.first_at:
                self._firsts.append(client.first_at - client.since)
        if self._late:
            self._begin(client, self._late.pop(0))
        elif not self._load.rate and self._now() < self._ends_at:
            self._begin(client, self._now())
        else:
            self._idle.append(client)
            if not self._open_calls:
                self._is_done.set()


def _request(load: Load) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
    body = load.body.encode()
    return f"POST {load.path} HTTP/1.1\r\nhost: bench\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


async def drive(load: Load) -> Measured:
    """Put that load on the server."""
    return await _Drive(load).run()


def main() -> None:
    """Be a provider or a driver."""
    if sys.argv[1:] == ["provider"]:
        uvloop.run(provide())
        return
    for line in sys.stdin:
        measured = uvloop.run(drive(msgspec.json.decode(line, type=Load)))
        sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
