"""What a model said, and what it is told that it said when the conversation goes on."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from proxy.wire.anthropic_answers import Chunks, completion
from proxy.wire.anthropic_requests import messages_request
from proxy.wire.sse import EventSplitter, event_data
from tests.fakes.provider.messages import fault_of, pieces_of, signed

HELLO = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f"}}

TEXTS = st.one_of(st.text(min_size=1, max_size=30), st.sampled_from([" ", "\n\n"]))
INPUTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
        max_leaves=5,
    ),
    max_size=3,
)
BLOCKS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.builds(lambda text: {"type": "thinking", "thinking": text, "signature": signed(text)}, st.text(max_size=30)),
    st.builds(lambda data: {"type": "redacted_thinking", "data": data}, TEXTS),
    st.builds(
        lambda said: {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": said}}, TEXTS
    ),
    st.builds(lambda said: {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"title": said}]}, TEXTS),
)
CALLS = st.builds(lambda given: {"type": "tool_use", "name": "f", "input": given}, INPUTS)


@st.composite
def contents(draw):
    """Content with calls of tools, as models write it: the text comes before them, thinking comes anywhere."""
    before = draw(st.lists(BLOCKS, max_size=4))
    thoughts = BLOCKS.filter(lambda block: block["type"] != "text")
    calls = draw(st.lists(st.one_of(CALLS, thoughts), max_size=4))
    blocks = [*before, draw(CALLS), *calls]
    for number, block in enumerate(blocks):
        if block["type"] == "tool_use":
            block["id"] = f"toolu_{number}"
    return blocks


def merged(blocks):
    """Content as a chat message has it: its texts are one, where the first of them stood, unless that is blank."""
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    kept, has_text = [], not "".join(texts).strip()
    for block in blocks:
        if block["type"] in {"server_tool_use", "web_search_tool_result"}:
            continue  # the provider's own business
        if block["type"] != "text":
            kept.append(block)
        elif not has_text:
            kept.append({"type": "text", "text": "".join(texts)})
            has_text = True
    return kept


def message_of(blocks):
    usage = {"input_tokens": 1, "output_tokens": 1}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-opus-5"}
    return {**head, "content": blocks, "stop_reason": "tool_use", "stop_sequence": None, "usage": usage}


def plain_answer(blocks):
    """The assistant's message that OpenAI's SDK reads out of a plain answer."""
    return ChatCompletion.model_validate_json(completion(json.dumps(message_of(blocks)).encode(), 1)).choices[0].message


def streamed_answer(blocks, characters):
    """Likewise out of a stream, put together by the SDK's own state."""
    chunks, splitter, state = Chunks(1), EventSplitter(10**6), ChatCompletionStreamState()
    stop = {"stop_reason": "tool_use", "stop_sequence": None}
    for piece in pieces_of(message_of(blocks), stop, characters):
        for event in splitter.feed(chunks.feed(piece.octets)):
            if event_data(event) != b"[DONE]":
                state.handle_chunk(ChatCompletionChunk.model_validate_json(event_data(event)))
    return state.current_completion_snapshot.choices[0].message


def next_turn(answer):
    """What the model is told in the next turn, after results of all tools."""
    said = answer.model_dump()
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in answer.tool_calls]
    body = {"model": "claude-opus-5", "messages": [HELLO, said, *results], "tools": [TOOL]}
    request = json.loads(messages_request(json.dumps(body).encode(), 64_000))
    assert fault_of(request) is None
    return request["messages"]


@settings(deadline=None, max_examples=150)
@given(contents())
def test_plain_answers_come_back_as_they_were(blocks):
    """Text, calls, thinking and signatures, each in its place."""
    said = next_turn(plain_answer(blocks))
    assert said[1] == {"role": "assistant", "content": merged(blocks)}
    assert [block["tool_use_id"] for block in said[2]["content"]] == [
        block["id"] for block in blocks if block["type"] == "tool_use"
    ]


@settings(deadline=None, max_examples=100)
@given(contents(), st.integers(1, 8))
def test_streamed_answers_come_back_as_they_were(blocks, characters):
    """Likewise, in whatever pieces they came."""
    assert next_turn(streamed_answer(blocks, characters))[1]["content"] == merged(blocks)
