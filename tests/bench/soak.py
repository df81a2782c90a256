"""What stays when much is asked for long: a thousand streams at once, readers that do not read, and hours in small.

    python -m tests.bench.soak [--duration 600] [--streams 1000] [--database sqlite|postgresql]

One `tollgate serve` worker, and in this process its provider and its clients. First `--streams` streams at once, each
compared byte for byte; then readers that take nothing of large streams, which must not pile up in the server; then, for
`--duration` seconds, a mixed load of plain calls, streams, clients that leave and calls that are refused. All the while
memory, file descriptors and connections are sampled: after the warm-up they have to be flat. Exit status 1 when they
are not, when a stream was not whole, or when the books are not clean with nothing left open.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import linear_regression, median
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import psutil
import uvloop

from proxy.storage import database
from proxy.units import new_id
from tests.chaos.evidence import open_reservations
from tests.postgres import server_for_tests
from tests.serving import CONFIG, MODEL, Served, serving

DURATION_S = 600.0
STREAMS = 1000
CUSTOMERS = 24
DEAF = 20
DEAF_EVENTS = 800
DEAF_EVENT_BYTES = 20_000
DEAF_S = 3.0
DEAF_BYTES_MAX = 8_000_000
"""What the server may hold of a stream that nobody reads: half. It keeps 4 MB of what it has sent, to count it."""

GROWTH_MAX = 0.06
"""How much larger the last quarter's median may be than the second's."""
MEMORY_NOISE_MB = 4.0
HANDLES_NOISE = 12
JUDGED_S_MIN = 20.0
"""In less time nothing can be said of growth."""
STREAM_S_MAX = 120.0
SAMPLE_S = 1.0
CONFIGURATION = CONFIG.replace("_s = 5\n", "_s = 60\n")
"""The provider here is as slow as the machine is busy."""


class Wish(msgspec.Struct, frozen=True):
    """What the provider is to answer: so many events, each with so many bytes of text, so far apart."""

    events: int = 20
    event_bytes: int = 20
    pace_s: float = 0.0

    def metadata(self) -> dict[str, str]:
        """As a request carries it: its values are strings."""
        return {name: str(value) for name, value in msgspec.structs.asdict(self).items()}


# ---- the provider


def event(wish: Wish, number: int) -> bytes:
    """One event of a stream."""
    text = f"{number} ".ljust(wish.event_bytes, "x")
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


def usage(wish: Wish) -> dict[str, int]:
    """What the provider says was used."""
    return {"prompt_tokens": 10, "completion_tokens": wish.events, "total_tokens": 10 + wish.events}


END = b"data: [DONE]\n\n"


def relayed(wish: Wish) -> bytes:
    """A whole stream as the client has to get it: without the usage that it did not ask for."""
    return b"".join(event(wish, number) for number in range(wish.events)) + END


class _Provider(asyncio.Protocol):
    """Writes no faster than it is read."""

    def __init__(self, connected: set["_Provider"]) -> None:
        self._connected = connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connected.add(self)
        self.transport = transport
        self.received = b""
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.answering: asyncio.Task[None] | None = None

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._connected.discard(self)
        if self.answering is not None:
            self.answering.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end or len(body) < int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return
        self.received = b""
        asked = json.loads(body)
        wish = msgspec.convert(asked["metadata"], Wish, strict=False)
        self.answering = asyncio.create_task(self._stream(wish) if asked.get("stream") else self._plain(wish))

    async def _plain(self, wish: Wish) -> None:
        await asyncio.sleep(wish.pace_s)
        message = {"role": "assistant", "content": "x" * wish.event_bytes}
        body = json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage(wish)}).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )

    async def _stream(self, wish: Wish) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for number in range(wish.events):
            await self.may_write.wait()
            self._chunk(event(wish, number))
            await asyncio.sleep(wish.pace_s)
        self._chunk(b"data: " + json.dumps({"choices": [], "usage": usage(wish)}).encode() + b"\n\n")
        self._chunk(END)
        self.transport.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


# ---- the clients


class Client:
    """One connection of a customer's, used again as long as the server keeps it."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, wish: Wish, *, is_stream: bool, **more: object) -> None:
        """Send a call."""
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**16)
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4000}
        body = json.dumps({**asked, "stream": is_stream, "metadata": wish.metadata(), **more}).encode()
        self._writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def answer(self, *, pause_s: float = 0) -> tuple[int, bytes]:
        """The status and the body of what was asked last, with a pause after every piece of a stream."""
        status, size = await self._head()
        if size is not None:
            return status, await self._reader.readexactly(size)
        pieces = []
        while piece := await self._piece():
            pieces.append(piece)
            if pause_s:
                await asyncio.sleep(pause_s)
        return status, b"".join(pieces)

    async def _head(self) -> tuple[int, int | None]:
        """The status, and the size of a body that has one."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        found = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        if b"connection: close" in head:
            self._writer.close()
        return int(head.split(b" ", 2)[1]), int(found) if found else None

    async def _piece(self) -> bytes:
        """One chunk of a stream; empty at its end."""
        size = int(await self._reader.readline(), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    def leave(self) -> None:
        """Be gone."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._writer = None


# ---- the server, looked at


class Sample(NamedTuple):
    """How the server was at one moment."""

    at_s: float
    memory_mb: float
    handles: int
    connections: int


class Watched:
    """A server's process, and what it was seen to hold."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.samples: list[Sample] = []

    def look(self) -> Sample:
        """How it is now."""
        sample = Sample(
            time.monotonic(),
            self._process.memory_info().rss / 2**20,
            self._process.num_fds(),
            len(self._process.net_connections("tcp")),
        )
        self.samples.append(sample)
        return sample

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Look every second until the block ends."""

        async def look() -> None:
            while True:
                self.look()
                await asyncio.sleep(SAMPLE_S)

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            looking.cancel()


class Course(NamedTuple):
    """How one figure went: the medians of the second and the last quarter, and what it gains a minute between."""

    name: str
    before: float
    after: float
    per_minute: float
    noise: float

    @property
    def is_flat(self) -> bool:
        """Whether it did not grow by more than chance."""
        return self.after <= self.before * (1 + GROWTH_MAX) + self.noise


def courses(samples: list[Sample]) -> list[Course]:
    """How memory, file descriptors and connections went after the warm-up, which is the first quarter."""
    quarter = max(1, len(samples) // 4)
    second, last, warm = samples[quarter : 2 * quarter], samples[-quarter:], samples[quarter:]
    found = []
    for name, noise in (("memory_mb", MEMORY_NOISE_MB), ("handles", HANDLES_NOISE), ("connections", HANDLES_NOISE)):
        values = [getattr(sample, name) for sample in warm]
        slope = linear_regression([sample.at_s for sample in warm], values).slope * 60
        before, after = (median(getattr(sample, name) for sample in part) for part in (second, last))
        found.append(Course(name, before, after, slope, noise))
    return found


# ---- what is done to it


class Trial:
    """One run, and what was wrong in it."""

    def __init__(self, port: int, key: str, watched: Watched) -> None:
        self._port, self._key = port, key
        self._watched = watched
        self.faults: list[str] = []

    async def many(self, streams: int) -> None:
        """That many streams at once, a tenth of them read slowly."""
        wish = Wish(events=100, pace_s=0.02)
        wanted = relayed(wish)
        begun = time.monotonic()

        async def one(number: int) -> str:
            client = Client(self._port, self._key)
            await client.ask(wish, is_stream=True)
            status, got = await client.answer(pause_s=0.03 if number % 10 == 0 else 0)
            client.leave()
            return "whole" if (status, got) == (200, wanted) else f"{status} {got[-200:]!r}"

        before = self._watched.look()
        async with asyncio.timeout(STREAM_S_MAX), self._watched.kept():
            came = Counter(await asyncio.gather(*(one(number) for number in range(streams))))
        peak = max(sample.memory_mb for sample in self._watched.samples)
        say(
            f"{streams} streams at once: {came['whole']} whole, in {time.monotonic() - begun:.1f} s;"
            f" memory {before.memory_mb:.0f} MB before, {peak:.0f} MB at most"
        )
        self.faults += [f"{count} streams were not whole: {what}" for what, count in came.items() if what != "whole"]

    async def deaf(self) -> None:
        """Readers that take nothing, for a while, of streams that are larger than all buffers."""
        wish = Wish(events=DEAF_EVENTS, event_bytes=DEAF_EVENT_BYTES)
        wanted = relayed(wish)
        before = self._watched.look().memory_mb
        clients = [Client(self._port, self._key) for _ in range(DEAF)]
        for client in clients:
            await client.ask(wish, is_stream=True)
        await asyncio.sleep(DEAF_S)
        held_mb = self._watched.look().memory_mb - before
        async with asyncio.timeout(STREAM_S_MAX):
            answers = await asyncio.gather(*(client.answer() for client in clients))
        for client in clients:
            client.leave()
        whole = sum(answer == (200, wanted) for answer in answers)
        say(
            f"{DEAF} streams of {len(wanted) / 1e6:.1f} MB that nobody reads: {held_mb:.0f} MB held; {whole} whole then"
        )
        if held_mb * 2**20 > DEAF * DEAF_BYTES_MAX:
            self.faults.append(f"the server held {held_mb:.0f} MB for readers that read nothing")
        if whole != DEAF:
            self.faults.append(f"{DEAF - whole} of {DEAF} streams were not whole in the end")

    async def long(self, duration_s: float) -> None:
        """A mixed load, and what it leaves."""
        ends_at = time.monotonic() + duration_s
        tally: Counter[str] = Counter()
        first = len(self._watched.samples)
        async with self._watched.kept():
            await asyncio.gather(*(self._customer(number, ends_at, tally) for number in range(CUSTOMERS)))
        say(
            f"{duration_s:.0f} s of mixed load: "
            + ", ".join(f"{count} {what}" for what, count in sorted(tally.items()))
        )
        if tally["wrong"]:
            self.faults.append(f"{tally['wrong']} answers were wrong")
        for course in courses(self._watched.samples[first:]):
            say(f"{course.name}: {course.before:.1f} → {course.after:.1f}, {course.per_minute:+.2f} a minute")
            if duration_s >= JUDGED_S_MIN and not course.is_flat:
                self.faults.append(f"{course.name} grew from {course.before:.1f} to {course.after:.1f}")

    async def _customer(self, number: int, ends_at: float, tally: Counter[str]) -> None:
        dice = random.Random(number)  # noqa: S311 - it deals calls out, and guards nothing
        client, stranger = Client(self._port, self._key), Client(self._port, "sk-tg-unknown")
        while time.monotonic() < ends_at:
            wish = Wish(
                events=dice.randint(1, 40), event_bytes=dice.choice((20, 20, 2000)), pace_s=dice.choice((0, 0.01))
            )
            what = dice.choices(("plain", "stream", "left", "refused"), (40, 40, 10, 10))[0]
            match what:
                case "plain":
                    await client.ask(wish, is_stream=False)
                    is_right = (await client.answer())[0] == 200
                case "stream":
                    await client.ask(wish, is_stream=True)
                    is_right = await client.answer() == (200, relayed(wish))
                case "left":
                    await client.ask(wish, is_stream=True)
                    await asyncio.sleep(dice.random() * 0.05)
                    client.leave()
                    is_right = True
                case _:
                    refused, status, more = dice.choice(
                        ((stranger, 401, {}), (client, 404, {"model": "none"}), (client, 400, {"n": "x"}))
                    )
                    await refused.ask(wish, is_stream=True, **more)
                    is_right = (await refused.answer())[0] == status
                    refused.leave()
            tally[what if is_right else "wrong"] += 1
        client.leave()


async def left_open(url: str) -> int:
    """How many reservations are still open after a while without calls."""
    engine = database.connect(url, pooled=False)
    try:
        for _ in range(50):
            if not (found := await open_reservations(engine)):
                break
            await asyncio.sleep(0.2)
        return found
    finally:
        await engine.dispose()


async def trial(start: Callable[[str], Served], url: str, duration_s: float, streams: int) -> list[str]:
    """All of it, on the server that `start` starts before a provider; what was wrong."""
    connected: set[_Provider] = set()
    loop = asyncio.get_running_loop()
    provider = await loop.create_server(lambda: _Provider(connected), "127.0.0.1", 0, backlog=2048)
    port = provider.sockets[0].getsockname()[1]
    served = await asyncio.to_thread(start, f"http://127.0.0.1:{port}/v1")
    key = await asyncio.to_thread(served.customer, "soak@example.com", "1000000")
    found = Trial(urlsplit(served.base_url).port, key, Watched(psutil.Process(served.process.pid)))
    await found.many(streams)
    await found.deaf()
    await found.long(duration_s)
    if count := await left_open(url):
        found.faults.append(f"{count} reservations stayed open")
    audit = await asyncio.to_thread(served.command, "audit")
    say(f"the books: {'clean' if audit['clean'] else 'NOT CLEAN'}, {audit['totals']['calls']} settled calls")
    if not audit["clean"]:
        found.faults.append("the audit is not clean")
    provider.close()
    for connection in connected:
        connection.transport.abort()
    await asyncio.sleep(0.1)  # for them to be closed before the loop is
    return found.faults


@contextmanager
def database_of(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a new database."""
    if kind == "sqlite":
        yield f"sqlite+aiosqlite:///{folder / 'soak.db'}"
        return
    with server_for_tests() as server:
        name = new_id("soak")
        server.create_database(name)
        yield server.url(name)
        server.drop_database(name)


def run(kind: str, duration_s: float, streams: int) -> list[str]:
    """One run on a new database of that kind; what was wrong."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollgate-soak-")))
        url = stack.enter_context(database_of(kind, folder))

        def start(upstream_url: str) -> Served:
            return stack.enter_context(serving(folder, url, upstream_url, CONFIGURATION))

        return uvloop.run(trial(start, url, duration_s, streams))


def say(line: str) -> None:
    """Tell people, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak")
    parser.add_argument("--duration", type=float, default=DURATION_S, help="seconds of mixed load")
    parser.add_argument("--streams", type=int, default=STREAMS, help="streams at once")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    options = parser.parse_args()
    faults = run(options.database, options.duration, options.streams)
    for fault in faults:
        say(f"WRONG: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
