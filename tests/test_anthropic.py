"""Anthropic behind OpenAI's API, end to end: a server process, the Messages API on a socket, both databases."""

import json
from decimal import Decimal

import openai
import pytest

from tests.fakes.provider.messages import fault_of, signed
from tests.published_messages import STREAMS
from tests.serving import SQLITE, UPSTREAM_KEY, audited, serving
from tests.waiting import until

CONFIG = """
[server]
port = 0
call_s = 2

[providers.claude]
kind = "anthropic"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"
first_byte_s = 1
idle_s = 1

[providers.demo]
kind = "demo"

[providers.fake]
kind = "openai"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"

[models.other]
candidates = ["fake/fake-model", "claude/claude-opus-5"]

[prices."fake/fake-model"]
input = "1"
output = "2"
max_output_tokens = 1000
context_tokens = 10000

[models.either]
candidates = ["claude/claude-opus-5", "demo/demo-chat"]

[prices."claude/claude-haiku-4-5"]
input = "1"
cached_input = "0.1"
cache_write = "1.25"
cache_write_1h = "2"
output = "5"
max_output_tokens = 64000
context_tokens = 200000
image_tokens_max = 1600

[prices."claude/claude-opus-5"]
input = "5"
output = "25"
max_output_tokens = 128000
context_tokens = 1000000
is_reasoning = true
"""

MODEL = "claude/claude-haiku-4-5"
MARKUP = Decimal("1.15")
once = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
"""For what has nothing to do with the database."""

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream):
    """A running server, audited when the tests are through with it."""
    fault_of({})  # the SDK's types are there before anybody waits for them
    folder = tmp_path_factory.mktemp("anthropic")
    with audited(folder, database, upstream.base_url, CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def funded(served):
    """A key with credits behind it."""
    return served.customer("funded@example.com", "1000")


@pytest.fixture
def client(served, funded):
    """OpenAI's client; nothing is held when the test is through with it."""
    with openai.OpenAI(base_url=served.base_url, api_key=funded, max_retries=0) as client:
        yield client
    until(lambda: served.holds_nothing(funded), "something stayed held")


def wish(**behaviour):
    """Messages that tell the fake provider how to behave."""
    return [{"role": "user", "content": f"!fake {json.dumps(behaviour)}"}]


def ask(client, *, model=MODEL, **fields):
    """A plain answer, with its head."""
    return client.chat.completions.with_raw_response.create(model=model, **{"messages": wish(), **fields})


def failure(client, **fields):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **fields)
    return caught.value


def charge_of(served, key, answer):
    return served.ended(key, answer.headers["x-request-id"])


def expected(usage):
    """What that costs at the configured prices of `MODEL`, with the markup."""
    prices = {"input": "1", "cached_input": "0.1", "cache_write": "1.25", "cache_write_1h": "2", "output": "5"}
    return sum(Decimal(prices[name]) * count for name, count in usage.items() if name in prices) * MARKUP / 10**6


def test_a_plain_call(served, funded, client, upstream):
    """It goes out with the operator's key and nothing of the client's, and is charged as reported."""
    answer = ask(client, user="u-1", extra_headers={"x-secret": "s"})
    choice = answer.parse().choices[0]
    assert (choice.message.content, choice.finish_reason) == ("The quick brown fox ", "stop")
    charge = charge_of(served, funded, answer)
    assert (charge["usage_source"], charge["response_model"]) == ("reported", "claude-haiku-4-5")
    assert Decimal(charge["charged"]) == expected(charge["usage"]) == Decimal(answer.headers["x-credits-charged"])
    call = upstream.journal[-1]
    assert call.path == "/v1/messages"
    assert (call.header("x-api-key"), call.header("anthropic-version")) == (UPSTREAM_KEY, "2023-06-01")
    assert not call.header("authorization")
    assert not call.header("x-secret")
    assert (call.parsed["max_tokens"], call.parsed["metadata"]) == (64_000, {"user_id": "u-1"})


USAGE = {
    "input_tokens": 100,
    "cache_creation_input_tokens": 200,
    "cache_read_input_tokens": 300,
    "cache_creation": {"ephemeral_5m_input_tokens": 120, "ephemeral_1h_input_tokens": 80},
    "output_tokens": 50,
    "output_tokens_details": {"thinking_tokens": 20},
    "service_tier": "standard",
}
CHARGED = {
    "input": 100,
    "cached_input": 300,
    "cache_write": 120,
    "cache_write_1h": 80,
    "output": 50,
    "reasoning": 20,
}


def test_every_class_has_its_price(served, funded, client):
    """The client sees OpenAI's inclusive numbers, and the charge is by Anthropic's classes."""
    messages = [{"role": "system", "content": "x" * 2000}, *wish(usage=USAGE)]
    answer = ask(client, messages=messages)
    usage = answer.parse().usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (600, 50, 650)
    assert usage.prompt_tokens_details.cached_tokens == 300
    assert usage.completion_tokens_details.reasoning_tokens == 20
    charge = charge_of(served, funded, answer)
    assert (charge["usage"], charge["usage_source"]) == (CHARGED, "reported")
    assert Decimal(charge["charged"]) == expected(CHARGED)


@pytest.mark.parametrize("shows_usage", [True, False])
def test_a_stream(served, funded, client, shows_usage):
    """Its last chunk has usage and cost for a client that asked; the charge is the same for one that did not."""
    options = {"stream_options": {"include_usage": True}} if shows_usage else {}
    messages = [{"role": "system", "content": "x" * 2000}, *wish(usage=USAGE)]
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=messages, stream=True, **options
    ) as answer:
        chunks = list(answer.parse())
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "The quick brown fox "
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    charge = charge_of(served, funded, answer)
    assert (charge["usage"], charge["usage_source"]) == (CHARGED, "reported")
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [shows_usage]
    if shows_usage:
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.cost) == (600, charge["charged"])


@once
@pytest.mark.parametrize("published", STREAMS.values(), ids=STREAMS)
def test_published_streams(served, funded, client, published):
    """They are charged by what they report, whatever they hold, and end for OpenAI's client."""
    messages = [{"role": "system", "content": "x" * 2000}, *wish(raw=published.octets.decode(), segment_bytes=50)]
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=messages, stream=True) as answer:
        chunks = list(answer.parse())
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == published.content
    assert choices[-1].finish_reason == published.finish
    charge = charge_of(served, funded, answer)
    assert (charge["usage"], charge["usage_source"]) == (published.usage, "reported")


@once
@pytest.mark.parametrize("is_stream", [True, False])
def test_tools_and_thinking_over_two_turns(client, upstream, is_stream):
    """Parallel calls come back with their results, and thinking with its signature, as the API demands."""
    blocks = [
        {"type": "thinking", "thinking": "Which?", "signature": signed("Which?")},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {"city": "Bonn"}},
    ]
    asked = {"model": "claude/claude-opus-5", "tools": [TOOL], "reasoning_effort": "low", "max_completion_tokens": 4000}
    messages = wish(blocks=blocks, text="Sun.")
    if is_stream:
        with client.chat.completions.stream(messages=messages, **asked) as stream:
            first = stream.get_final_completion().choices[0].message
    else:
        first = client.chat.completions.create(messages=messages, **asked).choices[0].message
    assert [json.loads(call.function.arguments) for call in first.tool_calls] == [{"city": "Köln"}, {"city": "Bonn"}]
    assert first.reasoning_content == "Which?"
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in first.tool_calls]
    again = [*messages, first.model_dump(), *results, {"role": "user", "content": '!fake {"text": "Sun."}'}]
    last = client.chat.completions.create(messages=again, **asked)
    assert last.choices[0].message.content == "Sun."
    sent = upstream.journal[-1].parsed
    assert sent["messages"][1]["content"] == blocks
    assert [block["type"] for block in sent["messages"][2]["content"]] == ["tool_result", "tool_result", "text"]
    assert sent["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert sent["output_config"] == {"effort": "low"}


@once
@pytest.mark.parametrize(
    ("behaviour", "status", "code", "headers"),
    [
        ({"status": 400}, 400, "invalid_request_error", {}),
        ({"status": 404}, 404, "not_found_error", {}),
        ({"status": 413}, 413, "request_too_large", {}),
        ({"status": 429, "retry_after": 7}, 429, "rate_limit_error", {"retry-after": "7"}),
        ({"status": 529, "retry_after": 1}, 503, "overloaded_error", {"retry-after": "1"}),
        ({"status": 500}, 502, "api_error", {}),
        ({"status": 502, "error_body": "html"}, 502, "provider_error", {}),
        ({"status": 401}, 502, "provider_refused_operator", {}),
        ({"status": 402}, 502, "provider_refused_operator", {}),
        ({"status": 403}, 502, "provider_refused_operator", {}),
        ({"status": 429, "error_code": "enforced_spend_limit_reached"}, 502, "provider_refused_operator", {}),
        ({"raw": "{}"}, 502, "provider_broke_off", {}),
        ({"half": True}, 502, "provider_broke_off", {}),
        ({"reset": "after_read"}, 502, "provider_broke_off", {}),
        ({"stall": "before_headers"}, 504, "provider_timeout", {}),
        ({"stall": "mid"}, 504, "provider_timeout", {}),
    ],
)
def test_failures(served, funded, client, behaviour, status, code, headers):
    """Each is an error in OpenAI's shape that costs nothing, and the operator's own problems are nobody else's."""
    before = served.balance(funded)["balance"]
    failed = failure(client, messages=wish(**behaviour))
    assert (failed.status_code, failed.code) == (status, code)
    assert {name: failed.response.headers.get(name) for name in headers} == headers
    assert served.balance(funded)["balance"] == before


@once
@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 2}),
        ("seed", {"seed": 1}),
        ("logprobs", {"logprobs": True}),
        ("temperature", {"temperature": 2}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("messages", {"messages": [{"role": "user", "name": "Ann", "content": "Hello"}]}),
    ],
)
def test_what_cannot_be_expressed(served, funded, client, upstream, param, fields):
    """It is 400 and names the field; the provider is not called, and nothing is charged."""
    calls, before = len(upstream.journal), served.balance(funded)["balance"]
    failed = failure(client, **fields)
    assert (failed.status_code, failed.param, failed.code) == (400, param, "unsupported_parameter")
    assert served.charge(funded, failed.response.headers["x-request-id"])["outcome"] == "nothing_delivered"
    assert (len(upstream.journal), served.balance(funded)["balance"]) == (calls, before)


@once
@pytest.mark.parametrize(
    ("path", "fields"),
    [("embeddings", {"input": "x"}), ("completions", {"prompt": "x"}), ("responses", {"input": "x"})],
)
def test_other_endpoints(served, funded, upstream, path, fields):
    """They are 400, since the provider has chat completions only."""
    calls = len(upstream.journal)
    with served.client(funded) as http:
        answer = http.post(f"/v1/{path}", json={"model": MODEL, **fields})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_endpoint")
    assert len(upstream.journal) == calls


@once
@pytest.mark.parametrize("behaviour", [{"status": 529}, {"error_event": "first", "status": 529}, {"status": 401}])
def test_another_candidate(client, upstream, behaviour):
    """It gets the call of one that is overloaded or refuses the operator, also when a stream begins with that."""
    calls = len(upstream.journal)
    chunks = list(client.chat.completions.create(model="either", messages=wish(**behaviour), stream=True))
    assert chunks[-1].model == "demo-chat"
    assert len(upstream.journal) == calls + 1


@once
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_one_candidate_has_no_words_for_is_the_next_ones(served, funded, stream):
    """Whichever would have been the first."""
    with served.client(funded) as http:
        body = {"model": "either", "messages": wish(), "seed": 1, "max_tokens": 5, "stream": stream}
        answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.headers["x-tollgate-provider"]) == (200, "demo")
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["provider"], charge["outcome"]) == ("demo", "completed")


@once
def test_a_failure_says_more_than_a_candidate_without_words(client):
    """It may be gone the next time, while another candidate's lack of words is nothing that the client did wrong."""
    failed = failure(client, model="other", messages=wish(status=503), n=2)
    assert failed.status_code == 503
    failed = failure(client, model="other", messages=wish(status=400), n=2)
    assert failed.code != "unsupported_parameter", "a refusal is final"


# ---- endings of streams


@once
@pytest.mark.parametrize("shows_usage", [True, False])
def test_a_stream_that_does_not_report_what_came_out(served, funded, client, shows_usage):
    """The text is counted beside the input that was reported, and the client is told as much."""
    octets = STREAMS["basic"].octets.decode().replace(',"usage":{"output_tokens": 15}', "")
    octets = octets.replace('"text": "Hello"', f'"text": "{"x" * 400}"')
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=wish(raw=octets), stream=True, stream_options={"include_usage": shows_usage}
    ) as answer:
        chunks = list(answer.parse())
    charge = charge_of(served, funded, answer)
    assert (charge["usage_source"], charge["usage"]) == ("counted", {"input": 25, "output": 1 + 101})
    shown = [(chunk.usage.completion_tokens, chunk.usage.cost) for chunk in chunks if chunk.usage]
    assert shown == ([(102, charge["charged"])] if shows_usage else [])


@once
@pytest.mark.parametrize(("kind", "status"), [("overloaded_error", 503), ("billing_error", 502)])
def test_an_error_with_status_200(client, kind, status):
    """It is the error that it says it is."""
    error = {"type": "error", "error": {"type": kind, "message": "No."}}
    assert failure(client, messages=wish(raw=json.dumps(error))).status_code == status


def broken_stream(client, **behaviour):
    """The text of a stream until it breaks, and the head of the answer."""
    texts = []
    with client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=wish(**behaviour), stream=True
    ) as answer:
        contents = (choice.delta.content or "" for chunk in answer.parse() for choice in chunk.choices)
        with pytest.raises(openai.APIError):
            texts.extend(iter(contents))
    return "".join(texts), answer


@pytest.mark.parametrize(
    "behaviour",
    [
        {"error_event": "middle", "status": 529},
        {"half": True},
        {"reset": "mid"},
        {"stall": "mid"},
        {"no_done": True},
    ],
)
def test_a_stream_that_breaks(served, funded, client, behaviour):
    """What was delivered is charged: the input as it was reported, and a count of the text; no end marker comes."""
    text, answer = broken_stream(client, tokens=200, **behaviour)
    charge = charge_of(served, funded, answer)
    assert (charge["state"], charge["outcome"], charge["usage_source"]) == ("settled", "provider_broke", "counted")
    assert 0 < charge["usage"]["output"] <= 1 + -(-len(text) // 4)
    assert charge["usage"]["input"] == len(wish(tokens=200, **behaviour)[0]["content"]) + 4
    assert Decimal(charge["charged"]) <= Decimal(charge["reserved"])


def test_a_client_that_leaves(served, funded, client, upstream):
    """The call is read to its end, since nobody can count what thinks, and its usage is charged."""
    stream = client.chat.completions.create(
        model=MODEL, messages=wish(tokens=200, pace_s=0.005), stream=True, extra_headers={"x-client-request-id": "left"}
    )
    next(iter(stream))
    request_id = stream.response.headers["x-request-id"]
    stream.close()
    charge = served.ended(funded, request_id)
    assert (charge["outcome"], charge["usage_source"]) == ("client_left", "reported")
    assert charge["usage"]["output"] == 200
    assert upstream.journal[-1].completed


def test_a_call_that_takes_too_long(served, funded, client):
    """A stream beyond the call's own time is charged for what was relayed."""
    _, answer = broken_stream(client, tokens=4000, pace_s=0.02)
    charge = charge_of(served, funded, answer)
    assert (charge["state"], charge["usage_source"]) == ("settled", "counted")


# ---- money


def test_what_the_grant_buys(served, upstream):
    """A call that names no maximum gets one that its wallet covers, said to the provider and to the client."""
    key = served.customer("poor@example.com", "0.2")
    with openai.OpenAI(base_url=served.base_url, api_key=key, max_retries=0) as poor:
        answer = ask(poor)
        bought = int(answer.headers["x-credits-max-tokens"])
        assert upstream.journal[-1].parsed["max_tokens"] == bought
        assert 1024 <= bought < 64_000
        charge = charge_of(served, key, answer)
        assert Decimal(charge["charged"]) <= Decimal(charge["reserved"]) <= Decimal("0.2")


@once
def test_a_grant_buys_thinking(served, upstream):
    """An effort asks for more than the least that is worth starting for."""
    key = served.customer("thinking@example.com", "0.02")
    with openai.OpenAI(base_url=served.base_url, api_key=key, max_retries=0) as poor:
        answer = ask(poor, reasoning_effort="low")
    sent = upstream.journal[-1].parsed
    assert sent["max_tokens"] == int(answer.headers["x-credits-max-tokens"]) >= 2048
    assert sent["thinking"] == {"type": "enabled", "budget_tokens": 1024}


CALLED = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
HISTORY = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "call_1", "content": "done"},
]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"messages": HISTORY},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}
            ]
        },
    ],
)
def test_the_reservation_bounds_the_charge(served, funded, client, fields):
    """It covers what the provider adds for tools, and images, which have no bytes in the body."""
    answer = ask(client, max_completion_tokens=10, **fields)
    charge = charge_of(served, funded, answer)
    assert charge["shortfall"] == "0"
    assert Decimal(charge["charged"]) <= Decimal(charge["reserved"])


def test_a_key_is_enough(tmp_path):
    """With the name of its variable alone, the server starts and offers Claude at the prices that ship."""
    text = '[server]\nport = 0\n[providers.anthropic]\nkind = "anthropic"\napi_key_env = "UPSTREAM_KEY"\n'
    with serving(tmp_path, SQLITE, "", configuration=text) as server:
        key = server.customer("a@example.com")
        with server.client(key) as http:
            model = http.get("/v1/models/claude-opus-5").json()
    assert (model["providers"], model["max_output_tokens"]) == (["anthropic"], 128_000)


@once
def test_the_simple_api(served, funded):
    """It answers with Claude as with any other model."""
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 50}
    with served.client(funded) as http:
        answer = http.post("/api/v1/llm/invoke", json=body).json()
    assert (answer["content"], answer["provider"]) == ("The quick brown fox ", "claude")
    assert Decimal(answer["credits_charged"]) == expected({"input": len("Hello") + 4, "output": 20})
