"""Two operators at the same moment, each with a process of its own where the database takes more than one."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa

from proxy.administration.credits import Order, book
from proxy.administration.users import change
from proxy.errors import BadRequest, Conflict, InsufficientCredits
from proxy.identity.users import create_user
from proxy.ledger.decide import CreditType
from proxy.storage import database
from proxy.storage.tables import users
from tests.books import opened_books, reserve_of, settle_of

ROUNDS = 12


@asynccontextmanager
async def rival_of(books):
    """The same database seen by another process."""
    async with opened_books(books.url, is_second=True) as rival:
        yield rival


async def outcomes(*works) -> list:
    return await asyncio.gather(*works, return_exceptions=True)


def kinds(answers) -> list[str]:
    return sorted(type(answer).__name__ for answer in answers)


async def admins(books) -> set[str]:
    query = sa.select(users.c.id).where(users.c.is_admin, users.c.is_active)
    async with database.reading(books.engine) as connection:
        return set(await connection.scalars(query))


@pytest.mark.parametrize("loss", [{"is_admin": False}, {"is_active": False}])
async def test_admins_who_take_each_others_rank(books, loss):
    """Of two one stays, of any number at least one: the last is refused, whoever was first."""
    async with database.writing(books.engine) as connection:
        people = [(await create_user(connection, f"a{n}@example.com", is_admin=True)).id for n in range(3)]
    async with rival_of(books) as rival:
        for number in range(ROUNDS):
            one, two, three = people[number % 3 :] + people[: number % 3]
            await change(books.engine, one, three, loss)
            answers = await outcomes(
                change(books.engine, one, two, loss),
                change(rival.engine, two, one, loss),
            )
            assert kinds(answers) == ["Conflict", "Standing"]
            (left,) = await admins(books)
            answers = await outcomes(*(change(engine, left, left, loss) for engine in (books.engine, rival.engine)))
            assert kinds(answers) == ["Conflict", "Conflict"]
            assert await admins(books) == {left}
            for user_id in people:
                await change(books.engine, left, user_id, {"is_admin": True, "is_active": True})


async def test_changes_of_one_user_are_recorded_one_after_the_other(books):
    """What an event says was before is what the one before it left."""
    person = await books.person()
    async with rival_of(books) as rival:
        await asyncio.gather(
            *(
                change(engine, "boss", person.user_id, {"requests_per_minute": 2 * number + place})
                for number in range(ROUNDS)
                for place, engine in enumerate((books.engine, rival.engine))
            )
        )
    async with database.reading(books.engine) as connection:
        rows = (await connection.execute(sa.text("SELECT before, after FROM admin_events"))).all()
    steps = [tuple(_decoded(one)["requests_per_minute"] for one in row) for row in rows]
    chain, at = dict(steps), None
    for _ in steps:
        at = chain.pop(at)
    assert not chain
    assert at == (await books.row("users", person.user_id))["requests_per_minute"]


def _decoded(value):
    return json.loads(value) if isinstance(value, str) else value


async def test_one_top_up_from_two_sides(books):
    """Under one key it is booked once, and each side is told the same."""
    person = await books.person(100)
    async with rival_of(books) as rival:
        for number in range(ROUNDS):
            order = Order(type=CreditType.TOPUP, amount=7, idempotency_key=f"once-{number}")
            one, two = await outcomes(
                book(books.engine, books.ledger, "boss", person.user_id, order),
                book(rival.engine, rival.ledger, "other", person.user_id, order),
            )
            assert one.entry == two.entry
            assert one.is_replay is not two.is_replay
    assert (await books.row("wallets", person.wallet_id))["balance"] == 100 + 7 * ROUNDS
    assert len(await books.ids("admin_events")) == ROUNDS


@pytest.mark.parametrize(("amount", "other"), [(None, None), (None, 15), (15, 15), (20, 6)])
async def test_two_refunds_of_one_charge(books, amount, other):
    """Whichever is first, the second gets no more than is left, which here is too little."""
    person = await books.person(1000)
    async with rival_of(books) as rival:
        for _ in range(ROUNDS):
            reserve = reserve_of(person, 60)
            await books.ledger.reserve(reserve)
            await books.ledger.settle(settle_of(reserve, 25))
            answers = await outcomes(
                *(
                    book(
                        side.engine,
                        side.ledger,
                        "boss",
                        person.user_id,
                        Order(type=CreditType.REFUND, amount=nanos, request_id=reserve.id),
                    )
                    for side, nanos in ((books, amount), (rival, other))
                )
            )
            back = sum(answer.entry.amount for answer in answers if not isinstance(answer, Exception))
            assert (await books.row("reservations", reserve.id))["refunded"] == back <= 25
            assert {type(answer) for answer in answers if isinstance(answer, Exception)} <= {BadRequest}
            assert back == 25 or kinds(answers) == ["BadRequest", "Booked"]


async def test_an_adjustment_and_a_reserve(books):
    """There is enough for one of them: the other is refused, and the balance always covers what is held."""
    person = await books.person(100)
    order = Order(type=CreditType.ADJUSTMENT, amount=-60)
    seen = set()
    async with rival_of(books) as rival:
        for number in range(ROUNDS):
            reserve = reserve_of(person, 60)
            works = [
                books.ledger.reserve(reserve),
                book(rival.engine, rival.ledger, "boss", person.user_id, order),
            ]
            held, adjusted = await outcomes(*works)
            seen.add((type(held).__name__, type(adjusted).__name__))
            if isinstance(held, InsufficientCredits):
                back = Order(type=CreditType.ADJUSTMENT, amount=60)
                await book(books.engine, books.ledger, "boss", person.user_id, back)
            else:
                await books.ledger.settle(settle_of(reserve, 0))
            row = await books.row("wallets", person.wallet_id)
            assert (row["balance"], row["reserved"]) == (100, 0), number
    assert seen <= {("Reserved", "BadRequest"), ("InsufficientCredits", "Booked")}


async def test_a_key_that_was_used_for_something_else(books):
    """A conflict, from either side."""
    person = await books.person(100)
    async with rival_of(books) as rival:
        await book(
            books.engine,
            books.ledger,
            "boss",
            person.user_id,
            Order(type=CreditType.TOPUP, amount=7, idempotency_key="k"),
        )
        with pytest.raises(Conflict):
            await book(
                rival.engine,
                rival.ledger,
                "boss",
                person.user_id,
                Order(type=CreditType.ADJUSTMENT, amount=7, idempotency_key="k"),
            )
