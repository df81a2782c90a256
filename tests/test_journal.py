"""The journal a page at a time, filtered, on both databases."""

import pytest

from proxy import journal
from proxy.journal import Filter, Page
from proxy.ledger.decide import Credit, CreditType
from proxy.storage import database
from proxy.units import MICROS_PER_DAY
from tests.books import Books, Person, release_of, reserve_of, settle_of

EVERYTHING = Filter()


async def call(books: Books, person: Person, tokens: int = 1, **asked) -> str:
    reserve = reserve_of(person, tokens, **asked)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(reserve, tokens))
    return reserve.id


async def refund(books: Books, person: Person, request_id: str, nanos: int) -> None:
    await books.ledger.credit(
        Credit(
            wallet_id=person.wallet_id,
            type=CreditType.REFUND,
            amount=nanos,
            description="goodwill",
            reservation_id=request_id,
        )
    )


async def page_of(books: Books, person: Person, wanted: Filter, **more: int | None) -> Page:
    async with database.reading(books.engine) as connection:
        span = await journal.span(connection, person.wallet_id, wanted)
        return await journal.read_page(connection, person.wallet_id, wanted, span, **{"limit": 50, **more})


async def numbers(books: Books, person: Person, wanted: Filter, **more: int) -> list[int]:
    """The numbers of all transactions that a filter finds, page by page."""
    found, before = [], None
    while True:
        page = await page_of(books, person, wanted, before=before, **more)
        found += [entry.seq for entry in page.entries]
        if page.before is None:
            return found
        assert before is None or page.before < before
        before = page.before


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
async def test_every_transaction_comes_once_newest_first(books, limit):
    """However small the pages are; and only the wallet's own."""
    person, other = await books.person(1000), await books.person(1000)
    for _ in range(5):
        await call(books, person)
        await call(books, other)
    assert await numbers(books, person, EVERYTHING, limit=limit) == [6, 5, 4, 3, 2, 1]


async def test_a_transaction_knows_its_call(books):
    """The key and the model of charges and refunds; nothing for what is booked by hand."""
    person = await books.person(1000)
    request_id = await call(books, person, 7, original_model="a")
    await refund(books, person, request_id, 2)
    back, charge, topup = (await page_of(books, person, EVERYTHING)).entries
    assert [(entry.type, entry.amount, entry.key_id, entry.model) for entry in (back, charge, topup)] == [
        ("refund", 2, person.key_id, "a"),
        ("deduction", -7, person.key_id, "a"),
        ("topup", 1000, None, None),
    ]
    assert (charge.balance_before, charge.balance_after, charge.reservation_id) == (1000, 993, request_id)


async def test_transactions_are_filtered_by_what_they_are(books):
    """By type, key and model, and by all of them at once."""
    person = await books.person(1000)
    request_id = await call(books, person, 7, original_model="a")  # 2
    await call(books, person, original_model="b")  # 3
    await call(books, person, original_model="a", key_id=None)  # 4
    await refund(books, person, request_id, 2)  # 5
    await books.top_up(person.wallet_id, 5)  # 6
    assert await numbers(books, person, Filter(type="topup")) == [6, 1]
    assert await numbers(books, person, Filter(type="deduction")) == [4, 3, 2]
    assert await numbers(books, person, Filter(type="adjustment")) == []
    assert await numbers(books, person, Filter(model="a")) == [5, 4, 2]
    assert await numbers(books, person, Filter(key_id=person.key_id), limit=1) == [5, 3, 2]
    assert await numbers(books, person, Filter(key_id=person.key_id, model="a", type="deduction")) == [2]
    assert await numbers(books, person, Filter(model="none")) == []
    stranger = await books.person()
    assert await numbers(books, person, Filter(key_id=stranger.key_id)) == []


async def aged(books: Books, person: Person) -> int:
    """A journal with a transaction a day, of which the last is today's; returns the first's instant."""
    for number in range(1, 11):
        await call(books, person, original_model=f"model-{number % 2}")
    drop = "DROP TRIGGER append_only_update" if books.url.startswith("sqlite") else None
    await books.execute(drop or "DROP TRIGGER append_only ON credit_transactions")
    day = MICROS_PER_DAY
    await books.execute(
        "UPDATE credit_transactions SET created_at = created_at - (11 - seq) * :day WHERE wallet_id = :id",
        day=day,
        id=person.wallet_id,
    )
    await books.execute(
        "UPDATE reservations SET settled_at = (SELECT created_at FROM credit_transactions t"
        " WHERE t.reservation_id = reservations.id AND t.type = 'deduction')"
    )
    await database.migrate(books.engine, "0003")
    await database.migrate(books.engine)
    return (await page_of(books, person, EVERYTHING)).entries[-1].created_at


async def test_transactions_are_filtered_by_date(books):
    """From one instant on, and before another."""
    person = await books.person(1000)
    first = await aged(books, person)
    day = MICROS_PER_DAY
    assert await numbers(books, person, Filter(since=first + 3 * day)) == [11, 10, 9, 8, 7, 6, 5, 4]
    assert await numbers(books, person, Filter(until=first + 1)) == [1]
    assert await numbers(books, person, Filter(until=first)) == []
    between = Filter(since=first + day, until=first + 4 * day + day // 2)
    assert await numbers(books, person, between, limit=2) == [5, 4, 3, 2]
    odd = Filter(since=first + day, until=first + 6 * day, model="model-1")
    assert await numbers(books, person, odd, limit=1) == [6, 4, 2]
    assert await numbers(books, person, Filter(since=first + 400 * day)) == []
    assert await numbers(books, person, Filter(until=-day)) == []


async def test_a_page_looks_at_so_many_and_says_where_to_go_on(books):
    """What is rare is found in the end, over pages that may be empty."""
    person = await books.person(1000)
    await call(books, person, original_model="rare")
    for _ in range(7):
        await call(books, person)
    await call(books, person, original_model="rare")
    for _ in range(7):
        await call(books, person)
    assert await numbers(books, person, Filter(model="rare"), scanned_max=3) == [10, 2]
    assert await numbers(books, person, Filter(type="deduction"), limit=2, scanned_max=3) == list(range(17, 1, -1))
    assert (await page_of(books, person, Filter(model="rare"), scanned_max=3)).entries == []


async def test_nobody_and_nothing_have_no_pages(books):
    """A wallet that is not, and one without a transaction."""
    person = await books.person()
    assert await page_of(books, person, EVERYTHING) == Page([], None)
    assert await page_of(books, Person("u", "nobody", "k", "s", "e"), EVERYTHING) == Page([], None)


async def test_calls_are_listed_newest_first(books):
    """Those too that are open or were released; of the wallet alone."""
    person, other = await books.person(1000), await books.person(1000)
    calls = [reserve_of(person, 5) for _ in range(3)]
    for reserve in calls:
        await books.ledger.reserve(reserve)
        await books.ledger.reserve(reserve_of(other, 5))
    await books.ledger.settle(settle_of(calls[0], 3))
    await books.ledger.release(release_of(calls[1]))
    expected = sorted(
        ((reserve.id, state) for reserve, state in zip(calls, ("settled", "released", "open"), strict=True)),
        reverse=True,
    )
    async with database.reading(books.engine) as connection:
        rows = await journal.read_calls(connection, person.wallet_id, limit=2)
        rest = await journal.read_calls(connection, person.wallet_id, limit=2, before=rows[-1].id)
    assert [(row.id, row.state) for row in (*rows, *rest)] == expected
