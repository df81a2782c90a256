import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.catalog import ANTHROPIC_ADDED_TOKENS
from proxy.errors import BadRequest
from proxy.wire.anthropic_requests import caches_for_an_hour, is_adaptive, messages_request
from proxy.wire.chat import decode_chat
from tests.fakes.provider.messages import fault_of, prompt_tokens, signed
from tests.fakes.provider.reply import TOKENS_PER_MEDIUM

HELLO = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CACHE = {"type": "ephemeral"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="
BUDGETED, ADAPTIVE = "claude-haiku-4-5", "claude-opus-5"


def body(model=BUDGETED, **fields):
    return json.dumps({"model": model, "messages": [HELLO], **fields}).encode()


def sent(model=BUDGETED, output_tokens_max=64_000, **fields):
    """The Messages request, which the official SDK's types and the fake provider's rules find nothing wrong with."""
    request = json.loads(messages_request(body(model, **fields), output_tokens_max))
    assert fault_of(request) is None
    return request


def turns(*messages, **fields):
    return sent(messages=list(messages), **fields)["messages"]


def refusal(**fields):
    with pytest.raises(BadRequest) as caught:
        messages_request(body(**fields), 64_000)
    return caught.value


def calling(*names, **fields):
    calls = [
        {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": "{}"}} for name in names
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls, **fields}


def result(name, content="sun"):
    return {"role": "tool", "tool_call_id": f"call_{name}", "content": content}


def text(said, **more):
    return {"type": "text", "text": said, **more}


def test_the_least():
    """A model, a maximum and the messages are all that need to be said."""
    assert sent() == {
        "model": BUDGETED,
        "max_tokens": 64_000,
        "messages": [{"role": "user", "content": [text("Hello")]}],
    }


# ---- the conversation


def test_instructions():
    """They come first, whatever their role and place, block by block."""
    request = sent(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [text("Be kind.", cache_control=CACHE), text("")]},
            HELLO,
            {"role": "system", "content": ""},
            {"role": "system", "content": "Be quick."},
        ]
    )
    assert request["system"] == [text("Be brief."), text("Be kind.", cache_control=CACHE), text("Be quick.")]
    assert len(request["messages"]) == 1


def test_consecutive_messages_of_one_side():
    """They become one turn."""
    said = turns(
        HELLO,
        {"role": "user", "content": [text("again")]},
        {"role": "assistant", "content": "Hi"},
        {"role": "assistant", "content": [text(", you"), {"type": "refusal", "refusal": "!"}]},
        HELLO,
    )
    assert said == [
        {"role": "user", "content": [text("Hello"), text("again")]},
        {"role": "assistant", "content": [text("Hi"), text(", you"), text("!")]},
        {"role": "user", "content": [text("Hello")]},
    ]


@pytest.mark.parametrize("nothing", ["", " \n", [], [text("")], [text(" "), text("")]])
@pytest.mark.parametrize("role", ["assistant", "user", "system"])
def test_messages_that_say_nothing(role, nothing):
    """They are left out, since the API takes no text that is blank."""
    assert turns(HELLO, {"role": role, "content": nothing}, {"role": "user", "content": "?"}) == [
        {"role": "user", "content": [text("Hello"), text("?")]}
    ]


def test_blank_texts_beside_others():
    """Those that are empty are left out, and those with spaces where there is nothing else to read."""
    image = {"type": "image_url", "image_url": {"url": PIXEL}}
    said = turns(
        {"role": "user", "content": [text("a"), text(""), text("\n"), text("b", cache_control=CACHE)]},
        calling("a", content="\n\n"),
        result("a", [text(" ")]),
        {"role": "user", "content": [image, text(" ")]},
        tools=[TOOL],
    )
    assert said[0]["content"] == [text("a"), text("\n"), text("b", cache_control=CACHE)]
    assert [block["type"] for block in said[1]["content"]] == ["tool_use"]
    assert [block["type"] for block in said[2]["content"]] == ["tool_result", "image"]
    assert said[2]["content"][0]["content"] == []


@pytest.mark.parametrize("after", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_last_message_that_says_nothing(after):
    """It is refused: without it the model would go on with what it said before."""
    assistant = {"role": "assistant", "content": "Hi"}
    assert refusal(messages=[HELLO, assistant, {"role": "user", "content": ""}, *after]).param == "messages"
    assert turns(HELLO, assistant)[-1]["role"] == "assistant"


def test_a_refusal_in_a_conversation():
    """It is what the assistant said."""
    said = turns(HELLO, {"role": "assistant", "content": None, "refusal": "No."}, HELLO)
    assert said[1] == {"role": "assistant", "content": [text("No.")]}


def test_tools_in_a_conversation():
    """Calls follow the text, their results are the first of the next turn, and the user's text comes after them."""
    said = turns(
        HELLO,
        calling("a", "b", content="Let me see."),
        result("a"),
        {**result("b", [text("rain"), {"type": "image_url", "image_url": {"url": PIXEL}}]), "name": "b"},
        {"role": "user", "content": "So?"},
        tools=[TOOL],
    )
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    assert said[1:] == [
        {
            "role": "assistant",
            "content": [
                text("Let me see."),
                {"type": "tool_use", "id": "call_a", "name": "a", "input": {}},
                {"type": "tool_use", "id": "call_b", "name": "b", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_a", "content": "sun"},
                {"type": "tool_result", "tool_use_id": "call_b", "content": [text("rain"), image]},
                text("So?"),
            ],
        },
    ]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_tools_that_were_called_before(choice):
    """They are named, since the API wants them to be, and none may be called."""
    messages = [HELLO, calling("a", "b"), result("a"), result("b"), calling("a"), result("a")]
    request = sent(messages=messages, tool_choice=choice)
    nothing = {"type": "object", "properties": {}}
    assert request["tools"] == [{"name": "a", "input_schema": nothing}, {"name": "b", "input_schema": nothing}]
    assert request["tool_choice"] == {"type": "none"}


def test_arguments_keep_their_bytes():
    """Numbers that no float holds and the order of names survive."""
    arguments = '{"b": 12345678901234567890123, "a": 1.50e400}'
    call = calling("a")
    call["tool_calls"][0]["function"]["arguments"] = arguments
    assert arguments.encode() in messages_request(body(messages=[HELLO, call, result("a")], tools=[TOOL]), 1)


@pytest.mark.parametrize("arguments", ["", "  "])
def test_no_arguments(arguments):
    """An empty text is what some models write for none."""
    call = calling("a")
    call["tool_calls"][0]["function"]["arguments"] = arguments
    assert turns(HELLO, call, result("a"), tools=[TOOL])[1]["content"][0]["input"] == {}


def test_ids_of_other_providers():
    """Those that the API does not take become others, the same for the call and its result."""
    call, answer = calling("a"), result("a")
    call["tool_calls"][0]["id"] = answer["tool_call_id"] = "functions.a:0"
    said = turns(HELLO, call, answer, tools=[TOOL])
    name = said[1]["content"][0]["id"]
    assert name.startswith("toolu_")
    assert said[2]["content"][0]["tool_use_id"] == name


def test_thinking_stands_where_it_stood():
    """Blocks go back to their places, with their signatures; those of other gateways come first."""
    first = {"type": "thinking", "thinking": "hm", "signature": signed("hm"), "index": 0, "position": 0}
    second = {"type": "redacted_thinking", "data": "d", "index": 1, "position": 2}
    answer = calling("a", content="Let me see.", thinking_blocks=[first, second], reasoning_content="hm", refusal=None)
    answer |= {"annotations": [], "audio": None, "function_call": None}
    kinds = [block["type"] for block in turns(HELLO, answer, result("a"), tools=[TOOL])[1]["content"]]
    assert kinds == ["thinking", "text", "redacted_thinking", "tool_use"]
    del first["position"], second["position"]
    kinds = [block["type"] for block in turns(HELLO, answer, result("a"), tools=[TOOL])[1]["content"]]
    assert kinds == ["thinking", "redacted_thinking", "text", "tool_use"]


def test_thinking_that_says_the_same_position_twice_keeps_its_order():
    """What a client has made up is bounded by what there is, and nothing is lost."""
    thoughts = [
        {"type": "redacted_thinking", "data": data, "position": at} for data, at in (("c", 9), ("a", 0), ("b", 0))
    ]
    said = json.loads(messages_request(body(messages=[HELLO, calling("x", thinking_blocks=thoughts)]), 64_000))
    assert [block.get("data") for block in said["messages"][1]["content"]] == ["a", "b", None, "c"]


@pytest.mark.parametrize("position", [-1, 20_001, 2**64, "0"])
def test_a_position_is_one_that_a_message_can_have(position):
    """Any other number would be more than a list can hold."""
    thought = {"type": "redacted_thinking", "data": "d", "position": position}
    assert refusal(messages=[HELLO, calling("a", thinking_blocks=[thought])]).param == "messages"


@pytest.mark.parametrize(
    "extra",
    [
        {"thinking_blocks": [{"type": "redacted_thinking", "data": "", "position": 0}] * 10_001},
        {"tool_calls": calling("a")["tool_calls"] * 10_001},
    ],
)
def test_what_an_assistant_says_is_counted(extra):
    """Each block costs time: those of all messages together are bounded."""
    assert refusal(messages=[HELLO, *[{"role": "assistant", **extra}] * 2]).code == "too_many_items"


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("https://example.test/a.png", {"type": "url", "url": "https://example.test/a.png"}),
        ("HTTP://example.test/a", {"type": "url", "url": "HTTP://example.test/a"}),
        ("data:image/JPG;base64,AA==", {"type": "base64", "media_type": "image/jpeg", "data": "AA=="}),
        ("data:image/webp;base64,AA==", {"type": "base64", "media_type": "image/webp", "data": "AA=="}),
    ],
)
def test_images(url, source):
    """By their address, or as data in one of the types that Claude reads."""
    part = {"type": "image_url", "image_url": {"url": url, "detail": "high"}, "cache_control": CACHE}
    said = turns({"role": "user", "content": [part, text("What is it?")]})
    assert said[0]["content"][0] == {"type": "image", "source": source, "cache_control": CACHE}


def test_documents():
    """A PDF is one, under its name."""
    part = {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"}}
    source = {"type": "base64", "media_type": "application/pdf", "data": "AA=="}
    said = turns({"role": "user", "content": [part]})
    assert said[0]["content"] == [{"type": "document", "source": source, "title": "a.pdf"}]


def test_caches():
    """What the client says about them goes where it said it, to the last block for a whole message."""
    request = sent(
        messages=[
            {"role": "system", "content": "s", "cache_control": CACHE},
            {"role": "user", "content": [text("a"), text("b")], "cache_control": CACHE},
            calling("a", cache_control=CACHE),
            {**result("a"), "cache_control": CACHE},
        ],
        tools=[{**TOOL, "cache_control": CACHE}],
        cache_control=CACHE,
    )
    assert request["cache_control"] == request["system"][0]["cache_control"] == request["tools"][0]["cache_control"]
    cached = [[block.get("cache_control") for block in turn["content"]] for turn in request["messages"]]
    assert cached == [[None, CACHE], [CACHE], [CACHE]]


# ---- everything else


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 64_000),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 5),
    ],
)
def test_the_maximum(fields, expected):
    """It is always said: the client's, or else the model's own."""
    assert sent(**fields)["max_tokens"] == expected


def test_the_maximum_of_an_unknown_model():
    """It is one that every model takes."""
    assert sent(output_tokens_max=None)["max_tokens"] == 32_000


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.25, "top_p": 0.5, "top_k": 3}, {"temperature": 0.25, "top_p": 0.5, "top_k": 3}),
        ({"temperature": 1, "top_p": 1.0}, {}),
        ({"stop": "."}, {"stop_sequences": ["."]}),
        ({"stop": [".", "!"]}, {"stop_sequences": [".", "!"]}),
        ({"stop": None, "seed": None, "n": 1, "logprobs": False, "store": False, "modalities": ["text"]}, {}),
        ({"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "top_logprobs": 0}, {}),
        ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}),
        ({"stream": False}, {}),
        ({"user": "u"}, {"metadata": {"user_id": "u"}}),
        ({"user": "u", "safety_identifier": "s"}, {"metadata": {"user_id": "s"}}),
        ({"metadata": {"user_id": "m"}}, {"metadata": {"user_id": "m"}}),
        ({"metadata": {}}, {}),
        ({"service_tier": "auto"}, {"service_tier": "auto"}),
        ({"service_tier": "default"}, {"service_tier": "standard_only"}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        ),
    ],
)
def test_plain_fields(fields, expected):
    """Each has the API's own name, and what asks for nothing is left out."""
    assert sent(**fields) == {**sent(), **expected}


def test_a_json_schema():
    """It is the format of the output, with the description that the client gave beside."""
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    assert sent(response_format=asked)["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    asked["json_schema"]["description"] = "A city."
    described = {"description": "A city.", **schema}
    assert sent(response_format=asked)["output_config"]["format"]["schema"] == described
    asked["json_schema"]["schema"] = {**schema, "description": "Its own."}
    assert sent(response_format=asked)["output_config"]["format"]["schema"]["description"] == "Its own."


def test_tools():
    """Their schemas are objects, which they need not say."""
    parameters = {"properties": {"a": {"type": "string"}}}
    request = sent(
        tools=[
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": parameters, "strict": True},
            },
            {"type": "function", "function": {"name": "g", "strict": False, "cache_control": CACHE}},
        ]
    )
    assert request["tools"] == [
        {"name": "f", "description": "d", "input_schema": {"type": "object", **parameters}, "strict": True},
        {"name": "g", "input_schema": {"type": "object", "properties": {}}, "cache_control": CACHE},
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none"}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, {"type": "tool", "name": "weather"}),
        ({"parallel_tool_calls": True}, None),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"parallel_tool_calls": False, "tool_choice": "required"},
            {"type": "any", "disable_parallel_tool_use": True},
        ),
        ({"parallel_tool_calls": False, "tool_choice": "none"}, {"type": "none"}),
    ],
)
def test_choices_of_tools(fields, expected):
    """Each has the API's own words."""
    assert sent(tools=[TOOL], **fields).get("tool_choice") == expected


@pytest.mark.parametrize("fields", [{"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": False}])
def test_no_choice_without_tools(fields):
    """There is nothing to choose, and nothing to say."""
    assert sent(**fields) == sent()


@pytest.mark.parametrize(
    ("model", "effort", "more", "expected"),
    [
        (BUDGETED, "none", {}, {"thinking": {"type": "disabled"}}),
        (BUDGETED, "minimal", {}, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        (BUDGETED, "low", {}, {"thinking": {"type": "enabled", "budget_tokens": 2048}}),
        (BUDGETED, "high", {}, {"thinking": {"type": "enabled", "budget_tokens": 24_576}}),
        (BUDGETED, "high", {"max_tokens": 4096}, {"thinking": {"type": "enabled", "budget_tokens": 2048}}),
        (
            ADAPTIVE,
            "minimal",
            {},
            {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "low"}},
        ),
        (
            ADAPTIVE,
            "xhigh",
            {"thinking": {"type": "adaptive"}},
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}},
        ),
    ],
)
def test_reasoning_effort(model, effort, more, expected):
    """It is an effort for models that know it, and a budget for older ones, within the maximum."""
    request = sent(model, reasoning_effort=effort, **more)
    assert {name: request[name] for name in ("thinking", "output_config") if name in request} == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("claude-3-7-sonnet-20250219", False),
        ("claude-3-5-haiku-latest", False),
        ("claude-sonnet-4-20250514", False),
        ("claude-opus-4-5-20251101", False),
        ("claude-opus-4@20250514", False),
        ("claude-opus-4-6", True),
        ("claude-sonnet-5", True),
        ("claude-fable-5-1", True),
        ("anthropic.claude-haiku-5-5-v1:0", True),
        ("my-deployment", True),
    ],
)
def test_models_that_think_by_effort(model, expected):
    """They are known by their version: from 4.6 on."""
    assert is_adaptive(model) is expected


# ---- what cannot be expressed


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 2}),
        ("logprobs", {"logprobs": True}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("logit_bias", {"logit_bias": {"50256": -100}}),
        ("presence_penalty", {"presence_penalty": 0.5}),
        ("frequency_penalty", {"frequency_penalty": -0.5}),
        ("seed", {"seed": 0}),
        ("audio", {"audio": {"voice": "alloy", "format": "wav"}}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("prediction", {"prediction": {"type": "content", "content": "x"}}),
        ("store", {"store": True}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("function_call", {"function_call": "auto"}),
        ("verbosity", {"verbosity": "low"}),
        ("prompt_cache_key", {"prompt_cache_key": "k"}),
        ("speed", {"speed": "fast"}),
        ("inference_geo", {"inference_geo": "us"}),
        ("max_output_tokens", {"max_output_tokens": 3}),
        ("something_new", {"something_new": 1}),
        ("temperature", {"temperature": 1.5}),
        ("metadata", {"metadata": {"purpose": "x"}}),
        ("service_tier", {"service_tier": "flex"}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
        (
            "response_format",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [], "description": "d"}}},
        ),
        ("reasoning_effort", {"reasoning_effort": "extreme"}),
        ("reasoning_effort", {"reasoning_effort": "low", "max_tokens": 2047}),
        ("reasoning_effort", {"reasoning_effort": "low", "thinking": {"type": "enabled", "budget_tokens": 2000}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "some"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("stream_options", {"stream": True, "stream_options": {"include_obfuscation": True}}),
        ("tools", {"tools": [{"type": "custom", "custom": {"name": "c"}}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "new": 1}}]}),
        ("stop", {"stop": 3}),
        ("messages", {"messages": [{"role": "system", "content": "alone"}]}),
        ("messages", {"messages": [{**HELLO, "name": "Ann"}]}),
        ("messages", {"messages": [{**HELLO, "mood": "good"}]}),
        ("messages", {"messages": [{**HELLO, "tool_calls": [{"id": "a"}]}]}),
        ("messages", {"messages": [{**HELLO, "tool_call_id": "a"}]}),
        ("messages", {"messages": [{"role": "function", "name": "f", "content": "x"}]}),
        ("messages", {"messages": [{"role": "critic", "content": "x"}]}),
        ("messages", {"messages": [HELLO, {"role": "tool", "content": "x"}]}),
        ("messages", {"messages": [HELLO, {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}),
        ("messages", {"messages": [HELLO, calling("a", tool_calls=[{"id": "a", "type": "custom", "custom": {}}])]}),
        ("messages", {"messages": [HELLO, calling("a", thinking_blocks=[{"type": "thinking", "thinking": "x"}])]}),
        ("messages", {"messages": [HELLO, calling("a", thinking_blocks=[{"type": "dream", "signature": "x"}])]}),
    ],
)
def test_what_cannot_be_expressed(param, fields):
    """It is refused by the name of its field."""
    refused = refusal(**fields)
    assert (refused.param, bool(refused.code)) == (param, True)


@pytest.mark.parametrize("arguments", ["x", "[]", '"a"', '{"a":1', '{"a":' + '{"a":' * 3000])
def test_arguments_that_are_no_object(arguments):
    """They cannot be a call's input, however deep they are."""
    call = calling("a")
    call["tool_calls"][0]["function"]["arguments"] = arguments
    assert refusal(messages=[HELLO, call, result("a")], tools=[TOOL]).param == "messages"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "ftp://example.test/a"}},
        {"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AA=="}},
        {"type": "image_url", "image_url": {"url": "data:image/png,AA"}},
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        {"type": "image_url"},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,AA=="}},
        {"type": "file", "file": {"filename": "a.pdf"}},
        {"type": "refusal", "refusal": "no"},
        {"type": "text"},
        {"type": "text", "text": "x", "image_url": {"url": PIXEL}},
        {"type": "image_url", "text": "x", "image_url": {"url": PIXEL}},
        {"type": "text", "text": "x", "mood": "good"},
        {"type": "video_url", "video_url": {"url": "x"}},
    ],
)
def test_parts_that_cannot_be_expressed(part):
    """They are refused, never left out of what the model reads."""
    assert refusal(messages=[{"role": "user", "content": [part]}]).param == "messages"


# ---- anything


TEXTS = st.text(max_size=20)
PARTS = st.one_of(
    st.builds(text, TEXTS),
    st.just({"type": "image_url", "image_url": {"url": PIXEL}}),
    st.builds(lambda said: text(said, cache_control=CACHE), TEXTS.filter(bool)),
)
CONTENTS = st.one_of(TEXTS, st.lists(PARTS, max_size=3))
CALL_IDS = st.sampled_from(["call_1", "toolu_2", "functions.f:3", "é"])
OBJECTS = st.dictionaries(TEXTS, st.one_of(st.integers(), TEXTS, st.none(), st.booleans()), max_size=3)


@st.composite
def conversations(draw):
    """Conversations as clients have them: each call of a tool is followed by its result."""
    messages = draw(st.lists(st.builds(lambda said: {"role": "system", "content": said}, TEXTS), max_size=2))
    messages.append({"role": "user", "content": draw(TEXTS.filter(str.strip))})
    for _ in range(draw(st.integers(0, 4))):
        names = draw(st.lists(CALL_IDS, unique=True, max_size=2))
        answer = {"role": "assistant", "content": draw(st.one_of(st.none(), TEXTS))}
        if names:
            functions = [{"name": "f", "arguments": json.dumps(draw(OBJECTS))} for _ in names]
            pairs = zip(names, functions, strict=True)
            answer["tool_calls"] = [{"id": name, "type": "function", "function": called} for name, called in pairs]
        messages.append(answer)
        messages += [{"role": "tool", "tool_call_id": name, "content": draw(CONTENTS)} for name in names]
        if not names or draw(st.booleans()):
            messages.append({"role": "user", "content": draw(TEXTS.filter(str.strip))})
    return messages


LONG = {"type": "ephemeral", "ttl": "1h"}
CONTROLLED = {"cache_control": LONG}
WEATHER = TOOL["function"]


@pytest.mark.parametrize(
    "fields",
    [
        CONTROLLED,
        {"messages": [{**HELLO, **CONTROLLED}]},
        {"messages": [{"role": "user", "content": [text("Hello", **CONTROLLED)]}]},
        {"messages": [{"role": "system", "content": "Be brief.", **CONTROLLED}, HELLO]},
        {"messages": [HELLO, calling("a"), {**result("a"), **CONTROLLED}]},
        {"messages": [HELLO, calling("a"), result("a", [text("sun", **CONTROLLED)])]},
        {"tools": [{**TOOL, **CONTROLLED}]},
        {"tools": [{**TOOL, "function": {**WEATHER, **CONTROLLED}}]},
    ],
)
def test_caches_of_an_hour(fields):
    """They are found wherever one can be asked for, however it is written, and nowhere else."""
    asked = body(**fields)
    unasked = asked.replace(b'"1h"', b'"5m"'), asked.replace(b', "ttl": "1h"', b"")
    escaped = asked.replace(b'"1h"', b'"\\u0031h"').replace(b"cache_control", b"cache\\u005fcontrol")
    found = [caches_for_an_hour(messages_request(each, 64_000)) for each in (asked, escaped, *unasked)]
    assert found == [True, True, False, False]


@pytest.mark.parametrize("ttl", [b"1e999", b'"2h"', b"[]", b"{}"])
def test_what_nobody_here_can_read_may_ask_for_an_hour(ttl):
    """It counts as dear as it can be, and is no error of ours."""
    asked = body(**CONTROLLED).replace(b'"1h"', ttl)
    assert caches_for_an_hour(messages_request(asked, 64_000))


def test_texts_ask_for_no_cache():
    """A text may say anything, and so may the arguments of a call."""
    said = json.dumps(CONTROLLED)
    call = {"id": "call_a", "type": "function", "function": {"name": "a", "arguments": said}}
    messages = [{"role": "user", "content": said}, {**calling("a"), "tool_calls": [call]}, result("a", said)]
    assert not caches_for_an_hour(messages_request(body(messages=messages), 64_000))


@settings(deadline=None, max_examples=150)
@given(conversations(), st.sampled_from([[], [TOOL]]))
def test_any_conversation(messages, tools):
    """What clients send makes a request that the SDK's types and the API's rules allow, and that its bytes bound."""
    request = sent(messages=messages, tools=tools)
    said = body(messages=messages, tools=tools)
    added = ANTHROPIC_ADDED_TOKENS if decode_chat(said).has_instructions else 0
    assert prompt_tokens(request) <= len(said) + added + TOKENS_PER_MEDIUM * said.count(PIXEL.encode())
    asked = [call for message in messages for call in message.get("tool_calls") or ()]
    used = [block for turn in request["messages"] for block in turn["content"] if block["type"] == "tool_use"]
    assert [block["input"] for block in used] == [json.loads(call["function"]["arguments"]) for call in asked]


ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
NAMES = """cache_control max_tokens messages metadata n parallel_tool_calls reasoning_effort response_format
service_tier stop stream_options temperature thinking tool_choice tools top_k user"""
FIELDS = st.sampled_from(NAMES.split())


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(FIELDS, ANY_JSON, max_size=3))
def test_any_fields(fields):
    """Whatever is in a request, it is translated or refused, and never anything else."""
    with suppress(BadRequest):
        decode_chat(body(**fields))
        json.loads(messages_request(body(**fields), 64_000))
