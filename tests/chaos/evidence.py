"""Collects what the judge needs: journals from outside of the database, and the ledger's own rows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.storage import database
from proxy.storage.tables import credit_transactions, instances, reservations, wallets
from proxy.units import MICROS_PER_SECOND
from tests.chaos.journal import AdminError, Call, Grant, Markup, Said, Switch, read_journal
from tests.chaos.judge import Evidence, Reservation, Serve, Transaction

_TOKEN = re.compile(r"token ([0-9a-f]{32})")

_FAULTS_LOGGED = frozenset({"ledger_fault", "ledger_refused", "unexpected_error"})
"""What a proxy logs when it meets something that cannot happen."""


async def collect(url: str, client_journal: Path, provider_journals: list[Path], logs: list[Path]) -> Evidence:
    """The evidence of a run that is over; what only a watch could see is still missing in it."""
    entries = read_journal(client_journal)
    engine = database.connect(url, pooled=False)
    try:
        return Evidence(
            calls=[entry for entry in entries if isinstance(entry, Call)],
            grants=[entry for entry in entries if isinstance(entry, Grant)],
            served=[serve for journal in provider_journals for serve in serves(journal)],
            said=[entry for entry in entries if isinstance(entry, Said)],
            markups=[entry for entry in entries if isinstance(entry, Markup)],
            switches=[entry for entry in entries if isinstance(entry, Switch)],
            admin_errors=[entry for entry in entries if isinstance(entry, AdminError)],
            reservations=await _reservations(engine),
            transactions=await _transactions(engine),
            mishaps=[mishap for log in logs for mishap in logged_faults(log)],
        )
    finally:
        await engine.dispose()


def serves(provider_journal: Path) -> Iterator[Serve]:
    """The calls in what a provider was sent; it says nothing of requests that broke off before their token."""
    with provider_journal.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            found = _TOKEN.search(entry["body"])
            if found is not None:
                yield Serve(found[1], is_refused=(entry["status"] or 0) >= 400)


def logged_faults(log: Path) -> Iterator[str]:
    """The entries of a proxy's log that speak of a bug, and whatever is no entry at all, such as a traceback."""
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            yield f"{log.stem}: {line}"
            continue
        if entry.get("event") in _FAULTS_LOGGED:
            said = {name: value for name, value in entry.items() if name != "exception"}
            yield f"{log.stem}: {said} {entry.get('exception', '').rpartition(chr(10))[2]}"


async def open_reservations(engine: AsyncEngine) -> int:
    """How many calls hold credits just now. Raises `Unavailable` when the database is out of reach."""
    async with database.reading(engine) as connection:
        counted = sa.select(sa.func.count()).select_from(reservations).where(reservations.c.state == "open")
        return await connection.scalar(counted)


async def overdrawn_wallets(engine: AsyncEngine) -> list[str]:
    """The wallets below zero just now. Raises `Unavailable` when the database is out of reach."""
    available = wallets.c.balance - wallets.c.reserved
    async with database.reading(engine) as connection:
        rows = await connection.execute(sa.select(wallets).where(sa.or_(available < 0, wallets.c.reserved < 0)))
        return [f"{row}" for row in rows]


async def _reservations(engine: AsyncEngine) -> list[Reservation]:
    owned = sa.outerjoin(reservations, instances, reservations.c.owner_id == instances.c.id)
    async with database.reading(engine) as connection:
        rows = await connection.execute(sa.select(reservations, instances.c.lease_until).select_from(owned))
        return [
            Reservation(
                id=row.id,
                client_request_id=row.client_request_id,
                wallet_id=row.wallet_id,
                state=row.state,
                charged=row.charged,
                refunded=row.refunded,
                is_late=bool(row.is_late),
                provider=row.provider,
                markup_bps=row.markup_bps,
                created_at=row.created_at / MICROS_PER_SECOND,
                owner_until=None if row.lease_until is None else row.lease_until / MICROS_PER_SECOND,
            )
            for row in rows
        ]


async def _transactions(engine: AsyncEngine) -> list[Transaction]:
    async with database.reading(engine) as connection:
        rows = await connection.execute(sa.select(credit_transactions))
        return [
            Transaction(
                wallet_id=row.wallet_id,
                type=row.type,
                amount=row.amount,
                reservation_id=row.reservation_id,
                idempotency_key=row.idempotency_key,
            )
            for row in rows
        ]
