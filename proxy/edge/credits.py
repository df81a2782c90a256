"""What a caller can read of its own books: balance, transactions, the charge of any call."""

import base64
import binascii
from typing import Any

import msgspec
import sqlalchemy as sa
from litestar import Request, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.edge.prices import shown_price
from proxy.errors import BadRequest, NotFound
from proxy.identity.keys import Caller
from proxy.identity.keys import Scope as KeyScope
from proxy.pricing import Price
from proxy.routing import Terms
from proxy.storage.database import reading
from proxy.storage.tables import credit_transactions, reservations, wallets
from proxy.units import format_credits, format_instant, format_percent, is_id

PAGE_MAX = 200
PAGE_DEFAULT = 50


class Balance(msgspec.Struct):
    """Amounts in credits, as decimal strings."""

    balance: str
    reserved: str
    available: str


class TransactionItem(msgspec.Struct):
    """One row of the journal; `balance_after` − `balance_before` = `amount`."""

    id: str
    type: str
    amount: str
    description: str
    balance_before: str
    balance_after: str
    request_id: str | None
    created_at: str


class TransactionPage(msgspec.Struct):
    """Newest first. `next_cursor` asks for the next page; null on the last."""

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


CallerRequest = Request[Caller, Any, Any]


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


@get(
    "/api/v1/credits/transactions",
    opt=needs(KeyScope.INFERENCE),
    summary="Your transactions",
    responses=documented(400),
)
async def transactions(
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
) -> TransactionPage:
    """Everything that ever changed the balance, newest first."""
    table = credit_transactions
    query = sa.select(table).where(table.c.wallet_id == request.user.wallet_id)
    if cursor is not None:
        query = query.where(table.c.seq < _seq_of(cursor))
    if not 1 <= limit <= PAGE_MAX:
        raise BadRequest(f"A page has from 1 to {PAGE_MAX} items.", param="limit", code="invalid_value")
    async with reading(engine) as connection:
        rows = (await connection.execute(query.order_by(table.c.seq.desc()).limit(limit + 1))).all()
    items = [
        TransactionItem(
            id=row.id,
            type=row.type,
            amount=format_credits(row.amount),
            description=row.description,
            balance_before=format_credits(row.balance_before),
            balance_after=format_credits(row.balance_after),
            request_id=row.reservation_id,
            created_at=format_instant(row.created_at),
        )
        for row in rows[:limit]
    ]
    return TransactionPage(items, _cursor_at(rows[limit - 1].seq) if len(rows) > limit else None)


@get(
    "/api/v1/credits/charges/{request_id:str}",
    opt=needs(KeyScope.INFERENCE),
    summary="The charge of one call",
    responses=documented(400, 404),
)
async def charge(request: CallerRequest, engine: NamedDependency[AsyncEngine], request_id: FromPath[str]) -> Charge:
    """What a call cost and why, by the `x-request-id` of its answer."""
    table = reservations
    if not is_id(request_id, "req"):
        raise NotFound(f"There is no call {request_id!r} of yours.")
    async with reading(engine) as connection:
        row = (
            await connection.execute(
                sa.select(table).where(table.c.id == request_id, table.c.wallet_id == request.user.wallet_id)
            )
        ).one_or_none()
    if row is None:
        raise NotFound(f"There is no call {request_id!r} of yours.")
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


def _cursor_at(seq: int) -> str:
    return base64.urlsafe_b64encode(str(seq).encode()).decode()


def _seq_of(cursor: str) -> int:
    try:
        seq = int(base64.urlsafe_b64decode(cursor.encode()))
    except (binascii.Error, ValueError) as exc:
        raise BadRequest("This cursor was not given out here.", param="cursor", code="invalid_cursor") from exc
    if not 0 <= seq < 2**63:
        raise BadRequest("This cursor was not given out here.", param="cursor", code="invalid_cursor")
    return seq
