"""A simple request as a chat completion, and the answer to it as a text."""

import json

import pytest
from msgspec import UNSET

from proxy.errors import BadRequest
from proxy.wire.invoke import Said, decode_invoke, read_chat


def as_chat(**fields):
    return json.loads(decode_invoke(json.dumps(fields).encode()).as_chat("served"))


def test_a_prompt_is_one_message_of_the_user():
    """The model is the one that serves, what only we read is left out, all else is passed on."""
    assert as_chat(prompt='Say "ü"\n', model="asked", provider="p", temperature=0.5, x={"y": [1]}) == {
        "messages": [{"role": "user", "content": 'Say "ü"\n'}],
        "model": "served",
        "temperature": 0.5,
        "x": {"y": [1]},
    }


def test_messages_stay_as_they_are():
    """Byte for byte, whatever is in them."""
    invocation = decode_invoke(b'{"messages": [ {"role":"user", "content":"\\u00fc"} ],"prompt":null, "stream":true}')
    assert b'[ {"role":"user", "content":"\\u00fc"} ]' in invocation.as_chat("m")
    assert json.loads(invocation.as_chat("m")).keys() == {"messages", "model", "stream"}
    assert invocation.is_stream


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ("", "invalid_json", None),
        ("[]", "invalid_type", None),
        ("{", "invalid_json", None),
        ("\xff", "invalid_json", None),
        ("{}", "missing_required_parameter", "prompt"),
        ('{"prompt": null}', "missing_required_parameter", "prompt"),
        ('{"messages": null}', "missing_required_parameter", "prompt"),
        ('{"prompt": "a", "messages": []}', "invalid_value", "prompt"),
        ('{"prompt": ["a"]}', "invalid_type", "prompt"),
        ('{"prompt": "a", "prompt": "b"}', "duplicate_field", "prompt"),
        ('{"prompt": "a", "provider": "b", "provider": "c"}', "duplicate_field", "provider"),
        ('{"prompt": "a", "Provider": "b"}', "ambiguous_field", "provider"),
        ('{"prompt": "a", "PROMPT": "b"}', "ambiguous_field", "prompt"),
        ('{"prompt": "a", "provider": {"order": []}}', "invalid_type", "provider"),
        ('{"prompt": "a", "provider": ""}', "invalid_value", "provider"),
        ('{"prompt": "a", "model": ""}', "invalid_value", "model"),
        ('{"prompt": "a", "model": 1}', "invalid_type", "model"),
        ('{"prompt": "a", "stream": "yes"}', "invalid_type", "stream"),
        ('{"prompt": "a", "n": 2}', "unsupported_parameter", "n"),
        ('{"prompt": "a", "audio": {"voice": "x"}}', "unsupported_parameter", "audio"),
        ('{"prompt": "a", "modalities": ["text", "audio"]}', "unsupported_parameter", "modalities"),
        ('{"a":' * 100_000, "invalid_json", None),
    ],
)
def test_what_is_no_simple_request(body, code, param):
    """It is refused with its reason, as on the paths of OpenAI's API."""
    with pytest.raises(BadRequest) as caught:
        decode_invoke(body.encode("latin-1"))
    assert (caught.value.code, caught.value.param) == (code, param)


def test_one_text_may_be_asked_for_expressly():
    """By a value that says nothing else."""
    assert decode_invoke(b'{"prompt": "", "n": 1, "audio": null, "modalities": ["text"]}').prompt == ""


def completion(message, *, part="message", reason="stop"):
    return json.dumps({"choices": [{part: message, "finish_reason": reason}]}).encode()


SOURCES = [{"type": "url_citation", "url_citation": {"url": "https://example.test/"}}]
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize("part", ["message", "delta"])
@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "hi", "refusal": None, "tool_calls": None}, Said(content="hi")),
        ({"content": [{"type": "text", "text": "h"}, {"type": "x"}, {"text": "i"}]}, Said(content="hi")),
        ({"content": None, "refusal": "no"}, Said(refusal="no")),
        ({"content": None, "tool_calls": CALLS}, Said(tool_calls=CALLS)),
        ({"content": "hi", "annotations": SOURCES}, Said(content="hi", annotations=SOURCES)),
        ({"content": "", "annotations": [], "reasoning_content": "hm"}, Said(reasoning="hm")),
        ({"content": "hi", "reasoning": "hm"}, Said(content="hi", reasoning="hm")),
        ({"content": {"odd": 1}, "tool_calls": {"odd": 1}, "refusal": 7}, Said()),
        ({}, Said()),
    ],
)
def test_what_a_model_said(part, message, said):
    """In whole answers and in pieces alike."""
    read = read_chat(completion(message, part=part))
    assert (read.said, read.finish_reason, read.error) == (said, "stop", None)
    assert said.is_empty == (said == Said())


def test_half_a_character_is_a_sign_that_stands_for_it():
    """Providers cut texts where tokens end."""
    assert read_chat(b'{"choices":[{"delta":{"content":"a\\ud83d"}}]}').said.content == "a�"


def test_what_is_no_number_is_nothing():
    """Python writes `NaN` where JSON has no word; the text beside it is read all the same, and stays as it is."""
    read = read_chat(b'{"choices":[{"delta":{"content":"a, NaN "},"logprobs":[NaN,-Infinity]}]}')
    assert read.said.content == "a, NaN "


@pytest.mark.parametrize("data", [b"", b"hello", b"[]", b"{}", b'{"choices": null}', b'{"choices": 1}', b"\xff"])
def test_what_is_no_chat_completion(data):
    """Whatever else it may be."""
    assert read_chat(data) is None


def test_chunks_that_say_nothing():
    """Such as the one with the usage."""
    read = read_chat(b'{"choices":[],"usage":{"total_tokens":1}}')
    assert (read.said.content, read.finish_reason, read.error) == (UNSET, None, None)
    assert read_chat(b'{"choices":[{"index":0,"finish_reason":7}]}').finish_reason is None


def test_errors_in_both_of_their_forms():
    """As a field, and as an event of that type; an empty field beside choices is none."""
    assert read_chat(b'{"error":{"message":"m"}}').error == {"message": "m"}
    assert read_chat(b'{"type":"error","message":"m","code":"c"}').error == {
        "message": "m",
        "type": "error",
        "param": None,
        "code": "c",
    }
    assert read_chat(b'{"choices":[{"delta":{"content":"a"}}],"error":null}').error is None
