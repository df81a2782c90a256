"""What calls add up to, for operators and for the owner of a wallet: read from the sums by day, never from the book.

Days are those of UTC. A range is of whole days, its first and its last included. Amounts are nano-credits.
"""

import re
from collections.abc import Iterable
from datetime import date, timedelta
from enum import StrEnum
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.errors import BadRequest
from proxy.ledger.rollup import date_of_day, day_of, day_of_date
from proxy.pages import GROUPS_MAX
from proxy.storage.database import database_now, reading
from proxy.storage.tables import api_keys, usage_days, usage_months, users
from proxy.units import MICROS_PER_DAY, Micros, Nanos

TIME_ZONE = "UTC"

DAYS_DEFAULT = 30
"""How many days a report covers that was asked for no others, today included."""

MONTHS_DEFAULT = 12

DAYS_MAX = 3660
"""Ten years."""


_LAST_YEAR = 2999
"""Nobody has reports of later ones, and there are no dates after those of the year 9999."""

_DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


class GroupBy(StrEnum):
    """By what a report adds calls up."""

    DAY = "day"
    MONTH = "month"
    MODEL = "model"
    PROVIDER = "provider"
    USER = "user"
    KEY = "key"


class DayRange(msgspec.Struct, frozen=True):
    """Days since the epoch, from `first` to `last`, both included."""

    first: int
    last: int

    @property
    def since(self) -> Micros:
        """The first instant of the range."""
        return self.first * MICROS_PER_DAY

    @property
    def until(self) -> Micros:
        """The first instant after it."""
        return (self.last + 1) * MICROS_PER_DAY


class Sums(msgspec.Struct, frozen=True):
    """Sums over calls; see `ledger.rollup.UsageDay` for what each of them counts."""

    calls: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    charged: Nanos = 0
    provider_cost: Nanos = 0
    shortfall: Nanos = 0
    refunded: Nanos = 0
    released: int = 0
    perhaps_billed: int = 0
    perhaps_billed_amount: Nanos = 0

    @property
    def markup(self) -> Nanos:
        """What the settled calls were to cost beyond what they cost the operator."""
        return self.charged + self.shortfall - self.provider_cost

    @property
    def margin(self) -> Nanos:
        """What the operator keeps of it: without what wallets could not bear, and what was given back."""
        return self.charged - self.refunded - self.provider_cost

    @property
    def average(self) -> Nanos:
        """The charge of one call in the mean, refunds not counted, rounded half up; 0 without calls."""
        return (2 * self.charged + self.calls) // (2 * self.calls) if self.calls else 0


class Group(msgspec.Struct, frozen=True):
    """The sums of one day (`2026-11-24`), month (`2026-11`), model, provider, user (by id) or key (by id).

    `name` is the user's e-mail address or the key's name, where there is one. `group` is empty for calls without a key,
    and for those that ended without a provider.
    """

    group: str
    name: str | None
    sums: Sums


class Groups(msgspec.Struct, frozen=True):
    """One page of groups; `next_offset` begins the next one, None after the last."""

    items: list[Group]
    next_offset: int | None = None


_COLUMNS = {
    GroupBy.DAY: "day",
    GroupBy.MONTH: "day",
    GroupBy.MODEL: "model",
    GroupBy.PROVIDER: "provider",
    GroupBy.USER: "user_id",
    GroupBy.KEY: "key_id",
}
_IN_TIME = (GroupBy.DAY, GroupBy.MONTH)


# ---- days


def parse_day(text: str, param: str) -> int:
    """The day of a date such as `2026-11-24`. Raises `BadRequest` about `param`."""
    wrong = BadRequest(f"{param}: not a date such as 2026-11-24.", param=param, code="invalid_value")
    if not _DATE.fullmatch(text):
        raise wrong
    try:
        found = date.fromisoformat(text)
    except ValueError as exc:
        raise wrong from exc
    if found.year > _LAST_YEAR:
        raise wrong
    return day_of_date(found)


def parse_range(first: str | None, last: str | None, now: Micros, *, months: bool = False) -> DayRange:
    """The days from the date `first` to the date `last`, both included.

    `last` is today if it is not given, and `first` such that there are thirty days, or with `months` twelve months.
    Raises `BadRequest` for what is no date, a range that ends before it begins, and one of more than ten years.
    """
    end = day_of(now) if last is None else parse_day(last, "to")
    if first is not None:
        begin = parse_day(first, "from")
    elif months:
        begin = _months_before(end)
    else:
        begin = max(end - DAYS_DEFAULT + 1, day_of_date(date.min))
    if begin > end:
        raise BadRequest("The range ends before it begins.", param="from", code="invalid_value")
    if end - begin >= DAYS_MAX:
        raise BadRequest(f"A range has at most {DAYS_MAX} days.", param="from", code="invalid_value")
    return DayRange(begin, end)


def _months_before(day: int) -> int:
    """The first day of the first of the twelve months that end with the one that holds `day`; not before year 1."""
    last = date_of_day(day)
    months = max(12, last.year * 12 + last.month - MONTHS_DEFAULT)
    return day_of_date(date(months // 12, months % 12 + 1, 1))


async def range_of(engine: AsyncEngine, first: str | None, last: str | None, *, months: bool = False) -> DayRange:
    """As `parse_range`, today being what the database's clock says."""
    async with reading(engine) as connection:
        return parse_range(first, last, await database_now(connection), months=months)


# ---- sums


async def read_totals(connection: AsyncConnection, days: DayRange, *, wallet_id: str | None = None) -> Sums:
    """The sums over all calls that ended on these days, of one wallet or of all."""
    rows = _rows(days, [], wallet_id)
    return _sums((await connection.execute(sa.select(*_summed(rows)))).one())


async def read_groups(  # noqa: PLR0913 - what is asked, of what, and which page of it
    connection: AsyncConnection,
    days: DayRange,
    by: GroupBy,
    *,
    wallet_id: str | None = None,
    limit: int = GROUPS_MAX,
    offset: int = 0,
) -> Groups:
    """The sums by group: days and months from the first on, everything else with the highest charges first.

    Days, months and others in which no call ended are left out.
    """
    rows = _rows(days, [_COLUMNS[by]], wallet_id, by_day=by is GroupBy.DAY)
    column = rows.c[_COLUMNS[by]]
    query = sa.select(column.label("group"), *_summed(rows)).group_by(column)
    if by in _IN_TIME:
        in_time = _in_time((await connection.execute(query.order_by(column))).all(), by)
        return _page([Group(group, None, sums) for group, sums in in_time][offset:], limit, offset)
    page = query.order_by(sa.func.sum(rows.c.charged).desc(), column).limit(limit + 1).offset(offset).subquery()
    found = (await connection.execute(_named(page, by).order_by(page.c.charged.desc(), page.c.group))).all()
    return _page([Group(row.group, row.name, _sums(row)) for row in found], limit, offset)


def _named(page: sa.Subquery, by: GroupBy) -> sa.Select[Any]:
    """Groups with what people call them."""
    if by is GroupBy.USER:
        return sa.select(page, users.c.email.label("name")).outerjoin(users, users.c.id == page.c.group)
    if by is GroupBy.KEY:
        return sa.select(page, api_keys.c.name).outerjoin(api_keys, api_keys.c.id == page.c.group)
    return sa.select(page, sa.null().label("name"))


async def read_report(  # noqa: PLR0913 - likewise
    connection: AsyncConnection,
    days: DayRange,
    by: GroupBy,
    *,
    wallet_id: str | None = None,
    limit: int = GROUPS_MAX,
    offset: int = 0,
) -> tuple[Sums, Groups]:
    """The sums in all, and one page of them by group."""
    page = await read_groups(connection, days, by, wallet_id=wallet_id, limit=limit, offset=offset)
    if offset == 0 and page.next_offset is None:
        return added(group.sums for group in page.items), page
    return await read_totals(connection, days, wallet_id=wallet_id), page


def added(sums: Iterable[Sums]) -> Sums:
    """The sums of sums."""
    return Sums(*map(sum, zip(*(msgspec.structs.astuple(one) for one in sums), strict=True)))


def _rows(days: DayRange, columns: list[str], wallet_id: str | None, *, by_day: bool = False) -> sa.Subquery:
    """What is to be summed: rows of whole months where there are any in the range, and of the days around them."""
    whole = None if by_day else _whole_months(days)
    parts = [_part(usage_days, days, columns, wallet_id)]
    if whole is not None:
        around = (DayRange(days.first, whole.first - 1), DayRange(whole.last + 1, days.last))
        parts = [_part(usage_months, whole, columns, wallet_id)]
        parts += [_part(usage_days, some, columns, wallet_id) for some in around if some.first <= some.last]
    return sa.union_all(*parts).subquery()


def _part(table: sa.Table, days: DayRange, columns: list[str], wallet_id: str | None) -> sa.Select[Any]:
    wanted = [table.c[name] for name in (*columns, *Sums.__struct_fields__)]
    query = sa.select(*wanted).where(table.c.day.between(days.first, days.last))
    return query if wallet_id is None else query.where(table.c.wallet_id == wallet_id)


def _whole_months(days: DayRange) -> DayRange | None:
    """The whole months in a range; None if it has none."""
    first, after = date_of_day(days.first), days.last + 1
    if first.day > 1:
        first = _month_after(first)
    last = date_of_day(days.last)
    end = after if (last + timedelta(days=1)).day == 1 else day_of_date(last.replace(day=1))
    begin = day_of_date(first)
    return DayRange(begin, end - 1) if begin < end else None


def _month_after(day: date) -> date:
    return (day.replace(day=1) + timedelta(days=32)).replace(day=1)


def _summed(rows: sa.Subquery) -> list[sa.ColumnElement[Any]]:
    return [sa.func.sum(rows.c[name]).label(name) for name in Sums.__struct_fields__]


def _sums(row: Any) -> Sums:
    return Sums(*(int(getattr(row, name) or 0) for name in Sums.__struct_fields__))


def _in_time(rows: Iterable[Any], by: GroupBy) -> list[tuple[str, Sums]]:
    """Rows of days in their order, by day or by month."""
    found: dict[str, Sums] = {}
    for row in rows:
        text = date_of_day(row.group).isoformat()
        group = text[:7] if by is GroupBy.MONTH else text
        found[group] = added((found.get(group, Sums()), _sums(row)))
    return list(found.items())


def _page(found: list[Group], limit: int, offset: int) -> Groups:
    return Groups(found[:limit], offset + limit if len(found) > limit else None)
