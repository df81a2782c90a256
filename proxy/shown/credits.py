"""Balances, and what changed them."""

import csv
import io
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy import journal
from proxy.errors import BadRequest, NotFound
from proxy.journal import Entry, Filter, Page, Span
from proxy.ledger.decide import CreditType
from proxy.pages import check_limit, cursor_at, number_of
from proxy.reports import DayRange, parse_day
from proxy.storage.database import reading
from proxy.storage.tables import wallets
from proxy.units import format_credits, format_instant, is_id

CSV_ROWS = 1_000
"""How many transactions of an export are read, and sent, at a time."""

_MODEL_CHARACTERS_MAX = 300

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection)."""

_NUMBER = re.compile(r"-[0-9]+(\.[0-9]+)?")


class Balance(msgspec.Struct):
    """Amounts in credits, as decimal strings."""

    balance: str
    reserved: str
    available: str


class TransactionItem(msgspec.Struct):
    """One row of the journal; `balance_after` − `balance_before` = `amount`.

    `key_id` and `model` are those of the call that was charged or refunded.
    """

    id: str
    type: str
    amount: str
    description: str
    balance_before: str
    balance_after: str
    request_id: str | None
    key_id: str | None
    model: str | None
    created_at: str


class TransactionPage(msgspec.Struct):
    """Newest first. `next_cursor` asks for the next page; null on the last.

    Where a key or a model is asked for, a page may have fewer items than its limit, or none, and not be the last.
    """

    items: list[TransactionItem]
    next_cursor: str | None


class CreditBooked(msgspec.Struct):
    """The row of the journal, and the balance after it."""

    transaction: TransactionItem
    balance: Annotated[str, Meta(examples=["12.5"])]


async def read_balance(connection: AsyncConnection, wallet_id: str) -> Balance:
    """The balance of `wallet_id`. Raises `NotFound` when there is no such wallet."""
    row = (await connection.execute(sa.select(wallets).where(wallets.c.id == wallet_id))).one_or_none()
    if row is None:
        raise NotFound("There is no such wallet.")
    return Balance(
        balance=format_credits(row.balance),
        reserved=format_credits(row.reserved),
        available=format_credits(row.balance - row.reserved - row.owed),
    )


def filter_of(
    type_: CreditType | None, first: str | None, last: str | None, key: str | None, model: str | None
) -> Filter:
    """Which transactions are wanted. Raises `BadRequest`."""
    if key is not None and not is_id(key, "key"):
        raise BadRequest("key: not the id of a key.", param="key", code="invalid_value")
    if model is not None and ("\0" in model or len(model) > _MODEL_CHARACTERS_MAX):
        raise BadRequest("model: not the name of a model.", param="model", code="invalid_value")
    everything = Filter()
    since = everything.since if first is None else DayRange(day := parse_day(first, "from"), day).since
    until = everything.until if last is None else DayRange(day := parse_day(last, "to"), day).until
    if first is not None and since >= until:
        raise BadRequest("The range ends before it begins.", param="from", code="invalid_value")
    return Filter(type=type_, since=since, until=until, key_id=key, model=model)


async def transaction_page(
    engine: AsyncEngine, wallet_id: str, wanted: Filter, limit: int, cursor: str | None
) -> TransactionPage:
    """A page of the transactions of a wallet. Raises `BadRequest`."""
    check_limit(limit)
    _, page = await _first_page(engine, wallet_id, wanted, limit, cursor)
    next_cursor = None if page.before is None else cursor_at(page.before)
    return TransactionPage([transaction_item(entry) for entry in page.entries], next_cursor)


async def transactions_csv(
    engine: AsyncEngine, wallet_id: str, wanted: Filter, cursor: str | None
) -> AsyncIterator[bytes]:
    """The lines of all transactions of a wallet; the first ones are read before this returns. Raises `BadRequest`."""
    span, page = await _first_page(engine, wallet_id, wanted, CSV_ROWS, cursor)
    return _csv(engine, wallet_id, wanted, span, page)


async def _first_page(
    engine: AsyncEngine, wallet_id: str, wanted: Filter, limit: int, cursor: str | None
) -> tuple[Span, Page]:
    before = None if cursor is None else number_of(cursor)
    async with reading(engine) as connection:
        span = await journal.span(connection, wallet_id, wanted)
        return span, await journal.read_page(connection, wallet_id, wanted, span, limit=limit, before=before)


def transaction_item(entry: Entry) -> TransactionItem:
    """A transaction, as it is shown."""
    return TransactionItem(
        id=entry.id,
        type=entry.type,
        amount=format_credits(entry.amount),
        description=entry.description,
        balance_before=format_credits(entry.balance_before),
        balance_after=format_credits(entry.balance_after),
        request_id=entry.reservation_id,
        key_id=entry.key_id,
        model=entry.model,
        created_at=format_instant(entry.created_at),
    )


async def _csv(engine: AsyncEngine, wallet_id: str, wanted: Filter, span: Span, page: Page) -> AsyncIterator[bytes]:
    """The lines of an export, from its first page on; no connection is held while the client takes them."""
    yield _lines([list(TransactionItem.__struct_fields__)])
    while True:
        yield _lines(
            [[_harmless(value) for value in msgspec.structs.astuple(transaction_item(one))] for one in page.entries]
        )
        if page.before is None:
            return
        async with reading(engine) as connection:
            page = await journal.read_page(connection, wallet_id, wanted, span, limit=CSV_ROWS, before=page.before)


def _lines(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _harmless(value: Any) -> Any:
    """A cell that no spreadsheet runs as a formula; negative amounts are numbers, and stay what they are."""
    if isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def credit_booked(entry: Entry) -> CreditBooked:
    """What was booked by hand, as it is shown."""
    transaction = transaction_item(entry)
    return CreditBooked(transaction, transaction.balance_after)
