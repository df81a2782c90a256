import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.wire.chat import ChatRequest
from proxy.wire.endpoints import decode
from proxy.wire.objects import patch
from proxy.wire.requests import OUTSIDE_OF_TOKENS, STATE, Endpoint, PaidRequest, asking_for_usage


def body(endpoint=Endpoint.CHAT, **fields):
    """A request to `endpoint` with these fields and what it must have."""
    least = {
        Endpoint.CHAT: {"messages": [{"role": "user", "content": "hi"}]},
        Endpoint.COMPLETIONS: {"prompt": "hi"},
        Endpoint.EMBEDDINGS: {"input": "hi"},
        Endpoint.RESPONSES: {"input": "hi"},
    }
    return json.dumps({"model": "m", **least[endpoint], **fields}).encode()


@pytest.mark.parametrize(
    ("options", "asking"),
    [
        ({}, b'{"include_usage":true}'),
        ({"stream_options": None}, b'{"include_usage":true}'),
        ({"stream_options": {"include_usage": False}}, b'{"include_usage": true}'),
        ({"stream_options": {"include_obfuscation": False}}, b'{"include_usage":true,"include_obfuscation": false}'),
    ],
)
def test_asking_for_usage(options, asking):
    """Usage is asked for, and whatever else the client wished of its stream stays."""
    assert asking_for_usage(body(**options)) == asking


@pytest.mark.parametrize("endpoint", Endpoint)
def test_the_least_that_a_request_must_say(endpoint):
    """A model and a prompt; nothing else is asked for."""
    expected = PaidRequest(
        endpoint=endpoint,
        model="m",
        has_output=endpoint is not Endpoint.EMBEDDINGS,
        must_unstore=endpoint is Endpoint.RESPONSES,
    )
    assert decode(endpoint, body(endpoint)) == expected


@pytest.mark.parametrize("endpoint", [Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS])
@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", 1),
        (["a"], 1),
        (["a", "b"], 2),
        ([1, 2, 3], 1),
        ([[1], [2, 3], [4]], 3),
        ([1, [2, 3], "b"], 3),
        (["a", 1], 2),
    ],
)
def test_prompts_are_counted(endpoint, prompt, prompts):
    """A text and a list of tokens are one prompt, and each may fill the context."""
    field = "prompt" if endpoint is Endpoint.COMPLETIONS else "input"
    assert decode(endpoint, body(endpoint, **{field: prompt})).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "choices"),
    [({}, 2), ({"n": 3}, 6), ({"best_of": 4}, 8), ({"n": 3, "best_of": 4}, 8), ({"n": 5, "best_of": None}, 10)],
)
def test_every_prompt_has_its_choices(fields, choices):
    """Those that are not shown are billed as well."""
    assert decode(Endpoint.COMPLETIONS, body(Endpoint.COMPLETIONS, prompt=["a", "b"], **fields)).choices == choices


@pytest.mark.parametrize("endpoint", Endpoint)
def test_bytes_that_are_no_utf8_are_refused(endpoint):
    """In any place: nobody knows what a provider would read."""
    with pytest.raises(BadRequest) as raised:
        decode(endpoint, body(endpoint, user="?").replace(b"?", b"\xff"))
    assert raised.value.code == "invalid_json"


def test_the_best_of_several_is_not_streamed():
    """As at OpenAI: whoever leaves such a stream would get what it does not show for nothing."""
    with pytest.raises(BadRequest) as raised:
        decode(Endpoint.COMPLETIONS, body(Endpoint.COMPLETIONS, stream=True, n=2, best_of=3))
    assert raised.value.param == "best_of"
    assert decode(Endpoint.COMPLETIONS, body(Endpoint.COMPLETIONS, stream=True, n=3, best_of=3)).choices == 3


@pytest.mark.parametrize(
    ("endpoint", "fields", "param"),
    [
        (Endpoint.COMPLETIONS, {"prompt": []}, "prompt"),
        (Endpoint.COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
        (Endpoint.COMPLETIONS, {"prompt": [1.5]}, "prompt"),
        (Endpoint.COMPLETIONS, {"prompt_embeds": "AA"}, "prompt_embeds"),
        (Endpoint.COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
        (Endpoint.COMPLETIONS, {"Best_Of": 5}, "best_of"),
        (Endpoint.EMBEDDINGS, {"input": ""}, "input"),
        (Endpoint.EMBEDDINGS, {"input": [{"type": "image_url"}]}, "input"),
        (Endpoint.EMBEDDINGS, {"input_image": "AA"}, "input_image"),
        (Endpoint.EMBEDDINGS, {"Input": "x"}, "input"),
        (Endpoint.RESPONSES, {"background": True}, "background"),
        (Endpoint.RESPONSES, {"background": 1}, "background"),
        (Endpoint.RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (Endpoint.RESPONSES, {"conversation": {"id": "conv_1"}}, "conversation"),
        (Endpoint.RESPONSES, {"prompt": {"id": "pmpt_1"}}, "prompt"),
        (Endpoint.COMPLETIONS, {"web_search_options": {}}, "web_search_options"),
        (Endpoint.RESPONSES, {"web_search_options": {}}, "web_search_options"),
        (Endpoint.RESPONSES, {"tools": [{"type": "image_generation"}]}, "tools"),
        (Endpoint.RESPONSES, {"tools": [{"type": "web_search_2099_01_01"}]}, "tools"),
        (Endpoint.RESPONSES, {"tools": [{"type": "code_interpreter"}]}, "tools"),
        (Endpoint.RESPONSES, {"tools": [{"type": "code_interpreter", "container": "cntr_1"}]}, "tools"),
        (Endpoint.RESPONSES, {"tools": [{"type": "code_interpreter", "container": {"type": "cntr_1"}}]}, "tools"),
        (
            Endpoint.RESPONSES,
            {"tools": [{"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["file-1"]}}]},
            "tools",
        ),
        (
            Endpoint.RESPONSES,
            {"tools": [{"type": "code_interpreter", "container": {"type": "auto", "memory_limit": "4g"}}]},
            "tools",
        ),
        (
            Endpoint.RESPONSES,
            {"tools": [{"type": "code_interpreter", "container": {"type": "auto", "File_Ids": ["file-1"]}}]},
            "tools",
        ),
        (Endpoint.RESPONSES, {"tools": [{"type": "function", "Container": {"type": "auto"}}]}, "tools"),
        (Endpoint.RESPONSES, {"input": [{"type": "code_interpreter_call", "container_id": "cntr_1"}]}, "input"),
        (Endpoint.RESPONSES, {"max_tool_calls": 0}, "max_tool_calls"),
        (Endpoint.RESPONSES, {"max_tool_calls": 10_001}, "max_tool_calls"),
        (Endpoint.RESPONSES, {"Max_Tool_Calls": 5}, "max_tool_calls"),
        (Endpoint.RESPONSES, {"tools": [{"type": "function", "Type": "web_search"}]}, "tools"),
        (Endpoint.RESPONSES, {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        (Endpoint.RESPONSES, {"input": [{"id": "msg_1"}]}, "input"),
        (Endpoint.RESPONSES, {"input": [{"type": None, "id": "msg_1"}]}, "input"),
        (Endpoint.RESPONSES, {"instructions": [{"type": "item_reference", "id": "msg_1"}]}, "instructions"),
        (Endpoint.RESPONSES, {"instructions": {"id": "pmpt_1"}}, "instructions"),
        (
            Endpoint.RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]},
            "input",
        ),
        (Endpoint.RESPONSES, {"input": [{"role": "user", "content": "x", "Content": "y"}]}, "input"),
        (Endpoint.RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_has_no_bound_is_refused(endpoint, fields, param):
    """400, and the field at fault."""
    with pytest.raises(BadRequest) as raised:
        decode(endpoint, body(endpoint, **fields))
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("endpoint", "fields", "tools", "tool_calls_max"),
    [
        (Endpoint.CHAT, {"web_search_options": {}}, {"web_search": "web_search_options"}, None),
        (
            Endpoint.CHAT,
            {"web_search_options": {"search_context_size": "low"}},
            {"web_search": "web_search_options"},
            None,
        ),
        (Endpoint.CHAT, {"web_search_options": None}, {}, None),
        (Endpoint.RESPONSES, {"tools": [{"type": "web_search"}]}, {"web_search": "web_search"}, None),
        (
            Endpoint.RESPONSES,
            {
                "tools": [
                    {"type": "function", "name": "f", "parameters": {}},
                    {"type": "web_search_preview", "search_context_size": "high"},
                    {"type": "file_search", "vector_store_ids": ["vs_1"]},
                    {"type": "code_interpreter", "container": {"type": "auto", "memory_limit": "1g"}},
                ],
                "max_tool_calls": 7,
            },
            {"web_search": "web_search_preview", "file_search": "file_search", "code_interpreter": "code_interpreter"},
            7,
        ),
        (Endpoint.RESPONSES, {"max_tool_calls": 7}, {}, 7),
    ],
)
def test_tools_that_the_provider_runs(endpoint, fields, tools, tool_calls_max):
    """They are found by what they are priced as; what they find becomes prompt that nobody can size."""
    request = decode(endpoint, body(endpoint, **fields))
    assert (request.tools, request.tool_calls_max, request.is_unsized) == (tools, tool_calls_max, bool(tools))
    assert not request.has_only_images


@pytest.mark.parametrize(
    ("items", "is_unsized"),
    [
        ([{"role": "user", "content": "hi"}], False),
        ([{"type": None, "role": "user", "content": "hi"}], False),
        ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}], False),
        ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}], False),
        ([{"type": "function_call_output", "call_id": "c", "output": "42"}], False),
        ([{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}], True),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "AA"}], False),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y"}]}], True),
        ([{"role": "user", "content": [{"type": "input_file", "file_data": "AA"}]}], True),
        ([{"type": "computer_call_output", "output": {"type": "x"}}], True),
        ([{"type": "something_new"}], True),
    ],
)
def test_what_of_a_response_is_not_in_the_body(items, is_unsized):
    """Whatever is not known to be text may be as large as the context."""
    request = body(Endpoint.RESPONSES, input=items)
    assert decode(Endpoint.RESPONSES, request).is_unsized is is_unsized


def test_a_response_that_is_not_kept_needs_no_patch():
    """A client that says so itself is passed on as it is."""
    assert not decode(Endpoint.RESPONSES, body(Endpoint.RESPONSES, store=False)).must_unstore


@settings(deadline=None)
@given(st.sampled_from(Endpoint), st.binary(max_size=60), st.booleans())
def test_any_bytes_for_each_endpoint(endpoint, octets, is_appended):
    """There is a request or a refusal, never another exception."""
    with suppress(BadRequest):
        decode(endpoint, body(endpoint)[:-1] + octets if is_appended else octets)


FIELDS = sorted(
    {
        *ChatRequest.__struct_fields__,
        *OUTSIDE_OF_TOKENS,
        *STATE,
        "input",
        "prompt",
        "instructions",
        "thinking",
        "reasoning",
        "text",
        "file_id",
        "content",
        "type",
        "Type",
        "role",
        "output",
        "prompt_embeds",
    }
)
odd_texts = st.text('aZ_é\u2028\U0001f600\ud800"\\{', max_size=8) | st.sampled_from(["user", "function", "message"])
odd_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | odd_texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | odd_texts, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(Endpoint), st.dictionaries(st.sampled_from(FIELDS), odd_values, max_size=5))
def test_any_json_for_each_endpoint(endpoint, fields):
    """Odd values in any place that is looked at are no surprise, and what is accepted can be patched and bounded."""
    request_body = body(endpoint, **fields)
    try:
        request = decode(endpoint, request_body)
    except BadRequest:
        return
    assert request.choices >= 1 <= request.prompts
    assert json.loads(patch(request_body, {"stream_options": asking_for_usage(request_body)}))["stream_options"]


@pytest.mark.parametrize("endpoint", Endpoint)
@pytest.mark.parametrize("opening", ['{"x":', "["])
def test_every_depth(endpoint, opening):
    """Around the limit of nesting there is still either a request or a refusal."""
    closing = "}" if opening == '{"x":' else "]"
    for depth in range(300, 1_100, 7):
        nested = f'"deep":{opening * depth}1{closing * depth}'.encode()
        for place in (b'"model"', b'"content"', b'"input"', b'"prompt"'):
            with suppress(BadRequest):
                decode(endpoint, body(endpoint).replace(place, nested + b"," + place))
