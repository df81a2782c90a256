"""Usage and margin for admins, from the sums by day: under `/api/v1/admin`, and `/api/v1/llm/usage`."""

from typing import Annotated, Any

import msgspec
from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromQuery, QueryParameter
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy import reports
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.identity.keys import Scope
from proxy.journal import check_limit, cursor_at, number_of
from proxy.ledger.rollup import date_of_day
from proxy.reports import GROUPS_MAX, DayRange, Group, GroupBy, Sums
from proxy.storage.database import reading
from proxy.units import format_credits

From = Annotated[
    str | None,
    QueryParameter(name="from", description="The first UTC day, such as 2026-11-01; by default 30 days are shown."),
]
To = Annotated[
    str | None, QueryParameter(name="to", description="The last UTC day, itself included; today by default.")
]

_LISTED_MAX = 100
"""Of models, providers and users in a report that shows them all; `group_by` shows the rest."""


class Range(msgspec.Struct, kw_only=True):
    """The days that are added up, both included, and whose days they are."""

    from_: str = msgspec.field(name="from")
    to: str
    time_zone: str


class Spending(msgspec.Struct, kw_only=True):
    """Sums over calls that were charged; amounts in credits, as decimal strings.

    `input_tokens` are all that went in, `cached_input_tokens` those of them that a cache had. `average_charged` is the
    mean charge of a call, refunds not counted.
    """

    calls: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    charged: str
    refunded: str
    average_charged: str


class UsageSums(Spending, kw_only=True):
    """Likewise, with what the provider took, what wallets could not bear, and the number of released calls."""

    provider_cost: str
    shortfall: str
    released: int


class UsageGroup(UsageSums, kw_only=True):
    """The sums of one day, month, model, provider, user or key.

    `group` is its id or name, and empty where there was none; `name` a user's e-mail address, or what a key is called.
    """

    group: str
    name: str | None


class UsagePage(Range, kw_only=True):
    """Days and months from the first on; the others by what was charged, the highest first."""

    group_by: GroupBy
    total: UsageSums
    items: list[UsageGroup]
    next_cursor: str | None


class UsageOverview(Range, kw_only=True):
    """All calls in their sums; of models, providers and users the hundred with the highest charges."""

    total: UsageSums
    by_day: list[UsageGroup]
    by_model: list[UsageGroup]
    by_provider: list[UsageGroup]
    by_user: list[UsageGroup]


class MarginSums(msgspec.Struct, kw_only=True):
    """What is left for the operator; amounts in credits, as decimal strings.

    `charged` + `shortfall` = `provider_cost` + `markup`: what calls were to cost, of which wallets could not bear the
    shortfall. `margin` = `charged` − `refunded` − `provider_cost`. Beyond it, providers may have billed
    `perhaps_billed` of the `released` calls, free for their callers; they had `perhaps_billed_at_most` reserved.
    """

    calls: int
    charged: str
    refunded: str
    provider_cost: str
    markup: str
    shortfall: str
    margin: str
    released: int
    perhaps_billed: int
    perhaps_billed_at_most: str


class MarginGroup(MarginSums, kw_only=True):
    """The margin of one day, month, model, provider, user or key."""

    group: str
    name: str | None


class MarginPage(Range, kw_only=True):
    """In the same order as usage."""

    group_by: GroupBy
    total: MarginSums
    items: list[MarginGroup]
    next_cursor: str | None


@get("/usage", summary="Usage", responses=documented(400))
async def usage(  # noqa: PLR0913, PLR0917 - what can be asked
    engine: NamedDependency[AsyncEngine],
    first: From = None,
    last: To = None,
    group_by: FromQuery[GroupBy] = GroupBy.DAY,
    limit: FromQuery[int] = GROUPS_MAX,
    cursor: FromQuery[str | None] = None,
) -> UsagePage:
    """What all users' calls add up to, by day, month, model, provider, user or key (by month: twelve, by default)."""
    return await usage_page(engine, (first, last), group_by, limit, cursor)


async def usage_page(
    engine: AsyncEngine, dates: tuple[str | None, str | None], group_by: GroupBy, limit: int, cursor: str | None
) -> UsagePage:
    """What calls add up to from one date to another, and one page of that by group. Raises `BadRequest`."""
    days, total, groups = await _report(engine, dates, group_by, limit, cursor)
    return UsagePage(
        **shown_range(days),
        group_by=group_by,
        total=UsageSums(**shown_usage(total)),
        items=[usage_group(group) for group in groups.items],
        next_cursor=_next(groups),
    )


@get("/margin", summary="The margin", responses=documented(400))
async def margin(  # noqa: PLR0913, PLR0917 - likewise
    engine: NamedDependency[AsyncEngine],
    first: From = None,
    last: To = None,
    group_by: FromQuery[GroupBy] = GroupBy.PROVIDER,
    limit: FromQuery[int] = GROUPS_MAX,
    cursor: FromQuery[str | None] = None,
) -> MarginPage:
    """What the operator keeps of what was charged, and what calls may have cost that nobody paid for."""
    return await margin_page(engine, (first, last), group_by, limit, cursor)


async def margin_page(
    engine: AsyncEngine, dates: tuple[str | None, str | None], group_by: GroupBy, limit: int, cursor: str | None
) -> MarginPage:
    """Likewise, what the operator keeps. Raises `BadRequest`."""
    days, total, groups = await _report(engine, dates, group_by, limit, cursor)
    return MarginPage(
        **shown_range(days),
        group_by=group_by,
        total=MarginSums(**_shown_margin(total)),
        items=[MarginGroup(group=group.group, name=group.name, **_shown_margin(group.sums)) for group in groups.items],
        next_cursor=_next(groups),
    )


@get("/api/v1/llm/usage", opt=needs(Scope.ADMIN), summary="Usage of the whole server", responses=documented(400))
async def overview(engine: NamedDependency[AsyncEngine], first: From = None, last: To = None) -> UsageOverview:
    """What all users' calls add up to, in all and by day, model, provider and user (admins only)."""
    days = await reports.range_of(engine, first, last)
    async with reading(engine, is_snapshot=True) as connection:
        total = await reports.read_totals(connection, days)
        by: dict[str, Any] = {
            f"by_{group_by}": [
                usage_group(group)
                for group in (await reports.read_groups(connection, days, group_by, limit=limit)).items
            ]
            for group_by, limit in (
                (GroupBy.DAY, reports.DAYS_MAX),
                (GroupBy.MODEL, _LISTED_MAX),
                (GroupBy.PROVIDER, _LISTED_MAX),
                (GroupBy.USER, _LISTED_MAX),
            )
        }
    return UsageOverview(**shown_range(days), total=UsageSums(**shown_usage(total)), **by)


async def _report(
    engine: AsyncEngine, dates: tuple[str | None, str | None], by: GroupBy, limit: int, cursor: str | None
) -> tuple[DayRange, Sums, reports.Groups]:
    """The sums of one moment, in all and one page of them by group. Raises `BadRequest`."""
    check_limit(limit, GROUPS_MAX)
    offset = 0 if cursor is None else number_of(cursor)
    days = await reports.range_of(engine, *dates, months=by is GroupBy.MONTH)
    async with reading(engine, is_snapshot=True) as connection:
        total, groups = await reports.read_report(connection, days, by, limit=limit, offset=offset)
    return days, total, groups


def _next(groups: reports.Groups) -> str | None:
    return None if groups.next_offset is None else cursor_at(groups.next_offset)


def shown_range(days: DayRange) -> dict[str, Any]:
    """The fields of a `Range`."""
    return {
        "from_": date_of_day(days.first).isoformat(),
        "to": date_of_day(days.last).isoformat(),
        "time_zone": reports.TIME_ZONE,
    }


def shown_spending(sums: Sums) -> dict[str, Any]:
    """The fields of a `Spending`."""
    return {
        "calls": sums.calls,
        "input_tokens": sums.input_tokens,
        "cached_input_tokens": sums.cached_input_tokens,
        "output_tokens": sums.output_tokens,
        "charged": format_credits(sums.charged),
        "refunded": format_credits(sums.refunded),
        "average_charged": format_credits(sums.average),
    }


def shown_usage(sums: Sums) -> dict[str, Any]:
    """The fields of `UsageSums`."""
    return {
        **shown_spending(sums),
        "provider_cost": format_credits(sums.provider_cost),
        "shortfall": format_credits(sums.shortfall),
        "released": sums.released,
    }


def usage_group(group: Group) -> UsageGroup:
    """A group as it is shown to an admin."""
    return UsageGroup(group=group.group, name=group.name, **shown_usage(group.sums))


def _shown_margin(sums: Sums) -> dict[str, Any]:
    return {
        "calls": sums.calls,
        "charged": format_credits(sums.charged),
        "refunded": format_credits(sums.refunded),
        "provider_cost": format_credits(sums.provider_cost),
        "markup": format_credits(sums.markup),
        "shortfall": format_credits(sums.shortfall),
        "margin": format_credits(sums.margin),
        "released": sums.released,
        "perhaps_billed": sums.perhaps_billed,
        "perhaps_billed_at_most": format_credits(sums.perhaps_billed_amount),
    }


router = Router("/api/v1/admin", opt=needs(Scope.ADMIN), route_handlers=[usage, margin])
