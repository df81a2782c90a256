"""The simple API: the same calls as on OpenAI's paths, and the same books, in fewer words."""

import base64
import gzip
import json
from decimal import Decimal

import pytest

from proxy.edge.invoke import INVOKE_PATH, TEST_PATH
from tests.leaver import Leaver, awaited_charge, paid
from tests.scripted import ERROR, scripted_provider
from tests.serving import CONFIG, MODEL, audited
from tests.waiting import until

CONFIGURATION = f"""{CONFIG}
[providers.spare]
kind = "openai"
base_url = "{{base_url}}"
api_key_env = "UPSTREAM_KEY"
default_model = "counted"

[prices."spare/counted"]
input = "3"
output = "3"
max_output_tokens = 1000
context_tokens = 128000

[prices."spare/other"]
input = "3"
output = "3"
max_output_tokens = 1000
context_tokens = 128000

[providers.gone]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"

[prices."gone/away"]
input = "1"
output = "1"
max_output_tokens = 10
context_tokens = 1000

[providers.scripted]
kind = "openai"
base_url = "SCRIPTED"

[prices."scripted/m"]
input = "1"
output = "1"
max_output_tokens = 10
context_tokens = 1000

[providers.idle]
kind = "openai"
base_url = "{{base_url}}"
enabled = false

[models.shared]
candidates = ["fake/counted", "spare/counted"]
"""
MARKUP = Decimal("1.15")


@pytest.fixture(scope="module")
def scripted():
    """A provider that answers by script, whatever it is asked."""
    with scripted_provider() as script_and_url:
        yield script_and_url


@pytest.fixture(scope="module")
def script(scripted):
    return scripted[0]


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream, scripted):
    """A running server on a database of each kind, audited when the tests are through with it."""
    folder = tmp_path_factory.mktemp("simple")
    configuration = CONFIGURATION.replace("SCRIPTED", scripted[1])
    with audited(folder, database, upstream.base_url, configuration) as server:
        yield server


@pytest.fixture(scope="module")
def customer(served):
    return served.customer("simple@example.com", "100")


@pytest.fixture(scope="module")
def broke(served):
    return served.customer("broke@example.com", "0.000001")


@pytest.fixture
def key(served, customer):
    """The customer's key, behind which nothing is held at the end of the test."""
    yield customer
    assert served.holds_nothing(customer)


@pytest.fixture
def http(served, key):
    with served.client(key) as client:
        yield client


def wish(**behaviour) -> str:
    """A prompt that tells the fake provider what to do."""
    return f"!fake {json.dumps(behaviour)}"


def invoked(http, **body) -> dict:
    answer = http.post(INVOKE_PATH, json=body)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["request_id"] == answer.headers["x-request-id"]
    return said


def events_of(text: str) -> list[dict]:
    """The events of a stream, each of the type that it is named for."""
    found = []
    for event in text.split("\n\n")[:-1]:
        if event.startswith(":"):
            continue
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def streamed(http, **body) -> list[dict]:
    answer = http.post(INVOKE_PATH, json={"stream": True, **body})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream"), answer.text
    return events_of(answer.text)


def said_in(events) -> str:
    return "".join(event.get("content", "") for event in events)


def check_books(served, key, said) -> None:
    """What the answer says of money is what is booked."""
    charge = served.charge(key, said["request_id"])
    assert (charge["state"], charge["outcome"], charge["provider"]) == ("settled", "completed", said["provider"])
    assert charge["charged"] == said["credits_charged"]
    assert charge["provider_cost"] == said["cost"]
    assert Decimal(said["credits_charged"]) == Decimal(said["cost"]) * MARKUP
    usage = said["usage"]
    assert usage["input_tokens"] == charge["usage"]["input"] + charge["usage"].get("cached_input", 0)
    assert usage["cached_input_tokens"] == charge["usage"].get("cached_input", 0)
    assert usage["output_tokens"] == charge["usage"]["output"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert said["credits_balance"] == served.balance(key)["balance"]


# ---- answers


def test_a_prompt_is_answered_with_a_text_and_its_price(served, http, key, upstream):
    """No more is needed than the prompt; other fields reach the provider as they are."""
    said = invoked(http, prompt=wish(text="Hello.", usage="cached"), temperature=0.25, max_tokens=50, new={"a": 1})
    assert (said["content"], said["finish_reason"], said["model"], said["provider"]) == (
        "Hello.",
        "stop",
        MODEL,
        "fake",
    )
    assert said.keys().isdisjoint({"tool_calls", "refusal", "reasoning"})
    check_books(served, key, said)
    sent = upstream.journal[-1].parsed
    assert (sent["temperature"], sent["max_tokens"], sent["new"], sent["model"]) == (0.25, 50, {"a": 1}, MODEL)
    assert [message["role"] for message in sent["messages"]] == ["user"]
    assert sent.keys().isdisjoint({"prompt", "provider"})


def test_a_conversation_is_answered_too(served, http, key, upstream):
    """With its messages in place of the prompt."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": wish(tokens=7)}]
    said = invoked(http, messages=messages, model="fake/counted")
    assert (said["model"], said["usage"]["output_tokens"]) == ("counted", 7)
    assert upstream.journal[-1].parsed["messages"] == messages
    check_books(served, key, said)


def test_a_stream_is_told_in_pieces_and_priced_at_its_end(served, http, key):
    """The charge is booked before the last event comes."""
    body = {"prompt": wish(text="One two three.", pace_s=0.01, usage="cached"), "stream": True}
    with http.stream("POST", INVOKE_PATH, json=body) as answer:
        assert answer.headers["x-tollgate-provider"] == "fake"
        assert Decimal(answer.headers["x-credits-reserved"]) > 0
        text = ""
        for piece in answer.iter_text():
            text += piece
            if '"type":"done"' in text:
                check_books(served, key, events_of(text)[-1])
    *deltas, done = events_of(text)
    assert (said_in(deltas), done["type"], done["finish_reason"]) == ("One two three.", "done", "stop")
    assert len(deltas) > 1
    assert {event["type"] for event in deltas} == {"delta"}
    check_books(served, key, done)


def test_a_stream_without_an_end_marker_has_one_here(served, http, key):
    """Some providers just stop; so do those whose last event lacks its end."""
    for oddity in ({"no_done": True}, {"raw": 'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}'}):
        said = streamed(http, prompt=wish(content_type="text/event-stream", **oddity))
        assert [event["type"] for event in said].count("done") == 1
        assert said[-1]["type"] == "done"
        assert served.charge(key, said[-1]["request_id"])["charged"] == said[-1]["credits_charged"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_no_text_is_told_as_well(http, is_stream):
    """A refusal, and calls of tools, in OpenAI's form."""
    for behaviour, field in (
        ({"refusal": "I would rather not."}, "refusal"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": 1}}]}, "tool_calls"),
    ):
        if is_stream:
            said = streamed(http, prompt=wish(**behaviour))
            assert [event for event in said if field in event]
            assert said[-1]["finish_reason"] == ("tool_calls" if field == "tool_calls" else "stop")
        else:
            answer = invoked(http, prompt=wish(**behaviour))
            assert answer[field]
            assert not answer["content"]


def test_a_plain_answer_to_one_who_asked_for_a_stream(served, http, key):
    """Is a stream of one piece."""
    plain = {"choices": [{"message": {"content": "All at once."}, "finish_reason": "stop"}]}
    said = streamed(http, prompt=wish(raw=json.dumps(plain), content_type="application/json"))
    assert [event["type"] for event in said] == ["delta", "done"]
    assert said_in(said) == "All at once."
    assert served.charge(key, said[-1]["request_id"])["charged"] == said[-1]["credits_charged"]


def test_an_encoded_answer_is_read(http):
    """Though the provider was asked for one that is not."""
    plain = json.dumps({"choices": [{"message": {"content": "Pressed."}}]}).encode()
    behaviour = {
        "raw_base64": base64.b64encode(gzip.compress(plain)).decode(),
        "content_type": "application/json",
        "extra_headers": {"content-encoding": "gzip"},
    }
    assert invoked(http, prompt=wish(**behaviour))["content"] == "Pressed."


def test_an_answer_that_is_no_chat_completion(served, http, key):
    """Costs nothing if it is empty, and is shown as the text that it was counted as if it is not."""
    refused = http.post(INVOKE_PATH, json={"prompt": wish(raw="{}")})
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "provider_broke_off")
    assert served.charge(key, refused.headers["x-request-id"])["charged"] == "0"
    said = invoked(http, prompt=wish(raw="some text", content_type="text/plain"))
    assert said["content"] == "some text"
    assert served.charge(key, said["request_id"])["charged"] == said["credits_charged"] != "0"


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_without_a_token_costs_nothing(served, http, key, is_stream):
    """And says so, with the balance as it is."""
    body = {"choices": [{"message": {"content": ""}, "delta": {}, "finish_reason": "stop"}]}
    raw = f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n" if is_stream else json.dumps(body)
    kind = "text/event-stream" if is_stream else "application/json"
    prompt = wish(raw=raw, content_type=kind)
    said = streamed(http, prompt=prompt)[-1] if is_stream else invoked(http, prompt=prompt)
    assert (said["credits_charged"], said["cost"], said["usage"]["total_tokens"]) == ("0", "0", 0)
    assert (said["provider"], said["model"]) == ("fake", MODEL)
    assert said["credits_balance"] == served.balance(key)["balance"]
    assert served.charge(key, said["request_id"])["state"] == "released"


# ---- who serves


def test_a_named_provider_is_the_only_candidate(http, upstream):
    """Of an alias, of a bare name, and of a name that only it has in full."""
    for provider in ("spare", "fake"):
        for model in ("shared", "counted", f"{provider}/counted"):
            said = invoked(http, prompt="hi", provider=provider, model=model)
            assert (said["provider"], said["model"]) == (provider, "counted")
    asked = len(upstream.journal)
    failed = http.post(INVOKE_PATH, json={"prompt": wish(status=503), "provider": "fake", "model": "shared"})
    assert failed.status_code == 503
    assert len(upstream.journal) == asked + 1, "the other candidate is left alone"


def test_an_alias_that_leaves_a_provider_out_does_not_hide_its_model(http):
    """The name of the model at that provider is enough."""
    assert invoked(http, prompt="hi", provider="spare", model="other")["model"] == "other"


def test_the_default_model_of_all_and_of_each_provider(http):
    """That of the configuration, the first under [models] that it serves, or the only one there is."""
    assert invoked(http, prompt="hi")["model"] == MODEL
    assert invoked(http, prompt="hi", provider="spare")["model"] == "counted"
    assert invoked(http, prompt="hi", provider="demo")["model"] == "demo-chat"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"provider": "nobody"}, 404, "provider_not_found", "provider"),
        ({"provider": "idle"}, 404, "provider_not_found", "provider"),
        ({"provider": "demo", "model": MODEL}, 404, "model_not_found", "model"),
        ({"model": "nothing"}, 404, "model_not_found", "model"),
    ],
)
def test_who_cannot_serve_is_not_found(http, fields, status, code, param):
    """Neither in a call nor in a test."""
    answer = http.post(INVOKE_PATH, json={"prompt": "hi", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    if "provider" in fields:
        assert http.post(TEST_PATH, json=fields).json()["error"] == error


# ---- errors, and every other end


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "behaviour",
    [
        {"status": 400},
        {"status": 401},
        {"status": 404},
        {"status": 422, "error_body": "html"},
        {"status": 429, "retry_after": 7},
        {"status": 500},
        {"status": 503, "error_body": "empty"},
        {"error_event": "first"},
        {"reset": "after_read"},
    ],
)
def test_a_failure_is_that_of_the_long_way(served, http, key, behaviour, is_stream):
    """The same status and words, and nothing is charged."""
    shared = {"model": "fake/counted", "stream": is_stream}
    simple = http.post(INVOKE_PATH, json={**shared, "prompt": wish(**behaviour)})
    messages = [{"role": "user", "content": wish(**behaviour)}]
    long = http.post("/v1/chat/completions", json={**shared, "messages": messages})
    assert simple.status_code == long.status_code >= 400
    assert simple.json() == long.json()
    names = ("content-type", "retry-after", "x-should-retry")
    assert [simple.headers.get(name) for name in names] == [long.headers.get(name) for name in names]
    assert served.charge(key, simple.headers["x-request-id"])["state"] == "released"


def test_what_is_not_covered_is_402(served, broke, upstream):
    """Before a provider sees it, with what this caller could afford."""
    asked = len(upstream.journal)
    with served.client(broke) as http:
        for path, body in ((INVOKE_PATH, {"prompt": "hi", "max_tokens": 100}), (TEST_PATH, {"provider": "fake"})):
            answer = http.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (402, "insufficient_credits")
            assert Decimal(error["required"]) > Decimal(error["available"])
    assert len(upstream.journal) == asked


@pytest.mark.parametrize("behaviour", [{"error_event": "middle"}, {"half": True}, {"reset": "mid"}])
def test_a_stream_that_breaks_says_so_and_what_it_cost(served, http, key, behaviour):
    """What came is charged, and no end follows."""
    *deltas, failed = streamed(http, prompt=wish(text="A text of some length.", **behaviour))
    assert said_in(deltas)
    assert {event["type"] for event in deltas} == {"delta"}
    assert failed["type"] == "error"
    assert failed["error"]["message"]
    charge = served.charge(key, failed["request_id"])
    assert (charge["state"], charge["outcome"]) == ("settled", "provider_broke")
    assert failed["credits_charged"] == charge["charged"] != "0"
    assert failed["credits_balance"] == served.balance(key)["balance"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_pays_for_what_it_caused(served, key, upstream, is_stream):
    """As on the long way."""
    charge = awaited_charge(served, key)
    body = {"prompt": wish(tokens=40, pace_s=0.01, delay_s=0.2), "stream": is_stream, "model": "fake/boundless"}
    asked = len(upstream.journal)
    client = Leaver(served, key, INVOKE_PATH, body)
    if is_stream:
        client.read_until(b"delta")
    else:
        until(lambda: len(upstream.journal) > asked, within_s=3)
    client.leave()
    assert paid(charge()) == ("settled", "client_left", "reported")


def test_a_client_that_leaves_a_stream_that_can_be_counted_stops_the_provider(served, key, upstream):
    """As on the long way."""
    body = {"prompt": wish(tokens=4000, pace_s=0.02), "stream": True, "model": "fake/counted"}
    client = Leaver(served, key, INVOKE_PATH, body)
    client.read_until(b"delta")
    client.leave()
    assert paid(served.ended(key, client.request_id, within_s=3)) == ("settled", "client_left", "counted")
    assert upstream.journal[-1].ended.wait(3)
    assert upstream.journal[-1].client_left


# ---- the rest of the simple API


def test_the_balance_is_that_of_the_wallet(served, http, key):
    """In the same words as under credits."""
    assert http.get("/api/v1/llm/balance").json() == served.balance(key)


def test_the_providers_that_serve_are_public_with_their_models(served):
    """Those that are disabled are for admins to see; the models are what `provider` and `model` take."""
    with served.client(None) as http:
        items = {item["name"]: item for item in http.get("/api/v1/llm/providers").json()["items"]}
    assert list(items) == ["fake", "demo", "spare", "gone", "scripted"]
    assert items["spare"] == {"name": "spare", "enabled": True, "models": ["counted", "other"]}


def test_a_provider_is_tried_at_the_callers_cost(served, http, key):
    """With the time that it took."""
    for provider, model in (("spare", None), ("fake", "counted"), ("demo", None)):
        tested = http.post(TEST_PATH, json={"provider": provider, **({"model": model} if model else {})}).json()
        assert (tested["ok"], tested["error"], tested["provider"]) == (True, None, provider)
        assert 0 < tested["latency_ms"] < 10_000
        check_books(served, key, tested)


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (401, ERROR, "provider_refused_operator"),
        (500, ERROR, None),
        (404, b"<html>", "provider_error"),
        (200, b"<html>Welcome!</html>", "provider_broke_off"),
        (200, b"{}", "provider_broke_off"),
        (0, b"", "provider_broke_off"),
    ],
)
def test_a_provider_that_answers_with_something_else_is_not_well(served, http, key, script, status, body, code):
    """Whatever it is; what came as an answer is charged, and errors are not."""
    script.answers_with(status, body)
    tested = http.post(TEST_PATH, json={"provider": "scripted"}).json()
    assert (tested["ok"], tested["error"]["code"], tested["model"]) == (False, code, "m")
    assert served.charge(key, tested["request_id"])["charged"] == tested["credits_charged"]
    assert (tested["credits_charged"] == "0") == (b"Welcome" not in body)
    script.answers_with(200, b'{"choices":[{"message":{"content":"ok"}}]}')
    assert http.post(TEST_PATH, json={"provider": "scripted"}).json()["ok"]


def test_a_provider_that_fails_is_said_to(served, http, key):
    """With its error, and at no cost."""
    tested = http.post(TEST_PATH, json={"provider": "gone"}).json()
    assert (tested["ok"], tested["error"]["code"], tested["credits_charged"]) == (False, "provider_unreachable", "0")
    assert (tested["provider"], tested["model"]) == ("gone", "away")
    assert tested["credits_balance"] == served.balance(key)["balance"]
    assert served.charge(key, tested["request_id"])["state"] == "released"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("{}", 400, "missing_required_parameter"),
        ('{"provider": 1}', 400, "invalid_type"),
        ('{"provider": "fake", "x": 1}', 400, "invalid_value"),
        ('{"provider": "fake", "provider": "demo"}', 400, "duplicate_field"),
        (json.dumps({"provider": "f" * 70_000}), 413, "request_too_large"),
    ],
)
def test_what_is_no_test(http, body, status, code):
    """It is refused with its reason."""
    answer = http.post(TEST_PATH, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("path", [INVOKE_PATH, TEST_PATH])
def test_nobody_calls_without_a_key_or_by_another_method(served, http, path):
    """As everywhere."""
    with served.client(None) as anybody:
        assert anybody.post(path, json={"prompt": "hi"}).status_code == 401
    answer = http.get(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
