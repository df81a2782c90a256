"""What a paid call costs: CPU of Tollgate's process per call and per streamed chunk, against a relay without accounts.

    python -m tests.bench.calls [--short] [--check] [--save] [--rounds 3] [--databases sqlite postgresql]

All gateways run at once, each in a process of its own, and take turns in every round; the provider and the driver are
processes too. Where there are two cores, the gateways have one and everything else the other. Figures are medians over
the rounds, and only their ratios mean anything:

    bare        uvicorn and our HTTP client, which relays: what HTTP in and out costs in Python
    unbooked    Tollgate with a ledger that says yes to everything
    sqlite, postgresql    Tollgate as it is, every commit durable

`--check` compares ratios with those in `baseline.json` (which `--save` writes), and fails when one is a fourth above
it in three attempts: a machine that is busy for a moment is no regression.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import psutil

from proxy.units import new_id
from tests.bench import stages
from tests.bench.ledger import durable
from tests.bench.load import CHUNKS, PACE_S, Load, Measured
from tests.postgres import server_for_tests
from tests.serving import Served, environment

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 1.25
ATTEMPTS = 3

DIRECT, BARE, UNBOOKED, SQLITE, POSTGRESQL = "direct", "bare", "unbooked", "sqlite", "postgresql"
PLAIN, BIG, STREAM, PACED = "plain", "big", "stream", "paced"

CONNECTIONS = 64
PACED_RATE = 100

CONFIG = """
[server]
port = 0

[providers.bench]
kind = "openai"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"

[prices."bench/bench-model"]
input = "0.15"
cached_input = "0.075"
output = "0.60"
max_output_tokens = 16384
context_tokens = 128000
# {model}
"""


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int = 5
    seconds: float = 2.0
    scenarios: tuple[str, ...] = (PLAIN, BIG, STREAM, PACED)
    databases: tuple[str, ...] = (SQLITE, POSTGRESQL)


SHORT = Scale(rounds=2, seconds=0.7, scenarios=(PLAIN, BIG, STREAM), databases=(SQLITE,))


class Turn(NamedTuple):
    """One gateway in one scenario of one round."""

    cpu_us: float
    """Of its process, for each call, or for each chunk of a stream."""
    measured: Measured


class Result(NamedTuple):
    """The medians over the rounds by gateway and scenario, and the memory and the start of each gateway."""

    cpu_us: dict[tuple[str, str], float]
    p50_ms: dict[tuple[str, str], float]
    first_p50_ms: dict[tuple[str, str], float]
    memory_mb: dict[str, float]
    start_s: dict[str, float]

    def ratios(self) -> dict[str, float]:
        """What `--check` compares, by name."""
        found = {}
        for gateway in (UNBOOKED, SQLITE, POSTGRESQL):
            for scenario in (PLAIN, STREAM):
                if (gateway, scenario) in self.cpu_us:
                    cpu_us = self.cpu_us[gateway, scenario]
                    found[f"{gateway} ÷ bare, {scenario}"] = cpu_us / self.cpu_us[BARE, scenario]
        if (UNBOOKED, BIG) in self.cpu_us:
            found["unbooked, big ÷ plain"] = self.cpu_us[UNBOOKED, BIG] / self.cpu_us[UNBOOKED, PLAIN]
        return found


# ---- the processes


class Unbooked(Served):
    """Tollgate without its ledger."""

    def program(self) -> list[str]:
        """See `Served`."""
        return [sys.executable, "-m", "tests.bench.gateways", "unbooked"]


class Bare(Served):
    """The relay."""

    def __init__(self, provider_url: str) -> None:
        super().__init__({**os.environ})
        self._provider_url = provider_url

    def program(self) -> list[str]:
        """See `Served`."""
        return [sys.executable, "-m", "tests.bench.gateways", "bare", self._provider_url]


class Gateway(NamedTuple):
    """What calls are sent to; `process` is None when that is the provider itself."""

    name: str
    port: int
    key: str
    process: psutil.Process | None
    start_s: float = 0.0


@contextmanager
def helper(word: str) -> Iterator[subprocess.Popen[str]]:
    """A process of `load`, off the gateways' core, which ends with its standard input."""
    program = [sys.executable, "-m", "tests.bench.load", word]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pin(process.pid, -1)
        try:
            yield process
        finally:
            process.stdin.close()


def pin(pid: int, core: int) -> None:
    """Give a process one core: the first (0) or the last (-1), where there are several and the system can."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(pid, {cores[core]})


@contextmanager
def running(name: str, served: Served, key: str) -> Iterator[Gateway]:
    """That server, started and, at the end, stopped."""
    begun = time.monotonic()
    served.start()
    start_s = time.monotonic() - begun
    try:
        pin(served.process.pid, 0)
        yield Gateway(name, urlsplit(served.base_url).port, key, psutil.Process(served.process.pid), start_s)
        if status := served.stop():
            raise SystemExit(f"{name} ended with status {status}: {served.log()[-1000:]}")
    finally:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()
        served.errors.close()


@contextmanager
def tollgate(name: str, database_url: str, provider_url: str) -> Iterator[Gateway]:
    """Tollgate over that database, with a customer who has plenty."""
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-") as folder:
        kind = Unbooked if name == UNBOOKED else Served
        served = kind(environment(Path(folder), database_url, provider_url, configuration=CONFIG))
        served.command("migrate")
        key = served.customer("bench@example.com", "1000000")
        with running(name, served, key) as gateway:
            yield gateway


@contextmanager
def gateways(scale: Scale, provider_port: int) -> Iterator[list[Gateway]]:
    """All that are compared, running."""
    url = f"http://127.0.0.1:{provider_port}/v1"
    with ExitStack() as stack:
        found = [Gateway(DIRECT, provider_port, "none", None)]
        found.append(stack.enter_context(running(BARE, Bare(url), "none")))
        found.append(stack.enter_context(tollgate(UNBOOKED, "sqlite+aiosqlite:///bench.db", url)))
        if SQLITE in scale.databases:
            found.append(stack.enter_context(tollgate(SQLITE, "sqlite+aiosqlite:///bench.db", url)))
        if POSTGRESQL in scale.databases:
            server = stack.enter_context(server_for_tests())
            sys.stderr.write(f"{durable(server)}\n")
            name = new_id("bench")
            server.create_database(name)
            stack.callback(server.drop_database, name)
            found.append(stack.enter_context(tollgate(POSTGRESQL, server.url(name), url)))
        yield found


# ---- the measuring


def load_of(gateway: Gateway, scenario: str, seconds: float) -> Load:
    """The calls of that scenario."""
    body = (stages.BIG_BODY if scenario == BIG else stages.BODY).decode()
    if scenario == STREAM:
        body = body.removesuffix("}") + ',"stream": true,"stream_options":{"include_usage":true}}'
        seconds = max(seconds, 1.5 * CHUNKS * PACE_S)
    return Load(
        port=gateway.port,
        path="/v1/chat/completions",
        headers={"authorization": f"Bearer {gateway.key}", "content-type": "application/json"},
        body=body,
        connections=CONNECTIONS,
        seconds=seconds,
        rate=PACED_RATE if scenario == PACED else 0,
    )


def measure(driver: subprocess.Popen[str], gateway: Gateway, load: Load) -> Turn:
    """Put `load` on `gateway`. Raises `SystemExit` when it does not answer all calls well."""
    before = cpu_s(gateway)
    driver.stdin.write(msgspec.json.encode(load).decode() + "\n")
    driver.stdin.flush()
    measured = msgspec.json.decode(driver.stdout.readline(), type=Measured)
    spent = cpu_s(gateway) - before
    if measured.errors or not measured.calls:
        raise SystemExit(f"{gateway.name} failed {measured.errors} of {measured.calls} calls")
    return Turn(spent / (measured.chunks or measured.calls) * 1e6, measured)


def cpu_s(gateway: Gateway) -> float:
    """What its process has used until now."""
    if gateway.process is None:
        return 0.0
    times = gateway.process.cpu_times()
    return float(times.user + times.system)


def bench(scale: Scale) -> Result:
    """Measure everything."""
    turns: dict[tuple[str, str], list[Turn]] = defaultdict(list)
    with ExitStack() as stack:
        provider, driver = (stack.enter_context(helper(word)) for word in ("provider", "driver"))
        with gateways(scale, int(provider.stdout.readline())) as found:
            for gateway in found:
                measure(driver, gateway, load_of(gateway, PLAIN, 0.3))
            for number in range(scale.rounds):
                for scenario in scale.scenarios:
                    for gateway in found:
                        turn = measure(driver, gateway, load_of(gateway, scenario, scale.seconds))
                        turns[gateway.name, scenario].append(turn)
                sys.stderr.write(f"round {number + 1} of {scale.rounds}\n")
            memory_mb = {one.name: one.process.memory_info().rss / 2**20 for one in found if one.process is not None}
            start_s = {one.name: one.start_s for one in found if one.process is not None}
    return Result(
        cpu_us={place: median(turn.cpu_us for turn in those) for place, those in turns.items()},
        p50_ms={place: median(turn.measured.p50_ms for turn in those) for place, those in turns.items()},
        first_p50_ms={place: median(turn.measured.first_p50_ms for turn in those) for place, those in turns.items()},
        memory_mb=memory_mb,
        start_s=start_s,
    )


# ---- what comes of it


def table(result: Result) -> str:
    """The result for people."""
    names = list(result.start_s)
    rows = [
        ("CPU per plain call, µs", {name: result.cpu_us.get((name, PLAIN)) for name in names}),
        ("… ÷ bare", {name: ratio(result, name, PLAIN, BARE, PLAIN) for name in names}),
        ("… with 20 kB ÷ 0.3 kB", {name: ratio(result, name, BIG, name, PLAIN) for name in names}),
        ("CPU per chunk, µs", {name: result.cpu_us.get((name, STREAM)) for name in names}),
        ("… ÷ bare", {name: ratio(result, name, STREAM, BARE, STREAM) for name in names}),
        ("first chunk, p50 − direct, ms", {name: beyond(result.first_p50_ms, name, STREAM) for name in names}),
        (f"p50 at {PACED_RATE}/s − direct, ms", {name: beyond(result.p50_ms, name, PACED) for name in names}),
        ("memory, MB", dict(result.memory_mb)),
        ("start to ready, s", dict(result.start_s)),
    ]
    lines = [f"| | {' | '.join(names)} |", f"|{' --- |' * (len(names) + 1)}"]
    for title, values in rows:
        if any(value is not None for value in values.values()):
            shown = ["" if value is None else f"{value:.2f}" for value in (values[name] for name in names)]
            lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def ratio(result: Result, name: str, scenario: str, other: str, others: str) -> float | None:
    """What one costs ÷ what the other costs."""
    above, below = result.cpu_us.get((name, scenario)), result.cpu_us.get((other, others))
    return None if above is None or not below else above / below


def beyond(values: dict[tuple[str, str], float], name: str, scenario: str) -> float | None:
    """How much longer than straight to the provider."""
    if (name, scenario) not in values:
        return None
    return values[name, scenario] - values[DIRECT, scenario]


def regressions(ratios: dict[str, float], baseline: dict[str, float]) -> list[str]:
    """Every ratio that is too far above the baseline's, in words."""
    return [
        f"{name}: {ratios[name]:.2f}, more than {TOLERANCE} × {known:.2f}"
        for name, known in baseline.items()
        if name in ratios and ratios[name] > TOLERANCE * known
    ]


def check(scale: Scale) -> Sequence[str]:
    """What is a regression in every one of several attempts."""
    baseline = msgspec.json.decode(BASELINE.read_bytes(), type=dict[str, float])
    found: set[str] | None = None
    for _ in range(ATTEMPTS):
        result = bench(scale)
        sys.stdout.write(table(result))
        missed = regressions(result.ratios(), baseline)
        sys.stdout.writelines(f"{line}\n" for line in missed)
        names = {line.partition(":")[0] for line in missed}
        found = names if found is None else found & names
        if not found:
            return []
    return sorted(found or ())


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.calls")
    parser.add_argument("--short", action="store_true", help="less of everything, on SQLite, in under a minute")
    parser.add_argument("--check", action="store_true", help="fail when a ratio is a fourth above the baseline's")
    parser.add_argument("--save", action="store_true", help="make this run the baseline")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--databases", nargs="+", choices=[SQLITE, POSTGRESQL])
    options = parser.parse_args()
    scale = SHORT if options.short else Scale()
    scale = scale._replace(rounds=options.rounds or scale.rounds, databases=tuple(options.databases or scale.databases))
    if options.check:
        missed = check(scale)
        if missed:
            raise SystemExit(f"slower than the baseline in each of {ATTEMPTS} attempts: {'; '.join(missed)}")
        return
    result = bench(scale)
    sys.stdout.write(table(result))
    if not options.short:
        sys.stdout.write(f"\n{stages.table()}")
    if options.save:
        rounded = {name: round(value, 2) for name, value in result.ratios().items()}
        BASELINE.write_bytes(msgspec.json.format(msgspec.json.encode(rounded), indent=2) + b"\n")


if __name__ == "__main__":
    main()
