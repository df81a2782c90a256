"""The journal of one wallet, newest first, a page at a time, however long it is.

A wallet's transactions are numbered without gaps, and their instants rise with their numbers: a range of dates is found
by halving the numbers, which needs no index of its own. What is filtered by key or model is looked for in at most some
thousands of transactions for one page, so that a page can be short, or even empty, and yet not be the last.
"""

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.errors import NotFound
from proxy.storage.database import reading
from proxy.storage.tables import credit_transactions, reservations, usage_days, wallets
from proxy.units import MICROS_PER_DAY, MICROS_PER_SECOND, Micros, Nanos, is_id

SCANNED_MAX = 5_000
"""How many transactions are looked at for one page."""

_DISORDER = 3600 * MICROS_PER_SECOND
"""By how much the database's clock may have been set back without a range of dates missing anything."""

_DEDUCTION = "deduction"
_FOREVER: Micros = 2**63 - 1
_LAST_ID = "req_~"
"""After every id of a call."""


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which transactions: of a type, from the instant `since` on and before `until`, of the calls of a key or model."""

    type: str | None = None
    since: Micros = 0
    until: Micros = _FOREVER
    key_id: str | None = None
    model: str | None = None

    @property
    def is_of_calls(self) -> bool:
        """Whether only transactions of certain calls are wanted."""
        return self.key_id is not None or self.model is not None


class Entry(msgspec.Struct, frozen=True):
    """A transaction; `key_id` and `model` are those of its call, if it has one."""

    id: str
    seq: int
    type: str
    amount: Nanos
    description: str
    balance_before: Nanos
    balance_after: Nanos
    reservation_id: str | None
    key_id: str | None
    model: str | None
    created_at: Micros


class Page(msgspec.Struct, frozen=True):
    """Transactions, newest first; the next page has those numbered below `before`, None after the last."""

    entries: list[Entry]
    before: int | None


class Span(msgspec.Struct, frozen=True):
    """The numbers of the transactions in which a filter's must be: from `first` on, below `end`."""

    first: int
    end: int


_NOTHING = Span(1, 1)


async def span(connection: AsyncConnection, wallet_id: str, wanted: Filter) -> Span:
    """Where in the journal the transactions of a filter are; a little more, never less."""
    await _by_index(connection)
    last: int = await connection.scalar(sa.select(wallets.c.seq).where(wallets.c.id == wallet_id)) or 0
    since, until = wanted.since, wanted.until
    if wanted.is_of_calls:
        called = await _called(connection, wallet_id, wanted)
        if called is None:
            return _NOTHING
        since, until = max(since, called[0]), min(until, called[1])
    first = 1 if since <= 0 else await _seq_at(connection, wallet_id, last, since - _DISORDER)
    end = last + 1 if until >= _FOREVER else await _seq_at(connection, wallet_id, last, until + _DISORDER)
    return Span(first, end)


async def _called(connection: AsyncConnection, wallet_id: str, wanted: Filter) -> tuple[Micros, Micros] | None:
    """From when to when the calls of a filter have transactions, by the sums by day; None if there are none."""
    days = usage_days
    row = (
        await connection.execute(
            sa.select(
                sa.func.min(days.c.day).label("first"),
                sa.func.max(days.c.day).label("last"),
                sa.func.sum(days.c.refunded).label("refunded"),
            ).where(
                days.c.wallet_id == wallet_id,
                sa.true() if wanted.key_id is None else days.c.key_id == wanted.key_id,
                sa.true() if wanted.model is None else days.c.model == wanted.model,
            )
        )
    ).one()
    if row.first is None:
        return None
    # A refund may have come on any later day.
    return row.first * MICROS_PER_DAY, _FOREVER if row.refunded else (row.last + 1) * MICROS_PER_DAY


async def _seq_at(connection: AsyncConnection, wallet_id: str, last: int, instant: Micros) -> int:
    """The number of the first transaction at `instant` or later; that after the last if there is none."""
    found: int = await connection.scalar(_HALVED, {"wallet_id": wallet_id, "last": last, "instant": instant})
    return found


_HALVED = sa.text(
    "WITH RECURSIVE halved (low, high) AS ("
    " SELECT CAST(1 AS BIGINT), CAST(:last AS BIGINT) + 1 UNION ALL"
    " SELECT CASE WHEN created_at < :instant THEN (low + high) / 2 + 1 ELSE low END,"
    " CASE WHEN created_at < :instant THEN high ELSE (low + high) / 2 END"
    " FROM halved JOIN credit_transactions ON wallet_id = :wallet_id AND seq = (low + high) / 2 WHERE low < high)"
    " SELECT low FROM halved WHERE low = high"
)
"""Between `low` and `high` is the number that is looked for; each row has half as many as the one before."""


async def read_page(  # noqa: PLR0913 - whose, which of them, and how many from where on
    connection: AsyncConnection,
    wallet_id: str,
    wanted: Filter,
    within: Span,
    *,
    limit: int,
    before: int | None = None,
    scanned_max: int = SCANNED_MAX,
) -> Page:
    """The newest `limit` transactions of a filter in the span that was found for it, numbered below `before`."""
    await _by_index(connection)
    end = within.end if before is None else min(before, within.end)
    first, is_cut = within.first, False
    if wanted.is_of_calls or wanted.type == _DEDUCTION:
        first = max(within.first, end - scanned_max)
        is_cut = first > within.first
    rows = (await connection.execute(_query(wallet_id, wanted, Span(first, end)).limit(limit + 1))).all()
    entries = [Entry(*row) for row in rows[:limit]]
    if len(rows) > limit:
        return Page(entries, entries[-1].seq)
    return Page(entries, first if is_cut else None)


def _query(wallet_id: str, wanted: Filter, within: Span) -> sa.Select[Any]:
    own, call = credit_transactions, reservations
    query = (
        sa.select(
            own.c.id,
            own.c.seq,
            own.c.type,
            own.c.amount,
            own.c.description,
            own.c.balance_before,
            own.c.balance_after,
            own.c.reservation_id,
            call.c.key_id,
            call.c.original_model,
            own.c.created_at,
        )
        .select_from(own.outerjoin(call, call.c.id == own.c.reservation_id))
        .where(own.c.wallet_id == wallet_id, own.c.seq >= within.first, own.c.seq < within.end)
        .order_by(own.c.seq.desc())
    )
    if wanted.type is not None:
        query = query.where(own.c.type == wanted.type)
        if wanted.type != _DEDUCTION:
            query = query.where(own.c.type != sa.literal_column(f"'{_DEDUCTION}'"))  # the index of all others will do
    if wanted.since > 0:
        query = query.where(own.c.created_at >= wanted.since)
    if wanted.until < _FOREVER:
        query = query.where(own.c.created_at < wanted.until)
    if wanted.key_id is not None:
        query = query.where(call.c.key_id == wanted.key_id)
    if wanted.model is not None:
        query = query.where(call.c.original_model == wanted.model)
    return query


async def _by_index(connection: AsyncConnection) -> None:
    """Have PostgreSQL walk the indexes for the rest of this transaction, whatever it thinks of the number of rows.

    A page needs few of the rows that are wanted, and they lie in the index in the order that is wanted.
    """
    if connection.dialect.name == "postgresql":
        plans = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin")
        await connection.execute(sa.select(*(sa.func.set_config(plan, "off", True) for plan in plans)))  # noqa: FBT003


# ---- charges


async def read_calls(
    connection: AsyncConnection, wallet_id: str, *, limit: int, before: str | None = None
) -> list[Any]:
    """At most `limit` rows of `reservations`, newest first, with ids below `before`: ids sort by their making."""
    table = reservations
    place = sa.tuple_(table.c.wallet_id, table.c.id)
    # As pairs, so that only their own index has them in order: in that of ids alone are everybody's between them.
    query = (
        sa.select(table)
        .where(place > sa.tuple_(wallet_id, ""), place < sa.tuple_(wallet_id, _LAST_ID if before is None else before))
        .order_by(table.c.wallet_id.desc(), table.c.id.desc())
    )
    await _by_index(connection)
    return list((await connection.execute(query.limit(limit))).all())


async def read_call(engine: AsyncEngine, request_id: str, *, wallet_id: str | None = None) -> Any:
    """The row of a call, of any wallet or of one. Raises `NotFound`."""
    query = sa.select(reservations).where(reservations.c.id == request_id)
    if wallet_id is not None:
        query = query.where(reservations.c.wallet_id == wallet_id)
    async with reading(engine) as connection:
        row = (await connection.execute(query)).one_or_none() if is_id(request_id, "req") else None
    if row is None:
        raise NotFound(f"There is no call {request_id!r}.")
    return row
