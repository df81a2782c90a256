"""Every way in which a call can end, with a real provider, real clients that leave, and both databases.

Whatever happens, the call is settled, released or refunded once, within a bound, and holds nothing afterwards.
"""

import asyncio
import json
import re
import signal
import sqlite3
import threading
import time
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import asyncpg
import pytest

from proxy.wire.requests import Endpoint
from tests.leaver import Leaver, awaited_charge, paid
from tests.serving import SQLITE, audited, serving
from tests.waiting import until

CONFIG = """
[server]
port = 0
call_s = 8
keep_alive_s = 0.3
settle_wait_s = 1
stall_s = 1.5

[providers.fake]
kind = "openai"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"
first_byte_s = 3
idle_s = 3

[prices."fake/counted"]
input = "1"
output = "2"
max_output_tokens = 100000000
context_tokens = 128000
tokenizer = "o200k_base"

[prices."fake/opaque"]
input = "1"
output = "2"
max_output_tokens = 100000000
context_tokens = 128000

[prices."fake/thinker"]
input = "1"
output = "2"
max_output_tokens = 1000
context_tokens = 128000
tokenizer = "o200k_base"
is_reasoning = true
"""

ENDPOINTS = list(Endpoint)
STREAMED = [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES]


def request(endpoint, model="opaque", *, stream=False, tokens_max=5000, **behaviour):
    """A request that tells the fake provider how to behave."""
    wish = f"!fake {json.dumps(behaviour)}"
    shared = {"model": f"fake/{model}", **({"stream": True} if stream else {})}
    match endpoint:
        case Endpoint.CHAT:
            return {**shared, "max_tokens": tokens_max, "messages": [{"role": "user", "content": wish}]}
        case Endpoint.COMPLETIONS:
            return {**shared, "max_tokens": tokens_max, "prompt": wish}
        case Endpoint.RESPONSES:
            return {**shared, "max_output_tokens": tokens_max, "input": wish}
        case Endpoint.EMBEDDINGS:
            return {**shared, "input": wish}


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream):
    """A running server with short limits, audited when the tests are through with it."""
    with audited(tmp_path_factory.mktemp("served"), database, upstream.base_url, CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def customer(served):
    """The key of somebody with plenty of credits."""
    return served.customer("customer@example.com", "1000000")


@pytest.fixture
def key(served, customer):
    """The customer's key, behind which nothing is held at the end of the test."""
    yield customer
    assert served.holds_nothing(customer)


@pytest.mark.parametrize("is_abrupt", [False, True])
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
def test_leaving_a_stream_that_can_be_counted_stops_the_provider(served, key, upstream, endpoint, is_abrupt):
    """The provider sees that we stop, and what it had sent is charged."""
    client = Leaver(served, key, endpoint, request(endpoint, "counted", stream=True, tokens=4000, pace_s=0.02))
    client.read_until(b"fox")
    client.leave(is_abrupt=is_abrupt)
    charge = served.ended(key, client.request_id, within_s=3)
    assert paid(charge) == ("settled", "client_left", "counted")
    entry = upstream.journal[-1]
    assert entry.ended.wait(3)
    assert entry.client_left
    assert 0 < charge["usage"]["output"] <= entry.completion_tokens < 2000


@pytest.mark.parametrize(("endpoint", "model"), [(Endpoint.CHAT, "opaque"), (Endpoint.CHAT, "thinker")])
def test_leaving_a_stream_that_cannot_be_counted_lets_it_end(served, key, upstream, endpoint, model):
    """It is read to its end, and charged by its usage."""
    body = request(endpoint, model, stream=True, tokens=400, chunk_tokens=20, pace_s=0.02, usage="reasoning")
    client = Leaver(served, key, endpoint, body)
    client.read_until(b"fox")
    client.leave()
    charge = served.ended(key, client.request_id)
    assert paid(charge) == ("settled", "client_left", "reported")
    assert (charge["usage"]["output"], upstream.journal[-1].completed) == (400, True)


@pytest.mark.parametrize("endpoint", STREAMED)
@pytest.mark.parametrize("model", ["counted", "opaque"])
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_byte_is_not_free(served, key, endpoint, model, stream):
    """The provider has the request and will bill for it: its answer is read and charged."""
    awaited = awaited_charge(served, key)
    client = Leaver(served, key, endpoint, request(endpoint, model, stream=stream, delay_s=0.3))
    time.sleep(0.1)
    client.leave()
    charge = awaited()
    assert paid(charge) == ("settled", "client_left", "reported")


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_a_provider_that_never_answers_costs_the_reservation(served, key, stream):
    """Nobody knows what it has done, and anybody could do this to the operator."""
    body = request(Endpoint.CHAT, stream=stream, stall="before_headers")
    awaited = awaited_charge(served, key)
    client = Leaver(served, key, Endpoint.CHAT, body)
    time.sleep(0.2)
    client.leave()
    charge = awaited()
    assert paid(charge) == ("settled", "client_left", "assumed")
    assert charge["charged"] == charge["reserved"]


def test_leaving_an_idle_stream_that_can_be_counted_ends_it_at_once(served, key):
    """Nobody waits for a chunk to notice that the client has gone."""
    client = Leaver(served, key, Endpoint.CHAT, request(Endpoint.CHAT, "counted", stream=True, stall="mid"))
    client.read_until(b"The")
    client.leave()
    charge = served.ended(key, client.request_id, within_s=1.5)
    assert paid(charge) == ("settled", "client_left", "counted")


def test_leaving_a_stream_of_which_only_usage_has_come_costs_that(served, key):
    """It was not shown to the client, but it is known."""
    usage = f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 50, 'completion_tokens': 0}})}\n\n"
    awaited = awaited_charge(served, key)
    body = request(Endpoint.CHAT, "counted", stream=True, raw=usage + " " * len(usage), stall="mid")
    client = Leaver(served, key, Endpoint.CHAT, body)
    time.sleep(0.2)
    client.leave()
    charge = awaited()
    assert paid(charge) == ("settled", "client_left", "reported")
    assert charge["usage"] == {"input": 50}


def test_numbers_that_nobody_can_count_are_no_way_out(served, key):
    """What JSON allows and Python cannot hold, in a field that is only passed on, is counted as well as anything."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maximum": "huge"}}}
    body = request(Endpoint.CHAT, "counted", stream=True, tokens=4000, pace_s=0.02)
    payload = json.dumps({**body, "tools": [tool]}).replace('"huge"', "1e999").encode()
    client = Leaver(served, key, Endpoint.CHAT, payload)
    client.read_until(b"fox")
    client.leave()
    charge = served.ended(key, client.request_id, within_s=3)
    assert paid(charge) == ("settled", "client_left", "counted")
    assert charge["usage"]["output"] > 0


def test_leaving_with_requests_in_line_is_leaving(served, key):
    """The one that is being answered is charged, those behind it never begin, and nothing of it is an error."""
    client = Leaver(served, key, Endpoint.CHAT, request(Endpoint.CHAT, "counted", stream=True, stall="mid"))
    client.ask()
    client.read_until(b"The")
    client.leave()
    charge = served.ended(key, client.request_id, within_s=1.5)
    assert paid(charge) == ("settled", "client_left", "counted")
    assert Decimal(served.balance(key)["reserved"]) == 0
    assert "ASGI" not in served.log()


def test_leaving_an_idle_stream_that_cannot_be_counted_costs_the_reservation(served, key):
    """Its provider falls silent, and nobody knows what it has done."""
    client = Leaver(served, key, Endpoint.CHAT, request(Endpoint.CHAT, stream=True, stall="mid"))
    client.read_until(b"The")
    client.leave()
    charge = served.ended(key, client.request_id)
    assert paid(charge) == ("settled", "client_left", "assumed")
    assert charge["charged"] == charge["reserved"]


@pytest.mark.parametrize("model", ["counted", "opaque"])
def test_leaving_with_a_full_socket_is_noticed(served, key, upstream, model):
    """A client that does not read holds its provider up; when it leaves, the call comes to its end."""
    size = 40_000_000
    body = request(Endpoint.CHAT, model, stream=True, tokens_max=size, tokens=size, chunk_tokens=20_000)
    client = Leaver(served, key, Endpoint.CHAT, body, buffer_bytes=4096)
    client.read_until(b"The")
    entry = upstream.journal[-1]
    assert not entry.ended.wait(0.7), "nothing was held up"
    client.leave(is_abrupt=True)
    charge = served.ended(key, client.request_id)
    assert charge["outcome"] == "client_left"
    assert entry.ended.wait(5)
    assert entry.completed is (model == "opaque")


@pytest.mark.parametrize("model", ["counted", "opaque"])
def test_a_client_that_takes_nothing_has_left(served, key, upstream, model):
    """It cannot keep a provider waiting, nor pay for less than it caused; its connection is cut off."""
    size = 40_000_000
    body = request(Endpoint.CHAT, model, stream=True, tokens_max=size, tokens=size, chunk_tokens=20_000)
    client = Leaver(served, key, Endpoint.CHAT, body, buffer_bytes=4096)
    client.read_until(b"The")
    charge = served.ended(key, client.request_id)
    assert paid(charge) == ("settled", "client_left", "counted" if model == "counted" else "reported")
    assert upstream.journal[-1].ended.wait(5)
    assert upstream.journal[-1].completed is (model == "opaque")
    assert b"[DONE]" not in client.read_to_its_end()
    client.leave()


def test_a_slow_reader_does_not_fill_the_memory(served, key):
    """What the client does not take stays with the provider."""
    status = Path(f"/proc/{served.process.pid}/status")

    def resident_kilobytes() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])

    before = resident_kilobytes()
    size = 60_000_000
    body = request(Endpoint.CHAT, stream=True, tokens_max=size, tokens=size, chunk_tokens=50_000)
    client = Leaver(served, key, Endpoint.CHAT, body, buffer_bytes=4096)
    client.read_until(b"The")
    time.sleep(0.8)
    grown = resident_kilobytes() - before
    client.leave(is_abrupt=True)
    assert grown < 20_000
    served.ended(key, client.request_id)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("behaviour", "status"),
    [
        ({"status": 400}, 400),
        ({"status": 422}, 422),
        ({"status": 429, "retry_after": 7}, 429),
        ({"status": 500}, 502),
        ({"status": 503}, 503),
        ({"status": 401}, 502),
        ({"status": 500, "error_body": "html"}, 502),
        ({"status": 404, "error_body": "empty"}, 404),
        ({"reset": "after_read"}, 502),
        ({"half": True}, 502),
    ],
)
def test_what_delivers_nothing_costs_nothing(served, key, endpoint, behaviour, status):
    """An error in OpenAI's shape, and the hold is given back; what the provider may still bill is told apart."""
    before = served.balance(key)
    with served.client(key) as http:
        answer = http.post(f"/v1/{endpoint}", json=request(endpoint, **behaviour))
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
    charge = served.charge(key, answer.headers["x-request-id"])
    assert (charge["state"], charge["charged"]) == ("released", "0")
    assert charge["outcome"] == ("nothing_delivered" if "status" in behaviour else "perhaps_billed")
    assert served.balance(key) == before


@pytest.mark.parametrize("endpoint", STREAMED)
@pytest.mark.parametrize("fault", [{"reset": "mid"}, {"half": True}, {"stall": "mid"}])
def test_a_stream_that_breaks_is_charged_for_what_was_relayed(served, key, endpoint, fault):
    """An error event takes the place of the end; the charge is a count within the reservation."""
    with served.client(key) as http:
        answer = http.post(f"/v1/{endpoint}", json=request(endpoint, stream=True, tokens=400, **fault))
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    assert "response.completed" not in answer.text
    last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "stream_broken"
    charge = served.charge(key, answer.headers["x-request-id"])
    assert paid(charge) == ("settled", "provider_broke", "counted")
    assert 0 < Decimal(charge["charged"]) <= Decimal(charge["reserved"])


@pytest.mark.parametrize("endpoint", STREAMED)
@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_is_charged_by_its_usage(served, key, upstream, endpoint, stream):
    """Its end comes after the charge."""
    body = request(endpoint, stream=stream, tokens=100)
    with served.client(key) as http, http.stream("POST", f"/v1/{endpoint}", json=body) as answer:
        text = "".join(answer.iter_text())
        charge = served.charge(key, answer.headers["x-request-id"])
    assert paid(charge) == ("settled", "completed", "reported")
    entry = upstream.journal[-1]
    assert (charge["usage"]["input"], charge["usage"]["output"]) == (entry.prompt_tokens, entry.completion_tokens)
    if stream:
        assert text.rstrip().endswith("[DONE]") or "response.completed" in text


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_embeddings_are_charged_for_their_input(served, key, upstream, encoding_format):
    """They have no output, and hold nothing for any."""
    body = {"model": "fake/opaque", "input": ["one", "two"], "encoding_format": encoding_format}
    with served.client(key) as http:
        answer = http.post("/v1/embeddings", json=body)
    assert len(answer.json()["data"]) == 2
    charge = served.charge(key, answer.headers["x-request-id"])
    assert charge["usage"] == {"input": upstream.journal[-1].prompt_tokens}
    assert Decimal(charge["reserved"]) < Decimal("0.001")


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.EMBEDDINGS])
def test_a_provider_that_is_silent_is_a_timeout_that_must_not_be_retried(served, key, endpoint):
    """504, not charged; a second try would be a second bill."""
    with served.client(key) as http:
        answer = http.post(f"/v1/{endpoint}", json=request(endpoint, stall="before_headers"))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    charge = served.charge(key, answer.headers["x-request-id"])
    assert (charge["state"], charge["outcome"]) == ("released", "perhaps_billed")


def test_a_silent_stream_is_kept_alive(served, key):
    """Comments come while nothing else does, and the answer is otherwise the provider's."""
    body = request(Endpoint.CHAT, stream=True, tokens=8, pace_s=0.5)
    with served.client(key) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert ": keep-alive\n\n" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_no_comment_follows_an_id(served, key):
    """The openai SDK would take it for an event without data."""
    body = request(Endpoint.CHAT, stream=True, tokens=8, pace_s=0.5, event_prefix="id: 7\n")
    with served.client(key) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert "keep-alive" not in answer.text.partition("id: 7")[2]


@contextmanager
def held(database, served):
    """The books are locked for everybody else while the block runs."""
    locked, over = threading.Event(), threading.Event()

    def hold_file() -> None:
        file = Path(served.environ["TOLLGATE_DATA_DIR"]) / "served.db"
        connection = sqlite3.connect(file, isolation_level=None, timeout=10)
        connection.execute("BEGIN IMMEDIATE")
        locked.set()
        over.wait(30)
        connection.execute("ROLLBACK")
        connection.close()

    async def hold_rows() -> None:
        connection = await asyncpg.connect(database.replace("+asyncpg", ""))
        async with connection.transaction():
            await connection.execute("SELECT id FROM wallets FOR UPDATE")
            locked.set()
            await asyncio.to_thread(over.wait, 30)
        await connection.close()

    hold = hold_file if database.startswith("sqlite") else lambda: asyncio.run(hold_rows())
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert locked.wait(10)
        yield
    finally:
        over.set()
        thread.join()


def postgres_of(database):
    """A function that runs one statement on the server of `database`."""

    def run(statement: str) -> None:
        async def execute() -> None:
            connection = await asyncpg.connect(database.replace("+asyncpg", ""))
            await connection.execute(statement)
            await connection.close()

        asyncio.run(execute())

    return run


def begun(upstream, calls: int) -> None:
    """Returns when the provider has got more than `calls` calls."""
    until(lambda: len(upstream.journal) > calls)


def test_a_plain_answer_that_cannot_be_booked_is_not_sent_and_costs_nothing(served, key, upstream, database):
    """503 instead; and if the settle turns out to have been booked, it is given back."""
    before, calls = served.balance(key), len(upstream.journal)
    client = Leaver(served, key, Endpoint.CHAT, request(Endpoint.CHAT, delay_s=0.5))
    begun(upstream, calls)
    with held(database, served):
        client.read_until(b"\r\n\r\n")
    assert client.read.startswith(b"HTTP/1.1 503")
    served.ended(key, client.request_id, within_s=20)
    # What was booked is given back by the operation after it.
    until(lambda: served.balance(key) == before, "it was not given back")
    charge = served.charge(key, client.request_id)
    assert charge["refunded"] == charge["charged"]
    client.leave()


def test_a_stream_whose_end_cannot_be_booked_ends_with_an_error_and_its_charge_stands(served, key, upstream, database):
    """Its content was delivered; its end was not."""
    calls = len(upstream.journal)
    body = request(Endpoint.CHAT, stream=True, tokens=40, pace_s=0.1)
    client = Leaver(served, key, Endpoint.CHAT, body)
    begun(upstream, calls)
    client.read_until(b"fox")
    with held(database, served):
        client.read_until(b"stream_broken")
    assert b"[DONE]" not in client.read
    charge = served.ended(key, client.request_id, within_s=20)
    assert paid(charge) == ("settled", "completed", "reported")
    assert charge["usage"]["output"] == 40
    client.leave()


def test_an_end_that_can_be_booked_in_time_is_only_late(served, key, upstream, database):
    """A short outage delays the end of the answer, and nothing else."""
    calls = len(upstream.journal)
    client = Leaver(served, key, Endpoint.CHAT, request(Endpoint.CHAT, stream=True, tokens=40, pace_s=0.05))
    begun(upstream, calls)
    client.read_until(b"fox")
    with held(database, served):
        client.read_until(b"azy")
        time.sleep(0.6)
    client.read_until(b"[DONE]")
    assert paid(served.charge(key, client.request_id)) == ("settled", "completed", "reported")
    client.leave()


def test_a_plain_answer_that_a_stopping_server_cannot_send_costs_nothing(database, upstream, tmp_path):
    """When the time for calls in flight is over, what waits for its charge is never sent: so it is given back."""
    url = f"{database}_stopped" if database.startswith("postgresql") else SQLITE
    if database.startswith("postgresql"):
        postgres_of(database)(f'CREATE DATABASE "{url.rpartition("/")[2]}"')
    config = CONFIG.replace("settle_wait_s = 1\n", "settle_wait_s = 30\ndrain_s = 1\n")
    with serving(tmp_path, url, upstream.base_url, config) as server:
        key = server.customer("customer@example.com", "1000")
        calls = len(upstream.journal)
        client = Leaver(server, key, Endpoint.CHAT, request(Endpoint.CHAT, delay_s=0.5))
        begun(upstream, calls)
        with held(url, server):
            assert upstream.journal[-1].ended.wait(5)
            time.sleep(1)  # for the answer to be read, and its settle to wait
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "ending_calls" in server.log())
        assert server.process.wait(40) == 0
        assert b"HTTP/1.1 200" not in client.read_to_its_end()
        client.leave()
        server.process.stdout.close()
        server.start()
        assert server.balance(key) == {"balance": "1000", "reserved": "0", "available": "1000"}
        with server.client(key) as http:
            [charge] = http.get("/api/v1/credits/charges").json()["items"]
        assert charge["refunded"] == charge["charged"] != "0"
        assert server.command("audit")["clean"]
