"""What the ledger's batches gain: pairs of reserve and settle a second, against a transaction for each operation.

    python -m tests.bench.ledger [--check] [--short] [--rounds 3] [--seconds 1.5] [--databases postgresql]

All variants take turns in every round, on one server with one set of settings, each on its own copy of one database.
Figures are medians over the rounds, and only their ratios mean anything. A rate is that of finished pairs over the time
until the last caller has finished its own. At the end the books of every variant are audited.
"""

import argparse
import asyncio
import itertools
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import uvloop

from proxy.ledger.audit import audit
from proxy.ledger.decide import Outcome, Reserve, Settle
from proxy.ledger.recovery import Lease
from proxy.ledger.store import Store
from proxy.storage import database
from proxy.storage.tables import api_keys, users, wallets
from proxy.units import new_id
from tests.bench.unbatched import Booker, driver_booker, orm_booker
from tests.books import Person, migrate_now, opened_books, reserve_of, settle_of, store_at
from tests.postgres import Server, server_for_tests

BALANCE = 10**15
HELD = 1000
USED = 700
WARMING_S = 0.2
CORES = os.cpu_count()

BATCHED, UNBATCHED, ORM, DRIVER = "batched", "unbatched", "ORM", "driver"
"""The ledger; the ledger's own transaction, by itself for each operation; see `unbatched` for the others."""
VARIANTS = (BATCHED, UNBATCHED, DRIVER, ORM)

HOT, SPREAD, LONE = "hot", "spread", "lone"
"""All callers on one wallet; each caller's every call on another wallet; one caller by itself."""
SCENARIOS = {HOT: (BATCHED, DRIVER, ORM), SPREAD: (BATCHED, DRIVER, ORM), LONE: VARIANTS}

LONE_SLICES = 10
"""A lone caller's variants take turns this often in a round: its latency is what a noisy machine disturbs most."""


class Target(NamedTuple):
    """At least `ratio` times as many pairs a second as `baseline`, or for one caller as short a median."""

    database: str
    scenario: str
    baseline: str
    ratio: float


NO_WORSE = 0.8
"""A lone caller's call takes a turn of the event loop more, and nothing else: the rest is a busy machine's noise."""

TARGETS = (
    Target("postgresql", HOT, ORM, 50),
    Target("postgresql", HOT, DRIVER, 20),
    Target("postgresql", SPREAD, ORM, 30),
    Target("postgresql", LONE, ORM, 1),
    Target("postgresql", LONE, UNBATCHED, NO_WORSE),
    Target("sqlite", HOT, DRIVER, 10),
    Target("sqlite", SPREAD, ORM, 10),
    Target("sqlite", LONE, ORM, 1),
    Target("sqlite", LONE, UNBATCHED, NO_WORSE),
)


class Scale(NamedTuple):
    """How much is measured, and what part of each target must be reached."""

    rounds: int = 3
    window_s: float = 1.5
    callers: int = 256
    wallets: int = 1000
    part: float = 1.0


SHORT = Scale(rounds=1, window_s=0.5, part=1 / 3)


class Round(NamedTuple):
    """One variant in one scenario of one round."""

    pairs_per_s: float
    p50_ms: float
    p99_ms: float


class Result(NamedTuple):
    """The medians over the rounds of one database, by scenario and variant, and what the server says of itself."""

    database: str
    server: str
    medians: dict[tuple[str, str], Round]

    def ratio(self, scenario: str, baseline: str) -> float:
        """How many times better the batches are: in pairs a second, for one caller in the median duration of a pair."""
        batched, other = self.medians[scenario, BATCHED], self.medians[scenario, baseline]
        return other.p50_ms / batched.p50_ms if scenario == LONE else batched.pairs_per_s / other.pairs_per_s


# ---- the databases


@contextmanager
def copies(kind: str, people: Sequence[Person]) -> Iterator[tuple[str, dict[str, str]]]:
    """What the server says of itself, and for each variant the URL of its own copy of a database with `people`."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="tollgate-bench-") as folder:
            template = Path(folder, "template.db")
            fill(f"sqlite+aiosqlite:///{template}", people)
            files = {name: shutil.copy(template, Path(folder, f"{name}.db")) for name in VARIANTS}
            urls = {name: f"sqlite+aiosqlite:///{file}" for name, file in files.items()}
            yield f"SQLite {sqlite3.sqlite_version}, WAL, synchronous FULL", urls
        return
    with server_for_tests() as server, ExitStack() as stack:
        names = {name: new_id("bench") for name in ("template", *VARIANTS)}
        for name in names.values():
            stack.callback(server.drop_database, name)
        server.create_database(names["template"])
        fill(server.url(names["template"]), people)
        server.execute("VACUUM ANALYZE", names["template"])
        for name in VARIANTS:
            server.create_database(names[name], template=names["template"])
        yield durable(server), {name: server.url(names[name]) for name in VARIANTS}


def durable(server: Server) -> str:
    """The server's version and settings. Raises `SystemExit` if it may lose what it has committed."""
    settings = {
        name: server.execute(f"SHOW {name}")[0][0] for name in ("fsync", "synchronous_commit", "full_page_writes")
    }
    if set(settings.values()) != {"on"}:
        raise SystemExit(f"not measured, since this server may lose what it has committed: {settings}")
    version = server.execute("SHOW server_version")[0][0]
    return ", ".join([f"PostgreSQL {version}", *(f"{name} {value}" for name, value in settings.items())])


def fill(url: str, people: Sequence[Person]) -> None:
    """Create the schema, and in it `people` with credits and a key each."""
    migrate_now(url)
    asyncio.run(_add(url, people))


async def _add(url: str, people: Sequence[Person]) -> None:
    async with opened_books(url) as books:
        async with database.writing(books.engine) as connection:
            for table, rows in (
                (users, [_user_row(person) for person in people]),
                (wallets, [{"id": person.wallet_id, "owner_id": person.user_id} for person in people]),
                (api_keys, [_key_row(person) for person in people]),
            ):
                await connection.execute(table.insert(), rows)
        await asyncio.gather(*(books.top_up(person.wallet_id, BALANCE) for person in people))


def _person() -> Person:
    user_id = new_id("usr")
    return Person(user_id, user_id, new_id("key"), key=new_id("secret"), email=f"{user_id}@example.com")


def _user_row(person: Person) -> dict[str, object]:
    return {
        "id": person.user_id,
        "email": person.email,
        "is_active": True,
        "is_admin": False,
        "email_verified": False,
        "token_version": 0,
        "created_at": 0,
        "updated_at": 0,
    }


def _key_row(person: Person) -> dict[str, object]:
    return {
        "id": person.key_id,
        "user_id": person.user_id,
        "wallet_id": person.wallet_id,
        "name": "",
        "scope": "inference",
        "prefix": "",
        "key_hash": person.key,
        "is_active": True,
        "created_at": 0,
    }


# ---- the measuring


@asynccontextmanager
async def opened(variant: str, url: str) -> AsyncIterator[Booker]:
    """The variant's books, on the database at `url`."""
    if variant == BATCHED:
        async with opened_books(url) as books:
            yield books.ledger
        return
    engine = database.connect(url, pooled=False)
    lease = Lease(engine, is_embedded=True)  # for ever: nobody sweeps here
    await lease.register()
    async with BOOKERS[variant](url, lease.id) as booker:
        yield booker
    await engine.dispose()


class StoreBooker:
    """The ledger without its batcher: a transaction for each operation of a lone caller."""

    def __init__(self, store: Store, owner_id: str) -> None:
        self._store = store
        self._owner_id = owner_id

    async def reserve(self, operation: Reserve) -> Outcome:
        """See `Booker`."""
        return (await self._store.transact([operation], owner_id=self._owner_id))[0]

    async def settle(self, operation: Settle) -> Outcome:
        """See `Booker`."""
        return (await self._store.transact([operation], owner_id=self._owner_id))[0]


@asynccontextmanager
async def store_booker(url: str, owner_id: str) -> AsyncIterator[StoreBooker]:
    """The ledger's store on the database at `url`."""
    engine = database.connect(url, pooled=False)
    store = store_at(url, engine)
    try:
        yield StoreBooker(store, owner_id)
    finally:
        await store.aclose()
        await engine.dispose()


BOOKERS = {UNBATCHED: store_booker, DRIVER: driver_booker, ORM: orm_booker}


async def measure(booker: Booker, callers: Sequence[Iterable[Person]], window_s: float) -> Round:
    """Let all callers make one call after the other for `window_s`, each to the end of its last one."""
    durations_s: list[float] = []
    started_at = time.perf_counter()

    async def call(people: Iterable[Person]) -> None:
        for person in people:
            began_at = time.perf_counter()
            reserve = reserve_of(person, HELD)
            await booker.reserve(reserve)
            await booker.settle(settle_of(reserve, USED))
            ended_at = time.perf_counter()
            durations_s.append(ended_at - began_at)
            if ended_at - started_at > window_s:
                return

    await asyncio.gather(*map(call, callers))
    elapsed_s = time.perf_counter() - started_at
    percentiles = quantiles(durations_s, n=100, method="inclusive") if len(durations_s) > 1 else durations_s * 99
    return Round(len(durations_s) / elapsed_s, percentiles[49] * 1000, percentiles[98] * 1000)


def callers_of(scenario: str, people: Sequence[Person], count: int) -> list[Iterable[Person]]:
    """For each caller the people for whom it calls, without end."""
    if scenario == SPREAD:
        return [itertools.islice(itertools.cycle(people), number, None) for number in range(0, 4 * count, 4)]
    return [itertools.repeat(people[0])] * (count if scenario == HOT else 1)


async def run(kind: str, server: str, urls: dict[str, str], people: Sequence[Person], scale: Scale) -> Result:
    """Measure all variants in turn, then audit what each has left. Raises `SystemExit` if books do not add up."""
    rounds: dict[tuple[str, str], list[Round]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        bookers = {name: await stack.enter_async_context(opened(name, url)) for name, url in urls.items()}
        for booker in bookers.values():
            await measure(booker, callers_of(LONE, people, 1), WARMING_S)
        for _, (scenario, names) in itertools.product(range(scale.rounds), SCENARIOS.items()):
            slices = LONE_SLICES if scenario == LONE else 1
            for _, name in itertools.product(range(slices), names):
                callers = callers_of(scenario, people, scale.callers)
                rounds[scenario, name].append(await measure(bookers[name], callers, scale.window_s / slices))
    for name, url in urls.items():
        await check_books(name, url)
    medians = {case: Round(*map(median, zip(*found, strict=True))) for case, found in rounds.items()}
    return Result(kind, server, medians)


async def check_books(variant: str, url: str) -> None:
    """Raises `SystemExit` unless the books that `variant` kept add up."""
    engine = database.connect(url, pooled=False)
    report = await audit(engine)
    await engine.dispose()
    if not report.is_clean:
        raise SystemExit(f"the books of {variant} do not add up:\n{report.as_text()}")


def bench(kind: str, scale: Scale) -> Result:
    """Measure on one kind of database: `sqlite` or `postgresql`."""
    people = [_person() for _ in range(scale.wallets)]
    with copies(kind, people) as (server, urls), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(kind, server, urls, people, scale))


# ---- the table


def table(result: Result, scale: Scale) -> str:
    """The result for people, with targets."""
    wanted = {(target.scenario, target.baseline): target for target in TARGETS if target.database == result.database}
    lines = [
        result.server,
        f"{scale.callers} callers, {scale.wallets} wallets, {scale.rounds} x {scale.window_s:g} s, {CORES} cores",
        f"{'':8}{'':11}{'pairs/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'batched is':>13}{'target':>10}",
    ]
    for (scenario, variant), one in sorted(
        result.medians.items(), key=lambda item: (HOT, SPREAD, LONE).index(item[0][0])
    ):
        line = f"{scenario:8}{variant:11}{one.pairs_per_s:10.0f}{one.p50_ms:10.2f}{one.p99_ms:10.2f}"
        if variant != BATCHED:
            line += f"{result.ratio(scenario, variant):12.1f}x"
        if target := wanted.get((scenario, variant)):
            line += f"{target.ratio * scale.part:9.1f}x"
        lines.append(line)
    return "\n".join(lines)


def missed(result: Result, scale: Scale) -> list[str]:
    """The targets that `result` does not reach, for people."""
    return [
        f"{target.database}, {target.scenario}: {ratio:.2f} times the {target.baseline}, less than {least:.2f}"
        for target in TARGETS
        if target.database == result.database
        and (ratio := result.ratio(target.scenario, target.baseline)) < (least := target.ratio * scale.part)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables; with `--check` 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ledger", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--short", action="store_true", help="one short round, and a third of each target is enough")
    parser.add_argument("--rounds", type=int, help=f"default {Scale().rounds}")
    parser.add_argument("--seconds", type=float, dest="window_s", help=f"of each window, default {Scale().window_s}")
    parser.add_argument("--callers", type=int, help=f"default {Scale().callers}")
    parser.add_argument("--wallets", type=int, help=f"default {Scale().wallets}")
    parser.add_argument("--databases", nargs="+", choices=("postgresql", "sqlite"), default=("postgresql", "sqlite"))
    chosen = parser.parse_args(arguments)
    given = {name: getattr(chosen, name) for name in ("rounds", "window_s", "callers", "wallets")}
    scale = (SHORT if chosen.short else Scale())._replace(**{k: v for k, v in given.items() if v is not None})
    faults = []
    for kind in chosen.databases:
        result = bench(kind, scale)
        sys.stdout.write(f"{table(result, scale)}\n\n")
        sys.stdout.flush()
        faults += missed(result, scale)
    sys.stdout.writelines(f"missed: {fault}\n" for fault in faults)
    return int(chosen.check and bool(faults))


if __name__ == "__main__":
    sys.exit(main())
