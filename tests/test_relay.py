"""The relay of one stream, without a network: wherever its bytes are cut, the same comes out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import UpstreamBroken
from proxy.metering import StreamMeter, stream_meter
from proxy.relay import Head, StreamRelay
from proxy.units import Usage
from proxy.wire.requests import Endpoint

ROOMY = Usage(input=10_000, output=10_000)


class Written:
    """An answer that keeps what is written to it."""

    def __init__(self) -> None:
        self.body = b""
        self.is_started = False
        self.is_ended = False

    async def start(self, _status, _headers) -> None:
        self.is_started = True

    async def write(self, chunk) -> None:
        assert self.is_started
        self.body += chunk

    async def end(self, chunk=b"") -> None:
        await self.write(chunk)
        self.is_ended = True


class EarlyError(Exception):
    pass


async def relayed(chunks, *, endpoint=Endpoint.CHAT, shows_usage=False, event_bytes_max=10_000):
    """What a client gets of a stream that comes in `chunks`, and what is charged for it; or what was raised."""
    answer = Written()
    meter: StreamMeter = stream_meter(endpoint, 100_000, tokens_max=10_000)
    relay = StreamRelay(
        answer,
        meter,
        Head(200, []),
        provider="p",
        shows_usage=shows_usage,
        event_bytes_max=event_bytes_max,
        keep_alive_s=60,
        raises_early=EarlyError,
        on_first=lambda: None,
    )

    async def coming():
        for chunk in chunks:
            yield chunk

    source = coming()
    try:
        await relay.forward(source)
    except (EarlyError, UpstreamBroken) as exc:
        return type(exc), answer.body
    metered = meter.result(prompt=b"x" * 40, bound=ROOMY)
    relay.add_usage(metered.usage)
    relay.tail.price(7)
    await relay.end(source, relay.tail.bytes(), rest_s_max=5)
    assert answer.is_ended
    return answer.body, metered, relay.has_failed


def event(fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 4}
PIECES = st.sampled_from(
    [
        event({"choices": [{"index": 0, "delta": {"content": "Hi"}}], "usage": None}),
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE}),
        event({"choices": [], "usage": USAGE}),
        event({"choices": [], "usage": {"prompt_tokens": -1}}),
        event({"error": {"message": "no", "code": 429}}),
        event({"type": "response.output_text.delta", "item_id": "i", "delta": "Hi"}),
        event({"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}),
        event({"type": "response.failed", "response": {"error": {"message": "no"}}}),
        b'data: {"choices": [],\r\ndata: "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\r\n\r\n',
        b'data: {"\xff": 1, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n',
        b'data: {"x": "\\ud800", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "a": 1, "a": 2}}\n\n',
        b"data: [DONE]\n\n",
        b"data: [DONE]\r\n\r\n",
        b": ping\n\n",
        b"id: 7\n\n",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"data: ",
        b"\xff\x00",
    ]
)
streams = st.lists(PIECES, max_size=7).map(b"".join)


@settings(deadline=None, max_examples=300)
@given(streams, st.lists(st.integers(0, 400), max_size=6), st.sampled_from(Endpoint), st.booleans())
async def test_cuts_make_no_difference(stream, cuts, endpoint, shows_usage):
    """Neither to the client nor to the charge."""
    ends = sorted({min(cut, len(stream)) for cut in cuts})
    chunks = [stream[i:j] for i, j in zip([0, *ends], [*ends, len(stream)], strict=True) if i < j]
    whole = await relayed([stream] if stream else [], endpoint=endpoint, shows_usage=shows_usage)
    assert await relayed(chunks, endpoint=endpoint, shows_usage=shows_usage) == whole
    single = [stream[i : i + 1] for i in range(len(stream))]
    assert await relayed(single, endpoint=endpoint, shows_usage=shows_usage) == whole


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=30) | PIECES, max_size=6), st.sampled_from(Endpoint), st.booleans())
async def test_any_stream_comes_to_an_end(chunks, endpoint, shows_usage):
    """Whatever comes is relayed, or refused as what it is: no other exception leaves the relay."""
    outcome = await relayed([chunk for chunk in chunks if chunk], endpoint=endpoint, shows_usage=shows_usage)
    assert isinstance(outcome[0], bytes) or outcome[0] in {EarlyError, UpstreamBroken}


@pytest.mark.parametrize("chunks", [[], [b": ping"], [b"{}"], [b'{"error": {"code": 429}}']])
async def test_a_stream_without_an_event_is_none(chunks):
    """It is refused, and nothing of it reaches the client, which gets an error of its own."""
    assert await relayed(chunks) == (UpstreamBroken, b"")


@pytest.mark.parametrize("stream", [b": ping\n\n", b"\n\n\n", b"event: ping\n\n: x", b"id: 1\r\n\r\n"])
async def test_a_stream_of_comments_is_none(stream):
    """What it has of events is relayed, and then it is broken: nothing was said."""
    failure, body = await relayed([stream])
    assert failure is UpstreamBroken
    assert stream.startswith(body)


async def test_events_before_one_that_is_too_long_are_delivered():
    """Whether they come in one piece with it or not."""
    first, second = event({"choices": [{"delta": {"content": "a"}}]}), b"data: " + b"x" * 200
    for chunks in ([first + second], [first, second], [first + second, b"y"]):
        assert await relayed(chunks, event_bytes_max=100) == (UpstreamBroken, first)


async def test_what_comes_between_the_usage_and_the_end_is_held_within_a_limit():
    """A provider that never ends does not fill the memory; what was relayed before stays so."""
    content, usage = event({"choices": [{"delta": {"content": "a"}}]}), event({"choices": [], "usage": USAGE})
    pings = [b": ping\n\n"] * 100
    assert await relayed([content, usage, *pings], shows_usage=True, event_bytes_max=200) == (UpstreamBroken, content)
    body, *_ = await relayed([content, usage, *pings[:10], b"data: [DONE]\n\n"], shows_usage=True, event_bytes_max=200)
    assert body.endswith(b"data: [DONE]\n\n")
