"""Metrics: exact sums over all processes, of everything that a call can do; and the log beside them."""

import json
import os
import re
from decimal import Decimal

import psutil
import pytest

from proxy.metrics import (
    BATCH_OPERATIONS,
    CALLS,
    CHARGED,
    DEATHS,
    FAMILIES,
    NANOS,
    OPEN,
    REGION_BYTES,
    Metrics,
    SharedMemory,
)
from proxy.storage.database import SCHEMA_HEAD
from tests.serving import CONFIG, MODEL, UPSTREAM_KEY, Served, environment, serving
from tests.waiting import until

LABELS = ("chat/completions", "fake", "m", "completed")
TOKEN = "a token for those who measure"
PROMPT = "a prompt that nobody may find in a log"

SERVER = CONFIG.replace("port = 0", f'port = 0\nworkers = 2\nmetrics_token = "{TOKEN}"')


def series(text: str) -> dict[str, Decimal]:
    """The values on a page, by name and labels."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: Decimal(value) for name, _, value in (line.rpartition(" ") for line in lines)}


# ---- the page


def test_what_processes_count_is_added_up():
    """Each in its own region, whoever reads; whoever takes a dead one's place goes on in its region."""
    shared = SharedMemory(3)
    one, other = Metrics(shared, 0), Metrics(shared, 1)
    one.add(CALLS, LABELS)
    other.add(CALLS, LABELS, 2)
    one.set(OPEN, {(): 5})
    other.set(OPEN, {(): 7})
    again = Metrics(shared, 0)
    again.add(CALLS, LABELS)
    found = series(shared.text())
    assert found['tollgate_calls_total{endpoint="chat/completions",provider="fake",model="m",outcome="completed"}'] == 4
    assert found["tollgate_open_reservations"] == 7, "gauges of the dead count no more"


def test_processes_that_were_forked_share_their_counts():
    """The memory is the same, not a copy of it."""
    shared = SharedMemory(2)
    mine = Metrics(shared, 0)
    child = os.fork()
    if child == 0:
        Metrics(shared, 1).add(DEATHS, (), 41)
        os._exit(0)
    os.waitpid(child, 0)
    mine.add(DEATHS)
    assert series(shared.text())["tollgate_worker_deaths_total"] == 42


def test_amounts_are_shown_exactly():
    """As decimal numbers, however large or small: a float would lose the last nano-credit."""
    metrics = Metrics()
    for amount, shown in ((1, "0.000000001"), (10**9, "1.000000001"), (9 * 10**18 - 10**9 - 1, "9000000000")):
        metrics.add(CHARGED, ("p", "m"), amount)
        assert f'tollgate_charged_credits_total{{provider="p",model="m"}} {shown}\n' in metrics.shared.text()
    assert NANOS == 10**9


def test_histograms_are_cumulative():
    """A value on a bound is below it, one above all bounds is counted in the last bucket; the sum is exact."""
    metrics = Metrics()
    for size in (1, 2, 3, 512, 513):
        metrics.observe(BATCH_OPERATIONS, (), size)
    found = series(metrics.shared.text())
    buckets = {name: int(value) for name, value in found.items() if "batch_operations_bucket" in name}
    assert buckets['tollgate_ledger_batch_operations_bucket{le="1"}'] == 1
    assert buckets['tollgate_ledger_batch_operations_bucket{le="2"}'] == 2
    assert buckets['tollgate_ledger_batch_operations_bucket{le="4"}'] == 3
    assert buckets['tollgate_ledger_batch_operations_bucket{le="512"}'] == 4
    assert buckets['tollgate_ledger_batch_operations_bucket{le="+Inf"}'] == 5
    assert found["tollgate_ledger_batch_operations_sum"] == 1031
    assert found["tollgate_ledger_batch_operations_count"] == 5


def test_any_label_can_be_shown():
    """Quotes, backslashes, line breaks and every alphabet."""
    metrics = Metrics()
    metrics.add(CALLS, ("a", 'q"', "b\\\n", "ünï"))
    line = 'tollgate_calls_total{endpoint="a",provider="q\\"",model="b\\\\\\n",outcome="ünï"} 1'
    assert line in metrics.shared.text().splitlines()


def test_a_full_region_loses_new_series_and_nothing_else():
    """A flood of labels costs no call and no other number."""
    metrics = Metrics()
    metrics.add(DEATHS)
    for number in range(REGION_BYTES // 50):
        metrics.add(CALLS, ("x", "y", "z", str(number)))
    metrics.add(DEATHS)
    found = series(metrics.shared.text())
    assert found["tollgate_worker_deaths_total"] == 2
    assert 1000 < len(found) < REGION_BYTES // 50


def test_names_follow_the_custom():
    """Counters end in `_total`, what has a unit says it, and no name comes twice."""
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert re.fullmatch(r"tollgate_[a-z_]+", family.name)
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert bool(family.bounds) == (family.kind == "histogram")


# ---- a server of two workers


@pytest.fixture(scope="module")
def served(postgres_database, tmp_path_factory, upstream):
    with serving(tmp_path_factory.mktemp("metrics"), postgres_database, upstream.base_url, SERVER) as server:
        yield server


@pytest.fixture(scope="module")
def key(served):
    return served.customer("customer@example.com", "1000")


def page(server: Served) -> dict[str, Decimal]:
    with server.client(TOKEN) as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return series(answer.text)


def changes(server: Served, before: dict[str, Decimal]) -> dict[str, Decimal]:
    after = page(server)
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def call(server: Served, key: str, *, model: str = MODEL, stream: bool = False, **behaviour) -> tuple[int, str]:
    """The status and request id of a call, on a connection of its own."""
    messages = [
        {"role": "system", "content": PROMPT},
        {"role": "user", "content": f"!fake {json.dumps(behaviour)}"},
    ]
    body = {"model": model, "max_tokens": 50, "stream": stream, "messages": messages}
    with server.client(key) as http:
        answer = http.post("/v1/chat/completions", json=body)
    return answer.status_code, answer.headers["x-request-id"]


def test_calls_are_counted_exactly_over_all_workers(served, key):
    """Whichever worker serves a call and whichever is asked: calls, tokens and credits are those of the receipts."""
    before = page(served)
    found = [call(served, key, stream=number % 2 == 1) for number in range(16)]
    assert {status for status, _ in found} == {200}
    receipts = [served.charge(key, request_id) for _, request_id in found]
    for _ in range(4):
        delta = changes(served, before)
        place = 'provider="fake",model="fake-model"'
        assert delta[f'tollgate_calls_total{{endpoint="chat/completions",{place},outcome="completed"}}'] == 16
        charged = sum(Decimal(receipt["charged"]) for receipt in receipts)
        assert delta[f"tollgate_charged_credits_total{{{place}}}"] == charged
        cost = sum(Decimal(receipt["provider_cost"]) for receipt in receipts)
        assert delta[f"tollgate_provider_cost_credits_total{{{place}}}"] == cost
        tokens = sum(receipt["usage"]["output"] for receipt in receipts)
        assert delta[f'tollgate_tokens_total{{{place},class="output"}}'] == tokens
        for stream in ("true", "false"):
            kind = f'{{endpoint="chat/completions",stream="{stream}"}}'
            for name in ("duration", "overhead", "first_byte"):
                assert delta[f"tollgate_call_{name}_seconds_count{kind}"] == 8
            assert (
                delta[f"tollgate_call_overhead_seconds_sum{kind}"] <= delta[f"tollgate_call_duration_seconds_sum{kind}"]
            )
        assert delta["tollgate_ledger_batch_operations_sum"] == 32
        assert delta['tollgate_usage_total{source="reported"}'] == 16


def test_overhead_leaves_out_the_provider(served, key):
    """A provider that takes half a second adds it to the duration, and not to Tollgate's own time."""
    before = page(served)
    assert call(served, key, delay_s=0.5)[0] == 200
    delta = changes(served, before)
    kind = '{endpoint="chat/completions",stream="false"}'
    duration, overhead = (delta[f"tollgate_call_{name}_seconds_sum{kind}"] for name in ("duration", "overhead"))
    assert duration >= Decimal("0.5")
    assert overhead <= duration - Decimal("0.5") + Decimal("0.01")


@pytest.mark.parametrize(
    ("behaviour", "names"),
    [
        ({"status": 401}, ['tollgate_provider_refused_operator_total{provider="fake"}']),
        (
            {"status": 500},
            ['tollgate_provider_errors_total{provider="fake",model="fake-model",reason="rejected"}'],
        ),
        ({"usage": "implausible"}, ['tollgate_implausible_usage_total{provider="fake"}']),
        (
            {"reset": "after_read"},
            [
                (
                    'tollgate_calls_total{endpoint="chat/completions",provider="fake",model="fake-model",'
                    'outcome="perhaps_billed"}'
                )
            ],
        ),
    ],
)
def test_what_operators_must_hear_of_is_counted(served, key, behaviour, names):
    """A provider that refuses the operator's account, fails, or reports nonsense."""
    before = page(served)
    call(served, key, **behaviour)
    delta = changes(served, before)
    for name in names:
        assert delta[name] == 1, delta


def test_refusals_are_counted_by_their_codes(served, key):
    """Before and behind the door."""
    before = page(served)
    poor = served.customer("poor@example.com", None)
    assert call(served, poor)[0] == 402
    assert call(served, "sk-tg-unknown")[0] == 401
    assert call(served, key, model="nobody/has-it")[0] == 404
    delta = changes(served, before)
    for status, code in ((402, "insufficient_credits"), (401, "invalid_api_key"), (404, "model_not_found")):
        assert delta[f'tollgate_refused_calls_total{{status="{status}",code="{code}"}}'] == 1


def test_gauges_follow_every_worker(served, key):
    """What each is worth just now: two of everything that every worker has."""
    found = until(lambda: (found := page(served))["tollgate_leases"] == 2 and found)
    assert found["tollgate_ledger_lost_workers"] == 0
    assert found['tollgate_database_connections{state="in_use"}'] >= 2
    for number in ("0", "1"):
        assert found[f'tollgate_worker_memory_bytes{{worker="{number}"}}'] > 10_000_000
        assert found[f'tollgate_worker_open_files{{worker="{number}"}}'] > 5


def test_a_dead_worker_is_counted_and_its_counts_stay(served, key):
    """Counters never go back."""
    call(served, key)
    before = page(served)
    psutil.Process(served.process.pid).children()[0].kill()
    deaths = "tollgate_worker_deaths_total"
    after = until(lambda: (after := page(served))[deaths] != before[deaths] and after, within_s=15)
    for name, value in before.items():
        if name.partition("{")[0].endswith(("_total", "_count", "_sum", "_bucket")):
            assert after[name] >= value, name


def test_metrics_are_for_those_with_the_token(served, key):
    """Nobody else's key opens them."""
    for credential in (None, key, "x", TOKEN[:-1]):
        with served.client(credential) as http:
            assert http.get("/metrics").status_code == 401, credential


def test_a_call_is_logged_with_who_what_and_how_much_and_without_what_was_said(served, key):
    """One line with all that an operator asks for; never the prompt, the answer or a secret."""
    _, request_id = call(served, key, stream=True)
    assert call(served, "sk-tg-" + "nobodys" * 6)[0] == 401
    charge = served.charge(key, request_id)
    lines = [json.loads(line) for line in served.log().splitlines() if line.startswith("{")]
    found = [line for line in lines if line.get("request_id") == request_id and line["event"] == "call"]
    assert len(found) == 1
    line = found[0]
    expected = {
        "outcome": "completed",
        "provider": "fake",
        "model": MODEL,
        "provider_model": MODEL,
        "endpoint": "chat/completions",
        "stream": True,
        "usage_source": charge["usage_source"],
        "output_tokens": charge["usage"]["output"],
        "charged": charge["charged"],
        "provider_cost": charge["provider_cost"],
        "shortfall": "0",
    }
    assert {name: line[name] for name in expected} == expected
    assert line["user_id"].startswith("usr_")
    assert line["key_id"].startswith("key_")
    assert line["duration_ms"] >= line["first_byte_ms"] >= 0
    assert line["overhead_ms"] <= line["duration_ms"] + 1
    log = served.log()
    for secret in (PROMPT, key, UPSTREAM_KEY, TOKEN, "nobodysnobodys", "quick brown"):
        assert secret not in log


def test_readiness_says_what_it_looked_at(served):
    """Database, schema, ledger, lease, process, and every provider."""
    with served.client(None) as http:
        answer = http.get("/health/ready")
    assert answer.status_code == 200
    checks = dict.fromkeys(("database", "schema", "ledger", "lease", "process"), "ok")
    assert answer.json()["checks"] == checks
    assert answer.json()["providers"].keys() == {"fake", "demo"}


@pytest.mark.parametrize(("revision", "status", "said"), [("9999", 200, "newer: 9999"), ("0001", 503, "older: 0001")])
def test_readiness_knows_the_schema(served, postgres, revision, status, said):
    """Red on an older one; on a newer one a replica serves until it is replaced."""
    name = served.environ["TOLLGATE_DATABASE_URL"].rpartition("/")[2]
    postgres.execute(f"UPDATE alembic_version SET version_num = '{revision}'", name)
    try:
        with served.client(None) as http:
            answer = http.get("/health/ready")
    finally:
        postgres.execute(f"UPDATE alembic_version SET version_num = '{SCHEMA_HEAD}'", name)
    found = answer.json()
    assert (answer.status_code, found.get("error", found)["checks"]["schema"]) == (status, said)


def test_without_a_token_metrics_are_for_this_machine(tmp_path, upstream):
    """Not for whoever comes through a proxy, which is on this machine as well."""
    served = Served(environment(tmp_path, "sqlite+aiosqlite:///own.db", upstream.base_url))
    served.start()
    with served.client(None) as http:
        assert http.get("/metrics").status_code == 200
        for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
            refused = http.get("/metrics", headers={header: "127.0.0.1"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "metrics_closed")
    assert served.stop() == 0
    served.errors.close()
