"""Tools that the provider runs, sold where the operator has priced them, on a real server with each database."""

import json
from decimal import Decimal

import pytest

from tests.fakes.provider.responses import FOUND_TOKENS
from tests.serving import audited

CONFIG = """
[server]
port = 0

[providers.fake]
kind = "openai"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"
is_local = false

[prices."fake/{model}"]
input = "1"
output = "2"
web_search = "0.01"
code_interpreter = "0.03"
tool_calls_max = 5
max_output_tokens = 100
context_tokens = 10000
service_tiers.flex = {{ input = "0.5", output = "1" }}

[prices."fake/unlimited"]
input = "1"
output = "2"
web_search = "0.01"
max_output_tokens = 100
context_tokens = 10000

[prices."fake/stepped"]
input = "1"
output = "2"
web_search = "0.01"
tool_calls_max = 5
max_output_tokens = 100
context_tokens = 10000
long_context = [{{ above_tokens = 50000, input = "2", output = "4" }}]

[prices."fake/plain"]
input = "1"
output = "2"
max_output_tokens = 100
context_tokens = 10000

[models.either]
candidates = ["fake/plain", "fake/{model}"]
"""

MODEL = "fake/fake-model"
MARKUP = Decimal("1.15")
SEARCH = {"type": "web_search"}
CODE = {"type": "code_interpreter", "container": {"type": "auto"}}


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream):
    """A running server, audited when the tests are through with it."""
    with audited(tmp_path_factory.mktemp("tools"), database, upstream.base_url, CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    """A customer's."""
    with served.client(served.customer("customer@example.com", "1000")) as http:
        yield http


def respond(client, *tools, model=MODEL, wish=None, **fields):
    """One response, with `tools`."""
    asked = "!fake " + json.dumps({"tokens": 10, **(wish or {})})
    return client.post("/v1/responses", json={"model": model, "input": asked, "tools": list(tools), **fields})


def chat(client, *, model=MODEL, wish=None, **fields):
    """One chat completion that searches the web."""
    messages = [{"role": "user", "content": "!fake " + json.dumps({"tokens": 10, **(wish or {})})}]
    return client.post(
        "/v1/chat/completions", json={"model": model, "messages": messages, "web_search_options": {}, **fields}
    )


def charge_of(client, answer) -> dict:
    assert answer.status_code == 200, answer.text
    charge = client.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").json()
    assert Decimal(charge["charged"]) <= Decimal(charge["reserved"])
    return charge


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [MODEL, "fake/stepped"])
@pytest.mark.parametrize("called", [respond, chat])
def test_a_provider_that_adds_up_all_that_was_read_is_covered(client, called, model, stream):
    """The whole context, once for the prompt and once after each of the searches, all at the price of its length."""
    usage = (
        {"input_tokens": 60_000, "output_tokens": 10}
        if called is respond
        else {
            "prompt_tokens": 60_000,
            "completion_tokens": 10,
            "num_search_queries": 5,
        }
    )
    wish = {"hosted_tools": ["web_search_call"] * 5, "usage": usage}
    tools = [SEARCH] if called is respond else []
    maximum = {"max_output_tokens" if called is respond else "max_tokens": 10}
    charge = charge_of(client, called(client, *tools, model=model, wish=wish, stream=stream, **maximum))
    assert (charge["usage"]["input"], charge["usage_source"]) == (60_000, "reported")
    assert charge["charged"] == charge["reserved"]


def implausible(served) -> int:
    """How often a provider has reported what cannot be."""
    with served.client(None) as anybody:
        lines = anybody.get("/metrics").text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("tollgate_implausible_usage_total{"))


def tool_dollars(charge) -> Decimal:
    """What the tools cost the operator: all that is not tokens."""
    usage = charge["usage"]
    return Decimal(charge["provider_cost"]) - Decimal(usage["input"] + 2 * usage.get("output", 0)) / 10**6


@pytest.mark.parametrize("stream", [False, True])
def test_uses_are_billed_as_the_answer_has_them(client, stream):
    """Each search, not the pages that it opened; each container, not what ran in it; what was found is input."""
    uses = ["web_search_call", "open_page", "code_interpreter_call", "code_interpreter_call", "web_search_call"]
    charge = charge_of(client, respond(client, SEARCH, CODE, wish={"hosted_tools": uses}, stream=stream))
    usage = charge["usage"]
    assert (usage["web_search"], usage["code_interpreter"], charge["usage_source"]) == (2, 1, "reported")
    assert usage["input"] > 5 * FOUND_TOKENS
    assert tool_dollars(charge) == Decimal("0.05")
    assert Decimal(charge["charged"]) == Decimal(charge["provider_cost"]) * MARKUP
    assert charge["prices"]["web_search"] == "0.01"


def test_what_is_not_used_costs_nothing(client):
    """What was held for it is free again: for the whole context too, which is read again after each search."""
    charge = charge_of(client, respond(client, SEARCH, max_output_tokens=10))
    assert "web_search" not in charge["usage"]
    # The dearest tier, the whole context six times, ten tokens, and five searches.
    assert Decimal(charge["reserved"]) == (Decimal("0.06") + Decimal(20) / 10**6 + Decimal("0.05")) * MARKUP


@pytest.mark.parametrize(("fields", "sent"), [({}, 5), ({"max_tool_calls": 2}, 2), ({"max_tool_calls": 9}, 9)])
def test_the_maximum_reaches_the_provider_and_bounds_what_is_held(client, upstream, fields, sent):
    """The client's own, else the model's: the provider stops there."""
    answer = respond(client, SEARCH, wish={"hosted_tools": ["web_search_call"] * 20}, max_output_tokens=10, **fields)
    charge = charge_of(client, answer)
    assert upstream.journal[-1].parsed["max_tool_calls"] == sent
    assert charge["usage"]["web_search"] == sent
    held = Decimal("0.01") * (1 + sent) + Decimal(20) / 10**6 + Decimal("0.01") * sent
    assert Decimal(charge["reserved"]) == held * MARKUP


@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_that_goes_on_is_paid_by_the_operator(served, client, stream):
    """What it reports beyond the maximum that it was sent cannot be: the maximum is charged, and there is an alarm."""
    alarms = implausible(served)
    wish = {"hosted_tools": ["web_search_call"] * 8, "ignore_max": True}
    charge = charge_of(
        client, respond(client, SEARCH, wish=wish, max_tool_calls=2, max_output_tokens=10, stream=stream)
    )
    assert (charge["usage"]["web_search"], charge["shortfall"]) == (2, "0")
    assert implausible(served) == alarms + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("searches", [6, 100_000, 2**63 - 1])
def test_a_chat_is_never_billed_for_more_searches_than_the_operator_said(served, client, stream, searches):
    """Nothing bounds them at the provider, so what a call may cost is bounded here: with an alarm, and no error."""
    alarms = implausible(served)
    usage = {"prompt_tokens": 50, "completion_tokens": 10, "server_tool_use": {"web_search_requests": searches}}
    charge = charge_of(client, chat(client, wish={"usage": usage}, stream=stream))
    assert (charge["usage"]["web_search"], charge["usage_source"]) == (5, "reported")
    assert implausible(served) == alarms + 1


def test_a_tier_has_the_prices_of_tools_of_the_standard_one(client):
    """Tools are never free because a tier does not say what they cost."""
    answer = respond(client, SEARCH, wish={"hosted_tools": ["web_search_call"]}, service_tier="flex")
    assert charge_of(client, answer)["prices"]["web_search"] == "0.01"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "searches"),
    [
        ({}, 5),
        ({"server_tool_use": {"web_search_requests": 2}}, 2),
        ({"num_search_queries": 0}, 0),
        ({"prompt_tokens_details": {"web_search_requests": 3}}, 3),
    ],
)
def test_a_chat_is_billed_for_the_searches_that_its_usage_reports(client, stream, said, searches):
    """Where it reports none, for all that it may have made: nothing else in a chat tells how many they were."""
    usage = {"prompt_tokens": 50, "completion_tokens": 10, "total_tokens": 60, **said}
    charge = charge_of(client, chat(client, wish={"usage": usage}, stream=stream))
    assert charge["usage"].get("web_search", 0) == searches
    assert tool_dollars(charge) == Decimal("0.01") * searches


def test_a_stream_that_breaks_is_billed_for_the_searches_that_were_relayed(client):
    """Its usage never came."""
    wish = {"hosted_tools": ["web_search_call"] * 2 + ["open_page"], "half": True, "text": "x" * 40, "chunk_tokens": 1}
    answer = respond(client, SEARCH, wish=wish, stream=True)
    charge = charge_of(client, answer)
    assert (charge["usage_source"], charge["usage"]["web_search"], charge["outcome"]) == (
        "counted",
        2,
        "provider_broke",
    )


def test_a_client_that_leaves_pays_for_what_was_used(served, client):
    """The answer is read to its end, as nobody can count what the provider's tools do."""
    wish = {"hosted_tools": ["web_search_call"] * 3, "tokens": 40, "pace_s": 0.02}
    body = {"model": MODEL, "input": f"!fake {json.dumps(wish)}", "tools": [SEARCH], "stream": True}
    with client.stream("POST", "/v1/responses", json=body) as answer:
        next(answer.iter_lines())
    key = client.headers["authorization"].removeprefix("Bearer ")
    charge = served.ended(key, answer.headers["x-request-id"])
    assert (charge["outcome"], charge["usage_source"], charge["usage"]["web_search"]) == ("client_left", "reported", 3)


@pytest.mark.parametrize(
    ("model", "tools", "param"),
    [
        ("fake/plain", [SEARCH], "tools"),
        (MODEL, [{"type": "file_search", "vector_store_ids": ["vs_1"]}], "tools"),
        (MODEL, [SEARCH, {"type": "file_search", "vector_store_ids": ["vs_1"]}], "tools"),
        (MODEL, [{"type": "image_generation"}], "tools"),
        (MODEL, [{"type": "mcp", "server_url": "https://example.test", "server_label": "x"}], "tools"),
        ("fake/unlimited", [SEARCH], "max_tool_calls"),
    ],
)
def test_what_has_no_price_or_no_bound_is_refused(client, upstream, model, tools, param):
    """400, and no call."""
    before = len(upstream.journal)
    answer = respond(client, *tools, model=model)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len(upstream.journal) == before


@pytest.mark.parametrize(
    ("model", "param"), [("fake/plain", "web_search_options"), ("fake/unlimited", "max_tool_calls")]
)
def test_a_chat_is_refused_likewise(client, model, param):
    """A chat cannot name a maximum: the model needs one."""
    answer = chat(client, model=model)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_client_can_bound_what_the_model_does_not(client):
    """Its own maximum is enough."""
    assert respond(client, SEARCH, model="fake/unlimited", max_tool_calls=1).status_code == 200


def test_a_candidate_without_the_tool_is_left_out(client):
    """The other one serves."""
    charge = charge_of(client, respond(client, SEARCH, model="either", wish={"hosted_tools": ["web_search_call"]}))
    assert (charge["usage"]["web_search"], [offer["model"] for offer in charge["offers"]]) == (1, ["fake-model"])


def test_the_list_of_models_says_what_tools_cost(client):
    """Markup included, and only where they are for sale."""
    listed = {model["id"]: model["pricing"] for model in client.get("/v1/models").json()["data"]}
    assert (listed[MODEL]["web_search"], listed[MODEL].get("file_search")) == ("0.0115", None)
    assert "web_search" not in listed["fake/plain"]


def test_a_preview_prices_tools_and_hours_in_the_cache(served):
    """One that is not for sale is 400."""
    served.command("users", "create", "--email", "boss@example.com", "--admin")
    key = served.command("keys", "create", "--email", "boss@example.com", "--scope", "admin")["key"]
    with served.client(key) as admin:
        asked = {"model": MODEL, "web_search_uses": 10, "cache_write_1h_tokens": 100_000}
        preview = admin.post("/api/v1/admin/markup/preview", json=asked).json()
        assert (preview["provider_cost"], preview["charged"]) == ("0.2", "0.23")
        refused = admin.post("/api/v1/admin/markup/preview", json={"model": MODEL, "file_search_uses": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file_search_uses")
