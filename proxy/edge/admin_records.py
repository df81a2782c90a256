"""`/api/v1/admin/events` and `/audit`: who changed what, and whether the books add up, for admins."""

import asyncio
from datetime import datetime
from typing import Annotated

import msgspec
from litestar import Router, get
from litestar.di import NamedDependency
from litestar.openapi.spec.enums import OpenAPIFormat
from litestar.params import FromQuery, QueryParameter
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration.events import Filter
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.errors import BadRequest, Unavailable
from proxy.identity.flights import Flights
from proxy.identity.keys import Scope
from proxy.ledger.audit import Report
from proxy.ledger.audit import audit as check
from proxy.pages import PAGE_DEFAULT
from proxy.shown.records import AuditItem, EventPage, audit_item, event_page
from proxy.units import micros_of

AUDIT_S_MAX = 60.0
"""How long an audit by HTTP may take; that of the command line takes as long as the books need."""

SUBJECT_CHARACTERS_MAX = 300

Instant = Annotated[str | None, QueryParameter(format=OpenAPIFormat.DATE_TIME)]  # a number is no instant


@get("/events", summary="Who changed what", responses=documented(400))
async def admin_events(  # noqa: PLR0913, PLR0917 - one parameter a filter
    engine: NamedDependency[AsyncEngine],
    actor: FromQuery[str | None] = None,
    action: FromQuery[str | None] = None,
    subject: FromQuery[str | None] = None,
    since: Instant = None,
    until: Instant = None,
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
) -> EventPage:
    """Every change made by an admin or by the command line.

    Those of one actor, action (`user.change`) or subject (an id or a name), `since` (included) to `until` (not
    included), which are instants of ISO 8601 with their time zone.
    """
    wanted = Filter(
        actor=_text(actor, "actor"),
        action=_text(action, "action"),
        subject=_text(subject, "subject"),
        since=_instant(since, "since"),
        until=_instant(until, "until"),
    )
    return await event_page(engine, wanted, limit, cursor)


def _text(text: str | None, param: str) -> str | None:
    if text is not None and (len(text) > SUBJECT_CHARACTERS_MAX or not text.isprintable()):
        message = f"{param}: at most {SUBJECT_CHARACTERS_MAX} printable characters."
        raise BadRequest(message, param=param, code="invalid_value")
    return text


def _instant(text: str | None, param: str) -> int | None:
    if text is None:
        return None
    try:
        instant = msgspec.convert(text, datetime)
    except msgspec.ValidationError as exc:
        raise BadRequest(f"{param}: not an instant of ISO 8601.", param=param, code="invalid_value") from exc
    if instant.tzinfo is None:
        raise BadRequest(f"{param}: a time zone is needed, such as Z.", param=param, code="invalid_value")
    return micros_of(instant)


class Auditor:
    """Runs one audit at a time, whose report is for everybody who asks meanwhile."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._flights = Flights[Report]()

    async def report(self) -> Report:
        """What an audit finds now. Raises `Unavailable` when it takes too long."""
        return await self._flights.join("audit", self._check)

    async def _check(self) -> Report:
        try:
            async with asyncio.timeout(AUDIT_S_MAX):
                return await check(self._engine)
        except TimeoutError as exc:
            raise Unavailable("The audit takes too long for HTTP: run `tollgate audit`.", retry_after_s=60) from exc


@get("/audit", summary="Check the books", responses=documented())
async def audit(auditor: NamedDependency[Auditor]) -> AuditItem:
    """Check every invariant of the ledger, in one snapshot, read-only, while calls go on.

    `clean` says whether the books add up; `violations` show the rows that are wrong. Books that take longer than a
    minute are for `tollgate audit`.
    """
    return audit_item(await auditor.report())


router = Router("/api/v1/admin", opt=needs(Scope.ADMIN), route_handlers=[admin_events, audit])
