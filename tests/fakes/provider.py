"""An OpenAI provider on a loopback socket, which misbehaves exactly as it is told.

It is a small HTTP/1.1 server on asyncio streams, so that resets, half answers and TCP segments are what a test asked
for and not what a framework made of them. It imports nothing from `proxy`: it counts and bills by rules of its own,
and so can prove ours wrong.

How it counts: a prompt has as many tokens as the UTF-8 bytes of its messages' texts and of the compact JSON of its
`tools`, plus 4 for every message; a reply has one token for every byte of its text.

How it is told: the text of the last user message, when it is `!fake ` and a JSON object, holds the fields of a
`Behaviour`, for instance `!fake {"tokens": 100, "usage": "none"}`. Any other text means the defaults.

How it is run: `FakeProvider` on the current loop, `run_in_thread()` for synchronous tests and for a server under test
in another process, `python -m tests.fakes.provider --port 0 --journal FILE` as a process of its own.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import re
import signal
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field, fields
from http.client import responses
from pathlib import Path
from typing import Any, Literal, Self, TextIO

MODELS = ("fake-large", "fake-small")

_BEHAVIOUR_MARK = "!fake "
_TOKENS_PER_MESSAGE = 4
_CREATED_AT = 1_700_000_000  # a fixed time stamp keeps answers the same from run to run
_PHRASE = "The quick brown fox jumps over the lazy dog. "
_STALL_S_MAX = 60.0
_FLUSH_MS_MAX = 1_000
_WISH_BYTES_MAX = 8_192  # `_RESET_BEFORE_READ` never matches more
_READER_BYTES = 65_536  # asyncio stops reading at twice this, so that a body can really stay unread
# The wish as it looks inside the JSON string that the message is; the rest of the body need not have arrived.
_RESET_BEFORE_READ = re.compile(rb'!fake \{[^\n]{0,4096}?\\"reset\\":\s*\\"before_read\\"')

_ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", None, "The request is invalid."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    402: ("insufficient_quota", "insufficient_quota", "You exceeded your current quota."),
    403: ("permission_error", "permission_denied", "You are not allowed to use this model."),
    404: ("invalid_request_error", "unknown_url", "Unknown request URL."),
    408: ("timeout_error", None, "The request took too long."),
    411: ("invalid_request_error", None, "The request has no content-length."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}
_SERVER_ERROR = ("server_error", None, "The server had an error while processing your request.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What the provider does with one call; the fields combine, a fault strikes whatever the answer would have been.

    tokens            length of every choice's reply, in tokens, before the request's maximum cuts it
    chunk_tokens      tokens in each event of a stream
    pace_s            seconds between two events of a stream
    delay_s           seconds before the first byte of the answer
    usage             normal       what was counted
                      none         no usage anywhere, even if asked for
                      cached       normal, and half of the prompt's tokens (rounded down) were cached
                      reasoning    half of the reply's tokens (rounded down) are reasoning: missing in the text, counted
                                   in `completion_tokens` and `reasoning_tokens`
                      hidden       half of the reply's tokens (rounded down) are missing in the text and in
                                   `completion_tokens`, and counted in `total_tokens` only
                      implausible  negative numbers
                      an object    is sent as it is
    status            HTTP status of an answer that is an error in OpenAI's shape; with `raw`, the status of that answer
    retry_after       the `retry-after` header, in seconds
    stall             waits till the client leaves, at most 60 s, then closes:
                      before_headers  with nothing sent
                      mid             after half of the answer
    reset             closes with a TCP reset:
                      before_read  as soon as this wish is seen in the body, whose other bytes stay unread
                      after_read   with the request read and nothing sent
                      mid          after half of the answer
    half              closes cleanly (FIN) after half of the answer, whose promised length or last chunk never comes
    cut_event         half of a stream ends inside an event: half of the next event's bytes come too
    no_done           the stream ends without `data: [DONE]`
    ignore_max        the reply ignores the request's maximum of tokens
    raw               the body of the answer, sent verbatim with a content-length
    content_type      the `content-type` header, in place of the usual one
    extra_headers     headers of the answer, in place of or beside the usual ones
    segment_bytes     bytes of each write to the socket; the loop runs between two writes

    Half of a plain answer is half of its body's bytes; half of a stream is half of its events, rounded down.
    """

    tokens: int = 20
    chunk_tokens: int = 4
    pace_s: float = 0.0
    delay_s: float = 0.0
    usage: Literal["normal", "none", "cached", "reasoning", "hidden", "implausible"] | dict[str, Any] = "normal"
    status: int | None = None
    retry_after: float | None = None
    stall: Literal["before_headers", "mid"] | None = None
    reset: Literal["before_read", "after_read", "mid"] | None = None
    half: bool = False
    cut_event: bool = False
    no_done: bool = False
    ignore_max: bool = False
    raw: str | None = None
    content_type: str | None = None
    extra_headers: dict[str, str] = field(default_factory=dict)
    segment_bytes: int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether only half of the answer is sent."""
        return self.half or self.stall == "mid" or self.reset == "mid"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The behaviour that the JSON object in `text` asks for.

        Raises TypeError if it is not an object, ValueError if a field or a choice does not exist.
        """
        wishes = json.loads(text)
        if not isinstance(wishes, dict):
            raise TypeError("a behaviour is a JSON object")
        if unknown := wishes.keys() - {known.name for known in fields(cls)}:
            raise ValueError(f"unknown behaviour: {', '.join(sorted(unknown))}")
        for name, choices in _CHOICES.items():
            wish = wishes.get(name)
            if isinstance(wish, str) and wish not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, not {wish}")
        for name in ("chunk_tokens", "segment_bytes"):
            if name in wishes and wishes[name] is not None and wishes[name] < 1:
                raise ValueError(f"{name} is at least 1")
        return cls(**wishes)


_CHOICES = {
    "usage": ("normal", "none", "cached", "reasoning", "hidden", "implausible"),
    "stall": ("before_headers", "mid"),
    "reset": ("before_read", "after_read", "mid"),
}


@dataclass(slots=True, kw_only=True)
class Served:
    """One request in the journal; it changes until `ended` is set.

    id                 sequence number, from 1; the answer's `x-request-id` is `fake-<id>`
    body               the bytes of the body that were read
    parsed             the body's JSON; None if it is not JSON or was not read whole
    headers            the request's, in their order, names in lower case
    prompt_tokens      counted for a chat completion, else 0
    completion_tokens  tokens of reply text sent so far; those of a plain answer are sent with its last byte
    unseen_tokens      reasoning and hidden tokens of the reply, which are never sent
    usage              the usage object that was sent; None as long as none was
    completed          the answer was sent to its end (without `[DONE]` if so told)
    client_left        the client closed before the end of the answer, or of its own request
    started_at         monotonic seconds, when the request's head had been read
    ended_at           likewise, when the provider was done with it
    ended              set with `ended_at`. `served.ended.wait(timeout_s)` blocks: never call it on the provider's loop,
                       but `await asyncio.to_thread(served.ended.wait, timeout_s)`
    """

    id: int
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    parsed: Any = None
    behaviour: Behaviour = field(default_factory=Behaviour)
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unseen_tokens: int = 0
    usage: dict[str, Any] | None = None
    completed: bool = False
    client_left: bool = False
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float | None = None
    ended: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def header(self, name: str) -> str:
        """The first value of the header `name` (in lower case), or an empty string."""
        return next((value for known, value in self.headers if known == name), "")

    def to_json(self) -> str:
        """One line for the journal's file; bytes of the body that are not UTF-8 become lone surrogates."""
        kept = {
            known.name: getattr(self, known.name) for known in fields(self) if known.name not in ("parsed", "ended")
        }
        body = self.body.decode(errors="surrogateescape")
        return json.dumps(kept | {"body": body, "behaviour": asdict(self.behaviour)})

    @classmethod
    def from_json(cls, line: str) -> Self:
        """The entry that `to_json` wrote, `ended`."""
        kept = json.loads(line)
        kept["body"] = kept["body"].encode(errors="surrogateescape")
        kept["headers"] = [(name, value) for name, value in kept["headers"]]
        kept["behaviour"] = Behaviour(**kept["behaviour"])
        served = cls(**kept, parsed=_parse(kept["body"]))
        served.ended.set()
        return served


def read_journal(path: Path) -> list[Served]:
    """The calls that a provider with `journal_path` has ended, in the order of their ends."""
    return [Served.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
        reader = _WatchfulReader(limit=_READER_BYTES)
        return asyncio.StreamReaderProtocol(reader, self._connected)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving():
            writer.transport.abort()
            return
        connection = asyncio.get_running_loop().create_task(self._serve(_Connection(reader, writer)))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, connection: "_Connection") -> None:
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

    async def _serve_next(self, connection: "_Connection") -> bool:
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


class _WatchfulReader(asyncio.StreamReader):
    """A reader that tells at once when the client closes, though nobody reads."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit)
        self.left = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.left.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.left.set()


class _Connection:
    """One client's connection; its methods raise ConnectionError once the client has left."""

    def __init__(self, reader: _WatchfulReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._socket = writer.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.transport.set_write_buffer_limits(high=0)  # what is drained has reached the kernel

    async def read_head(self) -> tuple[str, str, list[tuple[str, str]]] | None:
        """Method, path and headers of the next request; None if the client closed instead."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        request_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = request_line.split(" ")
        pairs = (line.split(":", 1) for line in lines)
        return method, target.partition("?")[0], [(name.lower(), value.strip()) for name, value in pairs]

    async def read_body(self, size_bytes: int) -> AsyncIterator[bytes]:
        """The pieces of a body, as they come.

        Raises asyncio.IncompleteReadError if the client closes before its end.
        """
        missing_bytes = size_bytes
        while missing_bytes:
            piece = await self._reader.read(min(missing_bytes, _READER_BYTES))
            if not piece:
                raise asyncio.IncompleteReadError(b"", missing_bytes)
            missing_bytes -= len(piece)
            yield piece

    async def write(self, octets: bytes, segment_bytes: int | None = None) -> None:
        """Hands `octets` to the kernel, in writes of `segment_bytes` if given; the loop runs after each."""
        step = segment_bytes or max(1, len(octets))
        for start in range(0, len(octets), step):
            if self._reader.left.is_set():
                raise ConnectionResetError
            self._writer.write(octets[start : start + step])
            await self._writer.drain()
            await asyncio.sleep(0)

    async def pause(self, duration_s: float) -> None:
        """Waits, but not for a client that leaves."""
        if duration_s <= 0:
            return
        try:
            async with asyncio.timeout(duration_s):
                await self._reader.left.wait()
        except TimeoutError:
            return
        raise ConnectionResetError

    async def reset(self) -> None:
        """Sends what was written, then a TCP reset."""
        for _ in range(_FLUSH_MS_MAX):
            if not self._unacknowledged_bytes():
                break
            await asyncio.sleep(0.001)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Closes without waiting for anything."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Closes cleanly, if it is still open, and waits until the socket is gone."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def _unacknowledged_bytes(self) -> int:
        """Bytes that a reset would throw away; 0 where the kernel does not tell."""
        try:
            (size_bytes,) = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))
        except OSError:
            return 0
        return size_bytes


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes that are sent at one go, and the tokens of reply text in them."""

    octets: bytes
    tokens: int = 0
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """An answer before faults: a body of one piece, or the events of a stream."""

    status: int = 200
    content_type: str = "application/json"
    is_stream: bool = False
    pieces: list[_Piece]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """What a model came up with; `text` is every choice's, `choices` how many there are."""

    id: str
    model: str
    choices: int
    text: str
    finish_reason: str
    usage: dict[str, Any] | None


async def _answer(connection: _Connection, served: Served) -> bool:
    """Serves one request; whether the connection can carry another one."""
    if not await _read_body(connection, served):
        await connection.reset()
        return False
    answer = _decide(served)
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


async def _read_body(connection: _Connection, served: Served) -> bool:
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
    served.parsed = _parse(served.body)
    return True


def _must_close(served: Served) -> bool:
    """Whether the request leaves the connection unfit for another one: so it wished, or its body was not read."""
    return served.header("connection").lower() == "close" or bool(served.header("transfer-encoding"))


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _decide(served: Served) -> _Answer:
    """The answer to a request that was read; fills in the journal's counts and behaviour."""
    is_chat = served.method == "POST" and served.path.endswith("/chat/completions")
    is_models = served.method == "GET" and served.path.endswith("/models")
    if not (is_chat or is_models):
        return _error(404, f"Unknown request URL: {served.method} {served.path}.")
    if not _is_authorized(served):
        return _error(401)
    if is_models:
        return _models()
    if served.header("transfer-encoding"):
        return _error(411)
    return _complete(served)


def _is_authorized(served: Served) -> bool:
    scheme, _, key = served.header("authorization").partition(" ")
    return scheme.lower() == "bearer" and bool(key.strip())


def _models() -> _Answer:
    models = [{"id": model, "object": "model", "created": _CREATED_AT, "owned_by": "fake-org"} for model in MODELS]
    return _Answer(pieces=[_Piece(_json({"object": "list", "data": models}))])


def _complete(served: Served) -> _Answer:
    request = served.parsed
    if not _is_chat_request(request):
        return _error(400, "A chat completion has a model and a list of messages.")
    try:
        served.behaviour = behaviour = _behaviour(request["messages"])
    except (ValueError, TypeError) as error:
        return _error(400, f"The provider cannot behave like that: {error}.")
    served.prompt_tokens = _prompt_tokens(request)
    is_stream = bool(request.get("stream"))
    if behaviour.raw is not None:
        usual_type = "text/event-stream" if is_stream else "application/json"
        piece = _Piece(behaviour.raw.encode(errors="surrogatepass"))
        return _Answer(status=behaviour.status or 200, content_type=usual_type, pieces=[piece])
    if behaviour.status is not None:
        return _error(behaviour.status)
    reply = _reply(served, request)
    if is_stream:
        pieces = list(_events(reply, behaviour, is_usage_wanted=_is_usage_wanted(request)))
        return _Answer(content_type="text/event-stream; charset=utf-8", is_stream=True, pieces=pieces)
    return _Answer(pieces=[_completion(reply)])


def _is_chat_request(request: Any) -> bool:
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        return False
    if not isinstance(request.get("n", 1), int | None):
        return False
    messages = request.get("messages")
    return isinstance(messages, list) and all(isinstance(message, dict) for message in messages)


def _is_usage_wanted(request: dict[str, Any]) -> bool:
    options = request.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _behaviour(messages: list[dict[str, Any]]) -> Behaviour:
    texts = [_text(message) for message in messages if message.get("role") == "user"]
    if not texts or not texts[-1].startswith(_BEHAVIOUR_MARK):
        return Behaviour()
    return Behaviour.from_json(texts[-1].removeprefix(_BEHAVIOUR_MARK))


def _text(message: dict[str, Any]) -> str:
    """The message's content, the texts of its parts one after the other."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _prompt_tokens(request: dict[str, Any]) -> int:
    messages = request["messages"]
    texts = [_text(message) for message in messages]
    tools = _json(request["tools"]) if request.get("tools") else b""
    text_bytes = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    return text_bytes + len(tools) + _TOKENS_PER_MESSAGE * len(messages)


def _reply(served: Served, request: dict[str, Any]) -> _Reply:
    behaviour = served.behaviour
    maximum = None if behaviour.ignore_max else _maximum(request)
    tokens = behaviour.tokens if maximum is None else min(behaviour.tokens, maximum)
    unseen = tokens // 2 if behaviour.usage in ("reasoning", "hidden") else 0
    choices = request.get("n") or 1
    served.unseen_tokens = choices * unseen
    return _Reply(
        id=f"chatcmpl-fake-{served.id}",
        model=request["model"],
        choices=choices,
        text=_reply_text(tokens - unseen),
        finish_reason="stop" if tokens == behaviour.tokens else "length",
        usage=_usage(behaviour, served.prompt_tokens, choices * (tokens - unseen), choices * unseen),
    )


def _maximum(request: dict[str, Any]) -> int | None:
    """The least of the request's maxima of output tokens; None without any."""
    maxima = (request.get("max_tokens"), request.get("max_completion_tokens"))
    return min((maximum for maximum in maxima if isinstance(maximum, int)), default=None)


def _reply_text(tokens: int) -> str:
    return (_PHRASE * (tokens // len(_PHRASE) + 1))[:tokens]


def _usage(behaviour: Behaviour, prompt: int, shown: int, unseen: int) -> dict[str, Any] | None:
    """The usage that is reported for so many tokens of prompt, of text and of output that is not in the text."""
    kind = behaviour.usage
    if isinstance(kind, dict):
        return kind
    if kind == "none":
        return None
    if kind == "implausible":
        return {"prompt_tokens": -1 - prompt, "completion_tokens": -1 - shown, "total_tokens": -2 - prompt - shown}
    reasoning = unseen if kind == "reasoning" else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": shown + reasoning,
        "total_tokens": prompt + shown + unseen,
        "prompt_tokens_details": {"cached_tokens": prompt // 2 if kind == "cached" else 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _completion(reply: _Reply) -> _Piece:
    """The body of a plain answer."""
    message = {"role": "assistant", "content": reply.text, "refusal": None, "annotations": []}
    completion = {
        "id": reply.id,
        "object": "chat.completion",
        "created": _CREATED_AT,
        "model": reply.model,
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
            for index in range(reply.choices)
        ],
    }
    if reply.usage is not None:
        completion["usage"] = reply.usage
    completion |= {"service_tier": "default", "system_fingerprint": "fp_fake"}
    return _Piece(_json(completion), tokens=reply.choices * len(reply.text), usage=reply.usage)


def _events(reply: _Reply, behaviour: Behaviour, *, is_usage_wanted: bool) -> Iterator[_Piece]:
    """The events of a stream, each with the tokens it carries."""
    usage = reply.usage if is_usage_wanted else None
    every = {
        "id": reply.id,
        "object": "chat.completion.chunk",
        "created": _CREATED_AT,
        "model": reply.model,
        "service_tier": "default",
        "system_fingerprint": "fp_fake",
    }
    null_usage = {} if usage is None else {"usage": None}
    for choice, tokens in _choices(reply, behaviour.chunk_tokens):
        yield _Piece(_event(every | {"choices": [choice]} | null_usage), tokens=tokens)
    if usage is not None:
        yield _Piece(_event(every | {"choices": [], "usage": usage}), usage=usage)
    if not behaviour.no_done:
        yield _Piece(b"data: [DONE]\n\n")


def _choices(reply: _Reply, chunk_tokens: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The choices of a stream's chunks with their tokens: the role, the text bit by bit, the reason of the end."""
    for index in range(reply.choices):
        yield _choice(index, {"role": "assistant", "content": "", "refusal": None}), 0
    for start in range(0, len(reply.text), chunk_tokens):
        text = reply.text[start : start + chunk_tokens]
        for index in range(reply.choices):
            yield _choice(index, {"content": text}), len(text)
    for index in range(reply.choices):
        yield _choice(index, {}, reply.finish_reason), 0


def _choice(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"


def _error(status: int, message: str | None = None) -> _Answer:
    kind, code, usual_message = _ERRORS.get(status, _SERVER_ERROR)
    error = {"message": message or usual_message, "type": kind, "param": None, "code": code}
    return _Answer(status=status, pieces=[_Piece(_json({"error": error}))])


def _json(shape: Any) -> bytes:
    return json.dumps(shape, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


async def _send(connection: _Connection, served: Served, answer: _Answer) -> None:
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


def _half(answer: _Answer, behaviour: Behaviour) -> list[_Piece]:
    if not answer.is_stream:
        octets = answer.pieces[0].octets
        return [_Piece(octets[: len(octets) // 2])]
    middle = len(answer.pieces) // 2
    if not behaviour.cut_event:
        return answer.pieces[:middle]
    octets = answer.pieces[middle].octets
    return [*answer.pieces[:middle], _Piece(octets[: len(octets) // 2])]


def _framed(piece: _Piece, answer: _Answer) -> bytes:
    """The piece as it goes over the wire; a stream's last one brings the end of the body with it."""
    if not answer.is_stream:
        return piece.octets
    end = b"0\r\n\r\n" if piece is answer.pieces[-1] else b""
    return b"%x\r\n%b\r\n%b" % (len(piece.octets), piece.octets, end)


def _head(served: Served, answer: _Answer) -> bytes:
    behaviour = served.behaviour
    headers = {
        "content-type": behaviour.content_type or answer.content_type,
        "x-request-id": f"fake-{served.id}",
        "x-ratelimit-remaining-requests": "99",
        "openai-organization": "fake-org",
    }
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


async def _serve_until_told(port: int, journal_path: Path | None) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    async with FakeProvider(port=port, journal_path=journal_path) as provider:
        sys.stdout.write(f"listening on 127.0.0.1:{provider.port}\n")
        sys.stdout.flush()
        await told.wait()


def main() -> None:
    """Serves until SIGTERM or SIGINT, having printed where."""
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.provider", description="A fake OpenAI provider.")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--journal", type=Path, help="file that gets one JSON line for every call that ended")
    options = parser.parse_args()
    asyncio.run(_serve_until_told(options.port, options.journal))


if __name__ == "__main__":
    main()
