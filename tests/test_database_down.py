"""Down is not wrong: what callers are told while PostgreSQL is away, and when it is back."""

import time

import pytest

from tests.fakes.provider import run_in_thread
from tests.identity.tokens import SECRET, own_claims, unsigned
from tests.postgres import Cluster
from tests.serving import CONFIG, MODEL, serving

CALL = {"model": MODEL, "messages": [{"role": "user", "content": "Say something."}]}
PASSWORD = "a password of some length"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A server on a cluster of its own, and the provider."""
    config = f'{CONFIG}\n[auth]\njwt_secret = "{SECRET}"\n[credits]\nstarting_credits = "1"\ngive_to_strangers = true\n'
    with Cluster() as cluster, run_in_thread() as upstream:
        cluster.create_database("down")
        with serving(tmp_path_factory.mktemp("down"), cluster.url("down"), upstream.base_url, config) as served:
            yield served, cluster, upstream


def test_nobody_is_told_that_a_key_is_wrong_while_nobody_can_know(world):
    """Known keys and tokens, unknown ones, a login: 503 with a time to wait, and no provider sees a call.

    What is wrong by itself stays wrong. When the database is back, everything goes on as before.
    """
    served, cluster, upstream = world
    credentials = {"email": "ann@example.com", "password": PASSWORD}
    with served.client(None) as http:
        assert http.post("/register", json=credentials).status_code == 201
        token = http.post("/login", json=credentials).json()["access_token"]
    with served.client(token) as http:
        known, unseen = (http.post("/api/v1/keys", json={}).json()["key"] for _ in range(2))
    for credential in (known, token):
        with served.client(credential) as http:
            assert http.post("/v1/chat/completions", json=CALL).status_code == 200
    calls = len(upstream.journal)

    cluster.halt()
    forged = unsigned(own_claims())
    for credential, method, path, body in (
        (known, "POST", "/v1/chat/completions", CALL),
        (token, "POST", "/v1/chat/completions", CALL),
        (unseen, "POST", "/v1/chat/completions", CALL),
        ("sk-tg-unknown", "POST", "/v1/chat/completions", CALL),
        (known, "GET", "/v1/models", None),
        (token, "GET", "/me", None),
        (None, "POST", "/login", credentials),
        (None, "GET", "/health/ready", None),
    ):
        with served.client(credential) as http:
            answer = http.request(method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "service_unavailable"), (credential, path)
        assert int(answer.headers["retry-after"]) > 0
    with served.client(None) as http:
        checks = http.get("/health/ready").json()["error"]["checks"]
        assert {name for name, said in checks.items() if said == "out of reach"} == {"database", "ledger"}
        assert "\ntollgate_ledger_lost_workers 1\n" in http.get("/metrics").text
        assert "\ntollgate_database_lost_workers 1\n" in http.get("/metrics").text
        assert http.get("/health/live").status_code == 200
    for credential in (forged, "sk-other", None):
        with served.client(credential) as http:
            assert http.post("/v1/chat/completions", json=CALL).status_code == 401
    assert len(upstream.journal) == calls

    cluster.launch()
    give_up_at = time.monotonic() + 20
    for credential in (known, token, unseen):
        with served.client(credential) as http:
            while (answer := http.post("/v1/chat/completions", json=CALL)).status_code != 200:
                assert answer.status_code == 503, answer.text
                assert time.monotonic() < give_up_at
                time.sleep(0.1)
    with served.client("sk-tg-unknown") as http:
        assert http.post("/v1/chat/completions", json=CALL).status_code == 401
    assert served.command("audit")["clean"]
    with served.client(None) as http:
        while "\ntollgate_database_lost_workers 0\n" not in http.get("/metrics").text:
            assert time.monotonic() < give_up_at
            time.sleep(0.1)
    log = served.log()
    assert log.count('"event":"database_lost","level":"error"') == log.count('"event":"database_back"') == 1
    assert '"reason":"[Errno' in log
