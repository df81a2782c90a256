"""The fake provider's Messages API, seen by Anthropic's own SDK."""

import json

import anthropic
import pytest

from tests.fakes.provider import run_in_thread
from tests.fakes.provider.messages import fault_of, signed


@pytest.fixture(scope="module")
def client():
    with run_in_thread() as provider:
        base_url = provider.base_url.removesuffix("/v1")
        with anthropic.Anthropic(base_url=base_url, api_key="key", max_retries=0) as client:
            yield client


def asked(said="Hello", **behaviour):
    text = f"!fake {json.dumps(behaviour)}" if behaviour else said
    return {"model": "claude-opus-5", "max_tokens": 2000, "messages": [{"role": "user", "content": text}]}


BLOCKS = [
    {"type": "thinking", "thinking": "Which?", "signature": signed("Which?")},
    {"type": "text", "text": "Let me see."},
    {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"city": "Köln"}},
    {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
]


def content(message):
    shown = [block.model_dump(exclude_none=True) for block in message.content]
    return [{name: block[name] for name in block if name not in {"citations", "caller"}} for block in shown]


def test_answers(client):
    """The SDK reads them, plain and put together from a stream with its pings and events of new kinds."""
    message = client.messages.create(**asked())
    assert (message.content[0].text, message.stop_reason) == ("The quick brown fox ", "end_turn")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (len("Hello") + 4, 20)
    request = asked(blocks=BLOCKS, usage="cached")
    plain = client.messages.create(**request)
    with client.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    assert content(plain) == content(streamed) == BLOCKS
    assert plain.usage.cache_read_input_tokens == streamed.usage.cache_read_input_tokens > 0
    assert plain.usage.output_tokens == streamed.usage.output_tokens


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, anthropic.BadRequestError), (429, anthropic.RateLimitError), (529, anthropic.InternalServerError)],
)
def test_errors(client, status, kind):
    """The SDK knows each as its own."""
    with pytest.raises(kind):
        client.messages.create(**asked(status=status))


def test_an_error_in_a_stream(client):
    """It comes after the beginning, and the SDK raises it."""
    with pytest.raises(anthropic.APIStatusError), client.messages.stream(**asked(error_event="middle")) as stream:
        stream.get_final_message()


SAID = {"role": "user", "content": "Hello"}
TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]


def calling(*names):
    blocks = [{"type": "tool_use", "id": name, "name": "f", "input": {}} for name in names]
    return {"role": "assistant", "content": blocks}


def answering(*names, before=()):
    blocks = [{"type": "tool_result", "tool_use_id": name, "content": "x"} for name in names]
    return {"role": "user", "content": [*before, *blocks]}


@pytest.mark.parametrize(
    "fields",
    [
        {"mood": "good"},
        {"n": 2},
        {"max_tokens": "2"},
        {"messages": [{**SAID, "name": "Ann"}]},
        {"messages": [SAID, SAID]},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": "good"}]}]},
        {"messages": [SAID, calling("a")], "tools": TOOLS},
        {"messages": [SAID, calling("a"), answering("b")], "tools": TOOLS},
        {"messages": [SAID, calling("a"), answering("a", before=[{"type": "text", "text": "x"}])], "tools": TOOLS},
        {"messages": [SAID, calling("a"), answering("a", "b")], "tools": TOOLS},
        {"messages": [SAID, calling("a"), answering("a")]},
        {"messages": [SAID, {"role": "assistant", "content": [{**BLOCKS[0], "signature": "forged"}]}]},
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        {"thinking": {"type": "enabled", "budget_tokens": 1023}},
        {"tool_choice": {"type": "auto"}},
        {"temperature": 1.1},
        {"output_config": {"format": {"type": "json_object"}}},
    ],
)
def test_what_is_no_request(fields):
    """Neither by the SDK's types nor by what is documented of conversations."""
    assert fault_of({**asked(), **fields}) is not None


def test_what_is_one():
    """With tools, their results and thinking."""
    turns = [SAID, {"role": "assistant", "content": BLOCKS}, answering("toolu_1", "toolu_2")]
    assert fault_of({**asked(), "messages": turns, "tools": TOOLS, "temperature": 0.5}) is None
