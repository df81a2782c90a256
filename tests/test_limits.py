"""Every limit is the operator's to set, says so in OpenAI's shape, and leaves nothing reserved."""

import base64
import contextlib
import gzip
import json
import socket
import time
from decimal import Decimal

import pytest

from proxy.wire.requests import Endpoint
from tests.serving import CONFIG, MODEL, SQLITE, audited

LIMITS = """[server]
body_bytes_max = 20000
body_s = 1
nesting_max = 20
answer_bytes_max = 30000
event_bytes_max = 9000
call_s = 3
"""
CONFIGURATION = (
    CONFIG.replace("[server]\n", LIMITS).replace("_byte_s = 5", "_byte_s = 2").replace("idle_s = 5", "idle_s = 2")
)


@pytest.fixture(scope="module")
def served(tmp_path_factory, upstream):
    """A running server with low limits, whose books are in order at the end."""
    with audited(tmp_path_factory.mktemp("limits"), SQLITE, upstream.base_url, CONFIGURATION) as server:
        yield server


@pytest.fixture(scope="module")
def key(served):
    return served.customer("limited@example.com", "10")


@pytest.fixture(scope="module")
def client(served, key):
    with served.client(key) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_stays_reserved(client):
    """After every test."""
    yield
    assert client.get("/api/v1/credits/balance").json()["reserved"] == "0"


def request(*, stream=False, **behaviour) -> dict:
    """A chat with a provider that behaves so."""
    messages = [{"role": "user", "content": f"!fake {json.dumps(behaviour)}"}]
    return {"model": MODEL, "messages": messages, **({"stream": True} if stream else {})}


def check_error(answer, status, code) -> None:
    """An error as OpenAI's SDKs read it."""
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"].keys() >= {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")


def state_of(client, answer) -> str:
    return client.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").json()["state"]


# ---- of requests


@pytest.mark.parametrize("endpoint", Endpoint)
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("size", [20_001, 400_000])
def test_a_body_over_the_limit(client, upstream, endpoint, is_chunked, size):
    """413, whether its length is said or not; the connection goes on."""
    before = len(upstream.journal)
    body = b"x" * size
    answer = client.post(f"/v1/{endpoint}", content=iter([body[:999], body[999:]]) if is_chunked else body)
    check_error(answer, 413, "request_too_large")
    assert len(upstream.journal) == before
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_at_the_limit(client, is_chunked):
    """It is served."""
    body = json.dumps(request(tokens=3)).encode().ljust(20_000)
    answer = client.post("/v1/chat/completions", content=iter([body[:7], body[7:]]) if is_chunked else body)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 3)


@pytest.mark.parametrize("endpoint", Endpoint)
def test_nesting_over_the_limit(client, endpoint):
    """400, and at the limit it is served: brackets in texts are no nesting."""
    prompt = {
        Endpoint.CHAT: {"messages": [{"role": "user", "content": "[" * 99}]},
        Endpoint.COMPLETIONS: {"prompt": "{"},
    }
    body = {"model": MODEL, **prompt.get(endpoint, {"input": '\\"]' * 99})}
    deep = json.loads("[" * 19 + "]" * 19)
    assert client.post(f"/v1/{endpoint}", json={**body, "metadata": deep}).status_code == 200
    answer = client.post(f"/v1/{endpoint}", json={**body, "metadata": [deep]})
    check_error(answer, 400, "invalid_json")
    assert "20 levels" in answer.text


def test_an_encoded_body(client):
    """415: it could be of any size."""
    answer = client.post("/v1/chat/completions", content=b"{}", headers={"content-encoding": "gzip"})
    check_error(answer, 415, "unsupported_content_encoding")


def exchanged(served, *parts: bytes) -> bytes:
    """What the server answers to `parts` on a connection of its own, up to its close or a second of silence."""
    with socket.create_connection(served.address, timeout=5) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
                connection.settimeout(1)
        return answer


def head(key, *lines: str) -> bytes:
    """The head of a paid request with these header lines."""
    return "\r\n".join(
        ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *lines, "", ""]
    ).encode()


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: abc"],
        ["Content-Length: -1"],
        ["Content-Length: 1_0"],
        ["Content-Length: 99999999999999999999999999"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: odd"],
    ],
    ids=str,
)
def test_a_malformed_length(served, key, upstream, lines):
    """It is refused, and never taken for something else."""
    before = len(upstream.journal)
    answer = exchanged(served, head(key, *lines), b"hello")
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), answer
    assert len(upstream.journal) == before


def test_malformed_chunks(served, key, upstream):
    """A body whose chunks are none is refused."""
    before = len(upstream.journal)
    answer = exchanged(served, head(key, "Transfer-Encoding: chunked"), b"zz\r\nhello\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert len(upstream.journal) == before


@pytest.mark.parametrize("lines", [["Content-Length: 50"], ["Transfer-Encoding: chunked"]], ids=str)
def test_a_body_that_stops(served, key, upstream, lines):
    """400 when the rest does not come in time."""
    before = len(upstream.journal)
    answer = exchanged(served, head(key, *lines), b"5\r\n{}   \r\n")
    status, _, rest = answer.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 400 "), answer
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    assert len(upstream.journal) == before


def test_a_client_that_leaves_inside_its_body(served, key, client, upstream):
    """Nothing is called and nothing reserved; the server goes on."""
    before = len(upstream.journal)
    with socket.create_connection(served.address, timeout=5) as connection:
        connection.sendall(head(key, "Content-Length: 50") + b"{}")
    assert client.get("/v1/models").status_code == 200
    assert len(upstream.journal) == before


# ---- of answers


def test_a_plain_answer_over_the_limit(client):
    """502: it cannot be held back until its charge is durable."""
    answer = client.post("/v1/chat/completions", json=request(tokens=31_000, ignore_max=True))
    check_error(answer, 502, "provider_broke_off")
    assert state_of(client, answer) == "released"


def test_an_encoded_answer_that_is_larger_than_it_looks(client):
    """What it says is not read beyond the limit; its bytes are within it."""
    packed = base64.b64encode(gzip.compress(b'{"choices": "%b"}' % (b"x" * 1_000_000))).decode()
    answer = client.post(
        "/v1/chat/completions", json=request(raw_base64=packed, extra_headers={"content-encoding": "gzip"})
    )
    assert answer.status_code == 200
    assert state_of(client, answer) == "settled"


def test_the_first_event_over_the_limit(client):
    """502, and nothing is charged."""
    answer = client.post("/v1/chat/completions", json=request(stream=True, raw="data: " + "x" * 9_001))
    check_error(answer, 502, "provider_broke_off")
    assert state_of(client, answer) == "released"


def test_a_later_event_over_the_limit(client):
    """What came before it was delivered, and is charged; an error event ends the stream."""
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "12345678"}}]})
    raw = f"data: {chunk}\n\ndata: " + "x" * 9_001
    answer = client.post("/v1/chat/completions", json=request(stream=True, raw=raw))
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[0] == f"data: {chunk}"
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "stream_broken"
    charge = client.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").json()
    assert (charge["state"], charge["outcome"], charge["usage"]["output"]) == ("settled", "provider_broke", 2)


# ---- of time


@pytest.mark.parametrize("stream", [False, True])
def test_no_first_byte_in_time(client, stream):
    """504, which clients do not try again by themselves: the provider may have done the work."""
    started = time.monotonic()
    answer = client.post("/v1/chat/completions", json=request(stream=stream, stall="before_headers"))
    check_error(answer, 504, "provider_timeout")
    assert answer.headers["x-should-retry"] == "false"
    assert 2 <= time.monotonic() - started < 20
    assert state_of(client, answer) == "released"


def test_silence_inside_a_plain_answer(client):
    """504: half of it is no answer."""
    answer = client.post("/v1/chat/completions", json=request(stall="mid"))
    check_error(answer, 504, "provider_timeout")
    assert state_of(client, answer) == "released"


@pytest.mark.parametrize(
    "behaviour", [{"stall": "mid", "tokens": 400}, {"tokens": 4_000, "chunk_tokens": 1, "pace_s": 0.3}]
)
def test_a_stream_that_takes_too_long(client, behaviour):
    """Silent, or over the time of a call: an error event, and a charge for what came."""
    answer = client.post("/v1/chat/completions", json=request(stream=True, **behaviour))
    assert answer.status_code == 200
    last = answer.text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stream_broken"
    charge = client.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").json()
    assert (charge["state"], charge["outcome"], charge["usage_source"]) == ("settled", "provider_broke", "counted")
    assert Decimal(charge["charged"]) > 0
    assert charge["duration_ms"] < 20_000


def test_a_plain_call_over_the_time_of_a_call(client):
    """504, however busy the provider is."""
    started = time.monotonic()
    answer = client.post("/v1/chat/completions", json=request(delay_s=1.5, stall="mid"))
    check_error(answer, 504, "provider_timeout")
    assert 3 <= time.monotonic() - started < 20
    assert state_of(client, answer) == "released"
