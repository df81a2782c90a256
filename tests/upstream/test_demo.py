import itertools
import json
import time

import pytest
from openai.types import ErrorObject
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from proxy.errors import UpstreamBroken
from proxy.upstream import ProviderCall
from proxy.upstream.demo import DEMO_CONTEXT_TOKENS, DEMO_MODEL, DemoProvider

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is  a\ntollgate?"}]


@pytest.fixture
def demo():
    return DemoProvider("demo", token_interval_s=0)


def call(*, path="chat/completions", body=None, **fields):
    request = {"model": DEMO_MODEL, "messages": HELLO, **fields}
    body = json.dumps(request).encode() if body is None else body
    return ProviderCall(path=path, model=DEMO_MODEL, body=body, headers=[], stream=bool(fields.get("stream")))


async def body_of(response):
    return b"".join([chunk async for chunk in response.chunks()])


async def completion(demo, **fields):
    """A plain answer, as the SDK sees it and checked against the SDK's types."""
    response = await demo.send(call(**fields))
    assert (response.status, response.headers) == (200, [(b"content-type", b"application/json")])
    return ChatCompletion.model_validate_json(await body_of(response), strict=True)


async def raw_chunks(demo, **fields):
    """The JSON of a stream's events, without the end marker."""
    response = await demo.send(call(stream=True, **fields))
    assert response.status == 200
    assert dict(response.headers)[b"content-type"].startswith(b"text/event-stream")
    *events, done, nothing = (await body_of(response)).split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    return [event.removeprefix(b"data: ") for event in events]


async def chunks(demo, **fields):
    return [ChatCompletionChunk.model_validate_json(raw, strict=True) for raw in await raw_chunks(demo, **fields)]


def streamed_text(chunks, *, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


async def refusal(demo, status, **fields):
    response = await demo.send(call(**fields))
    assert (response.status, response.headers) == (status, [(b"content-type", b"application/json")])
    return ErrorObject.model_validate(json.loads(await body_of(response))["error"], strict=True)


async def test_a_plain_answer(demo):
    """It says who answers, what was asked and how to get more, in OpenAI's shape."""
    answer = await completion(demo)
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.index, choice.finish_reason) == (
        "chat.completion",
        DEMO_MODEL,
        0,
        "stop",
    )
    assert choice.message.role == "assistant"
    for part in ("demo provider", "“What is a tollgate?”", "config.toml"):
        assert part in choice.message.content
    assert abs(answer.created - time.time()) < 60


async def test_the_same_request_has_the_same_answer(demo):
    """The id too; another request has another id."""
    one, again, other = await completion(demo), await completion(demo), await completion(demo, temperature=1)
    assert (one.id, one.choices) == (again.id, again.choices)
    assert one.id != other.id


async def test_a_stream_is_the_plain_answer_in_pieces(demo):
    """Role first, then a token a chunk, then the reason of the end; one id throughout; no usage unasked."""
    plain = await completion(demo)
    role, *tokens, end = await chunks(demo)
    assert role.choices[0].delta.role == "assistant"
    assert streamed_text(tokens) == plain.choices[0].message.content
    assert all(token.choices[0].finish_reason is None for token in tokens)
    assert end.choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in [role, *tokens, end]}) == 1
    assert not [raw for raw in await raw_chunks(demo) if b"usage" in raw]


async def test_usage_in_a_stream(demo):
    """The last chunk has it and no choices, all others have null; it is the plain answer's."""
    plain = await completion(demo)
    *others, last = await raw_chunks(demo, stream_options={"include_usage": True})
    assert all(json.loads(raw)["usage"] is None for raw in others)
    usage = ChatCompletionChunk.model_validate_json(last, strict=True)
    assert usage.choices == []
    assert usage.usage == plain.usage
    assert usage.usage.completion_tokens == len(others) - 2


async def test_usage_is_a_count_of_words_and_signs(demo):
    """Four words and two signs went in; sums are right; bytes bound tokens."""
    answer = await completion(demo, messages=[{"role": "user", "content": "One, two  three\n four!"}])
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.total_tokens == 6 + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= len(answer.choices[0].message.content.encode())


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "a", "   a", "a   ", "日本語", "👩‍👩‍👧", "\u2028", "x" * 5000, "..." * 50]
)
async def test_bytes_bound_prompt_tokens(demo, text):
    """Whatever the text, or the estimate would be no bound."""
    answer = await completion(demo, messages=[{"role": "user", "content": text}])
    assert answer.usage.prompt_tokens <= len(text.encode())
    assert streamed_text(await chunks(demo, messages=[{"role": "user", "content": text}])) == (
        answer.choices[0].message.content
    )


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 9}, 3),
        ({"max_tokens": 1}, 1),
    ],
)
async def test_the_maximum_of_tokens(demo, fields, tokens):
    """The smaller counts; the text is a prefix; streams end likewise."""
    whole = await completion(demo)
    answer = await completion(demo, **fields)
    assert answer.usage.completion_tokens == tokens
    assert answer.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content.startswith(answer.choices[0].message.content)
    stream = await chunks(demo, **fields)
    assert streamed_text(stream) == answer.choices[0].message.content
    assert stream[-1].choices[0].finish_reason == "length"


async def test_a_maximum_that_just_suffices(demo):
    """An answer of exactly that many tokens was not cut."""
    tokens = (await completion(demo)).usage.completion_tokens
    assert (await completion(demo, max_tokens=tokens)).choices[0].finish_reason == "stop"


async def test_several_choices(demo):
    """Each is whole, and all are counted."""
    one = await completion(demo)
    three = await completion(demo, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert {choice.message.content for choice in three.choices} == {one.choices[0].message.content}
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    stream = await chunks(demo, n=3)
    assert {streamed_text(stream, index=index) for index in range(3)} == {one.choices[0].message.content}


@pytest.mark.parametrize("stop", ["demo", ["zebra", "demo", "provider"], ["", "demo"]])
async def test_stop_sequences(demo, stop):
    """The text ends before the first of them."""
    whole = (await completion(demo)).choices[0].message.content
    answer = await completion(demo, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index("demo")]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", ["zebra", [], None])
async def test_stop_sequences_that_do_not_occur(demo, stop):
    """They change nothing."""
    assert (await completion(demo, stop=stop)).choices == (await completion(demo)).choices


async def test_stopped_at_the_first_letter(demo):
    """An answer of no tokens is an answer."""
    answer = await completion(demo, stop="H")
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == ("", 0)


async def test_a_long_question_is_cut(demo):
    """The echo is an excerpt, of the last thing that the user said."""
    messages = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": "word " * 100},
        {"role": "assistant", "content": "hm"},
    ]
    text = (await completion(demo, messages=messages)).choices[0].message.content
    assert text.count("word") == 16
    assert "…”" in text
    assert "first" not in text


async def test_content_in_parts(demo):
    """Texts are read, and other parts passed over."""
    parts = [
        {"type": "text", "text": "read {this}"},
        {"type": "image_url", "image_url": {"url": "https://x.test"}},
        {"type": "text", "text": "and that"},
    ]
    text = (await completion(demo, messages=[{"role": "user", "content": parts}])).choices[0].message.content
    assert "“read {this} and that”" in text


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "x"}], [{"role": "user", "content": None}]])
async def test_nothing_was_asked(demo, messages):
    """There is an answer all the same."""
    assert "nothing that it could repeat" in (await completion(demo, messages=messages)).choices[0].message.content


async def test_nulls_and_unknown_fields(demo):
    """Null is the same as absent, and what is not known is passed over."""
    nothing = dict.fromkeys(
        ["stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "stop", "tools", "temperature"]
    )
    assert (await completion(demo, **nothing, zebra=1)).choices == (await completion(demo)).choices


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"stop": 3}, "stop"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options"),
        ({"body": b'{"model": "demo-chat"}'}, None),
        ({"body": b""}, None),
        ({"body": b"{"}, None),
        ({"body": b"[]"}, None),
        ({"body": b'"\xed\xa0\x80"'}, None),
        ({"body": b'{"x": ' + b"[" * 100_000}, None),
    ],
)
async def test_requests_that_cannot_be_served(demo, fields, param):
    """They are refused in OpenAI's shape, naming the field where there is one."""
    error = await refusal(demo, 400, **fields)
    assert (error.type, error.param) == ("invalid_request_error", param)


async def test_a_prompt_over_the_context(demo):
    """It is refused, and one that leaves a token is answered with one."""
    error = await refusal(demo, 400, messages=[{"role": "user", "content": "a " * DEMO_CONTEXT_TOKENS}])
    assert error.code == "context_length_exceeded"
    last = await completion(demo, messages=[{"role": "user", "content": "a " * (DEMO_CONTEXT_TOKENS - 2) + "a"}])
    assert (last.usage.completion_tokens, last.choices[0].finish_reason) == (1, "length")


async def test_other_models_and_paths(demo):
    """There is nothing but the demo model's chat."""
    assert (await refusal(demo, 404, model="gpt-4o")).code == "model_not_found"
    assert "embeddings" in (await refusal(demo, 404, path="embeddings")).message


async def test_closing_stops_the_generation(demo):
    """What was closed cannot be read on, and does not look complete."""
    response = await demo.send(call(stream=True))
    reading = response.chunks()
    for _ in range(3):
        await anext(reading)
    await response.aclose()
    await response.aclose()
    with pytest.raises(UpstreamBroken):
        await anext(reading)
    with pytest.raises(UpstreamBroken):
        await anext(response.chunks())
    await demo.aclose()


async def test_a_body_is_read_once(demo):
    """As over HTTP."""
    response = await demo.send(call())
    await body_of(response)
    with pytest.raises(UpstreamBroken):
        await body_of(response)


async def test_tokens_keep_the_pace(monkeypatch):
    """The first event comes at once, and each other after the interval."""
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("proxy.upstream.demo.asyncio.sleep", pause)
    demo = DemoProvider("demo", token_interval_s=7)
    reading = (await demo.send(call(stream=True))).chunks()
    await anext(reading)
    assert pauses == []
    events = [event async for event in reading]
    assert pauses == list(itertools.repeat(7, len(events)))
