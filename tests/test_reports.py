"""Sums over calls, by whatever they are asked for, on both databases."""

import itertools
from datetime import date

import msgspec
import pytest

from proxy import reports
from proxy.errors import BadRequest
from proxy.ledger.decide import Credit, CreditType, Receipt, Release
from proxy.ledger.rollup import date_of_day, day_of_date
from proxy.reports import DayRange, Group, GroupBy, Sums
from proxy.shown.usage import wallet_stats
from proxy.storage import database
from proxy.units import MICROS_PER_DAY, now_micros
from tests.books import Books, Person, release_of, reserve_of, settle_of

TODAY = now_micros() // MICROS_PER_DAY
NOON = TODAY * MICROS_PER_DAY + MICROS_PER_DAY // 2


async def call(books: Books, person: Person, tokens: int, *, days_ago: int = 0, provider: str = "fake", **asked) -> str:
    """A settled call, some days ago; returns its id."""
    reserve = reserve_of(person, 1000, **asked)
    settle = settle_of(reserve, tokens)
    receipt = msgspec.structs.replace(settle.receipt, provider=provider)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(msgspec.structs.replace(settle, receipt=receipt))
    if days_ago:
        ended = NOON - days_ago * MICROS_PER_DAY
        await books.execute("UPDATE reservations SET settled_at = :ended WHERE id = :id", ended=ended, id=reserve.id)
        await books.execute("DELETE FROM usage_days")
        await books.execute(
            "INSERT INTO usage_days (wallet_id, day, user_id, key_id, model, provider, calls, output_tokens, charged,"
            f" provider_cost) SELECT wallet_id, settled_at / {MICROS_PER_DAY}, user_id, COALESCE(key_id, ''),"
            " original_model, provider, COUNT(*), SUM(charged), SUM(charged), SUM(provider_cost) FROM reservations"
            " WHERE state = 'settled' GROUP BY 1, 2, 3, 4, 5, 6"
        )
        await books.recount_months()
    return reserve.id


async def totals(books: Books, days: DayRange, **whose) -> Sums:
    async with database.reading(books.engine) as connection:
        return await reports.read_totals(connection, days, **whose)


async def groups(books: Books, days: DayRange, by: GroupBy, **which) -> reports.Groups:
    async with database.reading(books.engine) as connection:
        return await reports.read_groups(connection, days, by, **which)


def charged(groups: list[Group]) -> dict[str, int]:
    return {group.group: group.sums.charged for group in groups}


async def test_calls_are_added_up_by_whatever_is_asked(books):
    """Days and months in their order, everything else with the highest charges first; with the names that there are."""
    one, other = await books.person(10_000), await books.person(10_000)
    await call(books, one, 100, original_model="a", days_ago=40)
    await call(books, one, 30, original_model="b", key_id=None, days_ago=1)
    await call(books, other, 5, original_model="a", provider="second", days_ago=1)
    days = DayRange(TODAY - 50, TODAY)
    found = {by: (await groups(books, days, by)).items for by in GroupBy}
    before, yesterday = (date_of_day(TODAY - ago).isoformat() for ago in (40, 1))
    assert charged(found[GroupBy.DAY]) == {before: 100, yesterday: 35}
    assert charged(found[GroupBy.MONTH]) == (
        {before[:7]: 100, yesterday[:7]: 35} if before[:7] != yesterday[:7] else {before[:7]: 135}
    )
    assert list(charged(found[GroupBy.MODEL]).items()) == [("a", 105), ("b", 30)]
    assert list(charged(found[GroupBy.PROVIDER]).items()) == [("fake", 130), ("second", 5)]
    assert [(group.group, group.name) for group in found[GroupBy.USER]] == [
        (one.user_id, one.email),
        (other.user_id, other.email),
    ]
    assert list(charged(found[GroupBy.KEY]).items()) == [(one.key_id, 100), ("", 30), (other.key_id, 5)]
    assert [group.name for group in found[GroupBy.KEY]] == ["", None, ""]
    assert (await totals(books, days)).calls == 3


async def test_a_range_has_whole_days_with_its_first_and_its_last(books):
    """What ended outside of it does not count."""
    person = await books.person(10_000)
    for days_ago in (3, 2, 1):
        await call(books, person, days_ago, days_ago=days_ago)
    assert (await totals(books, DayRange(TODAY - 3, TODAY - 2))).charged == 5
    assert (await totals(books, DayRange(TODAY - 1, TODAY))).charged == 1
    assert await totals(books, DayRange(TODAY + 1, TODAY + 2)) == Sums()


async def test_whole_months_and_the_days_around_them_are_the_days(books):
    """However a range lies to the months, it has the sums of its days, by month too."""
    person = await books.person(10_000)
    ago = [1, 20, 31, 45, 60, 62, 75, 93, 100]
    for number, days_ago in enumerate(ago):
        await call(books, person, 2**number, days_ago=days_ago)
    ended = [TODAY - days_ago for days_ago in ago]
    for first, last in itertools.product(range(TODAY - 101, TODAY + 1, 9), range(TODAY - 101, TODAY + 1, 8)):
        if first > last:
            continue
        days = DayRange(first, last)
        expected = sum(2**number for number, day in enumerate(ended) if first <= day <= last)
        assert (await totals(books, days)).charged == expected
        months = (await groups(books, days, GroupBy.MONTH)).items
        assert sum(charged(months).values()) == expected
        assert {group.group for group in months} == {
            date_of_day(day).isoformat()[:7] for day in ended if first <= day <= last
        }


async def test_a_wallet_sees_its_own(books):
    """Whatever others do."""
    one, other = await books.person(10_000), await books.person(10_000)
    await call(books, one, 7)
    await call(books, other, 9)
    days = DayRange(TODAY - 1, TODAY + 1)
    assert (await totals(books, days, wallet_id=one.wallet_id)).charged == 7
    by_key = await groups(books, days, GroupBy.KEY, wallet_id=one.wallet_id)
    assert charged(by_key.items) == {one.key_id: 7}


async def test_what_a_wallet_spent_leaves_out_what_was_not_charged(books):
    """A day, a model and a key with nothing but a released call."""
    person = await books.person(10_000)
    reserve = reserve_of(person, 40)
    await books.ledger.reserve(reserve)
    await books.ledger.release(release_of(reserve))
    stats = await wallet_stats(books.engine, person.wallet_id, None, None)
    assert (stats.total.calls, stats.by_day, stats.by_model, stats.by_key) == (0, [], [], [])
    await call(books, person, 7)
    stats = await wallet_stats(books.engine, person.wallet_id, None, None)
    assert [one.charged for one in (*stats.by_day, *stats.by_model, *stats.by_key)] == ["0.000000007"] * 3


@pytest.mark.parametrize("by", [GroupBy.DAY, GroupBy.MODEL])
async def test_groups_are_paged(books, by):
    """Each comes once, and the last page says that it is."""
    person = await books.person(10_000)
    for number in range(5):
        await call(books, person, 10 - number, original_model=f"model-{number}", days_ago=9 - number)
    days = DayRange(TODAY - 50, TODAY)
    seen, offset = [], 0
    while offset is not None:
        page = await groups(books, days, by, limit=2, offset=offset)
        seen.append([group.sums.charged for group in page.items])
        offset = page.next_offset
    assert seen == [[10, 9], [8, 7], [6]]


async def test_the_margin_is_what_is_left(books):
    """Shortfalls, refunds and what nobody paid for are told apart."""
    person = await books.person(100)
    paid = reserve_of(person, 40)
    await books.ledger.reserve(paid)
    settle = settle_of(paid, 40)
    receipt = msgspec.structs.replace(settle.receipt, markup_bps=5000)
    await books.ledger.settle(msgspec.structs.replace(settle, cost=60, receipt=receipt))
    await books.ledger.credit(
        Credit(wallet_id=person.wallet_id, type=CreditType.REFUND, amount=6, description="test", reservation_id=paid.id)
    )
    dear = reserve_of(person, 46)
    await books.ledger.reserve(dear)
    await books.ledger.settle(settle_of(dear, 50))
    lost, refused = reserve_of(person, 0), reserve_of(person, 0)
    for reserve, outcome in ((lost, "perhaps_billed"), (refused, "nothing_delivered")):
        await books.ledger.reserve(reserve)
        receipt = Receipt(outcome=outcome, provider="fake")
        await books.ledger.release(Release(id=reserve.id, wallet_id=person.wallet_id, receipt=receipt))
    sums = await totals(books, DayRange(TODAY - 1, TODAY + 1))
    assert (sums.calls, sums.charged, sums.shortfall, sums.provider_cost) == (2, 106, 4, 90)
    assert (sums.markup, sums.refunded, sums.margin) == (20, 6, 10)
    assert (sums.released, sums.perhaps_billed, sums.average) == (2, 1, 53)


def test_an_average_is_rounded_and_that_of_nothing_is_nothing():
    """Half up, to a whole nano-credit."""
    assert Sums().average == 0
    assert Sums(calls=2, charged=3).average == 2
    assert Sums(calls=3, charged=4).average == 1


def day(text: str) -> int:
    return day_of_date(date.fromisoformat(text))


NOW = day("2026-11-24") * MICROS_PER_DAY + 5

RANGES = {
    (None, None, False): ("2026-10-26", "2026-11-24"),
    (None, "2026-03-01", False): ("2026-01-31", "2026-03-01"),
    ("2026-11-24", None, False): ("2026-11-24", "2026-11-24"),
    ("2024-02-29", "2024-03-01", True): ("2024-02-29", "2024-03-01"),
    (None, None, True): ("2025-12-01", "2026-11-24"),
    (None, "2026-12-31", True): ("2026-01-01", "2026-12-31"),
    (None, "2026-01-31", True): ("2025-02-01", "2026-01-31"),
    (None, "0001-01-20", False): ("0001-01-01", "0001-01-20"),
    (None, "0001-06-01", True): ("0001-01-01", "0001-06-01"),
}


@pytest.mark.parametrize(("asked", "expected"), RANGES.items())
def test_a_range_is_of_the_dates_that_are_asked_for(asked, expected):
    """Thirty days, or twelve months, where nothing is said."""
    first, last, months = asked
    found = reports.parse_range(first, last, NOW, months=months)
    assert (found.first, found.last) == tuple(map(day, expected))
    assert found.until - found.since == (found.last - found.first + 1) * MICROS_PER_DAY


@pytest.mark.parametrize(
    ("first", "last", "param"),
    [
        ("yesterday", None, "from"),
        ("2026-02-30", None, "from"),
        ("20260101", None, "from"),
        ("2026-W01-1", None, "from"),
        ("٢٠٢٦-٠١-٠١", None, "from"),
        (None, "2026-1-1", "to"),
        (None, "3000-01-01", "to"),
        (None, "", "to"),
        ("2026-02-02", "2026-02-01", "from"),
        ("2026-11-25", None, "from"),
        ("2000-01-01", "2026-01-01", "from"),
    ],
)
def test_a_range_that_is_none_is_refused(first, last, param):
    """With the parameter that is wrong."""
    with pytest.raises(BadRequest) as caught:
        reports.parse_range(first, last, NOW)
    assert caught.value.param == param
