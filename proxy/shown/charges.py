"""The receipts of calls."""

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy import journal
from proxy.pages import check_limit, cursor_at, place_of, unknown_cursor
from proxy.pricing import Price
from proxy.routing import Terms
from proxy.shown.prices import shown_price
from proxy.storage.database import reading
from proxy.units import format_credits, format_instant, format_percent, is_id


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
