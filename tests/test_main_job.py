"""The main job, end to end: a real server process, a real provider on a socket, real clients, both databases."""

import asyncio
import json
import subprocess
from decimal import Decimal

import httpx2
import openai
import pytest

from tests.serving import MODEL, UPSTREAM_KEY, audited
from tests.skips import needs

MESSAGES = [{"role": "user", "content": "Say something."}]
MARKUP = Decimal("1.15")


def wish(**behaviour) -> list[dict]:
    """Messages that tell the fake provider how to behave."""
    return [{"role": "user", "content": f"!fake {json.dumps(behaviour)}"}]


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream):
    """A running server, audited when the tests are through with it."""
    with audited(tmp_path_factory.mktemp("served"), database, upstream.base_url) as server:
        yield server


@pytest.fixture(scope="module")
def funded(served) -> str:
    """A key with credits behind it."""
    return served.customer("funded@example.com")


@pytest.fixture(scope="module")
def broke(served) -> str:
    """A key with an empty wallet behind it."""
    return served.customer("broke@example.com", None)


@pytest.fixture
def client(served, funded):
    with openai.OpenAI(base_url=served.base_url, api_key=funded, max_retries=0) as client:
        yield client


def balance_of(served, key) -> Decimal:
    return Decimal(served.balance(key)["balance"])


def expected(prompt_tokens, completion_tokens) -> Decimal:
    """Prices of the configuration: $1 and $2 per million tokens, at 15 %."""
    return (Decimal(prompt_tokens) * 1 + Decimal(completion_tokens) * 2) * MARKUP / 10**6


def test_a_plain_call_is_answered_and_charged_to_the_nano(served, funded, client, upstream):
    """The answer is the provider's, and the charge what it reported, at its price and the markup."""
    before = balance_of(served, funded)
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    usage = answer.parse().usage
    cost = expected(usage.prompt_tokens, usage.completion_tokens)
    assert Decimal(answer.headers["x-credits-charged"]) == cost
    assert Decimal(answer.headers["x-credits-balance"]) == before - cost == balance_of(served, funded)
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["state"], charge["outcome"], charge["usage_source"]) == ("settled", "completed", "reported")
    assert Decimal(charge["charged"]) == cost
    assert (charge["provider"], charge["model"], charge["markup_percent"]) == ("fake", MODEL, "15")
    assert Decimal(charge["reserved"]) >= cost


def test_ten_cents_book_0_115(served, funded, client):
    """A provider's cost of $0.10 books 0.115 credits."""
    usage = {"prompt_tokens": 100_000, "completion_tokens": 0, "total_tokens": 100_000}
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=wish(usage=usage, tokens=0))
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["provider_cost"], charge["charged"], charge["shortfall"]) == ("0.1", "0.115", "0")


def test_a_streamed_call_is_charged_before_its_end(served, funded, upstream):
    """When the client reads the end marker, the charge is in the ledger."""
    body = {"model": MODEL, "stream": True, "messages": MESSAGES}
    with served.client(funded) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        data = []
        for line in lines:
            if line.startswith("data: "):
                data.append(line.removeprefix("data: "))
            if data and data[-1] == "[DONE]":
                charge = served.charge(funded, answer.headers["x-request-id"])
                break
    assert (charge["state"], charge["usage_source"]) == ("settled", "reported")
    assert all(json.loads(chunk)["choices"] for chunk in data[:-1]), "the usage chunk is withheld unless asked for"
    entry = upstream.journal[-1]
    assert Decimal(charge["charged"]) == expected(entry.prompt_tokens, entry.completion_tokens)


def test_usage_that_was_asked_for_comes_with_its_cost(served, funded, client):
    """The last chunk carries the usage, and in it what the call was charged."""
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    with stream:
        chunks = list(stream)
    assert not chunks[-1].choices
    usage = chunks[-1].usage
    assert Decimal(usage.cost) == expected(usage.prompt_tokens, usage.completion_tokens)
    charge = served.charge(funded, stream.response.headers["x-request-id"])
    assert Decimal(charge["charged"]) == Decimal(usage.cost)


def test_what_the_wallet_does_not_cover_never_reaches_a_provider(served, broke, upstream):
    """402 in OpenAI's shape, with what was needed, and no call upstream."""
    before = len(upstream.journal)
    with (
        openai.OpenAI(base_url=served.base_url, api_key=broke, max_retries=2) as client,
        pytest.raises(openai.APIStatusError) as raised,
    ):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert raised.value.status_code == 402
    error = raised.value.body
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_credits")
    assert Decimal(error["required"]) > 0
    assert (error["available"], error["max_affordable_tokens"]) == ("0", 0)
    assert len(upstream.journal) == before


def test_the_maximum_that_402_names_is_then_accepted(served, upstream):
    """A caller told what it could afford can afford just that, and not one token more."""
    key = served.customer("modest@example.com", "0.5")
    call = {"model": "fake/dear", "messages": MESSAGES, "max_tokens": 900}
    with served.client(key) as http:
        refused = http.post("/v1/chat/completions", json=call)
        assert refused.status_code == 402
        affordable = refused.json()["error"]["max_affordable_tokens"]
        assert http.post("/v1/chat/completions", json={**call, "max_tokens": affordable + 1}).status_code == 402
        assert http.post("/v1/chat/completions", json={**call, "max_tokens": affordable}).status_code == 200


def test_a_prompt_is_counted_where_its_bytes_are_too_coarse(served, upstream):
    """A wallet that covers the tokens of a prompt, and not its bytes, is served: within what it holds."""
    key = served.customer("coarse@example.com", "0.003")
    body = {"model": "fake/counted", "messages": [{"role": "user", "content": "hello world " * 1000}], "max_tokens": 5}
    with served.client(key) as http:
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert Decimal(answer.headers["x-credits-reserved"]) < Decimal("0.003")
        assert http.post("/v1/chat/completions", json={**body, "model": MODEL}).status_code == 402


def test_a_call_without_a_maximum_is_clamped_to_what_its_grant_buys(served, upstream):
    """A small wallet gets a shorter answer, and is told so, but never a larger bill than it can pay."""
    key = served.customer("small@example.com", "0.4")
    with served.client(key) as http:
        answer = http.post("/v1/chat/completions", json={"model": "fake/dear", "messages": wish(tokens=5000)})
        assert answer.status_code == 402, "a useful answer of this model costs more than a dollar"
    key = served.customer("medium@example.com", "0.004")
    with served.client(key) as http:
        answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": wish(tokens=5000)})
    assert answer.status_code == 200
    bought = int(answer.headers["x-credits-max-tokens"])
    assert answer.json()["usage"]["completion_tokens"] == bought
    assert upstream.journal[-1].parsed["max_tokens"] == bought
    assert Decimal(answer.headers["x-credits-charged"]) <= Decimal(answer.headers["x-credits-reserved"])


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [(None, 401, "invalid_api_key"), ("sk-tg-unknown", 401, "invalid_api_key"), ("sk-other", 401, "invalid_api_key")],
)
def test_without_a_valid_key_there_is_no_answer(served, key, status, code):
    """401 on every path that is not public, with a request id."""
    with served.client(key) as http:
        for path in ("/v1/models", "/api/v1/credits/balance", "/v1/chat/completions"):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path
            assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_json"),
        (b"[]", 400, None, "invalid_type"),
        (b'{"model": "fake-model"}', 400, "messages", "missing_required_parameter"),
        (b'{"model": "fake-model", "messages": "hello"}', 400, "messages", "invalid_type"),
        (b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404, "model", "model_not_found"),
        (b'{"model": "fake-model", "messages": [{"role": "user"}], "n": 0}', 400, "n", "invalid_value"),
        (b"x" * 20_000_001, 413, None, "request_too_large"),
    ],
)
def test_what_cannot_be_served_is_said_in_openais_shape(served, funded, upstream, body, status, param, code):
    """A clear 4xx, no provider call, and nothing charged or held."""
    before, calls = balance_of(served, funded), len(upstream.journal)
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", content=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
        assert error["type"] == "invalid_request_error"
        assert http.get("/api/v1/credits/balance").json()["reserved"] == "0"
    assert (balance_of(served, funded), len(upstream.journal)) == (before, calls)


def test_other_wrong_turns_have_the_same_shape(served, funded):
    """Unknown paths, wrong methods, encoded bodies and foreign charges all answer with OpenAI's error object."""
    with served.client(funded) as http:
        answers = {
            404: http.get("/v1/nothing"),
            405: http.get("/v1/chat/completions"),
            415: http.post("/v1/chat/completions", content=b"x", headers={"Content-Encoding": "gzip"}),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
            assert answer.headers["x-request-id"].startswith("req_")
        assert http.get("/api/v1/credits/charges/req_nobody").status_code == 404
        assert http.get("/api/v1/credits/transactions?cursor=!").status_code == 400
        assert http.get("/api/v1/credits/transactions?limit=0").status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        ({"status": 400}, 400, None),
        ({"status": 429, "retry_after": 7}, 429, None),
        ({"status": 429, "error_code": "insufficient_quota"}, 502, "provider_refused_operator"),
        ({"status": 500}, 502, None),
        ({"status": 401}, 502, "provider_refused_operator"),
        ({"reset": "after_read"}, 502, "provider_broke_off"),
        ({"stall": "before_headers"}, 504, "provider_timeout"),
    ],
)
def test_what_delivers_nothing_costs_nothing(served, funded, behaviour, status, code, stream):
    """A provider's failure before the first byte is an error in OpenAI's shape, and the hold is released."""
    before = balance_of(served, funded)
    with served.client(funded) as http:
        answer = http.post(
            "/v1/chat/completions", json={"model": MODEL, "stream": stream, "messages": wish(**behaviour)}
        )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert code is None or error["code"] == code
    if status == 429:
        assert answer.headers["retry-after"] == "7"
    if code is not None:
        assert answer.headers["x-should-retry"] == "false", "it was billed already, or will not get better"
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["state"], charge["charged"]) == ("released", "0")
    assert balance_of(served, funded) == before


@pytest.mark.parametrize("fault", [{"half": True}, {"reset": "mid"}])
def test_a_stream_that_breaks_is_charged_for_what_was_relayed(served, funded, fault):
    """An error event in place of the end marker, and a counted charge within the reservation."""
    body = {"model": MODEL, "stream": True, "messages": wish(tokens=400, **fault)}
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    assert '"error"' in answer.text.strip().splitlines()[-1]
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["state"], charge["outcome"], charge["usage_source"]) == ("settled", "provider_broke", "counted")
    assert 0 < Decimal(charge["charged"]) <= Decimal(charge["reserved"])


RATE_LIMITED = '{"error": {"message": "slow down", "code": 429}}'


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_that_comes_with_status_200_is_an_error(served, funded, stream):
    """A body or first event that is an error is answered as one, and costs nothing."""
    raw = f"data: {RATE_LIMITED}\n\n" if stream else RATE_LIMITED
    behaviour = {"raw": raw, "content_type": "text/event-stream" if stream else "application/json"}
    with served.client(funded) as http:
        answer = http.post(
            "/v1/chat/completions", json={"model": MODEL, "stream": stream, "messages": wish(**behaviour)}
        )
    assert (answer.status_code, answer.text) == (429, RATE_LIMITED)
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["state"], charge["charged"]) == ("released", "0")


def test_a_stream_of_comments_and_an_error_costs_nothing(served, funded):
    """What was relayed before the error is no answer; the bytes are the provider's all the same."""
    raw = f": working\n\ndata: {RATE_LIMITED}\n\ndata: [DONE]\n\n"
    behaviour = {"raw": raw, "content_type": "text/event-stream"}
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", json={"model": MODEL, "stream": True, "messages": wish(**behaviour)})
    assert (answer.status_code, answer.text) == (200, raw)
    assert served.charge(funded, answer.headers["x-request-id"])["state"] == "released"


def test_an_error_after_content_is_charged_for_the_content(served, funded):
    """The error is relayed as it came, and what came before it was delivered."""
    content = '{"choices": [{"index": 0, "delta": {"content": "12345678"}}]}'
    raw = f"data: {content}\n\ndata: {RATE_LIMITED}\n\n"
    behaviour = {"raw": raw, "content_type": "text/event-stream"}
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", json={"model": MODEL, "stream": True, "messages": wish(**behaviour)})
    assert answer.text == raw
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["state"], charge["outcome"], charge["usage"]["output"]) == ("settled", "provider_broke", 2)


def test_a_usage_event_keeps_its_other_lines(served, funded):
    """The cost is put into usage that spans lines, beside an id and a comment."""
    raw = 'id: 7\ndata: {"choices": [],\ndata: "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n: note\n\n'
    behaviour = {"raw": raw + "data: [DONE]\n\n", "content_type": "text/event-stream"}
    body = {"model": MODEL, "stream": True, "messages": wish(**behaviour), "stream_options": {"include_usage": True}}
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", json=body)
    *lines, data = answer.text.removesuffix("\n\ndata: [DONE]\n\n").splitlines()
    assert lines == ["id: 7", ": note"]
    assert Decimal(json.loads(data.removeprefix("data: "))["usage"]["cost"]) == expected(3, 4)


def test_other_stream_options_survive(served, funded, upstream):
    """Usage is asked for beside what the client asked for."""
    body = {"model": MODEL, "stream": True, "messages": MESSAGES, "stream_options": {"include_obfuscation": False}}
    with served.client(funded) as http:
        http.post("/v1/chat/completions", json=body)
    assert upstream.journal[-1].parsed["stream_options"] == {"include_usage": True, "include_obfuscation": False}


def test_half_a_plain_answer_is_no_answer(served, funded):
    """What was cut off is not passed on, and not charged."""
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": wish(half=True)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "provider_broke_off")
    assert served.charge(funded, answer.headers["x-request-id"])["state"] == "released"


@pytest.mark.parametrize("stream", [False, True])
def test_usage_of_zero_beside_text_is_counted(served, funded, stream):
    """What was delivered was not free, whatever its provider says."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    with served.client(funded) as http:
        answer = http.post(
            "/v1/chat/completions", json={"model": MODEL, "stream": stream, "messages": wish(tokens=400, usage=usage)}
        )
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["usage_source"], charge["usage"]["output"]) == ("counted", 100)


@pytest.mark.parametrize("raw", ["", "{}", '{"choices": []}'])
def test_an_answer_of_nothing_is_passed_on_and_costs_nothing(served, funded, raw):
    """Its bytes are the provider's."""
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": wish(raw=raw)})
    assert (answer.status_code, answer.text, answer.headers["x-credits-charged"]) == (200, raw, "0")
    assert served.charge(funded, answer.headers["x-request-id"])["state"] == "released"


SPOKEN = {"modalities": ["text", "audio"], "audio": {"voice": "ash", "format": "wav"}, "max_tokens": 50}


def test_spoken_output_is_charged_at_its_own_price(served, funded, upstream):
    """Where it has one; elsewhere it is refused before a provider hears of it."""
    usage = {"prompt_tokens": 3, "completion_tokens": 10, "completion_tokens_details": {"audio_tokens": 6}}
    with served.client(funded) as http:
        body = {"model": "fake/counted", "messages": wish(usage=usage), **SPOKEN}
        answer = http.post("/v1/chat/completions", json=body)
        calls = len(upstream.journal)
        refused = http.post("/v1/chat/completions", json={**body, "model": MODEL})
    assert Decimal(answer.headers["x-credits-charged"]) == (3 * 1 + 4 * 2 + 6 * 8) * MARKUP / 10**6
    assert upstream.journal[-1].parsed["audio"] == SPOKEN["audio"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "modalities")
    assert len(upstream.journal) == calls


@pytest.mark.parametrize("stream", [False, True])
def test_spoken_output_that_nobody_can_count_costs_the_reservation(served, funded, stream):
    """A provider that speaks and reports nothing is not free."""
    said = '{"choices": [{"index": 0, "%s": {"content": null, "audio": {"data": "AAAA"}}}]}'
    raw = f"data: {said % 'delta'}\n\ndata: [DONE]\n\n" if stream else said % "message"
    behaviour = {"raw": raw, "content_type": "text/event-stream" if stream else "application/json"}
    with served.client(funded) as http:
        body = {"model": "fake/counted", "stream": stream, "messages": wish(**behaviour), **SPOKEN}
        answer = http.post("/v1/chat/completions", json=body)
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["usage_source"], charge["charged"]) == ("assumed", charge["reserved"])


def test_a_usage_that_cannot_be_booked_is_counted(served, funded):
    """Nothing is left open, and nobody gets a 500."""
    usage = {"prompt_tokens": 9 * 10**18, "completion_tokens": 1, "total_tokens": 9 * 10**18}
    with served.client(funded) as http:
        answer = http.post("/v1/chat/completions", json={"model": "fake/boundless", "messages": wish(usage=usage)})
    assert answer.status_code == 200
    assert served.charge(funded, answer.headers["x-request-id"])["usage_source"] == "counted"


@pytest.mark.parametrize("stream", [False, True])
def test_without_reported_usage_it_is_counted(served, funded, stream):
    """A provider that reports nothing is charged by what it sent, and the charge says so."""
    with served.client(funded) as http:
        answer = http.post(
            "/v1/chat/completions", json={"model": MODEL, "stream": stream, "messages": wish(tokens=400, usage="none")}
        )
    charge = served.charge(funded, answer.headers["x-request-id"])
    assert (charge["state"], charge["usage_source"]) == ("settled", "counted")
    assert charge["usage"]["output"] == 100, "a token for four bytes"


def test_a_client_that_leaves_is_charged_for_the_whole_answer(served, funded, upstream):
    """Hanging up does not make a stream free: it is read to its end, and settled."""
    body = {"model": MODEL, "stream": True, "messages": wish(tokens=200, chunk_tokens=10, pace_s=0.02)}
    with served.client(funded) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_raw())
        request_id = answer.headers["x-request-id"]
    charge = served.ended(funded, request_id)
    assert (charge["usage_source"], charge["usage"]["output"]) == ("reported", 200)


def test_secrets_do_not_cross(served, funded, client, upstream):
    """The provider sees the operator's key and never the client's; the client sees neither."""
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, extra_headers={"Cookie": "a=b", "OpenAI-Organization": "org-x"}
    )
    entry = upstream.journal[-1]
    assert entry.header("authorization") == f"Bearer {UPSTREAM_KEY}"
    assert not {name for name, _ in entry.headers} & {"cookie", "openai-organization"}
    assert funded not in str(entry.headers)
    assert UPSTREAM_KEY not in str(answer.headers)
    assert answer.headers["x-upstream-request-id"].startswith("fake-")


def test_the_clients_own_request_id_is_stored_beside_ours(served, funded, client):
    """It never replaces ours, which is the ledger's idempotency key."""
    answers = [
        client.chat.completions.with_raw_response.create(
            model=MODEL, messages=MESSAGES, extra_headers={"X-Client-Request-Id": "mine"}
        )
        for _ in range(2)
    ]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    for request_id in ids:
        assert served.charge(funded, request_id)["client_request_id"] == "mine"


def test_the_list_of_models(served, client):
    """Every priced and enabled model, in OpenAI's shape, and each by its own path."""
    names = {model.id for model in client.models.list()}
    assert {MODEL, f"fake/{MODEL}", "demo-chat", "fake/dear"} <= names
    assert client.models.retrieve("demo-chat").owned_by == "demo"
    assert client.models.retrieve("fake/dear").id == "fake/dear"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_the_journal_is_paged(served):
    """Every transaction once, newest first, however small the pages are."""
    key = served.customer("pages@example.com", "5")
    with openai.OpenAI(base_url=served.base_url, api_key=key) as client:
        for _ in range(3):
            client.chat.completions.create(model=MODEL, messages=MESSAGES)
    items, cursor = [], None
    with served.client(key) as http:
        while True:
            page = http.get(
                "/api/v1/credits/transactions", params={"limit": 2, **({"cursor": cursor} if cursor else {})}
            )
            items += page.json()["items"]
            cursor = page.json()["next_cursor"]
            if cursor is None:
                break
    assert [item["type"] for item in items] == ["deduction"] * 3 + ["topup"]
    for item in items:
        assert Decimal(item["balance_after"]) - Decimal(item["balance_before"]) == Decimal(item["amount"])
    assert sum(Decimal(item["amount"]) for item in items) == balance_of(served, key)


def test_one_caller_cannot_read_anothers_charge(served, funded, broke, client):
    """A request id is no secret, and opens nothing."""
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    with served.client(broke) as http:
        assert http.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").status_code == 404


def test_two_hundred_calls_at_once_race_for_a_few_credits(served, upstream):
    """However many race, the wallet is never overdrawn, and what it could pay is served."""
    key = served.customer("racer@example.com", "0.05")
    body = {"model": MODEL, "messages": wish(delay_s=0.5), "max_tokens": 1000}

    async def race() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            url = f"{served.base_url}/chat/completions"
            return await asyncio.gather(*(http.post(url, json=body) for _ in range(200)))

    answers = asyncio.run(race())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 402}
    assert 0 < statuses.count(200) < 200
    charged = sum(Decimal(answer.headers["x-credits-charged"]) for answer in answers if answer.status_code == 200)
    with served.client(key) as http:
        balance = http.get("/api/v1/credits/balance").json()
    assert Decimal(balance["balance"]) == Decimal("0.05") - charged >= 0
    assert balance["reserved"] == "0"


def test_the_demo_provider_needs_nothing(served, client):
    """The model that ships answers, streams, and is priced."""
    plain = client.chat.completions.with_raw_response.create(model="demo-chat", messages=MESSAGES)
    assert Decimal(plain.headers["x-credits-charged"]) > 0
    stream = client.chat.completions.create(model="demo-chat", messages=MESSAGES, stream=True)
    with stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == plain.parse().choices[0].message.content


async def test_the_async_sdk(served, funded):
    """Many calls and streams at once through the official asynchronous client."""
    async with openai.AsyncOpenAI(base_url=served.base_url, api_key=funded) as client:

        async def streamed() -> str:
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            async with stream:
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def plain() -> str:
            answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            return answer.choices[0].message.content

        texts = await asyncio.gather(*(streamed() for _ in range(10)), *(plain() for _ in range(10)))
    assert len(set(texts)) == 1


@needs("curl")
def test_curl(served, funded):
    """A stream arrives at curl as the provider sent it."""
    body = json.dumps({"model": MODEL, "stream": True, "messages": MESSAGES})
    done = subprocess.run(
        ["curl", "-sN", f"{served.base_url}/chat/completions", "-H", f"Authorization: Bearer {funded}", "-d", body],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.startswith('data: {"id"')
    assert done.stdout.endswith("data: [DONE]\n\n")


@needs("node")
def test_the_official_client_for_node(served, funded, node_modules):
    """Plain, streamed with usage, the list of models, and an error of the SDK's own class."""
    done = subprocess.run(
        ["node", "chat.mjs", served.base_url, funded, MODEL],
        cwd=node_modules,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["plain"] == seen["streamed"]
    assert Decimal(seen["usage"]["cost"]) == expected(
        seen["usage"]["prompt_tokens"], seen["usage"]["completion_tokens"]
    )
    assert seen["refused"] == {"status": 401, "code": "invalid_api_key", "name": "AuthenticationError"}
    assert "demo-chat" in seen["models"]
    assert served.charge(funded, seen["requestId"])["state"] == "settled"
