import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.metering import (
    FOLDED_BYTES,
    EventKind,
    Metered,
    ResponseMeter,
    StreamMeter,
    UsageSource,
    failure_status,
    meter_plain,
    stream_meter,
)
from proxy.units import Usage
from proxy.wire.requests import Endpoint
from proxy.wire.usage import read_usage

ROOMY = Usage(input=10_000, output=10_000)
REPORTED = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
INT64_MAX = 2**63 - 1


def event(fields, *, separators=(",", ":"), end=b"\n\n"):
    return b"data: " + json.dumps(fields, separators=separators).encode() + end


def chunk(content=None, /, *, finish=None, **fields):
    delta = {} if content is None else {"content": content}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "c", "object": "chat.completion.chunk", "model": "m-1", "choices": choices} | fields


def usage_chunk(usage=REPORTED, **fields):
    return chunk(choices=[], usage=usage, **fields)


def fed(*events, kept_bytes_max=100_000, **maxima):
    meter = StreamMeter(kept_bytes_max, **maxima)
    return meter, [meter.feed(each) for each in events]


def result(meter, prompt_bytes=40, bound=ROOMY):
    return meter.result(prompt=b"x" * prompt_bytes, bound=bound)


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        (REPORTED, Usage(input=10, output=5)),
        ({"prompt_tokens": 10, "completion_tokens": 5}, Usage(input=10, output=5)),
        ({"prompt_tokens": 10, "total_tokens": 10}, Usage(input=10)),
        ({"completion_tokens": 5, "total_tokens": 15}, Usage(input=10, output=5)),
        ({"completion_tokens": 5}, Usage(output=5)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, Usage()),
        (REPORTED | {"prompt_tokens_details": None, "completion_tokens_details": None}, Usage(input=10, output=5)),
        (REPORTED | {"prompt_tokens_details": {}, "completion_tokens_details": {}}, Usage(input=10, output=5)),
        (REPORTED | {"prompt_tokens_details": {"cached_tokens": 8}}, Usage(input=2, cached_input=8, output=5)),
        (
            REPORTED | {"prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 3, "cache_write_tokens": 2}},
            Usage(input=1, cached_input=4, audio_input=3, cache_write=2, output=5),
        ),
        (
            REPORTED | {"completion_tokens_details": {"reasoning_tokens": 4, "audio_tokens": 1}},
            Usage(input=10, output=4, audio_output=1, reasoning=4),
        ),
        ({"prompt_tokens": 10.0, "completion_tokens": 5.00, "total_tokens": 15.0}, Usage(input=10, output=5)),
        (REPORTED | {"cached_tokens": 8}, Usage(input=2, cached_input=8, output=5)),
        (REPORTED | {"prompt_cache_hit_tokens": 8}, Usage(input=2, cached_input=8, output=5)),
        (REPORTED | {"cache_creation_input_tokens": 8}, Usage(input=2, cache_write=8, output=5)),
        (REPORTED | {"prompt_tokens_details": {"cache_creation_tokens": 8}}, Usage(input=2, cache_write=8, output=5)),
        (
            REPORTED | {"cache_creation_input_tokens": 8, "cache_creation": {"ephemeral_1h_input_tokens": 3}},
            Usage(input=2, cache_write=5, cache_write_1h=3, output=5),
        ),
        (
            {
                "input_tokens": 1,
                "output_tokens": 5,
                "cache_read_input_tokens": 10,
                "cache_creation_input_tokens": 100,
                "cache_creation": {"ephemeral_5m_input_tokens": 40, "ephemeral_1h_input_tokens": 60},
            },
            Usage(input=1, cached_input=10, cache_write=40, cache_write_1h=60, output=5),
        ),
        (
            {
                "input_tokens": 1,
                "output_tokens": 5,
                "cache_creation": {"ephemeral_5m_input_tokens": 40, "ephemeral_1h_input_tokens": 60},
            },
            Usage(input=1, cache_write=40, cache_write_1h=60, output=5),
        ),
        (
            REPORTED
            | {
                "prompt_tokens_details": {
                    "cache_creation_tokens": 8,
                    "cache_creation_token_details": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 8},
                }
            },
            Usage(input=2, cache_write_1h=8, output=5),
        ),
        (
            REPORTED | {"prompt_tokens_details": {"cache_creation_token_details": {"ephemeral_1h_input_tokens": 8}}},
            Usage(input=2, cache_write_1h=8, output=5),
        ),
        (REPORTED | {"cost": 0.1, "new": {"x": []}}, Usage(input=10, output=5)),
        (
            {"prompt_tokens": INT64_MAX - 1, "completion_tokens": 1, "total_tokens": INT64_MAX},
            Usage(input=INT64_MAX - 1, output=1),
        ),
    ],
)
def test_usage_in_disjoint_classes(reported, usage):
    """What OpenAI reports inside of its totals is taken out of them."""
    assert read_usage(json.dumps(reported).encode()) == usage


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        (REPORTED | {"total_tokens": 40}, Usage(input=10, output=30, reasoning=25)),
        (
            REPORTED | {"total_tokens": 40, "completion_tokens_details": {"reasoning_tokens": 25}},
            Usage(input=10, output=30, reasoning=25),
        ),
        (REPORTED | {"total_tokens": 3}, Usage(input=10, output=5)),
    ],
)
def test_hidden_output(reported, usage):
    """A total above its parts is output that was not shown; one below them says nothing."""
    assert read_usage(json.dumps(reported).encode()) == usage


@pytest.mark.parametrize(
    "reported", [{"total_tokens": 12}, {"prompt_tokens": 12}, {"prompt_tokens": 5, "total_tokens": 12}]
)
def test_a_total_without_output(reported):
    """What has no output has only a prompt, under whatever name it is reported."""
    assert read_usage(json.dumps(reported).encode(), has_output=False) == Usage(input=12)
    body = json.dumps({"object": "list", "data": [{"embedding": [1]}], "usage": reported}).encode()
    metered = meter_plain(Endpoint.EMBEDDINGS, body, prompt=b"", bound=ROOMY)
    assert (metered.usage, metered.source) == (Usage(input=12), UsageSource.REPORTED)


def test_overlapping_details():
    """A token in two details counts once, in the dearer class."""
    details = {"cached_tokens": 9, "audio_tokens": 6, "cache_write_tokens": 3}
    reported = json.dumps(REPORTED | {"prompt_tokens_details": details}).encode()
    assert read_usage(reported) == Usage(audio_input=6, cache_write=3, cached_input=1, output=5)


def response_event(kind, **fields) -> bytes:
    return b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n"


TOOLS_BOUND = Usage(input=1000, output=1000, web_search=4)
SEARCHED = {"type": "web_search_call", "action": {"type": "search"}}


@pytest.mark.parametrize(
    ("items", "uses"),
    [
        ([], 0),
        ([SEARCHED] * 3, 3),
        ([{"type": "web_search_call"}, {"type": "web_search_call", "action": None}], 2),
        ([{"type": "web_search_call", "action": {"type": "find_in_page"}}, SEARCHED], 1),
        ([{"type": ["web_search_call"]}, {"type": None}, {}], 0),
        (None, 4),
    ],
)
def test_uses_of_tools_in_a_response(items, uses):
    """Searches count, whatever else there is; an answer without any items tells nothing, so the bound counts."""
    answer = {"usage": {"input_tokens": 10, "output_tokens": 5}} | ({} if items is None else {"output": items})
    body = json.dumps(answer).encode()
    metered = meter_plain(Endpoint.RESPONSES, body, prompt=b"", bound=TOOLS_BOUND)
    assert metered.usage == Usage(input=10, output=5, web_search=uses)
    unasked = meter_plain(Endpoint.RESPONSES, body, prompt=b"", bound=Usage(input=1000, output=1000))
    assert unasked.usage.tool_uses == 0, "nobody asked for tools, so none were held for"


@pytest.mark.parametrize(
    ("events", "kept_bytes_max", "uses"),
    [
        ([("added", 0, "in_progress"), ("added", 1, "in_progress")], 10_000, 2),
        ([("added", 0, "in_progress"), ("done", 0, "search"), ("done", 1, "open_page")], 10_000, 1),
        ([("done", number, "search") for number in range(5)], 10_000, 4),
        ([("done", number, "search") for number in range(2)], 100, 4),
    ],
)
def test_uses_of_tools_in_a_response_that_breaks(events, kept_bytes_max, uses):
    """Each item once, as it was said last; never more than what was held, and that where not all events are known."""
    meter = stream_meter(Endpoint.RESPONSES, kept_bytes_max, counts_tools=True)
    for kind, index, action in events:
        item = {"type": "web_search_call", "action": None if action == "in_progress" else {"type": action}}
        meter.feed(response_event(f"response.output_item.{kind}", output_index=index, item=item))
    meter.feed(response_event("response.output_text.delta", delta="word"))
    metered = meter.result(prompt=b"", bound=TOOLS_BOUND)
    assert (metered.source, metered.usage.web_search) == (UsageSource.COUNTED, uses)


def test_a_response_that_breaks_and_cannot_be_read_has_used_all_its_tools():
    """An item that nobody can read may be any."""
    meter = stream_meter(Endpoint.RESPONSES, 10_000, counts_tools=True)
    meter.feed(b'data: {"type":"response.output_item.done","item":7}\n\n')
    assert meter.result(prompt=b"", bound=TOOLS_BOUND).usage.web_search == 4


@pytest.mark.parametrize(("seen", "told", "uses"), [(2, 0, 2), (1, 3, 3), (0, 0, 0), (2, None, 4)])
def test_uses_that_were_streamed_count_though_the_end_does_not_repeat_them(seen, told, uses):
    """The larger of the two numbers; where the end has no items at all, the bound."""
    meter = stream_meter(Endpoint.RESPONSES, 10_000, counts_tools=True)
    for index in range(seen):
        meter.feed(response_event("response.output_item.done", output_index=index, item=SEARCHED))
    ended = {"usage": {"input_tokens": 10, "output_tokens": 5}}
    ended |= {} if told is None else {"output": [SEARCHED] * told}
    meter.feed(response_event("response.completed", response=ended))
    metered = meter.result(prompt=b"", bound=TOOLS_BOUND)
    assert (metered.source, metered.usage.web_search) == (UsageSource.REPORTED, uses)


def test_searches_beside_text_that_was_not_reported_are_known():
    """Usage without output tells of the prompt and of the tools."""
    meter = stream_meter(Endpoint.CHAT, 10_000, counts_tools=True)
    usage = {"prompt_tokens": 10, "completion_tokens": 0, "num_search_queries": 1}
    meter.feed(b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n')
    meter.feed(b'data: {"choices":[],"usage":' + json.dumps(usage).encode() + b"}\n\n")
    metered = meter.result(prompt=b"", bound=TOOLS_BOUND)
    assert (metered.source, metered.usage.web_search, metered.usage.input) == (UsageSource.COUNTED, 1, 10)


def test_more_uses_than_a_call_may_have_cannot_be():
    """The bound counts, in a stream as in a whole answer; a call that asked for no tools has used none."""
    body = (
        b'{"choices":[{"message":{"content":"x"}}],"usage":'
        + json.dumps(REPORTED | {"num_search_queries": 2**63 - 1}).encode()
        + b"}"
    )
    meter = stream_meter(Endpoint.CHAT, 10_000, counts_tools=True)
    meter.feed(b"data: " + body + b"\n\n")
    streamed = meter.result(prompt=b"", bound=TOOLS_BOUND)
    plain = meter_plain(Endpoint.CHAT, body, prompt=b"", bound=TOOLS_BOUND)
    for metered in (streamed, plain):
        assert (metered.usage.web_search, metered.is_implausible, metered.source) == (4, True, UsageSource.REPORTED)
    unasked = meter_plain(Endpoint.CHAT, body, prompt=b"", bound=Usage(input=1000, output=1000))
    assert (unasked.usage.web_search, unasked.is_implausible) == (0, False)


@pytest.mark.parametrize("usage", ['{"num_search_queries":-1}', "null", "7"])
def test_searches_that_cannot_be_are_no_report(usage):
    """The bound counts."""
    body = b'{"choices":[{"message":{"content":"x"}}],"usage":' + usage.encode() + b"}"
    assert meter_plain(Endpoint.CHAT, body, prompt=b"", bound=TOOLS_BOUND).usage.web_search == 4


IMPLAUSIBLE = [
    {},
    {"total_tokens": 15},
    {"prompt_tokens": None, "completion_tokens": None},
    REPORTED | {"completion_tokens": -1},
    REPORTED | {"total_tokens": -1},
    REPORTED | {"prompt_tokens": "10"},
    REPORTED | {"prompt_tokens": 10.5},
    REPORTED | {"prompt_tokens": True},
    REPORTED | {"prompt_tokens": [10]},
    REPORTED | {"prompt_tokens": 2**63},
    REPORTED | {"prompt_tokens": 10**400},
    REPORTED | {"prompt_tokens": INT64_MAX},
    REPORTED | {"prompt_tokens_details": {"cached_tokens": 11}},
    REPORTED | {"prompt_tokens_details": {"cached_tokens": -1}},
    REPORTED | {"prompt_tokens_details": {"audio_tokens": 11}},
    REPORTED | {"prompt_tokens_details": {"cache_write_tokens": 11}},
    REPORTED | {"cache_creation_input_tokens": 2, "cache_creation": {"ephemeral_1h_input_tokens": 3}},
    REPORTED | {"completion_tokens_details": {"reasoning_tokens": 6}},
    REPORTED | {"completion_tokens_details": {"audio_tokens": 6}},
    REPORTED | {"completion_tokens_details": []},
]


@pytest.mark.parametrize("reported", IMPLAUSIBLE)
def test_implausible_usage(reported):
    """What cannot be is no usage."""
    assert read_usage(json.dumps(reported).encode()) is None


tokens = st.none() | st.integers(-3, 50) | st.sampled_from([INT64_MAX, 2**64, 1.5, "7"])
details = st.dictionaries(
    st.sampled_from(["cached_tokens", "audio_tokens", "cache_write_tokens", "reasoning_tokens"]), tokens
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens"]), tokens),
    st.none() | details,
    st.none() | details,
)
def test_no_token_counts_twice(totals, inside, shown):
    """The classes are never negative and add up to what was reported, whatever that is."""
    reported = totals | {"prompt_tokens_details": inside, "completion_tokens_details": shown}
    usage = read_usage(json.dumps(reported).encode())
    if usage is None:
        return
    prompt, completion, total = (totals.get(f"{name}_tokens") for name in ("prompt", "completion", "total"))
    assert min(getattr(usage, name) for name in usage.__struct_fields__) >= 0
    assert usage.input_tokens + usage.output_tokens == max((prompt or 0) + (completion or 0), total or 0)
    if prompt is not None:
        assert usage.input_tokens == prompt
    assert usage.reasoning <= usage.output_tokens


@given(st.binary())
def test_any_bytes_for_usage(reported):
    """Garbage is no usage, and no surprise."""
    assert read_usage(reported) is None or isinstance(read_usage(reported), Usage)


# ---- plain answers


def answer(message=None, **fields):
    message = message or {"role": "assistant", "content": "Hello, you."}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps({"id": "c", "object": "chat.completion", "model": "m-1", "choices": choices} | fields).encode()


def plain(body, bound=ROOMY, **maxima):
    return meter_plain(Endpoint.CHAT, body, prompt=b"x" * 41, bound=bound, **maxima)


def test_a_plain_answer_that_reports():
    """Its usage is taken as it is, and its model is known."""
    assert plain(answer(usage=REPORTED)) == Metered(Usage(input=10, output=5), UsageSource.REPORTED, "m-1")


@pytest.mark.parametrize(("said", "known"), [("flex", "flex"), (None, None), (7, None), ({}, None)])
def test_the_service_tier_that_served(said, known):
    """As the provider says it, in answers and in streams of either shape; what is no name is none."""
    assert plain(answer(usage=REPORTED, service_tier=said)).service_tier == known
    meter, _ = fed(event(chunk("x")), event(usage_chunk(service_tier=said)))
    assert result(meter).service_tier == known
    responded = {"type": "response.completed", "response": {"usage": REPORTED, "service_tier": said}}
    streamed = ResponseMeter(1000)
    streamed.feed(event(responded))
    assert result(streamed).service_tier == known


def test_reported_usage_is_not_cut_to_the_bound():
    """Reported is what the provider bills, even above the reservation; the ledger knows what to do."""
    assert plain(answer(usage=REPORTED), bound=Usage(input=1, output=1)).usage == Usage(input=10, output=5)


@pytest.mark.parametrize("fields", [{}, {"usage": None}])
def test_a_plain_answer_that_reports_nothing(fields):
    """It is counted, at four bytes a token, rounded up."""
    assert plain(answer(**fields)) == Metered(Usage(input=11, output=3), UsageSource.COUNTED, "m-1")


@pytest.mark.parametrize("reported", [*IMPLAUSIBLE, 7, "x", []])
def test_a_plain_answer_that_reports_nonsense(reported):
    """It is counted, and worth an alarm."""
    metered = plain(answer(usage=reported))
    assert metered == Metered(Usage(input=11, output=3), UsageSource.COUNTED, "m-1", is_implausible=True)


@pytest.mark.parametrize(
    ("maxima", "is_implausible"),
    [
        ({"tokens_max": 15}, False),
        ({"tokens_max": 14}, True),
    ],
)
def test_usage_above_what_the_model_can_do(maxima, is_implausible):
    """It is implausible from the first token above."""
    metered = plain(answer(usage=REPORTED), **maxima)
    assert (metered.is_implausible, metered.source == UsageSource.COUNTED) == (is_implausible, is_implausible)
    meter, _ = fed(event(usage_chunk()), **maxima)
    assert meter.is_implausible is is_implausible


SCORED = {"prompt_tokens": 100, "completion_tokens": 0, "total_tokens": 100}


@pytest.mark.parametrize(
    ("bound", "output", "source"),
    [(ROOMY, 3, UsageSource.COUNTED), (Usage(input=200), 0, UsageSource.REPORTED)],
)
def test_text_beside_a_usage_without_output(bound, output, source):
    """The prompt that was reported is charged, and the text counted on top, where there may be any."""
    metered = plain(answer(usage=SCORED), bound=bound)
    assert (metered.usage, metered.source) == (Usage(input=100, output=output), source)
    meter, _ = fed(event(chunk("Hello, you.")), event(usage_chunk(SCORED)))
    assert (result(meter, bound=bound).usage, result(meter, bound=bound).source) == (metered.usage, source)


def test_a_usage_without_output_takes_no_output_back():
    """What was reported as written stays so."""
    meter, _ = fed(event(chunk("x", usage=REPORTED)), event(chunk("1234")), event(usage_chunk(SCORED)))
    assert result(meter).usage == Usage(input=10, output=6)


def test_many_usages_without_output_take_linear_time():
    """A provider that reports nothing written with every chunk does not stop the server."""
    events = [event(chunk("Hello")), event(chunk("", usage=SCORED))] * 4000
    started = time.perf_counter()
    fed(*events, kept_bytes_max=4_000_000)
    assert time.perf_counter() - started < 3


def test_everything_that_a_model_writes_is_counted():
    """Text, refusal, reasoning (once, under either name), names and arguments of all kinds of calls, in bytes."""
    message = {
        "content": "ééé",
        "refusal": "12",
        "reasoning": "1234",
        "reasoning_content": "1234",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"type": "custom", "custom": {"name": "cc", "input": "123"}},
        ],
        "function_call": {"name": "g", "arguments": "123"},
    }
    assert plain(answer(message)).usage.output == 6  # 24 bytes
    meter, _ = fed(event({"choices": [{"delta": message}, {"delta": {"content": "more"}}]}))
    assert result(meter).usage.output == 7


def test_the_text_of_completions_is_counted():
    """The older API has its text beside the message."""
    assert plain(json.dumps({"choices": [{"text": "12345678"}]}).encode()).usage.output == 2


@pytest.mark.parametrize(
    "body", [b"", b"<html>oops!</html>", b'{"choices":[{"message":{"content":[1]}}]}', b"[" * 9000]
)
def test_a_plain_answer_that_cannot_be_read(body):
    """It is counted by its bytes."""
    metered = plain(body)
    assert (metered.usage, metered.source) == (Usage(input=11, output=-(-len(body) // 4)), UsageSource.COUNTED)


def test_a_count_stays_within_the_bound():
    """Whatever was written, no more is counted than was reserved for."""
    assert plain(answer(), bound=Usage(input=7, output=2)).usage == Usage(input=7, output=2)
    assert plain(answer(), bound=Usage(input=3, cached_input=4, audio_output=2)).usage == Usage(input=7, output=2)


# ---- streams


def test_a_stream_as_openai_sends_it():
    """The usage chunk at the end is told apart, and its usage taken."""
    meter, kinds = fed(
        event(chunk("", usage=None)),
        event(chunk("Hel", usage=None)),
        event(chunk("lo", usage=None)),
        event(chunk(finish="stop", usage=None)),
        event(usage_chunk()),
        b"data: [DONE]\n\n",
    )
    assert kinds == [EventKind.CONTENT] * 4 + [EventKind.USAGE_ONLY, EventKind.DONE]
    assert result(meter) == Metered(Usage(input=10, output=5), UsageSource.REPORTED, "m-1")


def test_only_events_that_may_report_are_decoded(monkeypatch):
    """Chunks of text with `"usage":null` or `"error": null` cost no decoding."""
    monkeypatch.setattr("proxy.metering._decode_chunk", None)
    monkeypatch.setattr("proxy.metering._decode_written", None)
    quoted = 'say "usage": {"prompt_tokens": 1} and "error": 1'
    _, kinds = fed(
        event(chunk("a", usage=None, error=None)),
        event(chunk("b", usage=None, error=None), separators=(" , ", " :  ")),
        event(chunk(quoted)),
        b"data: [DONE]\n\n",
    )
    assert kinds == [EventKind.CONTENT] * 3 + [EventKind.DONE]


def test_usage_in_a_text_is_no_usage():
    """Neither quoted in a content nor nested in a choice does it count."""
    inner = {"usage": REPORTED, "error": {"message": "x"}}
    meter, kinds = fed(
        event(chunk(json.dumps(inner))),
        event(chunk(choices=[{"delta": {"content": "four"} | inner}])),
        event(chunk("usage")),
        event(chunk("error", usage=None)),
    )
    assert kinds == [EventKind.CONTENT] * 4
    metered = result(meter)
    text_bytes = len(json.dumps(inner)) + len("four") + len("usage") + len("error")
    assert (metered.source, metered.usage.output) == (UsageSource.COUNTED, -(-text_bytes // 4))
    assert not meter.is_implausible


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\t", " : ")])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b""])
def test_usage_in_any_white_space(separators, end):
    """White space between the tokens and around the lines makes no difference."""
    meter, kinds = fed(event(chunk("x")), event(usage_chunk(), separators=separators, end=end))
    assert kinds == [EventKind.CONTENT, EventKind.USAGE_ONLY]
    assert result(meter).usage == Usage(input=10, output=5)


def test_usage_over_several_lines():
    """An event may spread its data over lines, even between a name and its value."""
    lines = json.dumps(usage_chunk(), indent=1).replace('"usage":', '"usage":\n').encode().splitlines()
    meter, kinds = fed(b"id: 1\n" + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n")
    assert (kinds, result(meter).usage) == ([EventKind.USAGE_ONLY], Usage(input=10, output=5))


def test_usage_beside_text():
    """Usage in the last chunk with choices counts, and that chunk is content too."""
    meter, kinds = fed(event(chunk("Hello")), event(chunk(finish="stop", usage=REPORTED)), b"data: [DONE]\n\n")
    assert kinds == [EventKind.CONTENT, EventKind.USAGE, EventKind.DONE]
    assert result(meter) == Metered(Usage(input=10, output=5), UsageSource.REPORTED, "m-1")


def test_the_latest_usage_wins():
    """Providers that report as they go report totals."""
    meter, _ = fed(*(event(chunk("x", usage={"prompt_tokens": 9, "completion_tokens": i})) for i in range(1, 4)))
    assert result(meter) == Metered(Usage(input=9, output=3), UsageSource.REPORTED, "m-1")


def test_text_after_the_last_usage_is_counted_on_top():
    """A provider that reports at the start and breaks before the end gives no text away."""
    start = event(chunk("", usage={"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}))
    meter, _ = fed(start, event(chunk("12345678")), event(chunk("9")))
    assert result(meter) == Metered(Usage(input=9, output=3), UsageSource.COUNTED, "m-1")
    assert result(meter, bound=Usage(input=9, output=2)).usage == Usage(input=9, output=2)
    assert result(meter, bound=Usage()).usage == Usage(input=9)


def test_an_end_without_text_after_the_usage():
    """A chunk that only says why the answer ended makes the usage no less sure."""
    meter, _ = fed(event(chunk("Hello", usage=REPORTED)), event(chunk(finish="stop")))
    assert result(meter).source == UsageSource.REPORTED


def test_a_first_chunk_as_azure_sends_it():
    """Empty choices without usage are content: the verdict on the prompt."""
    meter, kinds = fed(event(chunk(choices=[], prompt_filter_results=[{"prompt_index": 0}])), event(usage_chunk()))
    assert kinds == [EventKind.CONTENT, EventKind.USAGE_ONLY]
    assert result(meter).source == UsageSource.REPORTED


@pytest.mark.parametrize("choices", [[], None])
def test_a_chunk_of_usage_alone(choices):
    """Without choices there is nothing else in it for a client."""
    assert fed(event(usage_chunk() | {"choices": choices}))[1] == [EventKind.USAGE_ONLY]


def test_a_stream_without_usage():
    """It is counted by its text, not by what is around it."""
    meter, _ = fed(event(chunk("")), event(chunk("Hello, ")), event(chunk("you.")), b"data: [DONE]\n\n")
    assert result(meter) == Metered(Usage(input=10, output=3), UsageSource.COUNTED, "m-1")
    assert result(meter, bound=Usage(input=4, output=1)).usage == Usage(input=4, output=1)


def test_a_stream_of_nothing():
    """What was relayed is nothing, so only the prompt is counted."""
    meter, _ = fed(b": ping\n\n")
    assert result(meter) == Metered(Usage(input=10), UsageSource.COUNTED, is_empty=True)


@pytest.mark.parametrize("reported", [each for each in IMPLAUSIBLE if each is not None])
def test_a_stream_that_reports_nonsense(reported):
    """It is counted, worth an alarm, and the chunk is still the one that clients need not see."""
    meter, kinds = fed(event(chunk("Hello, you.")), event(usage_chunk(reported)))
    assert kinds == [EventKind.CONTENT, EventKind.USAGE_ONLY]
    assert result(meter) == Metered(Usage(input=10, output=3), UsageSource.COUNTED, "m-1", is_implausible=True)


def test_plausible_usage_outlives_nonsense():
    """The latest usage that can be right is taken, with an alarm."""
    meter, _ = fed(event(usage_chunk()), event(usage_chunk({"prompt_tokens": -1})))
    assert result(meter) == Metered(Usage(input=10, output=5), UsageSource.REPORTED, "m-1", is_implausible=True)


@pytest.mark.parametrize(
    "done",
    [
        b"data: [DONE]\n\n",
        b"data:[DONE]\n\n",
        b"data: [DONE]\r\n\r\n",
        b"data: [DONE] \r\r",
        b"data: [DONE]",
        b"id: 1\ndata: [DONE]\n\n",
    ],
)
def test_the_end_marker(done):
    """It is known in all its spellings, and with the end of the stream in place of its empty line."""
    assert fed(done)[1] == [EventKind.DONE]


@pytest.mark.parametrize("other", [b": OPENROUTER PROCESSING\n\n", b"event: ping\n\n", b"\n\n", b"", b"id: [DONE]\n\n"])
def test_events_without_data(other):
    """They are neither content nor an end."""
    assert fed(other)[1] == [EventKind.OTHER]


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("error", [{"message": "overloaded", "code": 503}, "overloaded"])
def test_an_error_in_the_stream(error, separators):
    """It is told apart, also beside choices, and is no text."""
    meter, kinds = fed(
        event(chunk("four")),
        event({"error": error}, separators=separators),
        event(chunk(error=error, choices=[]), separators=separators),
    )
    assert kinds == [EventKind.CONTENT, EventKind.ERROR, EventKind.ERROR]
    assert result(meter).usage.output == 1


def test_chunks_that_cannot_be_read():
    """They are content, and count by their bytes."""
    broken = [b"data: 12345678\n\n", b'data: {"choices":7}\n\n', b'data: {"usage":{},"choices":7}\n\n', b'data: {"ch']
    meter, kinds = fed(*broken)
    assert kinds == [EventKind.CONTENT] * 4
    assert result(meter).usage.output == -(-(8 + 13 + 24 + 4) // 4)


@pytest.mark.parametrize("kind", [StreamMeter, ResponseMeter])
@pytest.mark.parametrize("usage_at", [None, 500])
def test_of_a_long_stream_its_text_is_kept(kind, usage_at):
    """And counted as if all of its events were there, in order and apart for each choice."""
    events = []
    for number in range(3000):
        if kind is ResponseMeter:
            fields = {"item_id": f"i{number % 2}", "output_index": number % 2, "delta": f"w{number} "}
            events.append(response_event("response.output_text.delta", **fields))
        else:
            choice = {"index": number % 2, "delta": {"content": f"w{number} "}, "finish_reason": None}
            events.append(event(chunk(choices=[choice])))
        if number == usage_at and kind is StreamMeter:
            events.append(event(usage_chunk()))
    folding, whole = kind(10**7), kind(10**7, keeps_events=True)
    for each in events:
        assert folding.feed(each) is whole.feed(each)
    assert sum(map(len, folding._kept)) <= FOLDED_BYTES < sum(map(len, whole._kept))
    seen = []

    class Recorder:
        def prompt(self, body):
            return 0

        def texts(self, texts):
            seen.append(list(texts))
            return sum(map(len, seen[-1]))

    results = [meter.result(prompt=b"", bound=ROOMY, counter=Recorder()) for meter in (folding, whole)]
    assert results[0] == results[1]
    assert sorted(seen[0]) == sorted(seen[1])


def test_what_is_kept_has_a_limit():
    """Beyond it, text is reckoned by its share of what was kept."""
    events = [event(chunk("12345678")) for _ in range(100)]
    meter, _ = fed(*events, kept_bytes_max=10 * len(events[0]))
    assert sum(map(len, meter._kept)) <= 10 * len(events[0])
    assert result(meter).usage.output == 200
    blind, _ = fed(*events, kept_bytes_max=0)
    assert result(blind).usage.output == -(-100 * (len(events[0]) - len(b"data: \n\n")) // 4)


@settings(deadline=None)
@given(st.lists(st.binary() | st.sampled_from([event(usage_chunk()), event(chunk("x")), b'data: {"error": {}}\n\n'])))
def test_any_events(events):
    """Whatever a provider sends has a kind and a result, and a count stays within its bound."""
    meter, kinds = fed(*events, kept_bytes_max=100)
    assert len(kinds) == len(events)
    metered = result(meter, bound=Usage(input=3, output=2))
    assert metered.source == UsageSource.REPORTED or (
        metered.usage.input_tokens <= 10 and metered.usage.output_tokens <= 5
    )


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b'{"error": {"message": "x", "code": 429}}', 429),
        (b'{"error": {"message": "x", "code": "503"}}', 503),
        (b'{"error": {"message": "x", "code": "model_overloaded"}}', 502),
        (b'{"error": {"message": "x", "code": 200}}', 502),
        (b'{"error": {"message": "x", "code": true}}', 502),
        (b'{"error": "overloaded", "choices": []}', 502),
        (b'{"error": null, "choices": []}', None),
        (b'{"error": {"code": 500}, "choices": [{"index": 0}]}', None),
        (b'{"choices": [{"message": {"content": "an \\"error\\""}}]}', None),
        (b'{"error": broken', None),
        (b'{"error": {"code": "server_error"}, "output": []}', 502),
        (b'{"error": {"code": "server_error"}, "output": [{"type": "message"}]}', None),
        (b'{"type": "error", "code": "429", "message": "x"}', 429),
        (b'{"type": "error", "code": "rate_limit_exceeded", "message": "x"}', 502),
        (b'{"type": "response.output_text.delta", "delta": "error"}', None),
    ],
)
def test_failure_status(answer, status):
    """An error in place of an answer stands for a status; beside choices it is only a remark."""
    assert failure_status(answer) == status


def test_usage_as_groq_sends_it():
    """Unasked, it is in a field of its own; what is beside it is content."""
    meter, kinds = fed(event(chunk("Hi")), event(chunk(finish="stop", x_groq={"id": "r", "usage": REPORTED})))
    assert kinds == [EventKind.CONTENT, EventKind.CONTENT]
    assert result(meter) == Metered(Usage(input=10, output=5), UsageSource.REPORTED, "m-1")


@pytest.mark.parametrize("x_groq", [None, "x", {"usage": None}, {"usage": 3}, {"error": {"x": '"usage": {'}}])
def test_other_fields_of_groq(x_groq):
    """Without usage in it, the field says nothing."""
    meter, _ = fed(event(chunk("12345678", x_groq=x_groq)))
    assert result(meter).usage.output == 2


@pytest.mark.parametrize("half", ["\ud83d", "\ude00\ud83d", "\\\ud83d"])
def test_half_a_character(half):
    """A text that holds one is read all the same, whatever else is beside it."""
    meter, kinds = fed(event(chunk(half)), event(usage_chunk(model=half)))
    assert kinds == [EventKind.CONTENT, EventKind.USAGE_ONLY]
    assert (result(meter).source, result(meter).usage) == (UsageSource.REPORTED, Usage(input=10, output=5))
    plain = json.dumps({"choices": [{"message": {"content": half * 4}}]}).encode()
    assert meter_plain(Endpoint.CHAT, plain, prompt=b"", bound=ROOMY).usage.output <= 3 * len(half)


ODD_RESPONSES = [
    {"model": 5},
    {"output": [{"type": "tool_search_call", "arguments": {"query": "x"}}]},
    {"output": [{"type": "message", "content": "not a list"}, None]},
    {"output": {}},
]


@pytest.mark.parametrize("odd", ODD_RESPONSES)
def test_usage_beside_an_output_of_any_shape(odd):
    """What a response holds besides does not hide its usage, nor that it has ended."""
    whole = {"usage": {"input_tokens": 10, "output_tokens": 5}, **odd}
    meter = stream_meter(Endpoint.RESPONSES, 10_000)
    ended = {"type": "response.completed", "item_id": 7, "item": "x", "response": whole}
    assert meter.feed(event(ended)) is EventKind.DONE
    metered = meter_plain(Endpoint.RESPONSES, json.dumps(whole).encode(), prompt=b"", bound=ROOMY)
    assert (metered.usage, metered.source) == (Usage(input=10, output=5), UsageSource.REPORTED)
    assert (result(meter).usage, result(meter).source) == (metered.usage, metered.source)


def test_what_cannot_be_read_of_a_response_is_counted():
    """An item in an unknown shape counts by its bytes, the others by their text."""
    odd = {"type": "message", "content": "1234"}
    items = [odd, {"type": "message", "content": [{"text": "12345678"}]}, {"name": "four\ud83d"}]
    whole = json.dumps({"output": items}).encode()
    metered = meter_plain(Endpoint.RESPONSES, whole, prompt=b"", bound=ROOMY)
    assert metered.usage.output == -(-(len(json.dumps(odd)) + 8 + 4 + 3) // 4)


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete", "response.failed"])
def test_text_that_comes_with_the_end_of_a_response_only(kind):
    """It is counted where nothing came before it, and not a second time where something did."""
    items = [{"type": "message", "content": [{"type": "output_text", "text": "12345678"}]}]
    ended = event({"type": kind, "response": {"usage": None, "output": items}})
    for before in ([], [event({"type": "response.output_text.delta", "delta": "12345678"})]):
        meter = stream_meter(Endpoint.RESPONSES, 10_000)
        for each in (*before, ended):
            meter.feed(each)
        assert (result(meter).usage.output, result(meter).is_empty) == (2, False)


def test_an_end_without_a_response():
    """There is nothing to count in an error."""
    meter = stream_meter(Endpoint.RESPONSES, 10_000)
    meter.feed(event({"type": "error", "message": "x"}))
    assert (result(meter).usage.output, result(meter).is_empty) == (0, True)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_does_not_have(number):
    """Python writes them all the same; they hide neither the usage nor the text beside them."""
    choice = {"message": {"content": "1234, NaN "}, "delta": {"content": "1234"}, "logprobs": [{"logprob": number}]}
    odd = {"model": "m", "choices": [choice], "odd": [number, number], "usage": REPORTED}
    metered = plain(json.dumps(odd).encode())
    assert (metered.usage, metered.source) == (Usage(input=10, output=5), UsageSource.REPORTED)
    meter, _ = fed(event({"choices": [choice]}))
    assert result(meter).usage.output == 4
    meter.feed(event(odd))
    assert result(meter).usage == Usage(input=10, output=5)


def test_the_name_of_a_tool_in_a_response_is_counted():
    """It comes with the item that its arguments belong to."""
    meter = stream_meter(Endpoint.RESPONSES, 10_000)
    for index in range(2):
        item = {"type": "function_call", "name": "12345678", "arguments": ""}
        meter.feed(event({"type": "response.output_item.added", "output_index": index, "item": item}))
        meter.feed(event({"type": "response.output_item.done", "output_index": index, "item": item}))
    assert result(meter).usage.output == 4
