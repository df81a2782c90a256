"""The fake provider's endpoints, held against the types of OpenAI's own SDK and read by that SDK."""

import json

import httpx2
import openai
import pytest
from openai.types import Completion, CompletionChoice, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.fakes.provider import FakeProvider

MODEL = "fake-small"
CALLS = [{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "time", "arguments": "{}"}]
ARGUMENTS = ['{"city":"Köln"}', "{}"]
CALL_TOKENS = len("weather" + '{"city":"Koeln"}' + "time" + "{}")
TEXT = "The quick brown fox "


class OpenChoice(CompletionChoice):
    """A choice of a streamed completion; the SDK's type forgets that OpenAI sends null until the last one."""

    finish_reason: str | None


class CompletionChunk(Completion):
    """A chunk of a streamed completion, for which the SDK has no type."""

    choices: list[OpenChoice]


@pytest.fixture
async def provider():
    async with FakeProvider() as running:
        yield running


@pytest.fixture
async def http(provider):
    """A client that reads bytes."""
    headers = {"Authorization": "Bearer key"}
    async with httpx2.AsyncClient(base_url=provider.base_url, headers=headers, timeout=10) as client:
        yield client


@pytest.fixture
async def sdk(provider):
    """The official client."""
    async with openai.AsyncOpenAI(base_url=provider.base_url, api_key="key", max_retries=0) as client:
        yield client


def wish(**behaviour) -> str:
    return f"!fake {json.dumps(behaviour)}"


def said(**behaviour) -> list[dict]:
    return [{"role": "user", "content": wish(**behaviour)}]


async def plain(http, path, shape, **body) -> dict:
    """The JSON of a plain answer, which is of the SDK's type `shape`."""
    answer = await http.post(path, json={"model": MODEL, **body})
    assert answer.status_code == 200, answer.text
    TypeAdapter(shape).validate_json(answer.content)
    return answer.json()


async def chunks(http, path, shape, **body) -> list[dict]:
    """The chunks of a stream that ends well, each of the SDK's type `shape`."""
    answer = await http.post(path, json={"model": MODEL, "stream": True, **body})
    *events, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    for event in events:
        TypeAdapter(shape).validate_json(event.removeprefix("data: "))
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def events(http, **body) -> list[dict]:
    """The events of a streamed response, named and numbered right, each of the SDK's type."""
    answer = await http.post("responses", json={"model": MODEL, "stream": True, **body})
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    seen = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        TypeAdapter(ResponseStreamEvent).validate_python(event)
        seen.append(event)
    return seen


def names(events) -> list[str]:
    """The events' types; deltas that follow one another count as one."""
    types = [event["type"].removeprefix("response.") for event in events]
    return [each for at, each in enumerate(types) if not (each.endswith("delta") and types[at - 1] == each)]


async def test_chat_is_of_the_sdks_types(http):
    """Plain and streamed, whatever the reply is."""
    for behaviour in ({}, {"refusal": "No."}, {"tool_calls": CALLS}, {"usage": "reasoning"}):
        await plain(http, "chat/completions", ChatCompletion, messages=said(**behaviour))
        await chunks(
            http,
            "chat/completions",
            ChatCompletionChunk,
            messages=said(**behaviour),
            stream_options={"include_usage": True},
        )


async def test_exact_text(http, provider):
    """`text` is the reply, counted in bytes and never cut inside a character."""
    whole = await plain(http, "chat/completions", ChatCompletion, messages=said(text="Grüße"))
    cut = await plain(http, "chat/completions", ChatCompletion, messages=said(text="Grüße"), max_tokens=3)
    assert whole["choices"][0]["message"]["content"] == "Grüße"
    assert whole["usage"]["completion_tokens"] == 7
    assert (cut["choices"][0]["message"]["content"], cut["choices"][0]["finish_reason"]) == ("Gr", "length")
    assert provider.journal[1].completion_tokens == 2


async def test_reasoning_comes_on_top_of_an_exact_text(http):
    """The text stays what was asked for, and as many tokens again were thought."""
    seen = await plain(http, "chat/completions", ChatCompletion, messages=said(text="abcd", usage="reasoning"))
    assert seen["choices"][0]["message"]["content"] == "abcd"
    assert seen["usage"]["completion_tokens"] == 8
    assert seen["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


async def test_json_reply(sdk):
    """`json` is what the SDK parses when it gave a schema."""

    class City(BaseModel):
        name: str
        inhabitants: int

    koeln = {"name": "Köln", "inhabitants": 1_087_000}
    chat = await sdk.chat.completions.parse(model=MODEL, messages=said(json=koeln), response_format=City)
    response = await sdk.responses.parse(model=MODEL, input=wish(json=koeln), text_format=City)
    assert chat.choices[0].message.parsed == response.output_parsed == City(**koeln)


@pytest.mark.parametrize("n", [1, 2])
async def test_tool_calls_of_a_chat(http, provider, n):
    """Each choice calls all tools; a stream names the tool first and sends its arguments in pieces."""
    ask = {"messages": said(tool_calls=CALLS), "n": n}
    answer = await plain(http, "chat/completions", ChatCompletion, **ask)
    for choice in answer["choices"]:
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ARGUMENTS
    assert answer["usage"]["completion_tokens"] == n * CALL_TOKENS
    stream = await chunks(http, "chat/completions", ChatCompletionChunk, **ask)
    deltas = [chunk["choices"][0] for chunk in stream if chunk["choices"][0]["index"] == n - 1]
    calls = [choice["delta"]["tool_calls"][0] for choice in deltas if "tool_calls" in choice["delta"]]
    assert [call["function"]["name"] for call in calls if "id" in call] == ["weather", "time"]
    assert all(call["function"]["arguments"] == "" for call in calls if "id" in call)
    texts = ["".join(call["function"]["arguments"] for call in calls if call["index"] == index) for index in (0, 1)]
    assert texts == ARGUMENTS
    assert deltas[-1]["finish_reason"] == "tool_calls"
    assert [served.completion_tokens for served in provider.journal] == [n * CALL_TOKENS] * 2


async def test_tool_calls_stop_at_the_maximum(http):
    """What does not fit is not called, and what half fits is cut."""
    ask = {"messages": said(tool_calls=CALLS), "max_tokens": len("weather") + 3}
    choice = (await plain(http, "chat/completions", ChatCompletion, **ask))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "weather", "arguments": '{"c'}]


async def test_results_of_tools_are_answered_with_text(http):
    """Calls come until their results do; the history's calls and results are part of the prompt."""
    first = said(tool_calls=CALLS[:1], text="Sunny.")
    called = (await plain(http, "chat/completions", ChatCompletion, messages=first))["choices"][0]["message"]
    history = [*first, called, {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "sun"}]
    answer = await plain(http, "chat/completions", ChatCompletion, messages=history)
    assert answer["choices"][0]["message"]["content"] == "Sunny."
    texts = [first[0]["content"], "weather", '{"city":"Koeln"}', "sun"]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts)) + 3 * 4
    again = await plain(http, "chat/completions", ChatCompletion, messages=[*history, *first])
    assert again["choices"][0]["finish_reason"] == "tool_calls"


async def test_refusal(sdk):
    """A refusal has no content, plain and streamed."""
    answer = await sdk.chat.completions.create(model=MODEL, messages=said(refusal="I will not."))
    assert (answer.choices[0].message.content, answer.choices[0].message.refusal) == (None, "I will not.")
    stream = await sdk.chat.completions.create(model=MODEL, messages=said(refusal="I will not."), stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert "".join(delta.refusal or "" for delta in deltas) == "I will not."
    assert not any(delta.content for delta in deltas)


@pytest.mark.parametrize(
    ("prompt", "tokens", "choices"),
    [("Grüße", 7, 1), (["ab", "c"], 3, 2), ([5, 6, 7], 3, 1), ([[5, 6], [7], [8]], 4, 3)],
)
async def test_completions_of_every_kind_of_prompt(http, prompt, tokens, choices):
    """Each prompt is completed, in its order, sixteen tokens unless told otherwise."""
    answer = await plain(http, "completions", Completion, prompt=prompt, n=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * choices))
    assert {choice["text"] for choice in answer["choices"]} == {TEXT[:16]}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (tokens, 16 * 2 * choices)


async def test_completions_take_the_last_wish(http):
    """Of several prompts the last that is a wish is heard."""
    prompt = [wish(tokens=3), wish(tokens=5), "Hello"]
    answer = await plain(http, "completions", Completion, prompt=prompt, max_tokens=100)
    assert [choice["text"] for choice in answer["choices"]] == ["The q"] * 3


async def test_best_of_is_paid_for(http, provider):
    """Replies that were thrown away are counted, though nobody sees them."""
    answer = await plain(http, "completions", Completion, prompt="x", max_tokens=10, n=2, best_of=5)
    assert len(answer["choices"]) == 2
    assert answer["usage"]["completion_tokens"] == 50
    assert (provider.journal[0].completion_tokens, provider.journal[0].unseen_tokens) == (20, 30)
    assert (
        await http.post("completions", json={"model": MODEL, "prompt": "x", "n": 2, "best_of": 1})
    ).status_code == 400
    body = {"model": MODEL, "prompt": "x", "best_of": 2, "stream": True}
    assert (await http.post("completions", json=body)).status_code == 400


async def test_echo_costs_nothing(http):
    """The prompt comes back before the reply, plain and streamed."""
    ask = {"prompt": ["ab", "cd"], "echo": True, "max_tokens": 3}
    answer = await plain(http, "completions", Completion, **ask)
    assert [choice["text"] for choice in answer["choices"]] == ["abThe", "cdThe"]
    assert answer["usage"]["completion_tokens"] == 6
    stream = await chunks(http, "completions", CompletionChunk, **ask)
    texts = [[chunk["choices"][0]["text"] for chunk in stream if chunk["choices"][0]["index"] == at] for at in (0, 1)]
    assert ["".join(bits) for bits in texts] == ["abThe", "cdThe"]


async def test_completions_streamed(http, provider):
    """Bits, the reason, and a chunk of usage if it was asked for."""
    ask = {"prompt": "x", "max_tokens": 10}
    assert all("usage" not in chunk for chunk in await chunks(http, "completions", CompletionChunk, **ask))
    *bits, last = await chunks(http, "completions", CompletionChunk, stream_options={"include_usage": True}, **ask)
    assert [bit["choices"][0]["text"] for bit in bits] == ["The ", "quic", "k ", ""]
    assert bits[-1]["choices"][0]["finish_reason"] == "length"
    assert all(bit["usage"] is None for bit in bits)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 11)
    assert [served.completion_tokens for served in provider.journal] == [10, 10]


@pytest.mark.parametrize(
    ("given", "tokens", "vectors"), [("Grüße", 7, 1), (["ab", "c"], 3, 2), ([5, 6], 2, 1), ([[5, 6], [7]], 3, 2)]
)
async def test_embeddings_of_every_kind_of_input(http, given, tokens, vectors):
    """A vector for each, the prompt counted, no output."""
    answer = await plain(http, "embeddings", CreateEmbeddingResponse, input=given)
    assert [each["index"] for each in answer["data"]] == list(range(vectors))
    assert len({tuple(each["embedding"]) for each in answer["data"]}) == vectors
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


async def test_embeddings_in_both_formats(http, sdk):
    """Base64, which the SDK asks for, holds the same floats; the same text has the same vector."""
    floats = await plain(http, "embeddings", CreateEmbeddingResponse, input="x", dimensions=40, encoding_format="float")
    packed = await http.post("embeddings", json={"model": MODEL, "input": "x", "encoding_format": "base64"})
    assert isinstance(packed.json()["data"][0]["embedding"], str)
    decoded = await sdk.embeddings.create(model=MODEL, input="x", dimensions=40)
    assert decoded.data[0].embedding == floats["data"][0]["embedding"]
    assert len(decoded.data[0].embedding) == 40


async def test_response(sdk, http, provider):
    """A response has the reply as its output and the usage in its own words."""
    await plain(http, "responses", Response, input="Hello", instructions="Be kind.", tools=[])
    response = await sdk.responses.create(
        model=MODEL,
        instructions="Be kind.",
        input=[{"role": "user", "content": [{"type": "input_text", "text": wish(usage="cached")}]}],
    )
    assert (response.status, response.output_text) == ("completed", TEXT)
    prompt = len("Be kind.") + len(wish(usage="cached")) + 4
    assert (response.usage.input_tokens, response.usage.output_tokens) == (prompt, 20)
    assert response.usage.input_tokens_details.cached_tokens == prompt // 2
    assert provider.journal[0].usage["input_tokens"] == len("Hello" + "Be kind.") + 4


async def test_response_streamed(http, provider):
    """The events are those that OpenAI sends, in its order."""
    seen = await events(http, input="Hello")
    assert names(seen) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event["delta"] for event in seen if event["type"].endswith("delta")) == TEXT
    assert seen[0]["response"]["usage"] is None
    final = seen[-1]["response"]
    assert final == await plain(http, "responses", Response, input="Hello") | {
        "id": final["id"],
        "output": final["output"],
    }
    assert (provider.journal[0].completion_tokens, provider.journal[0].usage) == (20, final["usage"])


async def test_response_cut_by_its_maximum(http):
    """It is incomplete, and says why."""
    plainly = await plain(http, "responses", Response, input="Hello", max_output_tokens=7)
    assert (plainly["status"], plainly["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert plainly["usage"]["output_tokens"] == 7
    seen = await events(http, input="Hello", max_output_tokens=7)
    assert names(seen)[-1] == "incomplete"
    assert seen[-1]["response"]["output"][0]["status"] == "incomplete"


async def test_response_that_reasons(http):
    """An item of reasoning goes before the message, and its tokens are in the output's."""
    seen = await events(http, input=wish(usage="reasoning"))
    assert [item["type"] for item in seen[-1]["response"]["output"]] == ["reasoning", "message"]
    usage = seen[-1]["response"]["usage"]
    assert (usage["output_tokens"], usage["output_tokens_details"]) == (20, {"reasoning_tokens": 10})


async def test_response_that_calls_and_is_answered(http, provider):
    """Calls are items with arguments in pieces; once there is an output for them, the reply is text."""
    first = [{"role": "user", "content": wish(tool_calls=CALLS, text="Sunny.")}]
    seen = await events(http, input=first)
    assert names(seen) == [
        "created",
        "in_progress",
        *["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"] * 2,
        "completed",
    ]
    items = seen[-1]["response"]["output"]
    assert [item["arguments"] for item in items] == ARGUMENTS
    assert provider.journal[0].completion_tokens == seen[-1]["response"]["usage"]["output_tokens"] == CALL_TOKENS
    outputs = [{"type": "function_call_output", "call_id": item["call_id"], "output": "sun"} for item in items]
    answer = await plain(http, "responses", Response, input=[*first, *items, *outputs])
    assert answer["output"][0]["content"][0]["text"] == "Sunny."
    texts = len(first[0]["content"]) + CALL_TOKENS + 2 * len("sun")
    assert answer["usage"]["input_tokens"] == texts + 5 * 4


async def test_response_that_refuses(http):
    """A refusal is a part of its own kind."""
    seen = await events(http, input=wish(refusal="I will not."))
    assert names(seen)[4:6] == ["refusal.delta", "refusal.done"]
    assert seen[-1]["response"]["output"][0]["content"] == [{"type": "refusal", "refusal": "I will not."}]


async def test_response_that_fails(http):
    """It ends as failed, streamed after half of the reply, without usage."""
    plainly = await plain(http, "responses", Response, input=wish(failed=True))
    assert (plainly["status"], plainly["error"]["code"], plainly["usage"]) == ("failed", "server_error", None)
    seen = await events(http, input=wish(failed=True))
    assert names(seen)[-2:] == ["output_text.delta", "failed"]
    assert seen[-1]["response"]["error"] == plainly["error"]


async def test_response_without_its_end(http):
    """`no_done` leaves out the last event."""
    assert names(await events(http, input=wish(no_done=True)))[-1] == "output_item.done"


@pytest.mark.parametrize(
    "kept", [{"previous_response_id": "x"}, {"background": True}, {"input": [{"type": "item_reference", "id": "x"}]}]
)
async def test_no_state_is_kept(http, kept):
    """What would need it is refused, and nothing can be retrieved."""
    answer = await http.post("responses", json={"model": MODEL, "input": "x", **kept})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert (await http.get("responses/resp_fake_1")).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {}),
        ("completions", {"prompt": []}),
        ("completions", {"prompt": ["x", 1]}),
        ("completions", {"prompt": "x", "n": "2"}),
        ("embeddings", {}),
        ("embeddings", {"input": ""}),
        ("embeddings", {"input": ["x", ""]}),
        ("embeddings", {"input": [[]]}),
        ("embeddings", {"input": "x", "dimensions": 0}),
        ("embeddings", {"input": "x", "encoding_format": "int8"}),
        ("responses", {}),
        ("responses", {"input": ["x"]}),
        ("responses", {"model": None, "input": "x"}),
        ("chat/completions", {"messages": said(tool_calls=[{"name": "x"}])}),
    ],
)
async def test_what_is_malformed(http, path, body):
    """It is a 400 in OpenAI's shape."""
    answer = await http.post(path, json={"model": MODEL, **body})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


CALLS_OF_EVERY_KIND = [
    ("chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ("completions", lambda text: {"prompt": ["x", text]}),
    ("responses", lambda text: {"input": text}),
]


@pytest.mark.parametrize(("path", "asked"), CALLS_OF_EVERY_KIND)
async def test_faults_strike_every_endpoint(http, provider, path, asked):
    """Statuses, raw bodies, halves and segments are the same wherever they are asked for."""
    for given, status in [({"status": 429, "retry_after": 2}, 429), ({"raw": "odd", "status": 202}, 202)]:
        assert (await http.post(path, json={"model": MODEL, **asked(wish(**given))})).status_code == status
    with pytest.raises(httpx2.RemoteProtocolError):
        await http.post(path, json={"model": MODEL, "stream": True, **asked(wish(half=True))})
    assert not provider.journal[-1].completed
    answer = await http.post(path, json={"model": MODEL, "stream": True, **asked(wish(segment_bytes=7))})
    assert TEXT[:4] in answer.text


@pytest.mark.parametrize(("path", "asked"), CALLS_OF_EVERY_KIND)
@pytest.mark.parametrize("place", ["first", "middle"])
async def test_error_event(http, path, asked, place):
    """The error is the first event of a 200 or comes after half of the reply, and nothing comes after it."""
    given = wish(error_event=place, status=429, error_code=429)
    answer = await http.post(path, json={"model": MODEL, "stream": True, **asked(given)})
    *before, last, _ = answer.text.split("\n\n")
    assert (answer.status_code, bool(before)) == (200, place == "middle")
    event = json.loads(last.rpartition("data: ")[2])
    assert event.get("error", event)["code"] == 429
    plainly = await http.post(path, json={"model": MODEL, **asked(given)})
    assert (plainly.status_code, plainly.json()["error"]["code"]) == (200, 429)


async def test_the_sdk_raises_an_error_event(sdk):
    """An error in a stream is one to the SDK, in chat and in responses."""
    stream = await sdk.chat.completions.create(model=MODEL, messages=said(error_event="middle"), stream=True)
    with pytest.raises(openai.APIError, match="had an error"):
        [chunk async for chunk in stream]
    stream = await sdk.responses.create(model=MODEL, input=wish(error_event="middle"), stream=True)
    assert [event.type async for event in stream][-1] == "error"


@pytest.mark.parametrize(("error_body", "start"), [("html", b"<html>"), ("empty", b""), ("openai", b'{"error"')])
async def test_error_bodies(http, error_body, start):
    """An error may be a page or nothing."""
    answer = await http.post(
        "chat/completions", json={"model": MODEL, "messages": said(status=502, error_body=error_body)}
    )
    assert answer.status_code == 502
    assert answer.content.startswith(start)
    assert bool(answer.content) == (error_body != "empty")


async def test_without_content_type(http):
    """An empty one is left out."""
    answer = await http.post("chat/completions", json={"model": MODEL, "messages": said(content_type="")})
    assert "content-type" not in answer.headers
    assert answer.json()["object"] == "chat.completion"


@pytest.mark.parametrize(("role", "expected"), [("first", 1), ("every", 4), ("none", 0)])
async def test_roles(http, role, expected):
    """The role is in one delta, in all of them, or in none."""
    ask = {"messages": said(role=role, tokens=8)}
    seen = await chunks(http, "chat/completions", ChatCompletionChunk, **ask)
    assert sum("role" in chunk["choices"][0]["delta"] for chunk in seen) == expected


@pytest.mark.parametrize(("path", "asked"), CALLS_OF_EVERY_KIND[:2])
@pytest.mark.parametrize("asks", [False, True])
async def test_usage_in_choice_chunks(http, path, asked, asks):
    """It is in the last chunk with a choice or counts up through all of them, whether it was asked for or not."""
    options = {"stream_options": {"include_usage": True}} if asks else {}
    shape = ChatCompletionChunk if path.startswith("chat") else CompletionChunk
    last = await chunks(http, path, shape, **asked(wish(usage_chunk="last", tokens=8)), **options)
    assert [bool(chunk.get("usage")) for chunk in last] == [False] * (len(last) - 1) + [True]
    assert last[-1]["choices"][0]["finish_reason"] == "stop"
    every = await chunks(http, path, shape, **asked(wish(usage_chunk="every", tokens=8)), **options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in every]
    assert counts == sorted(counts)
    assert counts[-1] == last[-1]["usage"]["completion_tokens"]
    assert all(chunk["choices"] for chunk in every)


@pytest.mark.parametrize("prefix", [": ping\n\n", "event: chunk\n", "id: 1\nretry: 5\n"])
async def test_event_prefix(http, sdk, prefix):
    """Comments and other lines come before every event, the end marker's too."""
    given = said(event_prefix=prefix)
    answer = await http.post("chat/completions", json={"model": MODEL, "stream": True, "messages": given})
    assert answer.text.count(f"{prefix}data: ") == answer.text.count("data: ")
    stream = await sdk.chat.completions.create(model=MODEL, messages=given, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


@pytest.mark.parametrize(
    "body",
    [
        {"path": "embeddings", "input": wish(usage="none")},
        {"path": "completions", "prompt": wish(usage="none")},
        {"path": "responses", "input": wish(usage="none")},
    ],
)
async def test_no_usage_anywhere(http, provider, body):
    """`none` is heard by all endpoints."""
    answer = await http.post(body.pop("path"), json={"model": MODEL, **body})
    assert answer.json().get("usage") is None
    assert provider.journal[0].usage is None


async def test_usage_of_ones_own_everywhere(http):
    """A usage object is sent as it is, and negative numbers stay negative."""
    for path, asked in [*CALLS_OF_EVERY_KIND, ("embeddings", lambda text: {"input": text})]:
        own = await http.post(path, json={"model": MODEL, **asked(wish(usage={"odd": 1}))})
        assert own.json()["usage"] == {"odd": 1}
        below = await http.post(path, json={"model": MODEL, **asked(wish(usage="implausible"))})
        assert below.json()["usage"]["total_tokens"] < 0
