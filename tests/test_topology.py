"""The topology of `docker-compose.yml` by hand: PostgreSQL, and two replicas behind nginx with that file's settings.

What a container engine would do is left out; what is between the parts is the same.
"""

import base64
import json
import re
import secrets
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx2
import psutil
import pytest
import yaml

from proxy.cli.serve import STOP_S_MAX
from proxy.metrics import FAMILIES
from proxy.settings import ServerSettings
from tests import debian
from tests.balancer import COMPOSE, PATIENCE_S, REPLICAS, balancing, free_port, inline
from tests.serving import CONFIG, MODEL, Served, environment
from tests.waiting import until

SERVICES = COMPOSE["services"]


class Replica(Served):
    """One proxy of the compose file, with its command and environment, on a port of its own."""

    def __init__(self, environ: dict[str, str]) -> None:
        super().__init__(environ)
        self.port = free_port()

    def program(self) -> list[str]:
        words = [str(self.port) if word == "8080" else word for word in SERVICES["proxy-a"]["command"]]
        words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]  # noqa: S104 - compared only
        return [sys.executable, "-m", "proxy", *words, "--json"]

    def direct(self, credential: str | None = None) -> httpx2.Client:
        headers = {} if credential is None else {"Authorization": f"Bearer {credential}"}
        return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=PATIENCE_S)

    def is_ready(self) -> bool:
        try:
            with self.direct() as http:
                return http.get("/health/ready").status_code == 200
        except httpx2.TransportError:
            return False


class Topology:
    """Replicas and a load balancer that run."""

    def __init__(self, replicas: list[Replica], url: str, upstream, key: str) -> None:
        self.replicas = replicas
        self.url = url
        self.upstream = upstream
        self.key = key

    def client(self, credential: str | None = None) -> httpx2.Client:
        """A client of the load balancer."""
        headers = {"Authorization": f"Bearer {credential or self.key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S)

    def call(self, http: httpx2.Client, *, stream: bool = False, **behaviour) -> httpx2.Response:
        return http.post("/v1/chat/completions", json=body(stream=stream, **behaviour))


def body(*, stream: bool, **behaviour) -> dict:
    wish = f"!fake {json.dumps(behaviour)}"
    return {"model": MODEL, "max_tokens": 100, "stream": stream, "messages": [{"role": "user", "content": wish}]}


def environ_of(folder: Path, database_url: str, upstream_url: str, token: str) -> dict[str, str]:
    """The environment that the compose file gives a proxy, with this machine's addresses and files."""
    values = {"postgres_password": "trusted anyway", "jwt_secret": secrets.token_hex(32), "metrics_token": token}
    own = {}
    for name, value in SERVICES["proxy-a"]["environment"].items():
        if value.startswith("/run/secrets/"):
            file = folder / value.rpartition("/")[2]
            file.write_text(values[file.name] + "\n")
            own[name] = str(file)
        elif name.startswith("TOLLGATE_"):
            own[name] = value
    found = environment(folder, database_url, upstream_url, configuration=CONFIG)
    url = re.sub(r"//([^:@]+)(:[^@]*)?@", r"//\1@", database_url)
    return {**found, **own, "TOLLGATE_DATABASE_URL": url, "TOLLGATE_TRUSTED_PROXIES": "127.0.0.0/8"}


@pytest.fixture(scope="module")
def token() -> str:
    return secrets.token_hex(32)


@pytest.fixture(scope="module")
def topology(postgres_database, tmp_path_factory, upstream, token) -> Iterator[Topology]:
    folder = tmp_path_factory.mktemp("topology")
    with ExitStack() as stack:
        replicas = []
        for place in REPLICAS:
            (folder / place).mkdir()
            environ = environ_of(folder / place, postgres_database, upstream.base_url, token)
            replicas.append(Replica(environ))
        replicas[0].command("migrate")
        for replica in replicas:
            stack.callback(put_down, replica)
            replica.start()
        program = debian.program("nginx", "nginx")
        url = stack.enter_context(balancing(program, folder, [replica.port for replica in replicas]))
        yield Topology(replicas, url, upstream, replicas[0].customer("c@example.com", "1000"))
        report = replicas[0].command("audit")
        assert report["clean"], report


def put_down(replica: Replica) -> None:
    if replica.process is not None:
        replica.process.kill()
        replica.process.wait()
        replica.process.stdout.close()
    replica.errors.close()


def test_both_replicas_serve(topology):
    """The load balancer uses both; what they say of their callers' addresses comes through it."""
    counts = [len(replica.log().splitlines()) for replica in topology.replicas]
    with topology.client() as http:
        answers = [topology.call(http) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    for replica, before in zip(topology.replicas, counts, strict=True):
        served = [line for line in replica.log().splitlines()[before:] if '"event":"call"' in line]
        assert len(served) >= 5


def test_a_stream_comes_through_byte_for_byte(topology):
    """In pieces that end anywhere, with characters that look like the ends of lines."""
    event = 'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
    event += '{"content":"a\u2028b \\u0000 \u00e9\U0001f600"},"finish_reason":null}]}\n\n'
    usage = 'data: {"id":"x","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}\n\n'
    sent = (": a comment\n\n" + event * 50).encode()
    raw = base64.b64encode(sent + usage.encode() + b"data: [DONE]\n\n").decode()
    with (
        topology.client() as http,
        http.stream(
            "POST",
            "/v1/chat/completions",
            json=body(stream=True, raw_base64=raw, content_type="text/event-stream", segment_bytes=7),
        ) as answer,
    ):
        received = b"".join(answer.iter_raw())
    assert answer.status_code == 200
    assert received == sent + b"data: [DONE]\n\n"  # nobody asked for usage


def test_a_stream_is_not_held_back(topology):
    """Its first events are there before the provider has sent the last ones."""
    with (
        topology.client() as http,
        http.stream("POST", "/v1/chat/completions", json=body(stream=True, tokens=20, pace_s=0.1)) as answer,
    ):
        chunks = answer.iter_raw()
        first = next(chunks)
        assert not topology.upstream.journal[-1].ended.is_set()
        assert first.startswith(b"data: ")
        assert b"[DONE]" not in first
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def test_metrics_are_not_for_the_world(topology, token):
    """Not even for whoever has the token: Prometheus asks each replica by itself."""
    with topology.client(token) as http:
        answer = http.get("/metrics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_path")
    for replica in topology.replicas:
        with replica.direct(token) as http:
            assert http.get("/metrics").text.startswith("# HELP tollgate_calls_total")


def test_errors_of_the_load_balancer_have_our_shape(topology):
    """A body over its limit is refused as we would."""
    with topology.client() as http:
        answer = http.post("/v1/chat/completions", content=b"x" * 22_000_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_without_any_replica_calls_are_refused_as_unavailable(tmp_path):
    """In our shape, and with the time after which to try again; never with the gateway's own 502."""
    program = debian.program("nginx", "nginx")
    with balancing(program, tmp_path, [free_port(), free_port()]) as url, httpx2.Client(base_url=url) as http:
        answer = http.post("/v1/chat/completions", json=body(stream=False))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"


class Callers:
    """Clients that call through the load balancer, one call after the other, until they are told to stop."""

    def __init__(self, topology: Topology, count: int) -> None:
        self.failures: list[str] = []
        self.calls = 0
        self._is_over = threading.Event()
        self._topology = topology
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _work(self, number: int) -> None:
        with self._topology.client() as http:
            while not self._is_over.is_set():
                stream = number % 2 == 1
                try:
                    answer = self._topology.call(http, stream=stream, tokens=5, pace_s=0.01 if stream else 0)
                    if answer.status_code != 200 or (stream and not answer.content.endswith(b"data: [DONE]\n\n")):
                        self.failures.append(f"{answer.status_code} {answer.content[-200:]!r}")
                except httpx2.HTTPError as exc:
                    self.failures.append(repr(exc))
                self.calls += 1


def test_a_replica_that_is_stopped_loses_no_call(topology):
    """It ends by itself with status 0 while its clients go on; when it is back it serves again."""
    replica = topology.replicas[0]
    with Callers(topology, 8) as callers:
        until(lambda: callers.calls >= 40, within_s=PATIENCE_S)
        replica.process.send_signal(signal.SIGTERM)
        assert replica.process.wait(PATIENCE_S) == 0, replica.log()
        at_end = callers.calls
        until(lambda: callers.calls >= at_end + 40, within_s=PATIENCE_S)
    assert callers.failures == []
    replica.process.stdout.close()
    replica.start()
    assert replica.is_ready()


def test_a_replica_that_is_killed_costs_its_own_calls_and_no_more(topology):
    """The next ones go to the other, whoever was killed."""
    for replica in topology.replicas:
        family = psutil.Process(replica.process.pid)
        for process in (family, *family.children()):
            process.kill()
        replica.process.wait()
        with topology.client() as http:
            answers = [topology.call(http, stream=number % 2 == 1) for number in range(12)]
        assert {answer.status_code for answer in answers} == {200}
        replica.process.stdout.close()
        replica.start()


# ---- what Prometheus gets


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(inline("alerts"))["groups"] for rule in group["rules"]]


def test_alerts_are_about_metrics_that_exist():
    """Each names one at least, of those that we have."""
    known = {"up"}
    for family in FAMILIES:
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        known |= {family.name + suffix for suffix in suffixes}
    for rule in rules():
        named = set(re.findall(r"\b(tollgate_[a-z_]+|up)\b", rule["expr"]))
        assert named, rule
        assert named <= known, rule
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 10


def test_prometheus_takes_its_configuration_and_the_alerts(tmp_path):
    """Its own tool says so."""
    promtool = debian.program("promtool", "prometheus")
    (tmp_path / "alerts.yml").write_text(inline("alerts"))
    (tmp_path / "prometheus.yml").write_text(inline("prometheus").replace("/etc/prometheus", str(tmp_path)))
    for command in (("check", "rules", "alerts.yml"), ("check", "config", "--syntax-only", "prometheus.yml")):
        done = subprocess.run(
            [promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr


HEALTHY = {
    'up{job="tollgate"}': "1x130",
    "tollgate_database_lost_workers": "0x130",
    "tollgate_ledger_lost_workers": "0x130",
    "tollgate_leases": "2x130",
    'tollgate_build_workers{version="1"}': "2x130",
    'tollgate_provider_refused_operator_total{provider="p"}': "0x130",
    'tollgate_implausible_usage_total{provider="p"}': "0x130",
    'tollgate_refused_calls_total{status="500",code="ledger_fault"}': "0x130",
    "tollgate_deferred_settles_total": "0x130",
    'tollgate_calls_total{provider="p",model="m"}': "0+10x130",
    'tollgate_shortfall_credits_total{provider="p",model="m"}': "0x130",
    'tollgate_provider_errors_total{provider="p",model="m"}': "0x130",
    'tollgate_provider_cooling_workers{provider="p",model="m"}': "0x130",
    "tollgate_worker_deaths_total": "0x130",
    "tollgate_worker_hangs_total": "0x130",
    'tollgate_call_overhead_seconds_bucket{le="0.5"}': "0+10x130",
    'tollgate_call_overhead_seconds_bucket{le="1"}': "0+10x130",
    'tollgate_call_overhead_seconds_bucket{le="+Inf"}': "0+10x130",
    'tollgate_worker_lag_seconds{worker="0"}': "0x130",
    'tollgate_worker_memory_bytes{worker="0"}': "120000000x130",
    'tollgate_worker_memory_bytes{worker="1"}': "120000000x130",
}
"""What Prometheus sees every 15 seconds of a server that is well, without its instance."""

ONCE = "0x110 1x20"
SICK = [
    ("Down", {'up{job="tollgate"}': "0x130"}),
    ("DatabaseLost", {"tollgate_database_lost_workers": "0x100 2x30"}),
    ("LedgerLost", {"tollgate_ledger_lost_workers": "0x100 1x30"}),
    ("LeaseLost", {"tollgate_leases": "2x100 1x30"}),
    ("ProviderRefusesOperator", {'tollgate_provider_refused_operator_total{provider="p"}': ONCE}),
    ("ServerError", {'tollgate_refused_calls_total{status="500",code="ledger_fault"}': ONCE}),
    ("DeferredSettles", {"tollgate_deferred_settles_total": ONCE}),
    ("Shortfall", {'tollgate_shortfall_credits_total{provider="p",model="m"}': ONCE}),
    ("ImplausibleUsage", {'tollgate_implausible_usage_total{provider="p"}': ONCE}),
    ("ProviderFailing", {'tollgate_provider_errors_total{provider="p",model="m"}': "0+2x130"}),
    ("ProviderFailing", {'tollgate_provider_errors_total{provider="replaced",model="m"}': "0+2x130"}),
    (
        "ProviderCoolingDown",
        {'tollgate_provider_cooling_workers{provider="p",model="m"}': " ".join(["0x60", *["1x3 0x5"] * 7])},
    ),
    ("WorkersDie", {"tollgate_worker_deaths_total": "0x90 1 2 3 4x30"}),
    ("WorkerHung", {"tollgate_worker_hangs_total": ONCE}),
    ("Slow", {'tollgate_call_overhead_seconds_bucket{le="0.5"}': "0+5x130"}),
    ("LoopLags", {'tollgate_worker_lag_seconds{worker="0"}': "0x60 2x70"}),
    ("Memory", {'tollgate_worker_memory_bytes{worker="0"}': "120000000x60 900000000x70"}),
]


def seen(alert: str | None, changes: dict[str, str]) -> dict:
    """A test for promtool: after half an hour that alert fires, and no other one."""
    series = {**HEALTHY, **changes}.items()
    return {
        "interval": "15s",
        "input_series": [
            {"series": name[:-1] + ',instance="a"}' if "{" in name else name + '{instance="a"}', "values": values}
            for name, values in series
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "30m",
                "exp_samples": [{"labels": f'{{alertname="Tollgate{alert}"}}', "value": 1}] if alert else [],
            }
        ],
    }


def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    """Each for what it is about, at its first time; none for a server that is well."""
    promtool = debian.program("promtool", "prometheus")
    assert {f"Tollgate{alert}" for alert, _ in SICK} == {rule["alert"] for rule in rules()}
    (tmp_path / "alerts.yml").write_text(inline("alerts"))
    tests = [seen(None, {}), *(seen(alert, changes) for alert, changes in SICK)]
    file = {"rule_files": ["alerts.yml"], "evaluation_interval": "15s", "tests": tests}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(file))
    done = subprocess.run(
        [promtool, "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_place_in_the_runbook():
    """Whoever is woken by it finds there what to do."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    runbook = readme.partition("\n## Runbook\n")[2].partition("\n## ")[0]
    for rule in rules():
        assert f"`{rule['alert'].removeprefix('Tollgate')}`" in runbook, rule["alert"]


def test_prometheus_takes_our_page(topology, token):
    """What a replica shows after all that is what its tool calls well formed."""
    promtool = debian.program("promtool", "prometheus")
    with topology.replicas[0].direct(token) as http:
        page = http.get("/metrics").text
    done = subprocess.run(
        [promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the compose file itself


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_hardened(name):
    """Nobody is root, no file can be changed, nothing is without a limit, and secrets come from files."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["user"] not in {"root", "0", "0:0"}
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert "healthcheck" in service or name == "migrate"
    for variable, value in service.get("environment", {}).items():
        assert not re.search("PASSWORD|SECRET|TOKEN", variable) or value.startswith("/run/secrets/")
    assert name in {"nginx", "prometheus"} or "ports" not in service


def test_the_keys_of_all_shipped_providers_reach_the_proxies():
    """Or a provider would be off without a word."""
    shipped = tomllib.loads((Path(__file__).parents[1] / "config.toml").read_text())["providers"].values()
    wanted = {provider["api_key_env"] for provider in shipped if "api_key_env" in provider}
    for proxy in ("proxy-a", "proxy-b"):
        found = {name for name in SERVICES[proxy]["environment"] if name.endswith("_API_KEY")}
        assert found == wanted


def test_grace_is_long_enough():
    """A replica is not killed while it still has time for its calls, and takes calls for longer than nginx idles."""
    proxy = SERVICES["proxy-a"]
    notice_s = float(proxy["environment"]["TOLLGATE_NOTICE_S"])
    idle_s = float(re.search(r"keepalive_timeout (\d+)s", inline("nginx"))[1])
    assert notice_s > idle_s
    assert float(proxy["stop_grace_period"].removesuffix("s")) >= notice_s + ServerSettings().drain_s + STOP_S_MAX
