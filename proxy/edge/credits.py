"""What a caller can read of its own books: balance, transactions, spending, the charge of any call."""

import csv
import io
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, cast

import msgspec
import sqlalchemy as sa
from litestar import MediaType, Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, Schema
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy import journal, reports
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.edge.prices import shown_price
from proxy.edge.reports import Range, Spending, shown_range, shown_spending
from proxy.errors import BadRequest, NotFound
from proxy.identity.keys import Caller
from proxy.identity.keys import Scope as KeyScope
from proxy.journal import (
    PAGE_DEFAULT,
    Entry,
    Filter,
    Page,
    Span,
    check_limit,
    cursor_at,
    number_of,
    place_of,
    unknown_cursor,
)
from proxy.ledger.decide import CreditType
from proxy.pricing import Price
from proxy.reports import DayRange, Group, GroupBy
from proxy.routing import Terms
from proxy.storage.database import reading
from proxy.storage.tables import reservations, wallets
from proxy.units import format_credits, format_instant, format_percent, is_id

CSV_ROWS = 1_000
"""How many transactions of an export are read, and sent, at a time."""

CSV_MEDIA_TYPE = "text/csv"

_MODEL_CHARACTERS_MAX = 300

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection)."""

From = Annotated[
    str | None,
    QueryParameter(name="from", description="The first UTC day, such as 2026-11-01; the beginning if left out."),
]
To = Annotated[str | None, QueryParameter(name="to", description="The last UTC day, itself included.")]
FromOfStats = Annotated[
    str | None, QueryParameter(name="from", description="The first UTC day; 29 days before the last if left out.")
]


class ListFormat(StrEnum):
    """How a list is answered."""

    JSON = "json"
    CSV = "csv"


@dataclass
class ListOrCsv(Operation):
    """An operation that answers with a list in JSON, or with all of it in CSV."""

    def __post_init__(self) -> None:
        content = self.responses["200"].content  # type: ignore[index, union-attr]
        content[CSV_MEDIA_TYPE] = OpenAPIMediaType(schema=Schema(type=OpenAPIType.STRING))  # type: ignore[index]


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


class OfferItem(msgspec.Struct):
    """Who might serve a call, at the prices and the markup of its start; of service tiers and prices the dearest."""

    provider: str
    model: str
    prices: dict[str, Any]
    markup_percent: str


class Charge(msgspec.Struct):
    """The receipt of one call: `offers` are what it was reserved at, `prices` what it was charged at."""

    request_id: str
    client_request_id: str | None
    state: str
    outcome: str | None
    provider: str | None
    model: str
    response_model: str | None
    usage: dict[str, int] | None
    usage_source: str | None
    prices: dict[str, Any] | None
    provider_cost: str | None
    markup_percent: str | None
    offers: list[OfferItem] | None
    reserved: str
    charged: str
    shortfall: str
    refunded: str
    created_at: str
    settled_at: str | None
    ttft_ms: int | None
    duration_ms: int | None


class ChargePage(msgspec.Struct):
    """Newest first. `next_cursor` asks for the next page; null on the last."""

    items: list[Charge]
    next_cursor: str | None


class DaySpending(Spending, kw_only=True):
    """The sums of one UTC day."""

    day: str


class ModelSpending(Spending, kw_only=True):
    """The sums of one model, as it was asked for."""

    model: str


class KeySpending(Spending, kw_only=True):
    """The sums of one key; of no key for calls that came with a token."""

    key_id: str | None
    name: str | None


class Stats(Range, kw_only=True):
    """What was spent in these days: those without a charge are left out, models and keys begin with the dearest."""

    total: Spending
    by_day: list[DaySpending]
    by_model: list[ModelSpending]
    by_key: list[KeySpending]


CallerRequest = Request[Caller, Any, Any]


def check_page(limit: int, cursor: str | None, prefix: str) -> None:
    """Raises `BadRequest` unless a page may have `limit` items, and `cursor` is an id with this prefix or None."""
    check_limit(limit)
    if cursor is not None and not is_id(cursor, prefix):
        raise unknown_cursor()


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


@get("/api/v1/credits/balance", opt=needs(KeyScope.INFERENCE), summary="Your balance", responses=documented(404))
async def balance(request: CallerRequest, engine: NamedDependency[AsyncEngine]) -> Balance:
    """What the wallet holds, what open calls hold of it, and what is left for new ones."""
    async with reading(engine) as connection:
        return await read_balance(connection, request.user.wallet_id)


# ---- transactions


@get(
    "/api/v1/credits/transactions",
    opt=needs(KeyScope.INFERENCE),
    summary="Your transactions",
    responses=documented(400),
    operation_class=ListOrCsv,
)
async def transactions(  # noqa: PLR0913, PLR0917 - what can be asked
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
    type: FromQuery[CreditType | None] = None,  # noqa: A002 - errors name it as it is here
    first: From = None,
    last: To = None,
    key: Annotated[str | None, QueryParameter(description="The id of the key whose calls are wanted.")] = None,
    model: Annotated[str | None, QueryParameter(description="The model of the calls that are wanted.")] = None,
    format: FromQuery[ListFormat | None] = None,  # noqa: A002 - likewise
) -> Response[TransactionPage]:
    """Everything that ever changed the balance, newest first.

    With `format=csv`, or with `Accept: text/csv`, all of it at once instead of a page.
    """
    check_limit(limit)
    wanted = filter_of(type, first, last, key, model)
    wallet_id = request.user.wallet_id
    if format is ListFormat.CSV or (format is None and _prefers_csv(request)):
        lines = await transactions_csv(engine, wallet_id, wanted, cursor)
        headers = {"content-disposition": 'attachment; filename="transactions.csv"'}
        stream = Stream(lines, media_type=CSV_MEDIA_TYPE, headers=headers)
        return cast("Response[TransactionPage]", stream)  # the document says what else there is: see `ListOrCsv`
    return Response(await transaction_page(engine, wallet_id, wanted, limit, cursor))


async def transaction_page(
    engine: AsyncEngine, wallet_id: str, wanted: Filter, limit: int, cursor: str | None
) -> TransactionPage:
    """A page of the transactions of a wallet. Raises `BadRequest`."""
    check_limit(limit)
    _, page = await _first_page(engine, wallet_id, wanted, limit, cursor)
    next_cursor = None if page.before is None else cursor_at(page.before)
    return TransactionPage([item_of(entry) for entry in page.entries], next_cursor)


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


def filter_of(
    type_: CreditType | None, first: str | None, last: str | None, key: str | None, model: str | None
) -> Filter:
    """Which transactions are wanted. Raises `BadRequest`."""
    if key is not None and not is_id(key, "key"):
        raise BadRequest("key: not the id of a key.", param="key", code="invalid_value")
    if model is not None and ("\0" in model or len(model) > _MODEL_CHARACTERS_MAX):
        raise BadRequest("model: not the name of a model.", param="model", code="invalid_value")
    everything = Filter()
    since = everything.since if first is None else DayRange(day := reports.parse_day(first, "from"), day).since
    until = everything.until if last is None else DayRange(day := reports.parse_day(last, "to"), day).until
    if first is not None and since >= until:
        raise BadRequest("The range ends before it begins.", param="from", code="invalid_value")
    return Filter(type=type_, since=since, until=until, key_id=key, model=model)


def _prefers_csv(request: CallerRequest) -> bool:
    return request.accept.best_match([MediaType.JSON, CSV_MEDIA_TYPE]) == CSV_MEDIA_TYPE


def item_of(entry: Entry) -> TransactionItem:
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
        yield _lines([[_harmless(value) for value in msgspec.structs.astuple(item_of(one))] for one in page.entries])
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


_NUMBER = re.compile(r"-[0-9]+(\.[0-9]+)?")


# ---- stats


@get(
    "/api/v1/credits/stats",
    opt=needs(KeyScope.INFERENCE),
    summary="Your spending",
    responses=documented(400),
)
async def stats(
    request: CallerRequest, engine: NamedDependency[AsyncEngine], first: FromOfStats = None, last: To = None
) -> Stats:
    """What your calls add up to, in all and by day, model and key; days are those of UTC."""
    return await wallet_stats(engine, request.user.wallet_id, first, last)


async def wallet_stats(engine: AsyncEngine, wallet_id: str, first: str | None, last: str | None) -> Stats:
    """What the calls that a wallet paid add up to, from one date to another. Raises `BadRequest`."""
    days = await reports.range_of(engine, first, last)
    async with reading(engine, is_snapshot=True) as connection:
        total = await reports.read_totals(connection, days, wallet_id=wallet_id)
        by_day, by_model, by_key = [
            (await reports.read_groups(connection, days, by, wallet_id=wallet_id, limit=reports.DAYS_MAX)).items
            for by in (GroupBy.DAY, GroupBy.MODEL, GroupBy.KEY)
        ]
    return Stats(
        **shown_range(days),
        total=Spending(**shown_spending(total)),
        by_day=[DaySpending(day=one.group, **shown_spending(one.sums)) for one in by_day if one.sums.calls],
        by_model=[ModelSpending(model=one.group, **shown_spending(one.sums)) for one in by_model if one.sums.calls],
        by_key=[_key_spending(one) for one in by_key if one.sums.calls],
    )


def _key_spending(one: Group) -> KeySpending:
    return KeySpending(key_id=one.group or None, name=one.name, **shown_spending(one.sums))


# ---- charges


@get("/api/v1/credits/charges", opt=needs(KeyScope.INFERENCE), summary="Your calls", responses=documented(400))
async def charges(
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
) -> ChargePage:
    """The receipts of all calls, newest first, those too that are open or cost nothing."""
    return await charge_page(engine, request.user.wallet_id, limit, cursor)


async def charge_page(engine: AsyncEngine, wallet_id: str, limit: int, cursor: str | None) -> ChargePage:
    """A page of the receipts of a wallet's calls. Raises `BadRequest`."""
    check_limit(limit)
    before = None if cursor is None else place_of(cursor)
    if before is not None and not is_id(before, "req"):
        raise unknown_cursor()
    async with reading(engine) as connection:
        rows = await journal.read_calls(connection, wallet_id, limit=limit + 1, before=before)
    next_cursor = cursor_at(rows[limit - 1].id) if len(rows) > limit else None
    return ChargePage([charge_of(row) for row in rows[:limit]], next_cursor)


@get(
    "/api/v1/credits/charges/{request_id:str}",
    opt=needs(KeyScope.INFERENCE),
    summary="The charge of one call",
    responses=documented(400, 404),
)
async def charge(request: CallerRequest, engine: NamedDependency[AsyncEngine], request_id: FromPath[str]) -> Charge:
    """What a call cost and why, by the `x-request-id` of its answer; admins may read anybody's."""
    caller = request.user
    sees_all = caller.is_admin and caller.scope.includes(KeyScope.ADMIN)
    try:
        return charge_of(await read_call(engine, request_id, wallet_id=None if sees_all else caller.wallet_id))
    except NotFound as exc:
        raise NotFound(f"There is no call {request_id!r} of yours.") from exc


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


def charge_of(row: Any) -> Charge:
    """The receipt in the row of a call."""
    return Charge(
        request_id=row.id,
        client_request_id=row.client_request_id,
        state=row.state,
        outcome=row.outcome,
        provider=row.provider,
        model=row.original_model,
        response_model=row.response_model,
        usage=row.usage,
        usage_source=row.usage_source,
        prices=None if row.price is None else shown_price(msgspec.convert(row.price, Price)),
        provider_cost=None if row.provider_cost is None else format_credits(row.provider_cost),
        markup_percent=None if row.markup_bps is None else format_percent(row.markup_bps),
        offers=None if row.offers is None else [_offer(each) for each in msgspec.convert(row.offers, list[Terms])],
        reserved=format_credits(row.amount),
        charged=format_credits(row.charged),
        shortfall=format_credits(row.shortfall),
        refunded=format_credits(row.refunded),
        created_at=format_instant(row.created_at),
        settled_at=None if row.settled_at is None else format_instant(row.settled_at),
        ttft_ms=row.ttft_ms,
        duration_ms=row.duration_ms,
    )


def _offer(terms: Terms) -> OfferItem:
    return OfferItem(terms.provider, terms.model, shown_price(terms.price), format_percent(terms.markup_bps))
