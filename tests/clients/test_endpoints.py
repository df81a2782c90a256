"""Responses, embeddings and legacy completions through clients that nobody here wrote."""

from decimal import Decimal

import pytest

from tests.clients.programs import AI_ENDPOINTS, ENDPOINTS
from tests.fakes.provider import Served
from tests.skips import needs

TEXT = "The quick brown fox "
CITY = {"name": "Köln", "inhabitants": 1_087_000}
CALLS = [["weather", {"city": "Köln"}]]


@pytest.fixture(scope="module", params=ENDPOINTS)
def program(request):
    return request.param


@pytest.fixture(scope="module")
def visit(program, run, upstream) -> tuple[dict, list[Served]]:
    """What the client saw in all scenarios, and the calls that its provider got."""
    before = len(upstream.journal)
    return run(program), upstream.journal[before:]


@pytest.fixture
def seen(visit) -> dict:
    return visit[0]


@pytest.fixture
def calls(visit) -> list[Served]:
    return visit[1]


def family(program) -> str:
    return program.script.partition("_")[0]


def test_responses_plain(seen):
    """Text and usage of a plain response, whose prompt is instructions and input."""
    assert seen["responses_plain"]["text"] == TEXT
    prompt, reply = seen["responses_plain"]["usage"]
    assert (prompt >= len("Be brief." + "Hello") + 4, reply) == (True, len(TEXT))


def test_responses_streamed(seen):
    """The same of a stream, put together from its events."""
    assert seen["responses_streamed"] == seen["responses_plain"]


def test_responses_tools(seen, calls):
    """The model calls a function, gets its output, and answers with text; nothing is stored."""
    assert seen["responses_tools"] == {"calls": CALLS, "text": "Sunny."}
    responses = [call for call in calls if call.path.endswith("/responses")]
    assert any(b"function_call_output" in call.body and b"sun in abundance" in call.body for call in responses)
    assert all(call.parsed["store"] is False for call in responses)


def test_responses_tools_streamed(seen):
    """The arguments of a call are put together from their pieces."""
    assert seen["responses_tools_streamed"] == {"calls": CALLS}


def test_responses_with_a_json_schema(seen, calls):
    """The schema reaches the provider, and its answer is parsed into the client's own type."""
    assert seen["responses_schema"] == CITY
    formats = [call.parsed["text"]["format"] for call in calls if "text" in call.parsed]
    assert formats[-1]["type"] == "json_schema"
    assert "inhabitants" in formats[-1]["schema"]["properties"]


def test_a_response_cut_by_its_maximum(seen):
    """It is incomplete, in the client's own words, and paid for as far as it came."""
    assert seen["responses_cut"] == {"is_cut": True, "tokens": 30}


def test_a_second_turn(seen):
    """What the model said, thoughts included, goes back to it whole."""
    assert seen["responses_conversation"] == {"text": "Sunny."}


@needs("node")
def test_items_kept_at_the_provider(run):
    """The AI SDK sends references unless it is told that nothing is stored; they are refused with a clear 400."""
    error = run(AI_ENDPOINTS, "references")["references"]
    assert (error["status"], error["code"]) == (400, "unsupported_parameter")
    assert "send them whole" in error["message"]


def test_a_cancelled_response_is_settled(seen, closed, reserved):
    """A client that stops listening leaves nothing open, and pays for no more than was held."""
    assert TEXT.startswith(seen["responses_cancelled"]["text"])
    (request_id,) = seen["responses_cancelled"]["request_ids"]
    charge = closed(request_id)
    assert charge["state"] == "settled"
    assert 0 < Decimal(charge["charged"]) <= Decimal(charge["reserved"])
    assert reserved() == "0"


def test_embeddings(seen):
    """A vector for each input, the same whether it travels as numbers or as base64; shorter if asked for."""
    embeddings = seen["embeddings"]
    assert (embeddings["vectors"], embeddings["dimensions"]) == (2, 3)
    assert embeddings["is_same_unpacked"]
    assert embeddings.get("usage", [8])[0] == len("aGrüße".encode())


def test_completions(seen):
    """Text and reason of a legacy completion."""
    plain = seen["completions_plain"]
    assert (plain["text"], plain["finish"], plain["usage"][1]) == (TEXT, "stop", len(TEXT))


def test_completions_streamed(seen):
    """The same of a stream, put together."""
    streamed = seen["completions_streamed"]
    assert (streamed["text"], streamed.get("finish", "stop")) == (TEXT, "stop")


@pytest.mark.parametrize("name", ["responses", "embeddings", "completions"])
def test_what_the_wallet_does_not_cover(program, seen, name):
    """402 is the client's own error, with our code, and is not tried again."""
    error = seen["errors"][name]
    classes = {"openai": "APIError", "langchain": "APIStatusError", "ai": "APICallError"}
    assert classes[family(program)] in error["classes"]
    assert (error["status"], error["code"], error["attempts"]) == (402, "insufficient_credits", 1)


def test_state_kept_at_the_provider(seen):
    """It is refused with a clear 400, once."""
    error = seen["errors"]["state"]
    assert (error["status"], error["code"], error["attempts"]) == (400, "unsupported_parameter", 1)
