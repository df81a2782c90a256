"""Usage and margin: what calls add up to, by day, month, model, provider, user or key."""

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy import reports
from proxy.ledger.rollup import date_of_day
from proxy.pages import GROUPS_MAX, check_limit, cursor_at, number_of
from proxy.reports import DayRange, Group, GroupBy, Sums
from proxy.storage.database import reading
from proxy.units import format_credits


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


_LISTED_MAX = 100
"""Of models, providers and users in a report that shows them all; `group_by` shows the rest."""


async def usage_page(
    engine: AsyncEngine, dates: tuple[str | None, str | None], group_by: GroupBy, limit: int, cursor: str | None
) -> UsagePage:
    """What calls add up to from one date to another, and one page of that by group. Raises `BadRequest`."""
    days, total, groups = await _report(engine, dates, group_by, limit, cursor)
    return UsagePage(
        **_range(days),
        group_by=group_by,
        total=UsageSums(**_usage(total)),
        items=[_usage_group(group) for group in groups.items],
        next_cursor=_next(groups),
    )


async def margin_page(
    engine: AsyncEngine, dates: tuple[str | None, str | None], group_by: GroupBy, limit: int, cursor: str | None
) -> MarginPage:
    """Likewise, what the operator keeps. Raises `BadRequest`."""
    days, total, groups = await _report(engine, dates, group_by, limit, cursor)
    return MarginPage(
        **_range(days),
        group_by=group_by,
        total=MarginSums(**_margin(total)),
        items=[MarginGroup(group=group.group, name=group.name, **_margin(group.sums)) for group in groups.items],
        next_cursor=_next(groups),
    )


async def usage_overview(engine: AsyncEngine, dates: tuple[str | None, str | None]) -> UsageOverview:
    """What calls add up to from one date to another, and the beginning of that by every group. Raises `BadRequest`."""
    days = await reports.range_of(engine, *dates)
    async with reading(engine, is_snapshot=True) as connection:
        total = await reports.read_totals(connection, days)
        by: dict[str, Any] = {
            f"by_{group_by}": [
                _usage_group(group)
                for group in (await reports.read_groups(connection, days, group_by, limit=limit)).items
            ]
            for group_by, limit in (
                (GroupBy.DAY, reports.DAYS_MAX),
                (GroupBy.MODEL, _LISTED_MAX),
                (GroupBy.PROVIDER, _LISTED_MAX),
                (GroupBy.USER, _LISTED_MAX),
            )
        }
    return UsageOverview(**_range(days), total=UsageSums(**_usage(total)), **by)


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
        **_range(days),
        total=Spending(**_spending(total)),
        by_day=[DaySpending(day=one.group, **_spending(one.sums)) for one in by_day if one.sums.calls],
        by_model=[ModelSpending(model=one.group, **_spending(one.sums)) for one in by_model if one.sums.calls],
        by_key=[_key_spending(one) for one in by_key if one.sums.calls],
    )


def _key_spending(one: Group) -> KeySpending:
    return KeySpending(key_id=one.group or None, name=one.name, **_spending(one.sums))


def _range(days: DayRange) -> dict[str, Any]:
    """The fields of a `Range`."""
    return {
        "from_": date_of_day(days.first).isoformat(),
        "to": date_of_day(days.last).isoformat(),
        "time_zone": reports.TIME_ZONE,
    }


def _spending(sums: Sums) -> dict[str, Any]:
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


def _usage(sums: Sums) -> dict[str, Any]:
    """The fields of `UsageSums`."""
    return {
        **_spending(sums),
        "provider_cost": format_credits(sums.provider_cost),
        "shortfall": format_credits(sums.shortfall),
        "released": sums.released,
    }


def _usage_group(group: Group) -> UsageGroup:
    return UsageGroup(group=group.group, name=group.name, **_usage(group.sums))


def _margin(sums: Sums) -> dict[str, Any]:
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
