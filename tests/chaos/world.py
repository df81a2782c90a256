"""The world that chaos strikes: a database, a provider, proxies and clients, each a process of its own."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from proxy.errors import Unavailable
from proxy.ledger.audit import audit
from proxy.storage import database
from tests.books import migrate_now, opened_books
from tests.chaos.clients import PATIENCE_S, Plan, Wallet
from tests.chaos.evidence import overdrawn_wallets
from tests.chaos.journal import Grant, Journal
from tests.chaos.judge import Kill
from tests.postgres import Cluster
from tests.serving import MODEL, UPSTREAM_KEY

DatabaseKind = Literal["postgresql", "sqlite"]

LEASE_S = 4.0
"""Of the proxies here: a fifth of the default, so that a pause beyond it is over soon."""

_CONFIG = f"""
[server]
settle_wait_s = 3
drain_s = 3

[database]
lease_s = {LEASE_S:g}

[providers.fake]
kind = "openai"
base_url = "{{base_url}}"
api_key_env = "UPSTREAM_KEY"
first_byte_s = 2
idle_s = 2

[models."{MODEL}"]
candidates = ["fake/{MODEL}"]

[prices."fake/{MODEL}"]
input = "1"
output = "2"
max_output_tokens = 4096
context_tokens = 128000
"""

FIRST_GRANT = "first"
"""The idempotency key of what a customer has before the first call."""

_RICH_NANOS = 100 * 10**9
_SMALL_NANOS = 20_000_000
"""Enough for some two hundred calls, and for few at once."""

_START_S_MAX = 60.0
_STOP_S_MAX = 40.0
_SAMPLE_S = 0.1
_AUDIT_SHARE = 10
"""An audit under load is repeated after ten times as long as it took: it is not the load."""


class WorldFailed(Exception):
    """A part of the world that nothing was done to has broken: the run proves nothing."""


class Proxy:
    """One `tollgate serve`, which keeps its port from start to start, as behind a load balancer."""

    def __init__(self, folder: Path, number: int, environ: dict[str, str]) -> None:
        self._environ = environ
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.log_path = folder / f"proxy-{number}.log"
        self.base_url = ""

    def start(self) -> None:
        """Serve, and return when it is ready. While the database recovers it is tried again, as a supervisor would."""
        give_up_at = time.monotonic() + _START_S_MAX
        while time.monotonic() < give_up_at:
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "proxy", "serve", "--json", "--port", str(self._port)],
                    env=self._environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            ready, _, _ = select.select([self._process.stdout], [], [], give_up_at - time.monotonic())
            line = self._process.stdout.readline() if ready else b""
            if line:
                said = json.loads(line)
                self.base_url, self._port = said["base_url"], said["port"]
                return
            self.kill()
        raise WorldFailed(f"a proxy did not start; see {self.log_path}")

    @property
    def has_died(self) -> bool:
        """Whether it has ended though nobody ended it."""
        return self._process is not None and self._process.poll() is not None

    def kill(self) -> None:
        """End it without a word, paused or not."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """Ask it to stop; returns its exit status, that of a kill if it takes too long."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stop it where it is."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on; nothing happens to one that runs."""
        self._process.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        status = _end(self._process, number)
        self._process = None
        return status


class World:
    """All parts of one run; what they write lies in `folder`."""

    def __init__(self, folder: Path, url: str, cluster: Cluster | None) -> None:
        self.folder = folder
        self.url = url
        self.proxies: list[Proxy] = []
        self.kills: list[Kill] = []
        self.mishaps: list[str] = []
        self._cluster = cluster
        self._clients: subprocess.Popen[bytes] | None = None
        self._provider: subprocess.Popen[bytes] | None = None
        self._environ: dict[str, str] = {}

    @property
    def cluster(self) -> Cluster:
        """The database server. Raises `WorldFailed` for an embedded database."""
        if self._cluster is None:
            raise WorldFailed("an embedded database has no server")
        return self._cluster

    @property
    def is_embedded(self) -> bool:
        """Whether the database is SQLite."""
        return self._cluster is None

    @property
    def client_journal(self) -> Path:
        """What customers and teller have put down."""
        return self.folder / "clients.jsonl"

    @property
    def provider_journal(self) -> Path:
        """What the provider has put down, for each call when it ended."""
        return self.folder / "provider.jsonl"

    def start_provider(self) -> str:
        """Start the provider; returns its base URL."""
        self._provider = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.provider", "--journal", self.provider_journal],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        address = self._provider.stdout.readline().decode().removeprefix("listening on ").strip()
        if not address:
            raise WorldFailed("the provider did not start")
        return f"http://{address}/v1"

    def stop_provider(self) -> None:
        """Break off what it still serves: then all of it is in its journal."""
        provider, self._provider = self._provider, None
        if provider is not None:
            _end(provider, signal.SIGTERM)

    def configure(self, upstream_url: str, replicas: int) -> None:
        """Write the configuration and make the proxies; nothing is started."""
        config = self.folder / "config.toml"
        config.write_text(_CONFIG.format(base_url=upstream_url))
        self._environ = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "TOLLGATE_CONFIG": str(config),
            "TOLLGATE_DATA_DIR": str(self.folder),
            "TOLLGATE_DATABASE_URL": self.url,
            "UPSTREAM_KEY": UPSTREAM_KEY,
        }
        self.proxies = [Proxy(self.folder, number, self._environ) for number in range(replicas)]

    def start_proxies(self) -> None:
        """Start all of them, at the same time."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(Proxy.start, self.proxies))

    def stop_proxies(self) -> None:
        """Stop all of them in order, at the same time."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(self.terminate, self.proxies))

    def let_clients_loose(self, *, seed: int, customers: int, wallets: list[Wallet]) -> None:
        """Start the clients' process on all proxies, and return when the first calls are over."""
        plan = Plan(seed, customers, [proxy.base_url for proxy in self.proxies], wallets, str(self.client_journal))
        file = self.folder / "plan.json"
        file.write_bytes(msgspec.json.encode(plan))
        with (self.folder / "clients.log").open("ab") as log:
            self._clients = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.clients", file],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        self.wait_for_calls(1)

    def wait_for_calls(self, more: int) -> None:
        """Return when that many more calls are in the clients' journal. Raises `WorldFailed` if they do not come."""
        wanted = self._calls_noted() + more
        give_up_at = time.monotonic() + _START_S_MAX
        while self._calls_noted() < wanted:
            self.check_clients()
            if time.monotonic() > give_up_at:
                raise WorldFailed(f"the clients make no calls; see {self.folder / 'clients.log'}")
            time.sleep(_SAMPLE_S)

    def _calls_noted(self) -> int:
        return self.client_journal.read_bytes().count(b'"type":"call"')

    def check_clients(self) -> None:
        """Raises `WorldFailed` if the clients have died."""
        if self._clients is not None and self._clients.poll() is not None:
            raise WorldFailed(f"the clients have died; see {self.folder / 'clients.log'}")

    def call_clients_home(self) -> None:
        """Let the clients finish what is under way. Raises `WorldFailed` if they do not end in order."""
        self.check_clients()
        clients, self._clients = self._clients, None
        if clients is not None and _end(clients, signal.SIGTERM, PATIENCE_S + _STOP_S_MAX):
            raise WorldFailed(f"the clients did not end well; see {self.folder / 'clients.log'}")

    def kill(self, proxy: Proxy) -> None:
        """Kill `proxy`, and put it down; that it was dead already is a mishap."""
        self._check(proxy)
        self.kills.append(Kill(proxy.base_url, time.time()))
        proxy.kill()

    def terminate(self, proxy: Proxy) -> None:
        """Stop `proxy` in order; that it cannot, or was dead already, is a mishap."""
        self._check(proxy)
        status = proxy.terminate()
        if status:
            self.mishaps.append(f"{proxy.log_path.stem} was asked to stop, and exited with status {status}")

    def _check(self, proxy: Proxy) -> None:
        if proxy.has_died:
            self.mishaps.append(f"{proxy.log_path.stem} died by itself")

    def audit(self) -> list[str]:
        """What `tollgate audit` finds."""
        command = [sys.executable, "-m", "proxy", "audit", "--json"]
        done = subprocess.run(command, env=self._environ, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode == 0 and json.loads(done.stdout)["clean"]:
            return []
        return [f"tollgate audit exited with {done.returncode}: {done.stdout}{done.stderr}"]

    def close(self) -> None:
        """End whatever still runs."""
        if self._clients is not None:
            _end(self._clients, signal.SIGKILL)
        for proxy in self.proxies:
            proxy.kill()
        self.stop_provider()


class Watch:
    """Looks at the books all through a run, in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.samples = 0
        self.audits = 0
        self.overdrawn: list[str] = []
        self.violations: list[str] = []
        self._url = url
        self._is_over = threading.Event()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep watch until the block ends; raises then what the watch could not bear."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="watch") as thread:
            watching = thread.submit(lambda: asyncio.run(self._look()))
            try:
                yield
            finally:
                self._is_over.set()
            watching.result(_STOP_S_MAX)

    async def _look(self) -> None:
        engine = database.connect(self._url, pooled=False)
        audit_at = 0.0
        while not self._is_over.is_set():
            try:
                self.overdrawn += await overdrawn_wallets(engine)
                self.samples += 1
                if time.monotonic() >= audit_at:
                    started_at = time.monotonic()
                    self.violations += [f"{finding}" for finding in (await audit(engine)).violations]
                    self.audits += 1
                    audit_at = time.monotonic() + 1 + _AUDIT_SHARE * (time.monotonic() - started_at)
            except Unavailable:
                pass  # the database is down, as the schedule wants it
            await asyncio.sleep(_SAMPLE_S)
        await engine.dispose()


@contextmanager
def opened_world(folder: Path, kind: DatabaseKind) -> Iterator[World]:
    """A world in which only the database and the provider run yet. What runs when the block ends is ended."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster()) if kind == "postgresql" else None
        if cluster is not None:
            cluster.create_database("chaos")
        url = f"sqlite+aiosqlite:///{folder / 'chaos.db'}" if cluster is None else cluster.url("chaos")
        migrate_now(url)
        world = World(folder, url, cluster)
        stack.callback(world.close)
        world.configure(world.start_provider(), replicas=1 if cluster is None else 2)
        yield world


async def endow(url: str, journal: Path, *, rich: int, small: int) -> list[Wallet]:
    """Make customers; what they get at first is put down as granted."""
    wallets = []
    notes = Journal(journal)
    async with opened_books(url) as books:
        for number in range(rich + small):
            person = await books.person()
            wallet = Wallet(person.wallet_id, person.email, person.key, is_small=number >= rich)
            amount = _SMALL_NANOS if wallet.is_small else _RICH_NANOS
            await books.top_up(wallet.id, amount, idempotency_key=FIRST_GRANT)
            notes.append(Grant(wallet_id=wallet.id, idempotency_key=FIRST_GRANT, amount=amount, is_acknowledged=True))
            wallets.append(wallet)
    notes.close()
    return wallets


def _end(process: subprocess.Popen[bytes], number: int, patience_s: float = _STOP_S_MAX) -> int:
    """Send the signal; returns the exit status, that of a kill if the process takes longer than `patience_s`."""
    process.send_signal(number)
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()
