"""The world that chaos strikes: a database, providers, proxies behind nginx and clients, all processes of their own."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from proxy.errors import Unavailable
from proxy.identity.keys import KeyTerms, Scope, create_key
from proxy.identity.users import create_user
from proxy.ledger.audit import audit
from proxy.storage import database
from tests import debian
from tests.balancer import balancing
from tests.books import migrate_now, opened_books
from tests.chaos.admin import PROVIDERS
from tests.chaos.calls import PATIENCE_S, Wallet
from tests.chaos.clients import Plan
from tests.chaos.evidence import overdrawn_wallets
from tests.chaos.journal import Grant, Journal
from tests.chaos.judge import Kill, Sample, Span
from tests.postgres import Cluster
from tests.serving import MODEL, UPSTREAM_KEY

DatabaseKind = Literal["postgresql", "sqlite"]

LEASE_S = 4.0
"""Of the proxies here: a fifth of the default, so that a pause beyond it is over soon."""

MARKUP_BPS = 1500
"""Before an admin changes it."""

_SERVER = f"""
[server]
settle_wait_s = 3
drain_s = 3

[database]
lease_s = {LEASE_S:g}
"""

_PROVIDER = f"""
[providers.{{name}}]
kind = "openai"
base_url = "{{base_url}}"
api_key_env = "UPSTREAM_KEY"
first_byte_s = 2
idle_s = 2

[prices."{{name}}/{MODEL}"]
input = "1"
output = "2"
max_output_tokens = 4096
context_tokens = 128000
"""

NOTICE_S = 5
"""Of replicas that are stopped under load, as in the compose file: longer than nginx keeps idle connections."""

_WORKERS = 2
"""Of each replica, likewise."""

FIRST_GRANT = "first"
"""The idempotency key of what a customer has before the first call."""

_RICH_NANOS = 100 * 10**9
_SMALL_NANOS = 20_000_000
"""Enough for some two hundred calls, and for few at once."""

_START_S_MAX = 60.0
_STOP_S_MAX = 40.0
_SAMPLE_S = 0.1
_MEMORY_SAMPLE_S = 1.0
_AUDIT_SHARE = 10
"""An audit under load is repeated after ten times as long as it took: it is not the load."""


class WorldFailed(Exception):
    """A part of the world that nothing was done to has broken: the run proves nothing."""


class Proxy:
    """One `tollgate serve`, which keeps its port from start to start, as behind a load balancer."""

    def __init__(self, folder: Path, number: int, environ: dict[str, str], workers: int) -> None:
        self._environ = environ
        self._workers = workers
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.log_path = folder / f"proxy-{number}.log"
        self.base_url = ""

    @property
    def port(self) -> int:
        """Where it listens; 0 before its first start."""
        return self._port

    def start(self) -> None:
        """Serve, and return when it is ready. While the database recovers it is tried again, as a supervisor would."""
        command = [sys.executable, "-m", "proxy", "serve", "--json", "--port", str(self._port)]
        give_up_at = time.monotonic() + _START_S_MAX
        while time.monotonic() < give_up_at:
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [*command, "--workers", str(self._workers)],
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

    def workers(self) -> list[psutil.Process]:
        """The processes that serve, the eldest first; none while it does not run."""
        family = self._family()
        return sorted(family[1:], key=psutil.Process.create_time) if self._workers > 1 else family

    def kill(self) -> None:
        """End it without a word, paused or not, and its workers with it."""
        workers = self._signal(signal.SIGKILL)[1:]
        self._end(signal.SIGKILL)
        psutil.wait_procs(workers, _STOP_S_MAX)

    def terminate(self) -> int:
        """Ask it to stop; returns its exit status, that of a kill if it takes too long."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stop all its processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on; nothing happens to one that runs."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> list[psutil.Process]:
        """The processes that got it, the supervisor first, so that it replaces nobody meanwhile."""
        family = self._family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return family

    def _family(self) -> list[psutil.Process]:
        """The process that was started, and its workers where they are others."""
        process = self._process  # the watch looks from a thread of its own
        if process is None:
            return []
        try:
            first = psutil.Process(process.pid)
            return [first, *first.children()]
        except psutil.NoSuchProcess:
            return []

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        status = _end(self._process, number)
        self._process = None
        return status


class Provider:
    """A fake provider as a process, which keeps its port and its journal from start to start."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.journal = folder / f"provider-{name}.jsonl"
        self.base_url = ""
        self._port = "0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Serve; returns when it does. Raises `WorldFailed` when it cannot."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.provider", "--journal", self.journal, "--port", self._port],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        address = self._process.stdout.readline().decode().removeprefix("listening on ").strip()
        if not address:
            raise WorldFailed(f"the provider {self.name} did not start")
        self.base_url = f"http://{address}/v1"
        self._port = address.rpartition(":")[2]

    def stop(self) -> None:
        """Break off what it still serves: then all of it is in its journal."""
        process, self._process = self._process, None
        if process is not None:
            _end(process, signal.SIGTERM)


class World:
    """All parts of one run; what they write lies in `folder`.

    A server of databases has replicas of several workers each, behind `nginx` where there is one, and two providers.
    """

    def __init__(self, folder: Path, url: str, cluster: Cluster | None, nginx: Path | None) -> None:
        self.folder = folder
        self.url = url
        self.nginx = nginx
        self.balancer: str | None = None
        self.proxies: list[Proxy] = []
        self.providers = [Provider(folder, name) for name in (PROVIDERS if cluster else PROVIDERS[:1])]
        self.kills: list[Kill] = []
        self.absences: list[Span] = []
        self.disturbances: list[Span] = []
        self.mishaps: list[str] = []
        self._cluster = cluster
        self._clients: subprocess.Popen[bytes] | None = None
        self._environ: dict[str, str] = {}
        self._paused_at: dict[str, float] = {}
        self._balancing = ExitStack()

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
    def workers(self) -> int:
        """How many processes serve in each proxy."""
        return 1 if self.is_embedded else _WORKERS

    @property
    def client_journal(self) -> Path:
        """What customers, teller and admin have put down."""
        return self.folder / "clients.jsonl"

    def start_providers(self) -> None:
        """Start them all."""
        for provider in self.providers:
            provider.start()

    def stop_providers(self) -> None:
        """Stop them all: then what they served is in their journals."""
        for provider in self.providers:
            provider.stop()

    def configure(self, replicas: int, notice_s: int) -> None:
        """Write the configuration and make the proxies; nothing is started. `notice_s` counts behind nginx alone."""
        candidates = [f"{provider.name}/{MODEL}" for provider in self.providers]
        parts = [_PROVIDER.format(name=provider.name, base_url=provider.base_url) for provider in self.providers]
        config = self.folder / "config.toml"
        config.write_text(f'{_SERVER}{"".join(parts)}\n[models."{MODEL}"]\ncandidates = {json.dumps(candidates)}\n')
        self._environ = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "TOLLGATE_CONFIG": str(config),
            "TOLLGATE_DATA_DIR": str(self.folder),
            "TOLLGATE_DATABASE_URL": self.url,
            "UPSTREAM_KEY": UPSTREAM_KEY,
        }
        if self.nginx is not None:
            self._environ |= {"TOLLGATE_NOTICE_S": str(notice_s), "TOLLGATE_TRUSTED_PROXIES": "127.0.0.0/8"}
        self.proxies = [Proxy(self.folder, number, self._environ, self.workers) for number in range(replicas)]

    def start_proxies(self) -> None:
        """Start all of them, at the same time, and then nginx in front of them."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(Proxy.start, self.proxies))
        if self.nginx is not None:
            (place := self.folder / "nginx").mkdir()
            self.folder.chmod(0o755)
            ports = [proxy.port for proxy in self.proxies]
            self.balancer = f"{self._balancing.enter_context(balancing(self.nginx, place, ports))}/v1"

    def stop_proxies(self) -> None:
        """Stop all of them in order, at the same time, and then what is in front of them."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._terminate, self.proxies))
        self._balancing.close()

    def let_clients_loose(self, *, seed: int, customers: int, wallets: list[Wallet], admin_key: str | None) -> None:
        """Start the clients' process on all proxies, and return when the first calls are over."""
        plan = Plan(
            seed=seed,
            customers=customers,
            base_urls=[self.balancer] if self.balancer else [proxy.base_url for proxy in self.proxies],
            wallets=wallets,
            journal=str(self.client_journal),
            sdk_customers=0 if self.is_embedded else customers // 3,
            admin_key=admin_key,
        )
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
        """Kill `proxy`, put it down, and start it again; that it was dead already is a mishap."""
        self._check(proxy)
        killed_at = time.time()
        self.kills.append(Kill(proxy.base_url, killed_at))
        proxy.kill()
        gone_at = time.time()
        proxy.start()
        self.absences.append(Span(killed_at, gone_at if self.balancer else time.time()))

    def kill_worker(self, proxy: Proxy, *, is_eldest: bool) -> None:
        """Kill the eldest or the youngest worker of `proxy`, and put it down; the proxy itself replaces it."""
        self._check(proxy)
        workers = proxy.workers()
        if workers:
            killed_at = time.time()
            self.kills.append(Kill(proxy.base_url, killed_at))
            worker = workers[0 if is_eldest else -1]
            worker.kill()
            with suppress(psutil.TimeoutExpired):
                worker.wait(PATIENCE_S)  # a server that is told to stop before it knows would not end in order
            self.absences.append(Span(killed_at, time.time()))

    def renew(self, proxy: Proxy) -> None:
        """Stop `proxy` in order and start it again. Behind nginx nobody notices; without it, its clients do."""
        stopped_at = time.time()
        self._terminate(proxy)
        proxy.start()
        if not self.balancer:
            self.absences.append(Span(stopped_at, time.time()))

    def pause(self, proxy: Proxy) -> None:
        """Stop `proxy` where it is."""
        self._paused_at[proxy.base_url] = time.time()
        proxy.pause()

    def resume(self, proxy: Proxy) -> None:
        """Let it go on, and put down for how long it could not."""
        proxy.resume()
        self.disturbances.append(Span(self._paused_at.pop(proxy.base_url), time.time()))

    @contextmanager
    def without_database(self) -> Iterator[None]:
        """Put down that processes learn nothing for as long as the block takes."""
        since = time.time()
        yield
        self.disturbances.append(Span(since, time.time()))

    def memory(self) -> dict[str, Sample]:
        """What each worker has just now, by the names of its proxy and its process."""
        found = {}
        for proxy in self.proxies:
            for worker in proxy.workers():
                with suppress(psutil.NoSuchProcess):
                    if resident := worker.memory_info().rss:  # none is left of who is dead and not buried yet
                        found[f"{proxy.log_path.stem}, process {worker.pid}"] = Sample(time.time(), resident / 1e6)
        return found

    def _terminate(self, proxy: Proxy) -> None:
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
        self._balancing.close()
        self.stop_providers()


class Watch:
    """Looks at the books all through a run, and at what its workers need; in a thread of its own."""

    def __init__(self, url: str, memory: Callable[[], dict[str, Sample]]) -> None:
        self.samples = 0
        self.audits = 0
        self.overdrawn: list[str] = []
        self.violations: list[str] = []
        self.memory: dict[str, list[Sample]] = {}
        self._url = url
        self._look_at_memory = memory
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
        audit_at = weigh_at = 0.0
        while not self._is_over.is_set():
            if time.monotonic() >= weigh_at:
                for worker, sample in self._look_at_memory().items():
                    self.memory.setdefault(worker, []).append(sample)
                weigh_at = time.monotonic() + _MEMORY_SAMPLE_S
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
def opened_world(folder: Path, kind: DatabaseKind, notice_s: int = NOTICE_S) -> Iterator[World]:
    """A world in which only the database and the providers run yet. What runs when the block ends is ended."""
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster()) if kind == "postgresql" else None
        if cluster is not None:
            cluster.create_database("chaos")
        url = f"sqlite+aiosqlite:///{folder / 'chaos.db'}" if cluster is None else cluster.url("chaos")
        migrate_now(url)
        world = World(folder, url, cluster, None if cluster is None else _nginx())
        stack.callback(world.close)
        world.start_providers()
        world.configure(1 if cluster is None else 2, notice_s)
        yield world


def _nginx() -> Path | None:
    """None where it cannot be had; the run then says so."""
    try:
        return debian.found("nginx", "nginx")
    except (subprocess.SubprocessError, OSError):
        return None


async def appoint(url: str) -> str:
    """Make an admin; returns the key."""
    async with opened_books(url) as books, database.writing(books.engine) as connection:
        user = await create_user(connection, "admin@example.com", is_admin=True)
        return (await create_key(connection, user, KeyTerms(scope=Scope.ADMIN))).secret


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
