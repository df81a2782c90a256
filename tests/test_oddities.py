"""Providers differ: each oddity of theirs is a case, with the charge it must come to."""

import base64
import gzip
import json
from decimal import Decimal

import pytest

from proxy.wire.requests import Endpoint
from tests.serving import CONFIG, MODEL, SQLITE, audited

CONFIGURATION = f"""{CONFIG}
[prices."fake/classes"]
input = "1"
cached_input = "0.5"
cache_write = "1.25"
audio_input = "10"
output = "2"
audio_output = "20"
max_output_tokens = 4096
context_tokens = 128000
"""
MARKUP = Decimal("1.15")


@pytest.fixture(scope="module")
def served(tmp_path_factory, upstream):
    """A running server whose books are in order at the end."""
    with audited(tmp_path_factory.mktemp("oddities"), SQLITE, upstream.base_url, CONFIGURATION) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with served.client(served.customer("odd@example.com", "100")) as client:
        yield client


def asked(client, *, endpoint=Endpoint.CHAT, model=MODEL, stream=False, fields=None, **behaviour):
    """The answer of a provider that behaves so."""
    wish = f"!fake {json.dumps(behaviour)}"
    prompt = {
        Endpoint.CHAT: {"messages": [{"role": "user", "content": wish}]},
        Endpoint.COMPLETIONS: {"prompt": wish},
    }.get(endpoint, {"input": wish})
    body = {"model": model, **prompt, **({"stream": True} if stream else {}), **(fields or {})}
    return client.post(f"/v1/{endpoint}", json=body)


def charge_of(client, answer) -> dict:
    """The receipt of a call, which must have been closed."""
    charge = client.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").json()
    assert charge["state"] in {"settled", "released"}
    return charge


def check_usage(client, answer, upstream, source="reported", **usage) -> None:
    """The call was answered, and charged for `usage`."""
    assert answer.status_code == 200, answer.text
    charge = charge_of(client, answer)
    assert (charge["state"], charge["outcome"], charge["usage_source"]) == ("settled", "completed", source)
    prompt_tokens = {"input": upstream.journal[-1].prompt_tokens} if "input" not in usage else {}
    expected = {**prompt_tokens, **usage}
    assert charge["usage"] == {name: tokens for name, tokens in expected.items() if tokens}
    assert Decimal(charge["charged"]) == _price(charge["usage"])


def _price(usage) -> Decimal:
    dollars = {"input": "1", "cached_input": "0.5", "cache_write": "1.25", "audio_input": "10", "audio_output": "20"}
    dollars |= {"output": "2", "reasoning": "0"}
    nanos = sum(tokens * Decimal(dollars[name]) for name, tokens in usage.items()) * 1000 * MARKUP
    return Decimal(-int(-nanos // 1)) / 10**9 if nanos != int(nanos) else nanos / 10**9


@pytest.mark.parametrize(
    "behaviour",
    [
        {"usage_chunk": "last"},
        {"usage_chunk": "every"},
        {"no_done": True},
        {"no_done": True, "usage_chunk": "last"},
        {"event_prefix": ": OPENROUTER PROCESSING\n\n"},
        {"event_prefix": "event: chunk\n"},
        {"event_prefix": "id: 7\nretry: 10\n"},
        {"event_prefix": "\n\n"},
        {"role": "none"},
        {"role": "every"},
        {"content_type": ""},
        {"content_type": "text/plain"},
    ],
    ids=str,
)
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
@pytest.mark.parametrize("wants_usage", [False, True])
def test_streams(client, upstream, endpoint, behaviour, wants_usage):
    """However a stream is made, its usage is found, and charged."""
    fields = {"stream_options": {"include_usage": True}} if wants_usage else {}
    answer = asked(client, endpoint=endpoint, stream=True, fields=fields, tokens=12, **behaviour)
    check_usage(client, answer, upstream, output=12)
    assert answer.headers["content-type"].startswith(behaviour.get("content_type") or "text/event-stream")
    assert answer.text.count("[DONE]") == (0 if behaviour.get("no_done") else 1)
    assert answer.text.count('"cost"') == (1 if wants_usage else 0)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/json; charset=utf-8"])
@pytest.mark.parametrize("endpoint", Endpoint)
def test_plain_answers_of_any_type(client, upstream, endpoint, content_type):
    """An answer that says nothing of its type, or something odd, is charged and passed on."""
    answer = asked(client, endpoint=endpoint, tokens=12, content_type=content_type)
    check_usage(client, answer, upstream, output=0 if endpoint is Endpoint.EMBEDDINGS else 12)
    assert answer.headers.get("content-type", "") == content_type


def test_a_response_without_its_last_event(client, upstream):
    """Nothing is reported: what was relayed is counted."""
    answer = asked(client, endpoint=Endpoint.RESPONSES, stream=True, tokens=40, no_done=True)
    charge = charge_of(client, answer)
    assert (charge["state"], charge["usage_source"], charge["usage"]["output"]) == ("settled", "counted", 10)


ERROR_STATUSES = {400: 400, 404: 404, 409: 409, 422: 422, 429: 429, 500: 502, 502: 502, 503: 503, 529: 503, 301: 502}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "shown"), ERROR_STATUSES.items())
@pytest.mark.parametrize("error_body", ["openai", "html", "empty"])
@pytest.mark.parametrize("error_code", [None, 1234])
def test_errors(client, status, shown, error_body, error_code, stream):
    """Whatever its body, an error has OpenAI's shape and a fitting status, and costs nothing."""
    answer = asked(client, stream=stream, status=status, error_body=error_body, error_code=error_code)
    assert answer.status_code == shown
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert "<html>" not in answer.text
    if error_body == "openai" and error_code is not None:
        assert error["code"] == error_code
    charge = charge_of(client, answer)
    assert (charge["state"], charge["charged"]) == ("released", "0")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_page_for_people_costs_nothing(client, endpoint, stream):
    """It is a provider that broke, whatever its status says."""
    page = {"raw": "<html>\n\n<p>Sign in.</p></html>", "content_type": "text/html; charset=utf-8"}
    answer = asked(client, endpoint=endpoint, stream=stream, **page)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "provider_broke_off")
    charge = charge_of(client, answer)
    assert (charge["state"], charge["charged"]) == ("released", "0")


@pytest.mark.parametrize("octets", [b"[" * 100_000, b'{"error": {"message": "\xff"}}', b'{"error": 1e999}', b"{}"])
def test_an_error_that_cannot_be_read(client, octets):
    """It is an error of ours in its place, of the same status."""
    answer = asked(client, status=400, raw_base64=base64.b64encode(octets).decode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "provider_error")
    assert charge_of(client, answer)["state"] == "released"


def test_an_error_that_is_encoded_is_read(client):
    """Encoded in spite of our request, it is still the provider's own."""
    packed = base64.b64encode(gzip.compress(b'{"error": {"message": "no", "code": "odd"}}')).decode()
    answer = asked(client, status=400, raw_base64=packed, extra_headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "odd")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES])
@pytest.mark.parametrize(("code", "status"), [(429, 429), ("503", 503), (None, 502), ("odd", 502)])
def test_an_error_first_with_status_200(client, endpoint, stream, code, status):
    """It is an error, though the provider did not know yet when it began; it costs nothing."""
    wish = {"error_event": "first", "error_code": code, "status": 500}
    answer = asked(client, endpoint=endpoint, stream=stream, **wish)
    assert answer.status_code == status
    assert {"message", "type", "code"} <= answer.json()["error"].keys()
    charge = charge_of(client, answer)
    assert (charge["state"], charge["charged"]) == ("released", "0")


def test_a_failed_response_with_text_is_charged(client):
    """What a provider delivers before it fails is no error body for nothing."""
    whole = {
        "object": "response",
        "status": "failed",
        "error": {"code": "server_error", "message": "x"},
        "output": [{"type": "message", "content": [{"type": "output_text", "text": "half of"}]}],
        "usage": {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13},
    }
    answer = asked(client, endpoint=Endpoint.RESPONSES, raw=json.dumps(whole))
    assert (answer.status_code, answer.json()) == (200, whole)
    charge = charge_of(client, answer)
    assert (charge["state"], charge["usage_source"]) == ("settled", "reported")
    assert charge["usage"] == {"input": 9, "output": 4}


GZIP = {"content-encoding": "gzip"}
SAID = 'data: {"choices": [{"index": 0, "delta": {"content": "12345678"}}]}\n\n'
USED = '{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}'


def test_every_member_of_an_encoding_is_relayed(client):
    """Servers may compress piece by piece: the usage is found in any of them."""
    pieces = [SAID, f"data: {USED}\n\n", "data: [DONE]\n\n"]
    packed = base64.b64encode(b"".join(gzip.compress(piece.encode()) for piece in pieces)).decode()
    answer = asked(client, stream=True, raw_base64=packed, content_type="text/event-stream", extra_headers=GZIP)
    assert answer.text == SAID + "data: [DONE]\n\n"
    assert charge_of(client, answer)["usage"] == {"input": 9, "output": 4}
    packed = base64.b64encode(gzip.compress(USED[:20].encode()) + gzip.compress(USED[20:].encode())).decode()
    answer = asked(client, raw_base64=packed, extra_headers=GZIP)
    assert charge_of(client, answer)["usage"] == {"input": 9, "output": 4}


@pytest.mark.parametrize("encoding", ["identity", "none", ""])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_said_to_have_no_encoding_has_none(client, upstream, stream, encoding):
    """Servers have several ways to say so."""
    answer = asked(client, stream=stream, tokens=12, extra_headers={"content-encoding": encoding})
    check_usage(client, answer, upstream, output=12)


def test_an_encoding_that_is_cut_off_is_a_stream_that_broke(client):
    """Its last bytes are missing, so nobody can say that it was whole."""
    packed = base64.b64encode(gzip.compress(SAID.encode() * 20)[:-9]).decode()
    answer = asked(client, stream=True, raw_base64=packed, content_type="text/event-stream", extra_headers=GZIP)
    assert "stream_broken" in answer.text
    charge = charge_of(client, answer)
    assert (charge["state"], charge["outcome"], charge["usage_source"]) == ("settled", "provider_broke", "counted")


UNREPORTED = {
    "text": ({"text": "x" * 40}, 10),
    "unicode": ({"text": "é☂" * 8}, 10),
    "refusal": ({"refusal": "x" * 40}, 10),
    "tool calls": ({"tool_calls": [{"name": "look_up_", "arguments": {"a": "x" * 24}}]}, 10),
    "two tool calls": ({"tool_calls": [{"name": "f" * 4, "arguments": "x" * 16}] * 2}, 10),
}


@pytest.mark.parametrize(("behaviour", "tokens"), UNREPORTED.values(), ids=UNREPORTED)
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_reports_is_counted(client, endpoint, stream, behaviour, tokens):
    """A token for four bytes of whatever the model wrote, and of the request."""
    answer = asked(client, endpoint=endpoint, stream=stream, usage="none", chunk_tokens=7, **behaviour)
    charge = charge_of(client, answer)
    assert (charge["state"], charge["usage_source"]) == ("settled", "counted")
    assert abs(charge["usage"]["output"] - tokens) <= 1
    assert charge["usage"]["input"] == -(-len(answer.request.content) // 4)
    assert Decimal(charge["charged"]) == _price(charge["usage"])


def test_usage_that_is_added_belongs_to_the_stream(client):
    """Asked for and not sent, it comes in a chunk with the stream's id and model, whatever comes before its first."""
    wants = {"stream_options": {"include_usage": True}}
    answer = asked(client, stream=True, fields=wants, usage="none", event_prefix=": OPENROUTER PROCESSING\n\n")
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert chunks[-1]["usage"]["cost"] == charge_of(client, answer)["charged"]
    assert [chunks[-1][name] for name in ("id", "model", "object")] == [
        chunks[0][name] for name in ("id", "model", "object")
    ]


def test_reasoning_that_nobody_reports_is_counted(client):
    """What a model thinks aloud is output as well."""
    chunk = {"choices": [{"index": 0, "delta": {"reasoning_content": "x" * 20, "content": "x" * 20}}]}
    raw = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    answer = asked(client, stream=True, raw=raw)
    assert charge_of(client, answer)["usage"]["output"] == 10


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "usage",
    [
        "implausible",
        {"prompt_tokens": 10**9, "completion_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": 10**9},
        {"prompt_tokens": 1, "completion_tokens": 1.5},
        {"prompt_tokens": 5, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 6}},
        {"total_tokens": 10},
    ],
    ids=str,
)
def test_usage_that_cannot_be_is_counted_and_said(served, client, usage, stream):
    """What the model cannot have used is no usage: the charge is a count, and the operator is told."""
    answer = asked(client, stream=stream, usage=usage, tokens=40)
    charge = charge_of(client, answer)
    assert (charge["state"], charge["usage_source"], charge["usage"]["output"]) == ("settled", "counted", 10)
    assert [line for line in served.log().splitlines() if "usage_implausible" in line and charge["request_id"] in line]


CLASSES = {
    "cached": (
        {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 60}},
        {"input": 40, "cached_input": 60, "output": 5},
    ),
    "audio": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "prompt_tokens_details": {"audio_tokens": 90},
            "completion_tokens_details": {"audio_tokens": 30},
        },
        {"input": 10, "audio_input": 90, "output": 20, "audio_output": 30},
    ),
    "reasoning": (
        {"prompt_tokens": 9, "completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 40}},
        {"input": 9, "output": 50, "reasoning": 40},
    ),
    "hidden": (
        {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 114},
        {"input": 9, "output": 105, "reasoning": 100},
    ),
    "deepseek": (
        {"prompt_tokens": 18, "completion_tokens": 2, "prompt_cache_hit_tokens": 10, "prompt_cache_miss_tokens": 8},
        {"input": 8, "cached_input": 10, "output": 2},
    ),
    "anthropic": (
        {
            "input_tokens": 50,
            "cache_creation_input_tokens": 248,
            "cache_read_input_tokens": 100,
            "output_tokens": 503,
        },
        {"input": 50, "cache_write": 248, "cached_input": 100, "output": 503},
    ),
    "responses": (
        {
            "input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
            "output_tokens": 50,
            "output_tokens_details": {"reasoning_tokens": 40},
            "total_tokens": 150,
        },
        {"input": 30, "cached_input": 60, "cache_write": 10, "output": 50, "reasoning": 40},
    ),
    "openrouter": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 5,
            "total_tokens": 105,
            "cost": 0.1,
            "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 100},
        },
        {"cache_write": 100, "output": 5},
    ),
}


@pytest.mark.parametrize(("usage", "classes"), CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
def test_every_class_has_its_price(client, upstream, endpoint, stream, usage, classes):
    """Cached, written, spoken and hidden tokens are charged as what they are, in whatever shape they are reported."""
    answer = asked(client, endpoint=endpoint, model="fake/classes", stream=stream, usage=usage)
    check_usage(client, answer, upstream, **{"input": 0, **classes})
