"""What calls add up to by day, through the real ledger on both databases; every test's books are audited at its end."""

from datetime import date

import msgspec
import pytest
import sqlalchemy as sa

from proxy.ledger.decide import Credit, CreditType, Expire, Receipt, Release
from proxy.ledger.rollup import FIGURE_MAX, day_of, tokens_of
from proxy.storage import database
from proxy.units import MICROS_PER_DAY, Usage, new_id
from tests.books import Books, release_of, reserve_of, settle_of, store_at

NOTHING = {
    "calls": 0,
    "input_tokens": 0,
    "cached_input_tokens": 0,
    "output_tokens": 0,
    "charged": 0,
    "provider_cost": 0,
    "shortfall": 0,
    "refunded": 0,
    "released": 0,
    "perhaps_billed": 0,
    "perhaps_billed_amount": 0,
}


async def days(books: Books, table: str = "usage_days") -> list[dict]:
    """All rows, in the order of their primary key."""
    async with database.reading(books.engine) as connection:
        rows = await connection.execute(
            sa.text(f"SELECT * FROM {table} ORDER BY wallet_id, day, user_id, key_id, model, provider")
        )
        return [dict(row) for row in rows.mappings()]


def day_of_date(text: str) -> int:
    return (date.fromisoformat(text) - date(1970, 1, 1)).days


def sums(row: dict) -> dict:
    """What is not nothing."""
    return {name: row[name] for name in NOTHING if row[name]}


async def test_calls_of_a_day_are_one_row(books):
    """Of the same key, model and provider; another key's or model's are others, and so are those without a key."""
    person = await books.person(1000)
    for tokens in (3, 4):
        reserve = reserve_of(person, 10)
        await books.ledger.reserve(reserve)
        await books.ledger.settle(settle_of(reserve, tokens))
    other = reserve_of(person, 10, key_id=None, original_model="other")
    await books.ledger.reserve(other)
    await books.ledger.settle(settle_of(other, 5))
    first, second = await days(books)
    today = day_of((await books.row("reservations", other.id))["settled_at"])
    assert [first[name] for name in ("wallet_id", "day", "user_id", "key_id", "model", "provider")] == [
        person.wallet_id,
        today,
        person.user_id,
        "",
        "other",
        "fake",
    ]
    assert (second["key_id"], second["model"]) == (person.key_id, "model")
    assert sums(first) == {"calls": 1, "output_tokens": 5, "charged": 5, "provider_cost": 5}
    assert sums(second) == {"calls": 2, "output_tokens": 7, "charged": 7, "provider_cost": 7}


async def test_an_open_call_is_not_counted(books):
    """What it costs nobody knows."""
    person = await books.person(1000)
    await books.ledger.reserve(reserve_of(person, 10))
    assert await days(books) == []


async def test_tokens_are_counted_by_class(books):
    """All that went in, whatever its class, of that what came from a cache, and all that came out."""
    person = await books.person(1000)
    reserve = reserve_of(person, 100)
    await books.ledger.reserve(reserve)
    usage = Usage(input=1, cached_input=2, cache_write=4, audio_input=8, output=16, audio_output=32, reasoning=5)
    settle = settle_of(reserve, 63)
    receipt = msgspec.structs.replace(settle.receipt, usage=msgspec.json.encode(usage).decode())
    await books.ledger.settle(msgspec.structs.replace(settle, receipt=receipt))
    [row] = await days(books)
    assert sums(row) == {
        "calls": 1,
        "input_tokens": 15,
        "cached_input_tokens": 2,
        "output_tokens": 48,
        "charged": 63,
        "provider_cost": 63,
    }


@pytest.mark.parametrize("outcome", ["perhaps_billed", "undelivered", "nothing_delivered", "caller_gone"])
async def test_what_was_released_is_counted_apart(books, outcome):
    """With what it had reserved, where the provider may have billed it."""
    person = await books.person(1000)
    reserve = reserve_of(person, 10)
    await books.ledger.reserve(reserve)
    receipt = Receipt(outcome=outcome, provider="fake")
    release = Release(id=reserve.id, wallet_id=person.wallet_id, receipt=receipt)
    await books.ledger.release(release)
    await books.ledger.release(release)
    [row] = await days(books)
    is_perhaps_billed = outcome in {"perhaps_billed", "undelivered"}
    more = {"perhaps_billed": 1, "perhaps_billed_amount": 10} if is_perhaps_billed else {}
    assert (row["provider"], sums(row)) == ("fake", {"released": 1, **more})


async def test_a_late_settle_takes_back_what_the_expiry_counted(books):
    """Also when the expiry was on an earlier day: the charge counts on the day on which it is settled."""
    person = await books.person(1000)
    reserve = reserve_of(person, 10)
    await books.ledger.reserve(reserve)
    await books.ledger.expire(Expire(id=reserve.id, wallet_id=person.wallet_id))
    [row] = await days(books)
    assert (row["provider"], sums(row)) == ("", {"released": 1, "perhaps_billed": 1, "perhaps_billed_amount": 10})
    await books.execute("UPDATE reservations SET settled_at = settled_at - :day", day=MICROS_PER_DAY)
    await books.execute("UPDATE usage_days SET day = day - 1")
    await books.recount_months()
    await books.ledger.settle(settle_of(reserve, 1200))
    expired, settled = await days(books)
    assert (expired["day"], sums(expired)) == (row["day"] - 1, {})
    assert (settled["day"], settled["provider"]) == (row["day"], "fake")
    assert sums(settled) == {
        "calls": 1,
        "output_tokens": 1200,
        "charged": 1000,
        "provider_cost": 1200,
        "shortfall": 200,
    }


async def test_an_expiry_and_its_late_settle_in_one_batch_are_a_settle(books):
    """What is added and taken back in one transaction leaves nothing."""
    person = await books.person(1000)
    reserve = reserve_of(person, 10)
    await books.ledger.reserve(reserve)
    store = store_at(books.url, books.engine)
    expire = Expire(id=reserve.id, wallet_id=person.wallet_id)
    await store.transact([expire, settle_of(reserve, 7)], owner_id=books.lease.id)
    await store.aclose()
    expired, settled = await days(books)
    assert (sums(expired), sums(settled)["charged"]) == ({}, 7)


async def test_a_refund_counts_on_the_day_of_its_charge(books):
    """By hand or because the answer was not delivered, once each however often it is sent."""
    person = await books.person(1000)
    by_hand, undelivered = reserve_of(person, 10), reserve_of(person, 20)
    for reserve in (by_hand, undelivered):
        await books.ledger.reserve(reserve)
        await books.ledger.settle(settle_of(reserve, 10))
    await books.execute("UPDATE reservations SET settled_at = settled_at - :day", day=MICROS_PER_DAY)
    await books.execute("UPDATE usage_days SET day = day - 1")
    await books.recount_months()
    refund = Credit(
        wallet_id=person.wallet_id,
        type=CreditType.REFUND,
        amount=4,
        description="test",
        idempotency_key=new_id("idem"),
        reservation_id=by_hand.id,
    )
    for _ in range(2):
        await books.ledger.credit(refund)
        await books.ledger.release(release_of(undelivered, is_undelivered=True))
    [row] = await days(books)
    assert sums(row) == {"calls": 2, "output_tokens": 20, "charged": 20, "provider_cost": 20, "refunded": 14}


async def test_what_is_replayed_is_counted_once(books):
    """A settle that was sent again adds nothing."""
    person = await books.person(1000)
    reserve = reserve_of(person, 10)
    await books.ledger.reserve(reserve)
    for _ in range(3):
        await books.ledger.settle(settle_of(reserve, 7))
    [row] = await days(books)
    assert sums(row)["calls"] == 1


async def test_months_add_their_days_up(books):
    """Under the first of each; what one batch counts on two days of a month is one row of it."""
    person = await books.person(1000)
    calls = [reserve_of(person, 10) for _ in range(3)]
    for call in calls:
        await books.ledger.reserve(call)
        await books.ledger.settle(settle_of(call, 10))
    today = (await days(books))[0]["day"]
    for call, day in zip(
        calls, (day_of_date("2026-01-31"), day_of_date("2026-02-01"), day_of_date("2026-02-28")), strict=True
    ):
        instant = day * MICROS_PER_DAY + 5
        await books.execute("UPDATE reservations SET settled_at = :at WHERE id = :id", at=instant, id=call.id)
    await database.migrate(books.engine, "0003")
    await database.migrate(books.engine)
    refunds = [release_of(call, is_undelivered=True) for call in calls]
    store = store_at(books.url, books.engine)
    await store.transact(refunds, owner_id=books.lease.id)
    await store.aclose()
    assert today > day_of_date("2026-02-28")
    expected = {"output_tokens": 10, "charged": 10, "provider_cost": 10, "refunded": 10}
    assert [sums(row) for row in await days(books)] == [{"calls": 1, **expected}] * 3
    january, february = await days(books, "usage_months")
    assert (january["day"], february["day"]) == (day_of_date("2026-01-01"), day_of_date("2026-02-01"))
    assert sums(january) == {"calls": 1, **expected}
    assert sums(february) == {"calls": 2, **{name: 2 * sum_ for name, sum_ in expected.items()}}


async def test_nonsense_of_a_provider_never_refuses_a_charge(books):
    """Costs and tokens beyond all reason, time after time, are booked; their sums take a bounded part of each."""
    person = await books.person(1000)
    for _ in range(3):
        reserve = reserve_of(person, 10)
        await books.ledger.reserve(reserve)
        settle = msgspec.structs.replace(settle_of(reserve, 2**62), tokens=1)
        settled = await books.ledger.settle(settle)
        await books.top_up(person.wallet_id, settled.charged)
    [row] = await days(books)
    assert sums(row) == {
        "calls": 3,
        "output_tokens": 3 * FIGURE_MAX,
        "charged": 3000,
        "provider_cost": 3 * FIGURE_MAX,
        "shortfall": 3 * FIGURE_MAX,
    }


@pytest.mark.parametrize("usage", [None, "", "5", '{"input": "many"}', '{"input": 1'])
def test_a_usage_that_cannot_be_read_has_no_tokens(usage):
    """A charge stands whatever its receipt says."""
    assert tokens_of(usage) == (0, 0, 0)


async def test_what_happened_before_there_were_sums_is_counted(books):
    """The migration makes of the calls that are there what the ledger would have made of them."""
    person = await books.person(10_000)
    calls = [reserve_of(person, 50, original_model=f"model-{number % 2}") for number in range(7)]
    for number, call in enumerate(calls):
        await books.ledger.reserve(call)
        await books.ledger.settle(settle_of(call, 40 + number))
    await books.ledger.release(release_of(calls[0], is_undelivered=True))
    open_, released, expired, lost = (reserve_of(person, 30) for _ in range(4))
    for call in (open_, released, expired, lost):
        await books.ledger.reserve(call)
    await books.ledger.release(release_of(released))
    await books.ledger.expire(Expire(id=expired.id, wallet_id=person.wallet_id))
    undelivered = Receipt(outcome="undelivered", provider="fake")
    await books.ledger.release(Release(id=lost.id, wallet_id=person.wallet_id, receipt=undelivered))
    huge = reserve_of(person, 1, key_id=None)
    await books.ledger.reserve(huge)
    await books.ledger.settle(settle_of(huge, 2**62))
    kept = await days(books), await days(books, "usage_months")
    await database.migrate(books.engine, "0003")
    await database.migrate(books.engine)
    assert (await days(books), await days(books, "usage_months")) == kept
    assert [len(rows) for rows in kept] == [5, 5]
