"""Claude behind chat completions, by its own Messages API, through clients that nobody here wrote."""

from decimal import Decimal

import pytest

from tests.clients.programs import CHAT
from tests.fakes.provider import Served
from tests.fakes.provider.messages import fault_of
from tests.serving import MODEL, SQLITE, serving
from tests.waiting import until

CONFIG = """
[server]
port = 0

[providers.claude]
kind = "anthropic"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"

[models."{model}"]
candidates = ["claude/claude-haiku-4-5"]

[prices."claude/claude-haiku-4-5"]
input = "1"
cached_input = "0.1"
output = "5"
max_output_tokens = 64000
context_tokens = 200000
"""

TEXT = "The quick brown fox "
CITY = {"name": "Köln", "inhabitants": 1_087_000}
CALLS = [["weather", {"city": "Köln"}]]
STATUSES = {
    "bad_request": 400,
    "unauthorized": 401,
    "not_covered": 402,
    "model_not_found": 404,
    "rate_limited": 429,
    "provider_failed": 502,
}


@pytest.fixture(scope="module")
def claude(tmp_path_factory, upstream):
    """A running server whose model is Claude, and whose books add up in the end."""
    fault_of({})  # the SDK's types are there before anybody waits for them
    folder = tmp_path_factory.mktemp("claude")
    with serving(folder, SQLITE, upstream.base_url, configuration=CONFIG) as server:
        yield server
        report = server.command("audit")
        assert report["clean"], report


@pytest.fixture(scope="module")
def keys(claude) -> tuple[str, str]:
    """A key with credits behind it, and one with an empty wallet."""
    return claude.customer("funded@example.com"), claude.customer("broke@example.com", None)


@pytest.fixture(scope="module", params=CHAT)
def visit(request, claude, keys, upstream) -> tuple[dict, list[Served]]:
    """What the client saw in all scenarios, and the calls that its provider got."""
    before = len(upstream.journal)

    def node_folder():
        return request.getfixturevalue("node_modules")

    return request.param.run(node_folder, claude.base_url, *keys, MODEL), upstream.journal[before:]


def test_text(visit):
    """Plain and streamed are the same, with their usage."""
    seen = visit[0]
    assert seen["plain"] == {"text": TEXT, "finish": "stop", "usage": [len("Hello") + 4, len(TEXT)]}
    assert seen["streamed"] == seen["plain"]


def test_tools(visit):
    """The model calls a tool, gets its result and answers, and streams its arguments in pieces."""
    seen, calls = visit
    assert seen["tools"] == {"calls": CALLS, "text": "It is sunny."}
    assert seen["tools_streamed"] == {"calls": CALLS}
    assert any(b'"tool_result"' in call.body and b"sun in abundance" in call.body for call in calls)


def test_json_schema(visit):
    """The schema reaches the provider as its own output format."""
    seen, calls = visit
    assert seen["schema"] == CITY
    formats = [call.parsed["output_config"]["format"] for call in calls if "output_config" in call.parsed]
    assert "inhabitants" in formats[-1]["schema"]["properties"]


@pytest.mark.parametrize("name", STATUSES)
def test_errors(visit, name):
    """Each has its status, and only what may pass is tried again."""
    error = visit[0]["errors"][name]
    assert error["status"] == STATUSES[name]
    assert error["attempts"] == (2 if name in {"rate_limited", "provider_failed"} else 1)


def test_a_cancelled_stream_is_settled(visit, claude, keys):
    """A client that stops listening leaves nothing open, and pays for no more than was held."""
    seen = visit[0]["cancelled"]
    assert TEXT.startswith(seen["text"])
    (request_id,) = seen["request_ids"]
    charge = claude.ended(keys[0], request_id)
    assert charge["state"] == "settled"
    assert 0 < Decimal(charge["charged"]) <= Decimal(charge["reserved"])


def test_a_call_given_up_before_its_answer(visit, claude, keys):
    """Nothing stays held."""
    assert visit[0]["timed_out"]["classes"]
    until(lambda: claude.holds_nothing(keys[0]), "something stayed held", within_s=20)
