import asyncio
import gzip
import json

import pytest

from proxy.errors import BadRequest, SettingsError, UpstreamBroken
from proxy.upstream import ProviderCall
from proxy.upstream.anthropic import AnthropicProvider
from proxy.upstream.lean import LeanClient
from tests.published_messages import OVERLOADED, STREAMS
from tests.upstream.servers import CHUNKED_HEAD, PATIENT, body_of, chunk, read_request, serving

BODY = b'{"model":"claude-opus-5","messages":[{"role":"user","content":"Hello"}]}'
MESSAGE = {"id": "msg_1", "model": "claude-opus-5", "content": [], "usage": {"input_tokens": 1, "output_tokens": 2}}
STREAM = STREAMS["basic"].octets


def call(body=BODY, *, path="chat/completions", stream=False, headers=()):
    return ProviderCall(
        path=path, model="claude-opus-5", body=body, headers=list(headers), stream=stream, output_tokens_max=1000
    )


@pytest.fixture
async def line():
    """A provider before a server that answers each call with `octets`, and what that server was sent."""

    class Line:
        octets = b""

        def __init__(self):
            self.requests = []

        async def answer(self, reader, writer):
            self.requests.append(await read_request(reader))
            writer.write(self.octets)
            await writer.drain()

        def provider(self, api_key="sk-ant", base_url=None, **options):
            limits = {"answer_bytes_max": 10_000, "event_bytes_max": 10_000, **options}
            return AnthropicProvider("claude", base_url or self.base_url, api_key, client, PATIENT, **limits)

    line, client = Line(), LeanClient()
    async with serving(line.answer) as url:
        line.base_url = f"{url}/v1"
        yield line
    await client.aclose()


def plain(body, status="200 OK", headers=""):
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def streamed(*pieces, is_whole=True):
    return CHUNKED_HEAD + b"".join(map(chunk, pieces)) + (b"0\r\n\r\n" if is_whole else b"")


async def test_the_whole_request(line):
    """Everything that goes out, and nothing of the client's head."""
    line.octets = plain(json.dumps(MESSAGE).encode())
    headers = [(b"authorization", b"Bearer tg-client"), (b"user-agent", b"OpenAI/Python 3"), (b"x-stainless-os", b"L")]
    response = await line.provider(headers=[("anthropic-beta", "x-1")]).send(call(headers=headers))
    assert json.loads(await body_of(response))["object"] == "chat.completion"
    head, body = line.requests[0]
    request_line, *lines = head.decode().strip().split("\r\n")
    assert request_line == "POST /v1/messages HTTP/1.1"
    fields = dict(field.lower().split(": ", 1) for field in lines)
    assert (fields.pop("host"), fields.pop("content-length")) == (line.base_url[7:-3], str(len(body)))
    assert fields.pop("user-agent").startswith("tollgate/")
    assert fields == {
        "x-api-key": "sk-ant",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "x-1",
        "content-type": "application/json",
        "accept": "application/json",
        "accept-encoding": "identity",
    }
    assert json.loads(body)["max_tokens"] == 1000


async def test_the_operators_version(line):
    """Another version of the API, and another name, go before ours; without a key none goes out."""
    line.octets = streamed(STREAM)
    headers = [("Anthropic-Version", "2026-10-21"), ("user-agent", "us")]
    await body_of(await line.provider(api_key=None, headers=headers).send(call(stream=True)))
    head = line.requests[0][0].lower()
    assert head.count(b"anthropic-version: 2026-10-21") == head.count(b"anthropic-version") == 1
    assert head.count(b"user-agent: us") == head.count(b"user-agent") == 1
    assert b"accept: text/event-stream" in head
    assert b"x-api-key" not in head


@pytest.mark.parametrize("base_url", ["ftp://acme.test", "http://user:pw@acme.test", "http://acme.test/#x"])
async def test_addresses_that_are_none(line, base_url):
    """They are refused at once."""
    with pytest.raises(SettingsError):
        line.provider(base_url=base_url)


@pytest.mark.parametrize(
    "options", [{"api_key": "a b"}, {"headers": [("x-api-key", "x")]}, {"headers": [("host", "x")]}]
)
async def test_keys_and_headers_that_cannot_be_sent(line, options):
    """They are refused at once."""
    with pytest.raises(SettingsError):
        line.provider(**options)


async def test_what_cannot_be_expressed_is_not_sent(line):
    """Neither another endpoint nor a field without words for it."""
    with pytest.raises(BadRequest) as caught:
        await line.provider().send(call(path="embeddings"))
    assert caught.value.code == "unsupported_endpoint"
    with pytest.raises(BadRequest) as caught:
        await line.provider().send(call(BODY.replace(b"}]}", b'}],"n":2}')))
    assert caught.value.param == "n"
    assert line.requests == []


async def test_headers_of_answers(line):
    """Ids and limits get OpenAI's names, and nothing else of the operator's account comes along."""
    headers = (
        "request-id: req_1\r\nanthropic-ratelimit-requests-remaining: 4\r\nretry-after: 3\r\nx-should-retry: true\r\n"
        "anthropic-organization-id: org_1\r\nset-cookie: a=b\r\ncf-ray: 1\r\n"
    )
    line.octets = plain(json.dumps(MESSAGE).encode(), headers=headers)
    response = await line.provider().send(call())
    assert response.headers == [
        (b"content-type", b"application/json"),
        (b"x-request-id", b"req_1"),
        (b"x-ratelimit-requests-remaining", b"4"),
        (b"retry-after", b"3"),
        (b"x-should-retry", b"true"),
    ]
    await response.aclose()


async def test_errors(line):
    """They are translated, and one about the operator's account gets the status for that."""
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low."}}
    line.octets = plain(json.dumps(error).encode(), status="400 Bad Request")
    response = await line.provider().send(call(stream=True))
    assert response.status == 400
    assert json.loads(await body_of(response))["error"]["type"] == "invalid_request_error"
    assert response.status == 402


@pytest.mark.parametrize("cut", [1, 60, len(STREAM) // 2, len(STREAM) - 1])
async def test_streams_cut_anywhere(line, cut):
    """Where the provider's segments end makes no difference."""
    line.octets = streamed(STREAM[:cut], STREAM[cut:])
    body = await body_of(await line.provider().send(call(stream=True)))
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.count(b"data: ") == 1 + 2 + 1 + 1 + 1


async def test_a_stream_that_does_not_say_that_it_is_one(line):
    """It is one all the same where one was asked for."""
    line.octets = streamed(STREAM).replace(b"Content-Type: text/event-stream\r\n", b"")
    assert b"event-stream" not in line.octets
    response = await line.provider().send(call(stream=True))
    assert (b"content-type", b"text/event-stream") in response.headers
    assert (await body_of(response)).endswith(b"data: [DONE]\n\n")


async def test_a_stream_whose_last_event_lacks_its_end(line):
    """It is over all the same."""
    line.octets = streamed(STREAM[:-2])
    assert (await body_of(await line.provider().send(call(stream=True)))).endswith(b"data: [DONE]\n\n")


async def test_a_stream_that_ends_in_an_error(line):
    """The error is the last that comes."""
    line.octets = streamed(STREAM.partition(b"event: content_block_stop")[0] + OVERLOADED)
    body = await body_of(await line.provider().send(call(stream=True)))
    assert b"overloaded_error" in body.rpartition(b"data: ")[2]


@pytest.mark.parametrize("encoding", ["identity", "none", "", "gzip", "GZIP"])
async def test_an_answer_that_is_encoded_against_our_request(line, encoding):
    """It was paid for, so it is read: whole, streamed or an error."""

    def packed(octets):
        return gzip.compress(octets) if encoding.lower() == "gzip" else octets

    header = f"content-encoding: {encoding}\r\n"
    line.octets = plain(packed(json.dumps(MESSAGE).encode()), headers=header)
    assert json.loads(await body_of(await line.provider().send(call())))["object"] == "chat.completion"
    line.octets = streamed(packed(STREAM)).replace(b"\r\n", f"\r\n{header}".encode(), 1)
    assert (await body_of(await line.provider().send(call(stream=True)))).endswith(b"data: [DONE]\n\n")
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    line.octets = plain(packed(json.dumps(error).encode()), status="529 Overloaded", headers=header)
    assert b"overloaded_error" in await body_of(await line.provider().send(call()))


BROKEN = {
    "a stream without its end": streamed(STREAM.partition(b"event: message_stop")[0]),
    "a stream of something else": streamed(b"data: <html>\n\n"),
    "a stream that breaks off": streamed(STREAM[:300], is_whole=False),
    "an event over the limit": streamed(b"data: " + b"x" * 20_000),
    "a long last event": streamed(b"event: ping\n\n" + b"x" * 20_000),
    "no message": plain(b"{}"),
    "no JSON": plain(b"<html>"),
    "a body over the limit": plain(b" " * 20_000),
    "a body that was not compressed": plain(b"{}", headers="content-encoding: gzip\r\n"),
    "a body that is encoded somehow": plain(b"{}", headers="content-encoding: br\r\n"),
    "a compressed body over the limit": plain(gzip.compress(b" " * 20_000), headers="content-encoding: gzip\r\n"),
}


@pytest.mark.parametrize("octets", BROKEN.values(), ids=BROKEN)
async def test_answers_that_are_broken(line, octets):
    """They end in an error, not in an answer that looks whole."""
    line.octets = octets
    with pytest.raises(UpstreamBroken):
        async with asyncio.timeout(5):
            await body_of(await line.provider().send(call(stream=True)))


async def test_closing_breaks_the_connection(line):
    """The provider sees that nobody reads on."""
    line.octets = streamed(STREAM[:200], is_whole=False)
    provider = line.provider()
    response = await provider.send(call(stream=True))
    await response.aclose()
    with pytest.raises(UpstreamBroken):
        await body_of(response)
    await provider.aclose()
