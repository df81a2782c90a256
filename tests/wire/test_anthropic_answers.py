import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from proxy.metering import StreamMeter, failure_status, read_usage
from proxy.units import Usage
from proxy.wire.anthropic_answers import _KNOWN, Chunks, NotAMessage, completion, failure
from proxy.wire.sse import EventSplitter, event_data
from tests.published_messages import OVERLOADED, STREAMS

MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-opus-5",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 5},
}


def translated(octets, *, segment_bytes=None):
    """The events that a stream becomes, fed in segments."""
    splitter, chunks = EventSplitter(10**6), Chunks(1_700_000_000)
    size = segment_bytes or len(octets)
    out = b""
    for start in range(0, len(octets), size):
        for event in splitter.feed(octets[start : start + size]):
            out += chunks.feed(event)
    return EventSplitter(10**6).feed(out), chunks


def snapshot(events):
    """What OpenAI's SDK makes of a stream."""
    state = ChatCompletionStreamState()
    for event in events:
        data = event_data(event)
        if data != b"[DONE]":
            state.handle_chunk(ChatCompletionChunk.model_validate_json(data))
    return state.current_completion_snapshot


def whole(**fields):
    answer = ChatCompletion.model_validate_json(completion(json.dumps({**MESSAGE, **fields}).encode(), 1))
    return answer, answer.choices[0]


@pytest.mark.parametrize("published", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("segment_bytes", [None, 1])
def test_published_streams(published, segment_bytes):
    """OpenAI's SDK reads out of them what they say, wherever they were cut on the way."""
    events, chunks = translated(published.octets, segment_bytes=segment_bytes)
    assert chunks.is_over
    assert events[-1] == b"data: [DONE]\n\n"
    seen = snapshot(events)
    choice = seen.choices[0]
    assert (seen.id, seen.model) == ("msg_1nZdL29xx5MUA1yADyHTEsnR8uuvGzszyY", "claude-opus-4-7")
    assert (choice.message.content or "", choice.finish_reason) == (published.content, published.finish)
    assert choice.message.refusal == published.refusal
    calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    assert calls == published.calls
    extra = choice.message.model_extra
    assert extra.get("reasoning_content", "") == published.reasoning
    assert extra.get("thinking_blocks", []) == published.thinking_blocks
    assert read_usage(seen.usage.model_dump_json().encode()) == Usage(**published.usage)


@pytest.mark.parametrize("published", STREAMS.values(), ids=STREAMS)
def test_published_streams_are_metered(published):
    """The meter of chat completions finds the usage in the last chunk, in Anthropic's classes."""
    meter = StreamMeter(10**6)
    for event in translated(published.octets)[0]:
        meter.feed(event)
    metered = meter.result(prompt=b"{}", bound=Usage(input=10**6, output=10**6))
    assert (metered.source, metered.usage) == ("reported", Usage(**published.usage))


@pytest.mark.parametrize("name", ["basic", "caches"])
def test_a_stream_that_breaks_off(name):
    """What went in is known from the beginning, and what came out is counted."""
    events, _ = translated(STREAMS[name].octets)
    meter = StreamMeter(10**6)
    for event in events[:2]:
        meter.feed(event)
    metered = meter.result(prompt=b"{}" * 500, bound=Usage(input=10**6, output=10**6))
    expected = {
        "basic": Usage(input=25, output=1 + 2),
        "caches": Usage(input=25, cached_input=5, cache_write=10, output=4),
    }
    assert (metered.source, metered.usage) == ("counted", expected[name])


def test_an_error_before_any_content():
    """It is the first thing that comes, with the status that its word means."""
    start = STREAMS["basic"].octets.partition(b"event: content_block_start")[0]
    events, chunks = translated(start + OVERLOADED)
    assert (len(events), chunks.is_over) == (1, True)
    assert failure_status(event_data(events[0])) == 529
    assert json.loads(event_data(events[0])) == {
        "error": {"message": "Overloaded", "type": "overloaded_error", "param": None, "code": "overloaded_error"}
    }


def test_nothing_comes_after_an_error():
    """There is no usage and no end marker."""
    before, after = STREAMS["basic"].octets.split(b"event: content_block_stop")
    events, _ = translated(before + OVERLOADED + b"event: content_block_stop" + after)
    assert b"overloaded_error" in events[-1]


def test_a_stream_without_a_reason_for_its_end():
    """It ends all the same, as far as a client can tell."""
    octets = STREAMS["basic"].octets
    start, end = octets.index(b"event: message_delta"), octets.index(b"event: message_stop")
    assert snapshot(translated(octets[:start] + octets[end:])[0]).choices[0].finish_reason == "stop"


def test_arguments_that_come_at_once():
    """Servers that took over the protocol may send them with the block's start."""
    block = '{"type":"tool_use","id":"toolu_1","name":"f","input":{"n":1e400,"n2":12345678901234567890123}}'
    octets = STREAMS["basic"].octets.replace(b'{"type": "text", "text": ""}', block.encode())
    octets = octets.replace(b"text_delta", b"other_delta").replace(b'"text": "', b'"other": "')
    call = snapshot(translated(octets)[0]).choices[0].message.tool_calls[0]
    assert call.function.arguments == '{"n":1e400,"n2":12345678901234567890123}'


@pytest.mark.parametrize("data", [b"{", b'{"type": 3}', b"[]", b'{"type": "message_start", "message": {}}'])
def test_events_that_are_none(data):
    """They are an error, rather than left out of an answer."""
    with pytest.raises(NotAMessage):
        Chunks(1).feed(b"data: " + data + b"\n\n")


@pytest.mark.parametrize("data", [b'{"type": "ping"}', b'{"type": "new", "delta": 7, "message": []}'])
def test_events_of_a_kind_that_is_not_known(data):
    """They are passed over, whatever they have by the names of others."""
    assert Chunks(1).feed(b"data: " + data + b"\n\n") == b""


BEGUN = {"input_tokens": 25, "output_tokens": 1}


def answering(*events, begun=BEGUN, ends=({"output_tokens": 9},)):
    """What OpenAI's SDK and the meter make of a stream of these events, which reports `begun` and then `ends`."""
    started = {"type": "message_start", "message": {**MESSAGE, "content": [], "usage": begun}}
    ended = [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": said} for said in ends]
    chunks, meter = Chunks(1), StreamMeter(10**6)
    out = b"".join(
        chunks.feed(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n")
        for event in (started, *events, *ended, {"type": "message_stop"})
    )
    events = EventSplitter(10**6).feed(out)
    for event in events:
        meter.feed(event)
    metered = meter.result(prompt=b"x" * 400, bound=Usage(input=10**6, output=10**6))
    return snapshot(events).choices[0], metered, events


def block(index, **fields):
    return {"type": "content_block_start", "index": index, "content_block": fields}


def delta(index, kind, **fields):
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


TEXT = (block(0, type="text", text=""), delta(0, "text_delta", text="x" * 400))


def test_a_tool_of_the_providers_is_none_of_the_clients():
    """What it is asked, and what it finds, gets into no call and no text."""
    choice, _, _ = answering(
        block(0, type="server_tool_use", id="srvtoolu_1", name="web_search", input={}),
        delta(0, "input_json_delta", partial_json='{"query": "x"}'),
        {"type": "content_block_stop", "index": 0},
        block(1, type="web_search_tool_result", tool_use_id="srvtoolu_1", content=[{"type": "web_search_result"}]),
        {"type": "content_block_stop", "index": 1},
        block(2, type="tool_use", id="toolu_1", name="f", input={}),
        delta(2, "input_json_delta", partial_json='{"a": 1}'),
        {"type": "content_block_stop", "index": 2},
    )
    calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert (calls, choice.message.content) == ([("toolu_1", "f", '{"a": 1}')], "")


def test_blocks_that_do_not_end_before_the_message_does():
    """They are whole all the same: calls with their arguments, and thinking with its signature."""
    choice, _, events = answering(
        block(0, type="thinking", thinking="hm", signature="s"), block(1, type="tool_use", id="t", name="f", input={})
    )
    assert choice.message.tool_calls[0].function.arguments == "{}"
    (thought,) = choice.message.model_extra["thinking_blocks"]
    assert (thought["thinking"], thought["signature"]) == ("hm", "s")
    assert b'"finish_reason":"stop"' in events[-3]


def test_blocks_and_deltas_of_kinds_that_are_not_known():
    """They are passed over, whatever they have by the names of others."""
    news = (
        block(1, type="new", text={"a": 1}, data=[1], id=2),
        delta(1, "new_delta", text=7, signature={}),
        delta(0, "new_delta", thinking=[]),
    )
    choice, metered, _ = answering(TEXT[0], *news, TEXT[1])
    assert (choice.message.content, metered.usage) == ("x" * 400, Usage(input=25, output=9))
    content = [{"type": "new", "text": {"a": 1}, "id": 2}, {"type": "text", "text": "Hi"}]
    assert whole(content=content)[1].message.content == "Hi"


@pytest.mark.parametrize("ends", [[None], [{}], [{"output_tokens": "many"}], [{"output_tokens": None}], []])
def test_a_stream_that_does_not_say_what_came_out(ends):
    """Its beginning says nothing of that, whatever number is there: the text is counted, and the input reported."""
    choice, metered, events = answering(*TEXT, ends=ends)
    assert choice.message.content == "x" * 400
    assert (metered.source, metered.usage) == ("counted", Usage(input=25, output=1 + 100))
    assert b'"usage"' not in b"".join(events[1:])


def test_a_stream_without_usage():
    """All of it is counted."""
    _, metered, _ = answering(*TEXT, begun=None, ends=[None])
    assert (metered.source, metered.usage) == ("counted", Usage(input=100, output=100))


def test_usage_that_grows():
    """The last number of each class is the right one, and there is one reason of the end."""
    ends = [
        {"output_tokens": 5, "input_tokens": 30, "cache_creation_input_tokens": 4},
        {"output_tokens": 9, "cache_read_input_tokens": 7},
    ]
    _, metered, events = answering(*TEXT, ends=ends)
    assert (metered.source, metered.usage) == ("reported", Usage(input=30, cached_input=7, cache_write=4, output=9))
    assert b"".join(events).count(b'"finish_reason":"stop"') == 1


@pytest.mark.parametrize("number", ["9.0", '"9"', "9"])
def test_whole_numbers_however_they_are_written(number):
    """Some servers have but one type of numbers."""
    ended = b'{"type":"message_delta","delta":{},"usage":{"output_tokens":%b}}' % number.encode()
    assert answering(*TEXT, ended, ends=[])[1].usage == Usage(input=25, output=9)


def test_a_number_that_cannot_be():
    """It is left to the meter, which counts instead and says so."""
    metered = answering(*TEXT, ends=[{"output_tokens": 10**30}])[1]
    assert (metered.source, metered.is_implausible) == ("counted", True)


def test_half_a_character():
    """It is no reason to break off an answer."""
    choice, metered, _ = answering(
        TEXT[0], b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a\\ud83d"}}'
    )
    assert (choice.message.content, metered.usage.output) == ("a\ufffd", 9)


ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)
BLOCK_TYPES = ("text", "thinking", "redacted_thinking", "tool_use", "server_tool_use")
FIELDS = {
    "message": st.fixed_dictionaries({"id": st.just("m"), "model": st.just("m"), "content": st.just([])}),
    "index": st.integers(0, 2),
    "content_block": st.fixed_dictionaries(
        {"type": st.sampled_from(BLOCK_TYPES)},
        optional={name: st.text(max_size=5) for name in ("text", "thinking", "data", "id", "name")}
        | {"input": ANY_JSON},
    ),
    "delta": st.fixed_dictionaries(
        {},
        optional={
            name: st.text(max_size=5)
            for name in ("type", "text", "partial_json", "thinking", "signature", "stop_reason")
        },
    ),
    "usage": st.fixed_dictionaries({}, optional={"input_tokens": st.integers(), "output_tokens": st.integers()}),
    "error": st.fixed_dictionaries({"type": st.text(max_size=5), "message": st.text(max_size=5)}),
}
KINDS = [*sorted(_KNOWN), "ping", "new"]
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS)}, optional={name: st.one_of(good, ANY_JSON) for name, good in FIELDS.items()}
)


@settings(deadline=None, max_examples=200)
@given(st.lists(EVENTS, max_size=8))
def test_any_events(events):
    """Whatever a provider sends in whatever order, OpenAI's types read what comes out, or it is an error."""
    chunks, splitter = Chunks(1), EventSplitter(10**6)
    with suppress(NotAMessage):
        for event in events:
            for out in splitter.feed(chunks.feed(b"data: " + json.dumps(event).encode() + b"\n\n")):
                data = event_data(out)
                if data != b"[DONE]" and not data.startswith(b'{"error"'):
                    ChatCompletionChunk.model_validate_json(data)


# ---- whole answers


def test_text():
    """A plain message, with its usage in OpenAI's words."""
    answer, choice = whole()
    assert (answer.id, answer.model, answer.object, answer.created) == ("msg_1", "claude-opus-5", "chat.completion", 1)
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", "Hi", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("something new", "stop"),
        (None, "stop"),
    ],
)
def test_reasons_of_the_end(stop_reason, finish_reason):
    """Each has OpenAI's word for it."""
    assert whole(stop_reason=stop_reason)[1].finish_reason == finish_reason


def test_a_refusal():
    """Its explanation is the message's refusal; without one there is the reason of the end alone."""
    details = {"type": "refusal", "category": "bio", "explanation": "No."}
    assert whole(stop_reason="refusal", stop_details=details)[1].message.refusal == "No."
    assert whole(stop_reason="refusal", stop_details=None)[1].message.refusal is None


def test_calls_and_thinking():
    """Arguments keep their bytes, and blocks of thinking their signatures and places."""
    content = [
        {"type": "text", "text": "Let me "},
        {"type": "thinking", "thinking": "which?", "signature": "s1"},
        {"type": "text", "text": "see."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"b": 1, "a": [1.50]}},
        {"type": "redacted_thinking", "data": "d"},
        {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
        {"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}},
    ]
    _, choice = whole(content=content, stop_reason="tool_use")
    assert choice.message.content == "Let me see."
    calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("toolu_1", "f", '{"b": 1, "a": [1.5]}'), ("toolu_2", "g", "{}")]
    assert choice.message.model_extra["reasoning_content"] == "which?"
    assert choice.message.model_extra["thinking_blocks"] == [
        {"index": 0, "type": "thinking", "thinking": "which?", "signature": "s1", "position": 1},
        {"index": 1, "type": "redacted_thinking", "data": "d", "position": 3},
    ]


def test_calls_alone():
    """A message without text has none, as OpenAI says it."""
    content = [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]
    assert whole(content=content)[1].message.content is None
    assert whole(content=[])[1].message.content == ""


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": 1, "output_tokens": 2}, Usage(input=1, output=2)),
        (
            {"input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 8},
            Usage(input=1, cached_input=4, cache_write=8, output=2),
        ),
        (
            {"input_tokens": 0, "output_tokens": 9, "output_tokens_details": {"thinking_tokens": 10}},
            Usage(output=9, reasoning=9),
        ),
        (
            {
                "input_tokens": 1,
                "output_tokens": 2,
                "cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 5},
            },
            Usage(input=1, cache_write=3, cache_write_1h=5, output=2),
        ),
        (
            {"input_tokens": 1, "output_tokens": 2, "cache_creation": {"ephemeral_5m_input_tokens": None}},
            Usage(input=1, output=2),
        ),
        ({"input_tokens": 1.0, "output_tokens": 2}, Usage(input=1, output=2)),
        ({"input_tokens": -1, "output_tokens": 2}, None),
        ({"input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": -2}, None),
        ({"output_tokens": 2}, None),
    ],
)
def test_usage(usage, expected):
    """The classes that Anthropic counts beside each other come back apart; what cannot be is left to be counted."""
    reported = json.loads(completion(json.dumps({**MESSAGE, "usage": usage}).encode(), 1)).get("usage")
    assert read_usage(json.dumps(reported).encode()) == expected


@pytest.mark.parametrize("usage", [None, [], {"input_tokens": "many"}, {"input_tokens": 1.5}])
def test_usage_that_cannot_be_read(usage):
    """It is none, and the answer is as good as ever."""
    answer, choice = whole(usage=usage)
    assert (answer.usage, choice.message.content) == (None, "Hi")


@pytest.mark.parametrize(
    ("parts", "asked_for_an_hour", "expected"),
    [
        (None, False, (9, 0)),
        (None, True, (0, 9)),
        ({"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 4}, False, (5, 4)),
        ({"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 4}, True, (5, 4)),
        ({"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 0}, True, (5, 4)),
        ({"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 20}, False, (0, 9)),
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_caches_of_an_hour(parts, asked_for_an_hour, expected, is_stream):
    """They are a class of their own, in which what nobody tells apart is counted if the request asked for them."""
    usage = {"input_tokens": 1, "output_tokens": 2, "cache_creation_input_tokens": 9, "cache_creation": parts}
    message = json.dumps({**MESSAGE, "usage": usage})
    if is_stream:
        chunks = Chunks(1, caches_for_an_hour=asked_for_an_hour)
        begun = f'data: {{"type":"message_start","message":{message}}}\n\n'.encode()
        ended = b'data: {"type":"message_delta","delta":{},"usage":{"output_tokens":2}}\n\n'
        out = b"".join(map(chunks.feed, (begun, ended, b'data: {"type":"message_stop"}\n\n')))
        reported = snapshot(EventSplitter(10**6).feed(out)).usage.model_dump_json().encode()
    else:
        answer = completion(message.encode(), 1, caches_for_an_hour=asked_for_an_hour)
        reported = json.dumps(json.loads(answer)["usage"]).encode()
    assert read_usage(reported) == Usage(input=1, cache_write=expected[0], cache_write_1h=expected[1], output=2)


@pytest.mark.parametrize(("tier", "expected"), [("standard", "default"), ("priority", "priority"), (None, None)])
def test_service_tier(tier, expected):
    """The ordinary one has OpenAI's name."""
    usage = {"input_tokens": 1, "output_tokens": 2, "service_tier": tier}
    assert whole(usage=usage)[0].service_tier == expected


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"id":1,"model":"m","content":[]}', b"\xff"])
def test_bodies_that_are_no_messages(body):
    """They are an error, rather than an empty answer."""
    with pytest.raises(NotAMessage):
        completion(body, 1)


# ---- errors


@pytest.mark.parametrize(
    ("status", "kind", "message", "details", "expected"),
    [
        (400, "invalid_request_error", "messages: too many", None, 400),
        (429, "rate_limit_error", "Slow down.", None, 429),
        (529, "overloaded_error", "Overloaded", None, 529),
        (403, "permission_error", "No.", None, 403),
        (400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API.", None, 402),
        (400, "invalid_request_error", "You have reached your specified API usage limits.", None, 402),
        (
            400,
            "invalid_request_error",
            "tools: no 'billing_error', 'spend_limit' or credit balance is too low",
            None,
            400,
        ),
        (403, "billing_error", "There is a problem with billing.", None, 402),
        (429, "rate_limit_error", "Enough.", {"error_code": "enforced_spend_limit_reached"}, 402),
        (400, "invalid_request_error", "No.", {"error_code": "organization_on_hold"}, 402),
        (
            400,
            "invalid_request_error",
            "No.",
            {"error_code": "image_dimensions_too_large", "paths": ["spend_limit"]},
            400,
        ),
        (400, "invalid_request_error", "No.", ["spend_limit"], 400),
    ],
)
def test_errors(status, kind, message, details, expected):
    """They have OpenAI's shape, and what is about the operator's account is told apart."""
    error = {"type": kind, "message": message} | ({} if details is None else {"details": details})
    seen, body = failure(status, json.dumps({"type": "error", "error": error, "request_id": "req_1"}).encode())
    code = "billing_error" if expected == 402 else kind
    assert seen == expected
    assert json.loads(body) == {"error": {"message": message, "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("overloaded_error", "Overloaded", 529),
        ("invalid_request_error", "Your credit balance is too low to access the API.", 402),
        ("request_too_large", "Too large.", 413),
        ("something_new", "No.", 502),
    ],
)
def test_errors_that_come_as_answers(kind, message, expected):
    """A body with status 200 and an event of a stream say which error they are as well."""
    error = json.dumps({"type": "error", "error": {"type": kind, "message": message}})
    event = Chunks(1).feed(f"data: {error}\n\n".encode())
    assert completion(error.encode(), 1) == event_data(event)
    assert failure_status(event_data(event)) == expected


@pytest.mark.parametrize("body", [b"", b"<html>no</html>", b'{"error": "no"}', b"[]"])
def test_errors_in_no_known_shape(body):
    """They are said to be some error of the provider."""
    status, answer = failure(502, body)
    assert (status, json.loads(answer)["error"]["code"]) == (502, "provider_error")
