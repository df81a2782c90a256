"""API keys."""

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.identity.keys import Key, list_keys
from proxy.pages import check_page
from proxy.storage.database import reading
from proxy.units import Micros, format_credits, format_instant, now_micros


class KeyItem(msgspec.Struct):
    """A key without itself; `prefix` is how it begins. `period_spent` is what counts against the limit."""

    id: str
    name: str
    scope: str
    prefix: str
    is_active: bool
    created_at: str
    expires_at: str | None
    last_used_at: str | None
    allowed_models: list[str] | None
    limit_amount: str | None
    limit_period: str | None
    spent: str
    period_spent: str
    reserved: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_calls_max: int | None


class KeyMade(KeyItem, kw_only=True):
    """A new key with `key`, this once."""

    key: str


class KeyPage(msgspec.Struct):
    """Newest first. `next_cursor` asks for the next page; null on the last."""

    items: list[KeyItem]
    next_cursor: str | None


async def key_page(engine: AsyncEngine, user_id: str, limit: int, cursor: str | None) -> KeyPage:
    """A page of a user's keys. Raises `BadRequest`."""
    check_page(limit, cursor, "key")
    async with reading(engine) as connection:
        found = await list_keys(connection, user_id, limit=limit + 1, before=cursor)
    now = now_micros()
    items = [key_item(key, now) for key in found[:limit]]
    return KeyPage(items, items[-1].id if len(found) > limit else None)


def key_item(key: Key, now: Micros) -> KeyItem:
    """A key, as it is shown."""
    return KeyItem(**_fields(key, now))


def key_made(key: Key, secret: str, now: Micros) -> KeyMade:
    """A new key, with what its user sends."""
    return KeyMade(**_fields(key, now), key=secret)


def _fields(key: Key, now: Micros) -> dict[str, Any]:
    """The fields of a `KeyItem`, with amounts in credits and instants in ISO 8601."""

    def instant(at: Micros | None) -> str | None:
        return None if at is None else format_instant(at)

    return {
        "id": key.id,
        "name": key.name,
        "scope": str(key.scope),
        "prefix": key.prefix,
        "is_active": key.is_active,
        "created_at": format_instant(key.created_at),
        "expires_at": instant(key.expires_at),
        "last_used_at": instant(key.last_used_at),
        "allowed_models": key.allowed_models,
        "limit_amount": None if key.limit_amount is None else format_credits(key.limit_amount),
        "limit_period": key.limit_period,
        "spent": format_credits(key.spent),
        "period_spent": format_credits(key.spent_in_period(now)),
        "reserved": format_credits(key.reserved),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "concurrent_calls_max": key.concurrent_calls_max,
    }
