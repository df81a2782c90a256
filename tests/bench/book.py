"""A long book on PostgreSQL: what people ask of it is answered within a fifth of a second, and never by reading it all.

    python -m tests.bench.book [--charges 1000000] [--plans] [--audit]

Seeds a year of charges of a thousand wallets, two fifths of them in one, counts them by the migration that made the
sums by day, and calls the functions behind the routes. Exits with 1 if one takes 200 ms or longer in the quickest of
its runs (what else the machine does is no property of a query), or if PostgreSQL reads `reservations` or
`credit_transactions` without an index, or more of their rows than a page may take, wanted or not.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import asyncpg
import msgspec
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy import journal, reports
from proxy.journal import Filter
from proxy.ledger.audit import audit
from proxy.reports import DayRange, GroupBy
from proxy.shown.credits import CSV_ROWS, read_balance
from proxy.storage import database
from proxy.units import MICROS_PER_DAY, new_id, now_micros
from tests.books import PRICE
from tests.postgres import Server, server_for_tests

CHARGES = 1_000_000
DAYS = 365
TIME_MS_MAX = 200.0
RUNS = 10
BOOK = ("reservations", "credit_transactions")
ROWS_MAX = journal.SCANNED_MAX

LONG = "usr_00000000000000000000000000000001"
"""The wallet with the longest book."""

FREQUENT_KEY, RARE_KEY = (f"key_{number:032d}" for number in (1, 2))
"""Of the long book: the rare one made one call in a thousand, and those in the first tenth of the year."""

_PEOPLE = """
INSERT INTO users (id, email, is_active, is_admin, email_verified, token_version, created_at, updated_at)
SELECT 'usr_' || lpad(n::text, 32, '0'), 'user' || n || '@example.com', true, false, false, 0, 0, 0
FROM generate_series(1, 1000) n;
INSERT INTO wallets (id, owner_id) SELECT id, id FROM users;
INSERT INTO api_keys (id, user_id, wallet_id, name, scope, prefix, key_hash, is_active, created_at)
SELECT 'key_' || lpad(n::text, 32, '0'), w, w, 'key ' || n, 'inference', '', 'hash' || n, true, 0
FROM (SELECT n, 'usr_' || lpad(CASE n WHEN 2 THEN 1 ELSE n END::text, 32, '0') AS w FROM generate_series(1, 1000) n) k;
"""

_CALLS = """
CREATE TEMPORARY TABLE calls AS
SELECT n, 'req_' || lpad(to_hex(at / 1000), 12, '0') || lpad(to_hex(n), 20, '0') AS id, at,
    'usr_' || lpad(CASE WHEN n % 5 < 2 THEN 1 ELSE 3 + n * 7919 % 998 END::text, 32, '0') AS wallet_id,
    'key_' || lpad(CASE WHEN n % 1000 = 0 AND n < {charges} / 10 THEN 2 WHEN n % 5 < 2 THEN 1
        ELSE 3 + n * 7919 % 998 END::text, 32, '0') AS key_id,
    'model-' || n % 3 AS model, 'provider-' || n % 3 % 2 AS provider, 100 + n % 977 AS tokens
FROM (SELECT n, ({start} + n * {step})::bigint AS at FROM generate_series(1, {charges}::bigint) n) numbers
"""
"""One call after the other at the same distance; a token costs a nano-credit."""

_RESERVATIONS = """
INSERT INTO reservations (id, wallet_id, user_id, key_id, amount, state, window_tokens, original_model, is_stream,
    created_at, outcome, cost, charged, refunded, is_late, provider, request_model, usage, usage_source, price,
    markup_bps, provider_cost, ttft_ms, duration_ms, settled_at)
SELECT id, wallet_id, wallet_id, key_id, 2 * tokens, 'settled', 1, model, true,
    at, 'completed', tokens, tokens, CASE WHEN n % 5000 = 1 THEN 7 ELSE 0 END, false, provider, model,
    json_build_object('output', tokens), 'reported', '{price}', 0, tokens, 5, 50, at
FROM calls
"""

_TRANSACTIONS = """
INSERT INTO credit_transactions (id, wallet_id, user_id, seq, type, amount, description, balance_before, balance_after,
    reservation_id, created_at)
SELECT 'txn_' || lpad(to_hex(at / 1000), 12, '0') || lpad(to_hex(row_number() OVER (ORDER BY at)), 20, '0'),
    wallet_id, wallet_id, row_number() OVER chain, type, amount, description, (sum(amount) OVER chain) - amount,
    sum(amount) OVER chain, reservation_id, at
FROM (
    SELECT wallet_id, at, 'deduction' AS type, -tokens AS amount, model AS description, id AS reservation_id FROM calls
    UNION ALL SELECT wallet_id, at + 1, 'refund', 7, 'goodwill', id FROM calls WHERE n % 5000 = 1
    UNION ALL SELECT id, {start}, 'topup', 1000000000000, 'a top-up', NULL FROM wallets
    UNION ALL SELECT wallet_id, at + 2, 'topup', 1000, 'a top-up', NULL FROM calls WHERE n % 20000 = 1
) booked
WINDOW chain AS (PARTITION BY wallet_id ORDER BY at)
"""

_COUNTERS = """
UPDATE wallets w SET balance = t.balance, seq = t.seq
FROM (SELECT wallet_id, sum(amount) AS balance, max(seq) AS seq FROM credit_transactions GROUP BY wallet_id) t
WHERE t.wallet_id = w.id;
UPDATE api_keys k SET spent = c.spent, period_spent = c.spent
FROM (SELECT key_id, sum(tokens) AS spent FROM calls GROUP BY key_id) c WHERE c.key_id = k.id;
"""


class Asked(NamedTuple):
    """What is asked, and what answers it."""

    name: str
    answer: Callable[[AsyncEngine], Awaitable[object]]


class Answered(NamedTuple):
    """How long it took, and how PostgreSQL finds the rows of each of its statements."""

    name: str
    min_ms: float
    median_ms: float
    plans: list[str]
    scans: list[str]
    """Where too much of the book is read."""


# ---- seeding


async def seed(url: str, charges: int) -> None:
    """Fill the new database at `url` with a year of calls, and their sums by the migration."""
    engine = database.connect(url, pooled=False)
    await database.migrate(engine)
    await database.migrate(engine, "0003")
    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(address, command_timeout=300)
    values = {
        "charges": charges,
        "start": now_micros() - DAYS * MICROS_PER_DAY,
        "step": DAYS * MICROS_PER_DAY // charges,
        "price": msgspec.json.encode(PRICE).decode(),
    }
    for name, statement in {
        "people": _PEOPLE,
        "calls": _CALLS,
        "reservations": _RESERVATIONS,
        "transactions": _TRANSACTIONS,
        "counters": _COUNTERS,
    }.items():
        with timed(name):
            await connection.execute(statement.format(**values))
    with timed("the migration"):
        await database.migrate(engine)
    with timed("vacuum analyze"):
        await connection.execute("VACUUM ANALYZE")
    await connection.close()
    await engine.dispose()


def say(text: str) -> None:
    """Show a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class timed:  # noqa: N801 - it reads as a word
    """Says how long a block takes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        say(f"{self.name:<16} {time.perf_counter() - self.started:6.1f} s")


# ---- what is asked


def asked(charges: int) -> list[Asked]:
    """What callers and admins ask, each as its route asks it."""
    today = now_micros() // MICROS_PER_DAY
    month, year = DayRange(today - 29, today), DayRange(today - 364, today)
    past = DayRange(today - 200, today - 171)
    deep = charges // 5

    def transactions(name: str, wanted: Filter, *, limit: int = 50, before: int | None = None) -> Asked:
        async def answer(engine: AsyncEngine) -> object:
            async with database.reading(engine) as connection:
                span = await journal.span(connection, LONG, wanted)
                return await journal.read_page(connection, LONG, wanted, span, limit=limit, before=before)

        return Asked(f"transactions, {name}", answer)

    def stats(name: str, days: DayRange) -> Asked:
        async def answer(engine: AsyncEngine) -> object:
            async with database.reading(engine, is_snapshot=True) as connection:
                total = await reports.read_totals(connection, days, wallet_id=LONG)
                by = [
                    await reports.read_groups(connection, days, by, wallet_id=LONG)
                    for by in (GroupBy.DAY, GroupBy.MODEL, GroupBy.KEY)
                ]
                return total, by

        return Asked(f"stats, {name}", answer)

    def report(name: str, days: DayRange, by: GroupBy) -> Asked:
        async def answer(engine: AsyncEngine) -> object:
            async with database.reading(engine, is_snapshot=True) as connection:
                return await reports.read_report(connection, days, by)

        return Asked(name, answer)

    return [
        Asked("balance", _over(lambda connection: read_balance(connection, LONG))),
        transactions("first page", Filter()),
        transactions("deep page", Filter(), before=deep),
        transactions("a page of the export", Filter(), limit=CSV_ROWS, before=deep),
        transactions("top-ups", Filter(type="topup")),
        transactions("refunds of a month", Filter(type="refund", since=past.since, until=past.until)),
        transactions("charges", Filter(type="deduction"), before=deep),
        transactions("of a month", Filter(since=past.since, until=past.until)),
        transactions("of a key", Filter(key_id=FREQUENT_KEY)),
        transactions("of a rare key", Filter(key_id=RARE_KEY)),
        transactions("of no model", Filter(key_id=RARE_KEY, model="model-9")),
        transactions("of a model and month", Filter(model="model-1", since=past.since, until=past.until)),
        Asked("charges, first page", _over(lambda connection: journal.read_calls(connection, LONG, limit=51))),
        stats("30 days", month),
        stats("a year", year),
        report("usage by day, 30 days", month, GroupBy.DAY),
        report("usage by month, a year", year, GroupBy.MONTH),
        report("usage by user, a year", year, GroupBy.USER),
        report("usage by key, 30 days", month, GroupBy.KEY),
        report("margin by provider, a year", year, GroupBy.PROVIDER),
    ]


def _over(answer: Callable[[AsyncConnection], Awaitable[object]]) -> Callable[[AsyncEngine], Awaitable[object]]:
    async def over(engine: AsyncEngine) -> object:
        async with database.reading(engine) as connection:
            return await answer(connection)

    return over


# ---- measuring


async def measure(engine: AsyncEngine, one: Asked) -> Answered:
    """Ask once to see its statements and their plans, then some more times for the time it takes."""
    statements: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        statements.append((statement, parameters))

    sa.event.listen(engine.sync_engine, "before_cursor_execute", note)
    await one.answer(engine)
    sa.event.remove(engine.sync_engine, "before_cursor_execute", note)
    plans = await explain(engine, statements)
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        await one.answer(engine)
        times.append((time.perf_counter() - started) * 1000)
    found = [node for plan in plans for node in nodes(plan)]
    scans = [shown_node(node) for node in found if node.get("Relation Name") in BOOK and is_wide(node)]
    return Answered(one.name, min(times), median(times), [shown(plan) for plan in plans], scans)


async def explain(engine: AsyncEngine, statements: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The plan of each different statement, as it is carried out in their transaction."""
    plans: dict[str, dict[str, Any]] = {}
    async with database.reading(engine) as connection:
        for statement, parameters in statements:
            if "set_config" in statement:
                await connection.exec_driver_sql(statement, parameters)
            elif statement not in plans:
                explained = await connection.exec_driver_sql(
                    f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}", parameters
                )
                plans[statement] = explained.scalar_one()[0]["Plan"]
    return list(plans.values())


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes, the outermost first."""
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


def is_wide(node: dict[str, Any]) -> bool:
    """Whether a node reads more of its table than a page of a list may take."""
    return node["Node Type"] == "Seq Scan" or rows_read(node) > ROWS_MAX


def rows_read(node: dict[str, Any]) -> float:
    """How many rows a node looked at, those included that were not wanted."""
    dropped = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return node["Actual Loops"] * (node["Actual Rows"] + dropped)


def shown_node(node: dict[str, Any]) -> str:
    """Where a node finds its rows, and how many it looks at."""
    table = node.get("Relation Name", "")
    index = f" by {node['Index Name']}" if "Index Name" in node else ""
    return f"{node['Node Type']} {table}{index} ({rows_read(node):.0f} rows)"


def shown(plan: dict[str, Any]) -> str:
    """Where a plan finds its rows, in one line."""
    return "; ".join(shown_node(node) for node in nodes(plan) if "Relation Name" in node or "Index Name" in node)


def missed(answers: list[Answered], time_ms_max: float = TIME_MS_MAX) -> list[str]:
    """What took too long or reads the book."""
    slow = [f"{one.name}: {one.min_ms:.0f} ms" for one in answers if one.min_ms >= time_ms_max]
    return slow + [f"{one.name}: {', '.join(one.scans)}" for one in answers if one.scans]


async def bench(url: str, charges: int) -> list[Answered]:
    """Ask everything of the seeded database at `url`."""
    engine = database.connect(url)
    answers = [await measure(engine, one) for one in asked(charges)]
    await engine.dispose()
    return answers


def table(answers: list[Answered], *, plans: bool) -> str:
    """For people."""
    lines = [f"{'':<38}{'quickest':>9}{'median':>9}"]
    for one in answers:
        lines.append(f"{one.name:<38}{one.min_ms:>6.1f} ms{one.median_ms:>6.1f} ms")
        lines += [f"    {plan}" for plan in one.plans if plans]
    return "\n".join(lines)


async def check_books(url: str) -> None:
    """Raises `SystemExit` unless the seeded books add up: what is measured must be what there is."""
    engine = database.connect(url, pooled=False)
    report = await audit(engine)
    await engine.dispose()
    if not report.is_clean:
        raise SystemExit(report.as_text())


def run(server: Server, charges: int, *, audits: bool) -> list[Answered]:
    """Seed a database of its own, ask, and drop it."""
    name = new_id("book")
    server.create_database(name)
    try:
        asyncio.run(seed(server.url(name), charges))
        if audits:
            with timed("audit"):
                asyncio.run(check_books(server.url(name)))
        return asyncio.run(bench(server.url(name), charges))
    finally:
        server.drop_database(name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--charges", type=int, default=CHARGES)
    parser.add_argument("--plans", action="store_true", help="show how PostgreSQL finds the rows")
    parser.add_argument("--audit", action="store_true", help="check that the seeded books add up: takes minutes")
    given = parser.parse_args()
    with server_for_tests() as server:
        answers = run(server, given.charges, audits=given.audit)
    say(table(answers, plans=given.plans))
    found = missed(answers)
    say("\n".join(f"missed: {one}" for one in found) or "all within 200 ms, none by reading the book")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
