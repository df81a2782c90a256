"""Chat completions through clients that nobody here wrote: what their users would see."""

import sqlite3
from contextlib import closing
from decimal import Decimal

import pytest

from tests.clients.programs import CHAT
from tests.fakes.provider import Served

TEXT = "The quick brown fox "
CITY = {"name": "Köln", "inhabitants": 1_087_000}
CALLS = [["weather", {"city": "Köln"}]]
ERRORS = {
    "bad_request": (400, None, {"openai": "BadRequestError", "langchain": "OpenAIInvalidRequestError"}),
    "unauthorized": (
        401,
        "invalid_api_key",
        {"openai": "AuthenticationError", "langchain": "OpenAIAuthenticationError"},
    ),
    "not_covered": (402, "insufficient_credits", {"openai": "APIError", "langchain": "APIStatusError"}),
    "model_not_found": (404, "model_not_found", {"openai": "NotFoundError", "langchain": "OpenAIModelNotFoundError"}),
    "rate_limited": (
        429,
        "rate_limit_exceeded",
        {"openai": "RateLimitError", "langchain": "OpenAIRateLimitError", "ai": "RetryError"},
    ),
    "provider_failed": (
        502,
        None,
        {"openai": "InternalServerError", "langchain": "OpenAIAPIError", "ai": "RetryError"},
    ),
}
"""Status, code and the class that each family of clients has for it; the AI SDK has one for nearly all."""

RETRIED = {"rate_limited", "provider_failed"}
RETRY_AFTER_S = 3


@pytest.fixture(scope="module", params=CHAT)
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


def test_plain(seen):
    """Text, reason and usage of a plain answer."""
    assert seen["plain"] == {"text": TEXT, "finish": "stop", "usage": [len("Hello") + 4, len(TEXT)]}


def test_streamed(seen):
    """The same of a stream, put together."""
    assert seen["streamed"] == seen["plain"]


def test_tools(seen, calls):
    """The model calls a tool, gets its result, and answers with text."""
    assert seen["tools"] == {"calls": CALLS, "text": "It is sunny."}
    assert any(b"sun in abundance" in call.body and b'"tool"' in call.body for call in calls)


def test_tools_streamed(seen):
    """The arguments of a call are put together from their pieces."""
    assert seen["tools_streamed"] == {"calls": CALLS}


def test_json_schema(seen, calls):
    """The schema reaches the provider, and its answer is parsed into the client's own type."""
    assert seen["schema"] == CITY
    formats = [call.parsed["response_format"] for call in calls if "response_format" in call.parsed]
    assert formats[-1]["type"] == "json_schema"
    assert "inhabitants" in formats[-1]["json_schema"]["schema"]["properties"]


@pytest.mark.parametrize("name", ERRORS)
def test_errors(program, seen, name):
    """Each error is the client's own for its status, and only what may pass is tried again."""
    status, code, classes = ERRORS[name]
    error = seen["errors"][name]
    assert classes.get(family(program), "APICallError") in error["classes"]
    assert (error["status"], error["code"]) == (status, code)
    assert error["attempts"] == (2 if name in RETRIED else 1)


def test_retry_after(seen):
    """The client waits as long as it was told, and shows it."""
    error = seen["errors"]["rate_limited"]
    assert error["retry_after"] == str(RETRY_AFTER_S)
    assert error["waited_s"] >= RETRY_AFTER_S


def test_a_cancelled_stream_is_settled(seen, closed):
    """A client that stops listening leaves nothing open, and pays for no more than was held."""
    assert TEXT.startswith(seen["cancelled"]["text"])
    assert seen["cancelled"]["text"]
    (request_id,) = seen["cancelled"]["request_ids"]
    charge = closed(request_id)
    assert charge["state"] == "settled"
    assert 0 < Decimal(charge["charged"]) <= Decimal(charge["reserved"])


def test_a_call_given_up_before_its_answer(program, seen, reserved):
    """The client's own time-out, or its user's, ends in its own error; nothing stays held."""
    classes = {"openai": "APIConnectionError", "langchain": "OpenAITimeoutError", "ai": "DOMException"}
    assert classes[family(program)] in seen["timed_out"]["classes"]
    assert reserved() == "0"


def test_the_ledger_out_of_reach(program, run, data_folder, upstream):
    """503 and Retry-After while the database cannot be written; no provider is called."""
    before = len(upstream.journal)
    with closing(sqlite3.connect(data_folder / "data" / "served.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        error = run(program, "unavailable")["unavailable"]
        writer.execute("ROLLBACK")
    classes = {"openai": "InternalServerError", "langchain": "OpenAIAPIError", "ai": "APICallError"}
    assert classes[family(program)] in error["classes"]
    assert (error["status"], error["code"]) == (503, "unavailable")
    assert int(error["retry_after"]) > 0
    assert len(upstream.journal) == before
