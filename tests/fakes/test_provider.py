"""The fake provider, seen by a client that reads the socket itself."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fakes.provider import MODELS, FakeProvider, Served, read_journal, run_in_thread

REPOSITORY = Path(__file__).parents[2]
WAIT_S = 10


@dataclass
class Seen:
    """What came over the socket: `ending` is eof or reset, `is_whole` whether HTTP says that the body was complete."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ending: str = ""
    is_whole: bool = False
    reads: int = 0

    @property
    def parsed(self):
        return json.loads(self.body)

    @property
    def events(self):
        """The chunks of a stream, parsed; the end marker as the text [DONE]."""
        events = self.body.decode().split("\n\n")
        texts = [event.removeprefix("data: ") for event in events if event]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    @property
    def text(self):
        return "".join(choice["delta"].get("content", "") for chunk in self.chunks for choice in chunk["choices"])

    @property
    def chunks(self):
        return [event for event in self.events if event != "[DONE]"]

    @property
    def error(self):
        return self.parsed["error"]


@pytest.fixture
async def provider():
    async with FakeProvider() as running:
        yield running


def chat(wish=None, **fields) -> bytes:
    """A chat completion's body; `wish` is the behaviour asked for."""
    content = "Hello" if wish is None else f"!fake {json.dumps(wish)}"
    return json.dumps({"model": "fake-small", "messages": [{"role": "user", "content": content}], **fields}).encode()


def request(
    body: bytes, *, path="/v1/chat/completions", method="POST", headers=("Authorization: Bearer key",)
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: fake", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def exchange(provider, octets: bytes) -> Seen:
    """Sends `octets`, reads till the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(octets)
    seen, received = Seen(), b""
    try:
        async with asyncio.timeout(WAIT_S):
            while piece := await reader.read(65_536):
                received += piece
                seen.reads += 1
        seen.ending = "eof"
    except ConnectionResetError:
        seen.ending = "reset"
    finally:
        writer.transport.abort()
    return decode(received, seen)


def decode(received: bytes, seen: Seen) -> Seen:
    head, _, body = received.partition(b"\r\n\r\n")
    if not head:
        return seen
    status_line, *lines = head.decode().split("\r\n")
    seen.status = int(status_line.split(" ")[1])
    seen.headers = dict(line.split(": ", 1) for line in lines)
    if "chunked" in seen.headers.get("transfer-encoding", ""):
        seen.body, seen.is_whole = dechunk(body)
    else:
        seen.body, seen.is_whole = body, len(body) == int(seen.headers["content-length"])
    return seen


def dechunk(octets: bytes) -> tuple[bytes, bool]:
    body = b""
    while octets:
        size, _, octets = octets.partition(b"\r\n")
        if int(size, 16) == 0:
            return body, True
        body += octets[: int(size, 16)]
        octets = octets[int(size, 16) + 2 :]
    return body, False


async def ask(provider, wish=None, **fields) -> Seen:
    return await exchange(
        provider, request(chat(wish, **fields), headers=("Authorization: Bearer key", "Connection: close"))
    )


async def ended(served: Served) -> Served:
    assert await asyncio.to_thread(served.ended.wait, WAIT_S)
    return served


async def test_plain_answer(provider):
    """A plain answer is a chat.completion whose text has as many bytes as its usage has tokens."""
    seen = await ask(provider)
    choice = seen.parsed["choices"][0]
    assert (seen.status, seen.is_whole, seen.parsed["object"]) == (200, True, "chat.completion")
    assert choice["message"]["content"] == "The quick brown fox "
    assert choice["finish_reason"] == "stop"
    assert seen.parsed["usage"]["prompt_tokens"] == len("Hello") + 4
    assert seen.parsed["usage"]["completion_tokens"] == 20
    assert seen.parsed["usage"]["total_tokens"] == 29


async def test_headers_of_an_answer(provider):
    """An answer names its entry in the journal and has the headers that OpenAI's have."""
    seen = await ask(provider)
    assert seen.headers["x-request-id"] == f"fake-{provider.journal[0].id}"
    assert seen.headers["x-ratelimit-remaining-requests"] == "99"
    assert seen.headers["openai-organization"] == "fake-org"


async def test_prompt_is_counted_in_bytes(provider):
    """Texts of strings and of parts count in UTF-8 bytes, schemas as compact JSON, an image 1,105, a message four."""
    messages = [
        {"role": "system", "content": "né"},
        {"role": "assistant", "content": None},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "☂"}],
        },
    ]
    schemas = {"tools": [{"type": "function"}], "response_format": {"type": "text"}}
    seen = await ask(provider, messages=messages, **schemas)
    texts = 3 + 0 + 4 + len('[{"type":"function"}]{"type":"text"}')
    assert seen.parsed["usage"]["prompt_tokens"] == texts + 1_105 + 3 * 4


async def test_a_prediction_is_billed_on_top(provider):
    """None of it comes true: it is output that is not sent, in every choice, whatever the maximum."""
    prediction = {"type": "content", "content": "né"}
    seen = await ask(provider, {"tokens": 50}, prediction=prediction, n=2, max_tokens=7)
    assert seen.parsed["usage"]["completion_tokens"] == 2 * (7 + 3)


@pytest.mark.parametrize("fields", [{"max_tokens": 7}, {"max_completion_tokens": 7}])
async def test_maximum_cuts_the_reply(provider, fields):
    """The request's maximum is kept, and the reason says so."""
    seen = await ask(provider, {"tokens": 50}, **fields)
    assert seen.parsed["choices"][0]["finish_reason"] == "length"
    assert seen.parsed["usage"]["completion_tokens"] == len(seen.parsed["choices"][0]["message"]["content"]) == 7


async def test_maximum_is_ignored_when_told(provider):
    """`ignore_max` replies past the maximum."""
    seen = await ask(provider, {"tokens": 50, "ignore_max": True}, max_tokens=7)
    assert seen.parsed["usage"]["completion_tokens"] == 50


async def test_all_choices_are_counted(provider):
    """Three choices cost three replies, plain and streamed."""
    plain = await ask(provider, {"tokens": 6}, n=3)
    stream = await ask(provider, {"tokens": 6}, n=3, stream=True, stream_options={"include_usage": True})
    assert [choice["index"] for choice in plain.parsed["choices"]] == [0, 1, 2]
    assert plain.parsed["usage"]["completion_tokens"] == 18
    assert len(stream.text) == stream.chunks[-1]["usage"]["completion_tokens"] == 18
    assert [served.completion_tokens for served in provider.journal] == [18, 18]


async def test_stream_without_usage(provider):
    """A stream has the role first, the reason last, then the end marker, and says nothing of usage."""
    seen = await ask(provider, {"tokens": 10}, stream=True)
    assert seen.headers["content-type"].startswith("text/event-stream")
    assert seen.chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in seen.chunks] == [None, None, None, None, "stop"]
    assert (seen.text, seen.events[-1], seen.is_whole) == ("The quick ", "[DONE]", True)
    assert all("usage" not in chunk for chunk in seen.chunks)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in seen.chunks)


async def test_stream_with_usage(provider):
    """With include_usage every chunk has a null usage, and one more without choices has the count."""
    seen = await ask(provider, {"tokens": 10}, stream=True, stream_options={"include_usage": True})
    *chunks, last = seen.chunks
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 10
    assert seen.events[-1] == "[DONE]"


async def test_chunk_tokens(provider):
    """`chunk_tokens` is the text of one event."""
    seen = await ask(provider, {"tokens": 10, "chunk_tokens": 5}, stream=True)
    assert [len(chunk["choices"][0]["delta"].get("content", "")) for chunk in seen.chunks] == [0, 5, 5, 0]


async def test_no_usage(provider):
    """`none` leaves usage out everywhere, even if it was asked for."""
    plain = await ask(provider, {"usage": "none"})
    stream = await ask(provider, {"usage": "none"}, stream=True, stream_options={"include_usage": True})
    assert "usage" not in plain.parsed
    assert b"usage" not in stream.body
    assert [served.usage for served in provider.journal] == [None, None]


async def test_cached_usage(provider):
    """`cached` says that half of the prompt was cached."""
    usage = (await ask(provider, {"usage": "cached"})).parsed["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] // 2 > 0


async def test_reasoning_usage(provider):
    """`reasoning` counts tokens that the text does not have, within the maximum."""
    seen = await ask(provider, {"tokens": 50, "usage": "reasoning"}, max_tokens=11)
    usage = seen.parsed["usage"]
    assert len(seen.parsed["choices"][0]["message"]["content"]) == 6
    assert usage["completion_tokens_details"]["reasoning_tokens"] == provider.journal[0].unseen_tokens == 5
    assert usage["completion_tokens"] == 11
    assert usage["total_tokens"] == usage["prompt_tokens"] + 11


async def test_hidden_usage(provider):
    """`hidden` counts tokens in the total only."""
    seen = await ask(provider, {"tokens": 10, "usage": "hidden"})
    usage = seen.parsed["usage"]
    assert usage["completion_tokens"] == len(seen.parsed["choices"][0]["message"]["content"]) == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 10


async def test_implausible_usage(provider):
    """`implausible` counts below zero."""
    usage = (await ask(provider, {"usage": "implausible"})).parsed["usage"]
    assert all(tokens < 0 for tokens in usage.values())


async def test_usage_sent_verbatim(provider):
    """A usage object is sent as it is, and is in the journal."""
    wish = {"usage": {"prompt_tokens": 1, "extra": "yes"}}
    assert (await ask(provider, wish)).parsed["usage"] == wish["usage"] == provider.journal[0].usage


async def test_key_is_required(provider):
    """Without a bearer key a chat is a 401 in OpenAI's shape."""
    for headers in (("Connection: close",), ("Connection: close", "Authorization: Bearer ")):
        seen = await exchange(provider, request(chat(), headers=headers))
        assert (seen.status, seen.error["code"]) == (401, "invalid_api_key")


async def test_models(provider):
    """The models are two."""
    headers = ("Authorization: Bearer key", "Connection: close")
    seen = await exchange(provider, request(b"", path="/v1/models", method="GET", headers=headers))
    assert [model["id"] for model in seen.parsed["data"]] == list(MODELS)


async def test_unknown_path(provider):
    """Any other path is a 404 in OpenAI's shape."""
    seen = await exchange(provider, request(b"", path="/v1/nothing", headers=("Connection: close",)))
    assert (seen.status, seen.error["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("base", ["/v1", "", "/openai/v1beta"])
async def test_any_base_path(provider, base):
    """A chat is served below any base path."""
    headers = ("Authorization: Bearer key", "Connection: close")
    assert (await exchange(provider, request(chat(), path=f"{base}/chat/completions", headers=headers))).status == 200


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"model": "m"}', b'{"messages": []}', b'{"model": "m", "messages": [], "n": "2"}']
)
async def test_malformed_chat(provider, body):
    """A body that is no chat completion is a 400."""
    seen = await exchange(provider, request(body, headers=("Authorization: Bearer key", "Connection: close")))
    assert (seen.status, seen.error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "wish", [{"tokns": 1}, {"usage": "nun"}, {"stall": "now"}, {"reset": "no"}, {"chunk_tokens": 0}, ["tokens"]]
)
async def test_unknown_wish(provider, wish):
    """A misspelt behaviour is a 400 that says so, not the default."""
    seen = await ask(provider, wish)
    assert seen.status == 400
    assert "cannot behave" in seen.error["message"]


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 408, 429, 500, 503, 529])
async def test_error_status(provider, status):
    """`status` answers an error of OpenAI's shape with that status."""
    seen = await ask(provider, {"status": status})
    assert (seen.status, seen.is_whole) == (status, True)
    assert seen.error.keys() == {"message", "type", "param", "code"}


async def test_retry_after(provider):
    """`retry_after` is a header in seconds."""
    assert (await ask(provider, {"status": 429, "retry_after": 1.5})).headers["retry-after"] == "1.5"


async def test_a_raw_answer_that_is_no_text(provider):
    """`raw_base64` is the body as well, whatever its bytes."""
    seen = await ask(provider, {"raw_base64": "H4sA/w=="})
    assert seen.body == b"\x1f\x8b\x00\xff"


async def test_raw_answer(provider):
    """`raw` is the body to the last byte, with the type, status and headers asked for."""
    wish = {"raw": "é\u2028{", "content_type": "text/odd", "status": 202, "extra_headers": {"X-Odd": "1"}}
    seen = await ask(provider, wish)
    assert (seen.status, seen.body, seen.is_whole) == (202, "é\u2028{".encode(), True)
    assert (seen.headers["content-type"], seen.headers["x-odd"]) == ("text/odd", "1")


async def test_delay(provider):
    """`delay_s` passes before the first byte, `pace_s` between the events."""
    await ask(provider, {"delay_s": 0.1})
    await ask(provider, {"tokens": 8, "pace_s": 0.05}, stream=True)
    plain, stream = provider.journal
    assert plain.ended_at - plain.started_at >= 0.1
    assert stream.ended_at - stream.started_at >= 0.05 * 4


async def test_segments(provider):
    """`segment_bytes` spreads the same answer over many reads."""
    seen = await ask(provider, {"segment_bytes": 1}, stream=True)
    assert seen.reads > 100
    assert (seen.text, seen.events[-1], seen.is_whole) == ("The quick brown fox ", "[DONE]", True)


async def test_reset_before_read(provider):
    """The reset comes while most of the body is unread."""
    body = chat({"reset": "before_read"}, padding="x" * 50_000_000)
    seen = await exchange(provider, request(body))
    assert (seen.ending, seen.status) == ("reset", 0)
    served = await ended(provider.journal[0])
    assert 0 < len(served.body) < 1_000_000
    assert (served.behaviour.reset, served.completed, served.client_left) == ("before_read", False, False)


async def test_reset_after_read(provider):
    """The reset comes with the body read and nothing sent."""
    body = chat({"reset": "after_read"}, padding="x" * 1_000_000)
    seen = await exchange(provider, request(body))
    assert (seen.ending, seen.status) == ("reset", 0)
    served = await ended(provider.journal[0])
    assert (served.body, served.completion_tokens, served.completed) == (body, 0, False)


async def test_reset_in_the_middle_of_a_stream(provider):
    """Half of the events arrive whole, then a reset; the journal knows their tokens."""
    seen = await ask(provider, {"reset": "mid", "tokens": 4000}, stream=True)
    served = await ended(provider.journal[0])
    assert (seen.ending, seen.is_whole) == ("reset", False)
    assert len(seen.text) == served.completion_tokens == 2000
    assert not served.completed


async def test_reset_in_the_middle_of_an_answer(provider):
    """Half of the bytes arrive, then a reset."""
    seen = await ask(provider, {"reset": "mid", "tokens": 1_000_000})
    assert (seen.ending, seen.is_whole) == ("reset", False)
    assert len(seen.body) == int(seen.headers["content-length"]) // 2
    assert (await ended(provider.journal[0])).completion_tokens == 0


async def test_half_of_an_answer(provider):
    """Half of the promised bytes arrive, then a clean end."""
    seen = await ask(provider, {"half": True})
    assert (seen.ending, seen.is_whole) == ("eof", False)
    assert len(seen.body) == int(seen.headers["content-length"]) // 2


async def test_half_of_a_stream(provider):
    """Half of the events arrive without the last chunk, then a clean end."""
    seen = await ask(provider, {"half": True}, stream=True)
    assert (seen.ending, seen.is_whole) == ("eof", False)
    assert len(seen.text) == provider.journal[0].completion_tokens == 12
    assert "[DONE]" not in seen.events


async def test_cut_event(provider):
    """`cut_event` ends the half inside an event, whose tokens do not count."""
    whole = await ask(provider, {"half": True}, stream=True)
    cut = await ask(provider, {"half": True, "cut_event": True}, stream=True)
    assert len(whole.body) < len(cut.body)
    assert not cut.body.endswith(b"\n\n")
    assert provider.journal[0].completion_tokens == provider.journal[1].completion_tokens


async def test_no_done(provider):
    """`no_done` ends the stream well, but for the end marker."""
    seen = await ask(provider, {"no_done": True}, stream=True)
    assert seen.is_whole
    assert seen.events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(("stall", "expected"), [("before_headers", b""), ("mid", b"HTTP/1.1 200 OK")])
async def test_stall_until_the_client_leaves(provider, stall, expected):
    """A stalled call sends what it should and no more, and ends as soon as the client leaves."""
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(request(chat({"stall": stall})))
    assert await reader.read(len(expected)) == expected
    served = await entry(provider, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read_to_the_end(reader), 0.1)
    assert not served.ended.is_set()
    writer.close()
    await writer.wait_closed()
    assert (await ended(served)).client_left
    assert not served.completed


async def entry(provider, number: int) -> Served:
    """The journal's entry of that number, once it is there."""
    return (await asyncio.to_thread(provider.wait_for_calls, number, WAIT_S))[number - 1]


async def read_to_the_end(reader: asyncio.StreamReader) -> None:
    while await reader.read(65_536):
        pass


async def test_client_leaves_a_stream(provider):
    """A client's hang-up ends the stream; the journal has the tokens sent by then and no more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(request(chat({"tokens": 4000, "pace_s": 0.01}, stream=True)))
    await reader.readuntil(b"The ")
    writer.close()
    await writer.wait_closed()
    served = await ended(provider.journal[0])
    assert (served.client_left, served.completed) == (True, False)
    assert 4 <= served.completion_tokens < 400


async def test_client_leaves_an_unread_answer(provider):
    """A client that never reads and then closes is noticed while the answer is being sent."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", provider.port))
        await loop.sock_sendall(client, request(chat({"tokens": 20_000_000})))
        assert await loop.sock_recv(client, 8) == b"HTTP/1.1"
        served = provider.journal[0]
        assert not served.ended.is_set()
    assert (await ended(served)).client_left
    assert served.completion_tokens == 0


async def test_client_leaves_its_own_request(provider):
    """A client that closes before the end of its body is in the journal as having left."""
    _, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(request(chat())[:-5])
    served = await entry(provider, 1)
    writer.close()
    await writer.wait_closed()
    assert (await ended(served)).client_left
    assert served.body == chat()[:-5]


async def test_keep_alive(provider):
    """One connection carries a plain answer, a stream, an error and a plain answer again."""

    def talk() -> list[int]:
        client = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=WAIT_S)
        statuses, sockets = [], set()
        for wish, fields in [({}, {}), ({}, {"stream": True}), ({"status": 500}, {}), ({}, {})]:
            client.request("POST", "/v1/chat/completions", chat(wish, **fields), {"Authorization": "Bearer key"})
            sockets.add(client.sock)
            answer = client.getresponse()
            answer.read()
            statuses.append(answer.status)
        client.close()
        assert len(sockets) == 1
        return statuses

    assert await asyncio.to_thread(talk) == [200, 200, 500, 200]
    assert [served.completed for served in provider.journal] == [True] * 4


async def test_expect_continue(provider):
    """A client that waits for 100 Continue before it sends its body gets it, then its answer."""
    headers = ("Authorization: Bearer key", "Expect: 100-continue")
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    writer.write(request(chat(), headers=headers).removesuffix(chat()))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(chat())
    assert (await reader.readuntil(b"\r\n")) == b"HTTP/1.1 200 OK\r\n"
    writer.close()
    await writer.wait_closed()


async def test_request_without_length(provider):
    """A chunked request is a 411."""
    headers = ("Authorization: Bearer key", "Transfer-Encoding: chunked")
    assert (await exchange(provider, request(b"", headers=headers))).status == 411


async def test_malformed_request_ends_its_connection_only(provider):
    """What is not HTTP is cut off; the next client is served."""
    assert (await exchange(provider, b"\x16\x03\x01 nonsense\r\n\r\n")).status == 0
    assert (await ask(provider)).status == 200


async def test_journal_in_memory(provider):
    """An entry holds the request as it came and what was counted and sent."""
    body = chat({"tokens": 8}, temperature=0)
    headers = ("Authorization: Bearer key", "X-Odd: Value", "Connection: close")
    await exchange(provider, request(body, headers=headers))
    served = await ended(provider.journal[0])
    assert (served.id, served.method, served.path, served.status) == (1, "POST", "/v1/chat/completions", 200)
    assert (served.body, served.parsed) == (body, json.loads(body))
    assert ("x-odd", "Value") in served.headers
    assert served.header("authorization") == "Bearer key"
    assert (served.behaviour.tokens, served.prompt_tokens, served.completion_tokens) == (
        8,
        len('!fake {"tokens": 8}') + 4,
        8,
    )
    assert (served.completed, served.client_left) == (True, False)
    assert served.started_at <= served.ended_at


async def test_journal_on_file(tmp_path):
    """The file's lines are the entries in memory, whatever the bytes of the body."""
    path = tmp_path / "journal"
    async with FakeProvider(journal_path=path) as provider:
        await ask(provider, {"tokens": 8}, stream=True)
        await exchange(provider, request(b"\xff\r\n\xe2\x80\xa8", headers=("Connection: close",)))
        for served in provider.journal:
            await ended(served)
        assert read_journal(path) == provider.journal


async def test_stop_breaks_calls_under_way():
    """Stopping ends stalled calls as not completed, and frees the port for another start."""
    provider = FakeProvider()
    await provider.start()
    port = provider.port
    stalled = asyncio.create_task(ask(provider, {"stall": "before_headers"}))
    await entry(provider, 1)
    await provider.stop()
    await provider.stop()
    assert (await stalled).status == 0
    assert (provider.journal[0].completed, provider.journal[0].client_left) == (False, False)
    await provider.start()
    assert provider.port == port
    assert (await ask(provider)).status == 200
    await provider.stop()


def test_in_a_thread(tmp_path):
    """A synchronous test talks to a provider in a thread; afterwards nobody listens."""
    with run_in_thread(journal_path=tmp_path / "journal") as provider:
        client = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=WAIT_S)
        client.request("POST", "/v1/chat/completions", chat(), {"Authorization": "Bearer key"})
        assert json.load(client.getresponse())["usage"]["completion_tokens"] == 20
        client.close()
        assert provider.journal[0].ended.wait(WAIT_S)
    assert len(read_journal(tmp_path / "journal")) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", provider.port))


def test_thread_on_a_taken_port():
    """A port that is taken is an error of the caller's, and leaves no thread."""
    with run_in_thread() as provider, pytest.raises(OSError, match="in use"), run_in_thread(port=provider.port):
        pass


def test_as_a_process(tmp_path):
    """The process says where it listens, serves, keeps the journal and ends well on SIGTERM."""
    command = [sys.executable, "-m", "tests.fakes.provider", "--port", "0", "--journal", str(tmp_path / "journal")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        port = int(re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", process.stdout.readline())[1])
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        client.request("POST", "/v1/chat/completions", chat(), {"Authorization": "Bearer key"})
        assert client.getresponse().read()
        client.close()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    assert read_journal(tmp_path / "journal")[0].completed
