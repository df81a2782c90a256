"""The server: connections, requests and answers, and the faults that strike them."""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Iterator
from http.client import responses
from pathlib import Path
from typing import Self, TextIO

from tests.fakes.provider.answer import Answer, Piece
from tests.fakes.provider.behaviour import Behaviour
from tests.fakes.provider.connection import READER_BYTES, Connection, WatchfulReader
from tests.fakes.provider.endpoints import decide
from tests.fakes.provider.journal import Served, parse

_STALL_S_MAX = 60.0
_WISH_BYTES_MAX = 8_192  # `_RESET_BEFORE_READ` never matches more
# The wish as it looks inside the JSON string that the message is; the rest of the body need not have arrived.
_RESET_BEFORE_READ = re.compile(rb'!fake \{[^\n]{0,4096}?\\"reset\\":\s*\\"before_read\\"')


class FakeProvider:
    """A provider on 127.0.0.1, between `start` and `stop`; it can start again, on the same port.

    `journal` holds every request from the moment its head was read. With `journal_path`, a line is also appended to
    that file when a call ends.
    """

    def __init__(self, *, port: int = 0, journal_path: Path | None = None) -> None:
        self.port = port
        self.journal: list[Served] = []
        self._arrival = threading.Condition()
        self._journal_path = journal_path
        self._journal_file: TextIO | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        """What an OpenAI SDK takes as its `base_url`."""
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_for_calls(self, count: int, timeout_s: float = 10.0) -> list[Served]:
        """The journal, once it has `count` entries; call it by `asyncio.to_thread` on the provider's own loop.

        Raises TimeoutError if they do not come within `timeout_s`.
        """
        with self._arrival:
            if not self._arrival.wait_for(lambda: len(self.journal) >= count, timeout_s):
                raise TimeoutError(f"{len(self.journal)} calls came, not {count}")
        return self.journal

    async def start(self) -> None:
        """Listens on `port`, or on a free one if that is 0.

        Raises OSError if the port is taken.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        if self._journal_path:
            self._journal_file = self._journal_path.open("a", buffering=1, encoding="utf-8")

    async def stop(self) -> None:
        """Stops listening, breaks the calls under way and waits until every socket is closed."""
        if self._server is None:
            return
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None
        if self._journal_file:
            self._journal_file.close()
            self._journal_file = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _accept(self) -> asyncio.StreamReaderProtocol:
        reader = WatchfulReader(limit=READER_BYTES)
        return asyncio.StreamReaderProtocol(reader, self._connected)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving():
            writer.transport.abort()
            return
        connection = asyncio.get_running_loop().create_task(self._serve(Connection(reader, writer)))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, connection: Connection) -> None:
        try:
            while await self._serve_next(connection):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            connection.abort()
        except asyncio.CancelledError:
            connection.abort()
            raise
        finally:
            await connection.close()

    async def _serve_next(self, connection: Connection) -> bool:
        """Serves the next request; whether the connection can carry another one."""
        head = await connection.read_head()
        if head is None:
            return False
        method, path, headers = head
        served = Served(id=len(self.journal) + 1, method=method, path=path, headers=headers)
        with self._arrival:
            self.journal.append(served)
            self._arrival.notify_all()
        try:
            return await _answer(connection, served)
        except (ConnectionError, asyncio.IncompleteReadError):
            served.client_left = True
            raise
        finally:
            self._end(served)

    def _end(self, served: Served) -> None:
        served.ended_at = time.monotonic()
        if self._journal_file:
            self._journal_file.write(served.to_json() + "\n")
        served.ended.set()


@contextlib.contextmanager
def run_in_thread(*, port: int = 0, journal_path: Path | None = None) -> Iterator[FakeProvider]:
    """A provider that is served by a loop in a thread of its own.

    Raises OSError if the port is taken.
    """
    provider = FakeProvider(port=port, journal_path=journal_path)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fake-provider", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(provider.start(), loop).result(10)
        try:
            yield provider
        finally:
            asyncio.run_coroutine_threadsafe(provider.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _answer(connection: Connection, served: Served) -> bool:
    """Serves one request; whether the connection can carry another one."""
    if not await _read_body(connection, served):
        await connection.reset()
        return False
    answer = decide(served)
    behaviour = served.behaviour
    await connection.pause(behaviour.delay_s)
    if behaviour.reset in ("before_read", "after_read"):
        await connection.reset()
        return False
    if behaviour.stall == "before_headers":
        await connection.pause(_STALL_S_MAX)
        return False
    await _send(connection, served, answer)
    return served.completed and not _must_close(served)


async def _read_body(connection: Connection, served: Served) -> bool:
    """Reads the body into the journal; false if its call is to be reset before it is read."""
    if "100-continue" in served.header("expect").lower():
        await connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    seen = b""
    try:
        async for piece in connection.read_body(int(served.header("content-length") or 0)):
            body += piece
            seen = seen[-_WISH_BYTES_MAX:] + piece
            if _RESET_BEFORE_READ.search(seen):
                served.behaviour = Behaviour(reset="before_read")
                return False
    finally:
        served.body = bytes(body)
    served.parsed = parse(served.body)
    return True


def _must_close(served: Served) -> bool:
    """Whether the request leaves the connection unfit for another one: so it wished, or its body was not read."""
    return served.header("connection").lower() == "close" or bool(served.header("transfer-encoding"))


async def _send(connection: Connection, served: Served, answer: Answer) -> None:
    """Sends the answer or half of it, then does to the connection what the behaviour says."""
    behaviour = served.behaviour
    served.status = answer.status
    pieces = _half(answer, behaviour) if behaviour.is_cut else answer.pieces
    unsent = _head(served, answer)
    for position, piece in enumerate(pieces):
        await connection.pause(behaviour.pace_s if position else 0)
        await connection.write(unsent + _framed(piece, answer), behaviour.segment_bytes)
        unsent = b""
        served.completion_tokens += piece.tokens
        served.usage = piece.usage or served.usage
    if not behaviour.is_cut:
        served.completed = True
        return
    await connection.write(unsent)
    if behaviour.stall == "mid":
        await connection.pause(_STALL_S_MAX)
    if behaviour.reset == "mid":
        await connection.reset()


def _half(answer: Answer, behaviour: Behaviour) -> list[Piece]:
    if not answer.is_stream:
        octets = answer.pieces[0].octets
        return [Piece(octets[: len(octets) // 2])]
    middle = len(answer.pieces) // 2
    if not behaviour.cut_event:
        return answer.pieces[:middle]
    octets = answer.pieces[middle].octets
    return [*answer.pieces[:middle], Piece(octets[: len(octets) // 2])]


def _framed(piece: Piece, answer: Answer) -> bytes:
    """The piece as it goes over the wire; a stream's last one brings the end of the body with it."""
    if not answer.is_stream:
        return piece.octets
    end = b"0\r\n\r\n" if piece is answer.pieces[-1] else b""
    return b"%x\r\n%b\r\n%b" % (len(piece.octets), piece.octets, end)


def _head(served: Served, answer: Answer) -> bytes:
    behaviour = served.behaviour
    headers = {
        "content-type": answer.content_type if behaviour.content_type is None else behaviour.content_type,
        "x-request-id": f"fake-{served.id}",
        "x-ratelimit-remaining-requests": "99",
        "openai-organization": "fake-org",
    }
    if not headers["content-type"]:
        del headers["content-type"]
    if answer.is_stream:
        headers["transfer-encoding"] = "chunked"
    else:
        headers["content-length"] = str(len(answer.pieces[0].octets))
    if behaviour.retry_after is not None:
        headers["retry-after"] = f"{behaviour.retry_after:g}"
    if _must_close(served):
        headers["connection"] = "close"
    headers |= {name.lower(): str(value) for name, value in behaviour.extra_headers.items()}
    lines = [
        f"HTTP/1.1 {answer.status} {responses.get(answer.status, 'Unknown')}",
        *(f"{name}: {value}" for name, value in headers.items()),
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1")
