"""Who changed what, and whether the books add up."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration.events import Event, Filter, events
from proxy.ledger.audit import Finding, Report, Totals
from proxy.pages import check_page
from proxy.units import format_instant


class EventItem(msgspec.Struct):
    """One change: `actor` is a user's id, or "command line"; `before` and `after` hold what was another way."""

    id: str
    actor: str
    action: Annotated[str, Meta(examples=["user.change"])]
    subject: str
    before: Any
    after: Any
    created_at: str


class EventPage(msgspec.Struct):
    """Newest first. `next_cursor` asks for the next page; null on the last."""

    items: list[EventItem]
    next_cursor: str | None


async def event_page(engine: AsyncEngine, wanted: Filter, limit: int, cursor: str | None) -> EventPage:
    """A page of the events of a filter. Raises `BadRequest`."""
    check_page(limit, cursor, "event")
    found = await events(engine, wanted, limit=limit + 1, before=cursor)
    items = [_item(event) for event in found[:limit]]
    return EventPage(items, items[-1].id if len(found) > limit else None)


def _item(event: Event) -> EventItem:
    return EventItem(**{**msgspec.structs.asdict(event), "created_at": format_instant(event.created_at)})


class AuditItem(msgspec.Struct):
    """What an audit found; amounts in nano-credits (10⁻⁹), as `tollgate audit --json` has them."""

    clean: bool
    violations: list[Finding]
    notes: list[Finding]
    totals: Totals


def audit_item(report: Report) -> AuditItem:
    """What an audit found, as it is shown."""
    return AuditItem(report.is_clean, report.violations, report.notes, report.totals)
