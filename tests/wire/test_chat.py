import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.wire.chat import ChatRequest, decode_chat
from proxy.wire.requests import Endpoint, PaidRequest

MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.test/cat.png"}}
TEXT = {"type": "text", "text": "hi"}


def body(**fields):
    return json.dumps({"model": "m", "messages": MESSAGES} | fields).encode()


def with_parts(*parts):
    return body(messages=[{"role": "user", "content": list(parts)}])


def compact(request_body):
    return json.dumps(json.loads(request_body), separators=(",", ":")).encode()


def refusal(request_body):
    with pytest.raises(BadRequest) as caught:
        decode_chat(request_body)
    return caught.value


def test_the_fields_we_read():
    """Each is there under its name, and others are ignored."""
    request = decode_chat(
        body(
            messages=[{"role": "system", "content": None}, {"role": "user", "content": [TEXT], "name": "x"}],
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False},
            max_tokens=5,
            max_completion_tokens=7,
            n=2,
            modalities=["text"],
            service_tier="auto",
            store=True,
            tools=[{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "c"}}],
            temperature=0.5,
            something={"new": [1, {"a": {}}]},
        )
    )
    assert request == PaidRequest(
        endpoint=Endpoint.CHAT,
        model="m",
        is_stream=True,
        wants_usage=True,
        maxima={"max_tokens": 5, "max_completion_tokens": 7},
        choices=2,
        service_tier="auto",
        has_instructions=True,
        must_unstore=True,
    )


@pytest.mark.parametrize(
    ("fields", "has_instructions"),
    [
        ({}, False),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, True),
        ({"response_format": {"type": "text"}}, True),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]}, True),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": None}]}, False),
    ],
)
def test_what_a_provider_may_explain(fields, has_instructions):
    """Tools, those that were called before included, and formats."""
    assert decode_chat(body(**fields)).has_instructions is has_instructions


@given(st.lists(st.booleans(), min_size=13, max_size=13))
def test_what_may_be_cached(escaped):
    """It is found however its name is written."""
    pairs = zip("cache_control", escaped, strict=True)
    name = "".join(f"\\u{ord(letter):04x}" if is_escaped else letter for letter, is_escaped in pairs)
    said = body(messages=[{"role": "user", "content": [{"type": "text", "text": "é \\ <", "name": {}}]}])
    assert not decode_chat(said).asks_for_caches
    assert decode_chat(said.replace(b'"name"', f'"{name}"'.encode())).asks_for_caches


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": {}},
        {"messages": [{"role": "user", "content": "x", "cache_control": {}}]},
        {"tools": [{"type": "function", "cache_control": {}}]},
    ],
)
def test_where_caches_may_be_asked_for(fields):
    """Anywhere."""
    assert decode_chat(body(**fields)).asks_for_caches


def test_null_is_absent():
    """Clients send null for what they leave out."""
    optional = [name for name in ChatRequest.__struct_fields__ if name not in {"model", "messages"}]
    absent = dict.fromkeys([*optional, "web_search_options", "audio", "prompt"])
    assert decode_chat(body(**absent)) == decode_chat(body())


@pytest.mark.parametrize(
    ("request_body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (body() + b" x", None, "invalid_json"),
        (b"\xef\xbb\xbf{}", None, "invalid_json"),
        (body()[:-1] + b',"\xff":1}', None, "invalid_json"),
        (body(model="X").replace(b"X", b"\xff"), None, "invalid_json"),
        (body(model="X").replace(b"X", b"\\ud800"), None, "invalid_json"),
        (with_parts(TEXT | {"X": 1}).replace(b"X", b"\xff"), None, "invalid_json"),
        (body(messages=[{"role": "u", "X": {}}]).replace(b"X", b"\xff"), None, "invalid_json"),
        (body(tools=[{"type": "function", "X": 1}]).replace(b"X", b"\xff"), None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_type"),
        (b'{"x":' + b"[" * 100_000, None, "invalid_json"),
        (b'{"x":' + b'{"x":' * 100_000, None, "invalid_json"),
        (b"[]", None, "invalid_type"),
        (b"null", None, "invalid_type"),
        (b"{}", "model", "missing_required_parameter"),
        (b'{"model":"m"}', "messages", "missing_required_parameter"),
        (body(model=""), "model", "invalid_value"),
        (body(model=3), "model", "invalid_type"),
        (body(messages=[]), "messages", "invalid_value"),
        (body(messages="hi"), "messages", "invalid_type"),
        (body(messages=[{"content": "hi"}]), "messages", "missing_required_parameter"),
        (body(messages=[{"role": "user", "content": 3}]), "messages", "invalid_type"),
        (with_parts({"text": "hi"}), "messages", "missing_required_parameter"),
        (body(max_tokens=0), "max_tokens", "invalid_value"),
        (body(max_tokens=-1), "max_tokens", "invalid_value"),
        (body(max_tokens="9"), "max_tokens", "invalid_type"),
        (body(max_tokens=True), "max_tokens", "invalid_type"),
        (body(max_tokens=10**30), "max_tokens", "invalid_value"),
        (body(max_completion_tokens=1.5), "max_completion_tokens", "invalid_type"),
        (body(n=0), "n", "invalid_value"),
        (body(n=129), "n", "invalid_value"),
        (body(stream=1), "stream", "invalid_type"),
        (body(stream_options={"include_usage": "yes"}), "stream_options", "invalid_type"),
        (body(tools=[{}]), "tools", "missing_required_parameter"),
    ],
)
def test_malformed_bodies(request_body, param, code):
    """Each is refused with the field at fault and a stable code."""
    error = refusal(request_body)
    assert (error.param, error.code) == (param, code)


def test_messages_name_the_place():
    """A developer is told where in the body the fault is."""
    error = refusal(body(messages=[{"role": 3}]))
    assert str(error) == "Invalid type for 'messages[0].role': Expected `str`, got `int`."
    assert str(refusal(body(messages=[{}]))) == "Missing required parameter: 'messages[0].role'."


def test_every_depth():
    """Around the limit of nesting there is still either a request or a refusal."""
    for depth in range(500, 1_100):
        nested = b'{"a":' * depth + b"1" + b"}" * depth
        for request_body in (
            body(messages=[{"role": "u", "X": 1}]),
            with_parts(IMAGE | {"X": 1}),
            body(tools=[{"type": "function", "X": 1}]),
        ):
            with suppress(BadRequest):
                decode_chat(request_body.replace(b'"X": 1', b'"X":' + nested))


@settings(deadline=None)
@given(st.binary() | st.binary().map(lambda end: body()[:-1] + end))
def test_any_bytes(request_body):
    """There is a request or a refusal, never another exception."""
    try:
        decode_chat(request_body)
    except BadRequest:
        return


odd_texts = st.text('aZ_é\u2028\U0001f600\ud800"\\{', max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | odd_texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_texts, inner, max_size=4),
    max_leaves=12,
)
field_names = st.sampled_from([*ChatRequest.__struct_fields__, "audio", "file_id", "content", "type", "Type", "role"])


@settings(deadline=None)
@given(
    st.dictionaries(field_names, json_values | st.just(MESSAGES), max_size=6),
    st.lists(st.dictionaries(field_names, json_values, max_size=4), max_size=3),
    st.lists(st.dictionaries(field_names, json_values, max_size=4), max_size=3),
)
def test_any_json(fields, parts, tools):
    """Odd values in the places that are looked at more closely are no surprise either."""
    messages = [{"role": "user", "content": [part | {"type": "file"} for part in parts]}]
    for request in (fields, {"model": "m", "messages": messages, "tools": tools} | fields):
        try:
            decode_chat(json.dumps(request).encode())
        except BadRequest:
            continue


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"search_parameters": {"mode": "auto"}}, "search_parameters"),
        ({"plugins": [{"id": "web"}]}, "plugins"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"background": 1}, "background"),
        ({"deferred": True}, "deferred"),
        ({"web_search": True}, "web_search"),
        ({"enable_search": 1}, "enable_search"),
        ({"data_sources": [{"type": "azure_search"}]}, "data_sources"),
        ({"chat_template": "{% for i in range(9) %}x{% endfor %}"}, "chat_template"),
        ({"extra_body": {"max_tokens": 9000}}, "extra_body"),
        ({"models": ["dear/model"]}, "models"),
        ({"best_of": 5}, "best_of"),
        ({"modalities": ["text", "video"]}, "modalities"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {}}, {"type": "code_interpreter"}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]}, "messages"),
    ],
)
def test_what_has_no_bound_is_refused(fields, param):
    """What is billed outside of tokens, or kept at the provider, is 400 and names the field."""
    for request_body in (body(**fields), compact(body(**fields))):
        error = refusal(request_body)
        assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"background": False},
        {"deferred": None},
        {"candidate_count": 1},
        {"plugins": []},
        {"best_of": 1},
        {"service_tier": "default"},
        {"modalities": ["text"]},
        {"modalities": []},
        {"messages": [{"role": "assistant", "content": "hi", "audio": None}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "AA", "file_id": None}}]}]},
        {"metadata": {"prompt": "x", "plugins": [1], "file_id": "mine"}},
    ],
)
def test_what_is_switched_off_is_not_refused(fields):
    """A field that asks for nothing is no reason for a refusal, nor is its name where it means nothing."""
    decode_chat(body(**fields))


M = b'{"model":"m","messages":[{"role":"user","content":"hi"}]'
ATTACKS = [
    (M + b',"max_tokens":1,"max_tokens":9000}', "max_tokens"),
    (M + b',"max_tokens":1,"max_tokens":1}', "max_tokens"),
    (M + b',"max_tokens":1,"Max_Tokens":9000}', "max_tokens"),
    (M + b',"MAX_TOKENS":9000}', "max_tokens"),
    (M + b',"maxTokens":9000,"max_tokens":1}', "max_tokens"),
    (M + b',"max-tokens":9000}', "max_tokens"),
    (M + b',"max_tokens":1,"max\\u005ftokens":9000}', "max_tokens"),
    (M + b',"\\u006dax_tokens":1,"max_tokens":9000}', "max_tokens"),
    (M + b',"max_tokens":1,"\\u004dax_tokens":9000}', "max_tokens"),
    (M + ',"max_to\u212aens":9000}'.encode(), "max_tokens"),
    (M + b',"max_token\\u017f":9000}', "max_tokens"),
    (M + ',"l\u0131ne":1,"\u017ftream":true}'.encode(), "stream"),
    (M + ',"serv\u0131ce_tier":"priority"}'.encode(), "service_tier"),
    (M + b',"model":"m"}', "model"),
    (M + b',"Model":"dear"}', "model"),
    (M + b',"messages":[{"role":"user","content":"hi"}]}', "messages"),
    (M + b',"stream":true,"stream":false}', "stream"),
    (M + b',"n":1,"n":128}', "n"),
    (M + b',"N":128}', "n"),
    (M + b',"n":1,\n\t"n" : 128}', "n"),
    (M + b',"user":"","n":1,"user":"","n":1}', "user"),
    (M + b',"Web_Search_Options":{}}', "web_search_options"),
    (M + b',"web_search_options":{},"web_search_options":null}', "web_search_options"),
    (M + b',"stream_options":{"include_usage":true,"include_usage":false}}', "stream_options"),
    (M + b',"stream_options":{"include_usage":true,"Include_Usage":false}}', "stream_options"),
    (M + b',"stream_options":{"include_usage":true,"include\\u005fusage":false}}', "stream_options"),
    (b'{"model":"m","messages":[{"role":"user","content":[{"type":"image_url"}],"content":"hi"}]}', "messages"),
    (b'{"model":"m","messages":[{"role":"user","Content":[{"type":"image_url"}],"content":"hi"}]}', "messages"),
    (b'{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","type":"text"}]}]}', "messages"),
    (b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","Type":"image_url"}]}]}', "messages"),
    (b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","typ\\u0065":"image_url"}]}]}', "messages"),
    (b'{"model":"m","messages":[{"role":"a","content":"","audio":{"id":"x"},"audio":null}]}', "messages"),
    (b'{"model":"m","messages":[{"role":"a","content":"","Audio":{"id":"x"}}]}', "messages"),
    (b'{"model":"m","messages":[{"role":"u","content":[{"type":"file","file":{"File_Id":"x"}}]}]}', "messages"),
    (
        b'{"model":"m","messages":[{"role":"u","content":[{"type":"file","file":{"file_id":"x","file_id":null}}]}]}',
        "messages",
    ),
    (M + b',"tools":[{"type":"web_search","type":"function"}]}', "tools"),
    (M + b',"tools":[{"type":"function"},{"type":"function","TYPE":"web_search"}]}', "tools"),
]


@pytest.mark.parametrize(("request_body", "param"), ATTACKS)
def test_fields_that_another_parser_may_read_otherwise(request_body, param):
    """A name twice, or in another spelling, is refused wherever we read it, whatever the white space around it."""
    error = refusal(request_body)
    assert (error.param, error.code in {"duplicate_field", "ambiguous_field"}) == (param, True)
    for old, new in ((b",", b" , "), (b":", b": "), (b"{", b"{\n")):
        assert refusal(request_body.replace(old, new)).param == param
    spaced = request_body.replace(b",", b", ").replace(b":", b": ")
    long = b"x" * 5000
    for begun in (b'"user": "%b", ' % long, b'"user":"%b",' % long, b""):
        assert refusal(spaced.replace(b"{", b"{" + begun, 1)).param == param


@settings(deadline=None)
@given(st.sampled_from(ATTACKS), st.integers(0, 40), st.integers(0, 40))
def test_white_space_hides_no_duplicate(attack, before, after):
    """The check by length cannot be balanced by white space."""
    request_body, param = attack
    padded = b" " * before + request_body[:-1] + b" " * after + b"}"
    assert refusal(padded).param == param


def test_names_are_free_where_we_do_not_read():
    """Contents, tool schemas and metadata may use every name and spelling, as often as they like."""
    words = ["model", "n", "N", "max_tokens", "Max_Tokens", "stream", "type", "Type", "content", "audio"]
    said = " ".join(f'"{word}": 1, "{word}": 2 {{' for word in words)
    schema = {"type": "object", "properties": {word: {"type": "string"} for word in words}, "required": words}
    request_body = body(
        messages=[
            {"role": "user", "content": said},
            {"role": "user", "content": [{"type": "text", "text": said}]},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": said}}]},
        ],
        tools=[{"type": "function", "function": {"name": "model", "parameters": schema}}] * 2,
        metadata=dict.fromkeys(words, "model"),
        stream=True,
        n=1,
        max_tokens=3,
    )
    assert decode_chat(request_body) == decode_chat(compact(request_body))


def test_images_that_the_request_enlarges():
    """They have no maximum that the model's row could know."""
    messages = [{"role": "user", "content": [TEXT, IMAGE]}]
    assert decode_chat(body(messages=messages, mm_processor_kwargs=None)).has_only_images
    assert not decode_chat(body(messages=messages, mm_processor_kwargs={"max_pixels": 10**9})).has_only_images


@pytest.mark.parametrize(
    ("content", "is_media"),
    [
        ("hi", False),
        (None, False),
        ([], False),
        ([TEXT], False),
        ([TEXT, {"type": "refusal", "refusal": "no"}], False),
        ([TEXT, IMAGE], True),
        ([{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}], True),
        ([{"type": "file", "file": {"file_data": "AA"}}], True),
        ([{"type": "something_new"}], True),
    ],
)
def test_content_that_is_not_in_the_body(content, is_media):
    """Everything but text may be larger than its bytes."""
    request = decode_chat(body(messages=[{"role": "user", "content": "x"}, {"role": "user", "content": content}]))
    assert request.is_unsized is is_media


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 7, "max_completion_tokens": None}, 7),
        ({"max_tokens": 7, "max_output_tokens": 8, "num_predict": 9, "n_predict": 10, "max_new_tokens": 11}, 11),
    ],
)
def test_the_maximum(fields, tokens):
    """Of several maxima the largest counts, in whatever spelling a provider may take it."""
    assert decode_chat(body(**fields)).maximum == tokens


def test_a_prediction_counts_by_its_bytes():
    """It may be billed as output, whatever becomes of it; null is none."""
    prediction = {"type": "content", "content": "é"}
    assert decode_chat(body(prediction=prediction)).prediction_tokens == len(json.dumps(prediction))
    assert decode_chat(body(prediction=None)).prediction_tokens == 0


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 4096}}, 4096),
        ({"reasoning": {"max_tokens": 2000, "effort": "high"}}, 2000),
        ({"thinking": "on", "reasoning": {"max_tokens": "many"}}, 0),
        ({"thinking": None}, 0),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "high", "thinking": {"type": "enabled", "budget_tokens": 4096}}, 4096),
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": None}, 0),
    ],
)
def test_the_budget_for_thinking(fields, tokens):
    """It is what a useful answer needs at least; unknown shapes are the provider's business."""
    assert decode_chat(body(**fields)).thinking_tokens == tokens


@pytest.mark.parametrize(
    ("fields", "wants_audio"),
    [
        ({"modalities": ["text", "audio"], "audio": {"voice": "ash", "format": "wav"}}, True),
        ({"modalities": ["audio"]}, True),
        ({"audio": {"voice": "ash", "format": "wav"}}, True),
        ({"modalities": ["text"], "audio": None}, False),
        ({}, False),
    ],
)
def test_spoken_output(fields, wants_audio):
    """Whether an answer may be spoken, and so has to have a price for that."""
    assert decode_chat(body(**fields)).wants_audio is wants_audio
