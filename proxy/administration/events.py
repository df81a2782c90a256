"""Who changed what: the events that every change by an operator leaves."""

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.storage.database import reading
from proxy.storage.tables import admin_events
from proxy.units import Micros


class Event(msgspec.Struct, frozen=True):
    """One change; `before` and `after` hold what of its subject was another way."""

    id: str
    actor: str
    action: str
    subject: str
    before: Any
    after: Any
    created_at: Micros


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which events to show: those of an actor, action or subject, from `since` until before `until`; None is any."""

    actor: str | None = None
    action: str | None = None
    subject: str | None = None
    since: Micros | None = None
    until: Micros | None = None


async def events(engine: AsyncEngine, wanted: Filter, *, limit: int, before: str | None = None) -> list[Event]:
    """Events, newest first; at most `limit`, those before the event `before`."""
    table = admin_events
    query = sa.select(*(table.c[name] for name in Event.__struct_fields__))
    for name in ("actor", "action", "subject"):
        value = getattr(wanted, name)
        if value is not None:
            query = query.where(table.c[name] == value)
    if wanted.since is not None:
        query = query.where(table.c.created_at >= wanted.since)
    if wanted.until is not None:
        query = query.where(table.c.created_at < wanted.until)
    if before is not None:
        query = query.where(table.c.id < before)
    async with reading(engine) as connection:
        rows = await connection.execute(query.order_by(table.c.id.desc()).limit(limit))
        return [Event(**row._mapping) for row in rows]  # noqa: SLF001 - SQLAlchemy's documented name of a row's dict
