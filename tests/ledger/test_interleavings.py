"""Two transactions on two connections to PostgreSQL, one stopped by hand at each of its statements in turn.

Wherever it is stopped the other one goes on until it ends or waits for the wallet's lock; then the first goes on. What
must hold, holds for every place and with the parts exchanged. Without the lock it does not, and that is tested too.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import pytest
import sqlalchemy as sa
import structlog

from proxy.ledger.decide import (
    Credit,
    Credited,
    CreditType,
    Expire,
    Operation,
    Outcome,
    Refusal,
    Refused,
    Released,
    Reserved,
    Settled,
)
from proxy.ledger.store import PostgresStore
from proxy.storage import database
from tests.books import Books, Person, opened_books, reserve_of, settle_of
from tests.ledger.stepping import FENCE, LOCK, SteppedStore

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

IS_LOCKED = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.fixture(autouse=True)
def logged():
    """What is logged, as entries."""
    with structlog.testing.capture_logs() as entries:
        yield entries


class Seen(NamedTuple):
    """What the two transactions answered, and whether the second one had to wait for the first."""

    stopped: Outcome
    other: Outcome
    has_waited: bool


async def interleaved(
    books: Books, stop: int, first: Operation, second: Operation, *, is_unlocked: bool = False
) -> tuple[Seen, int]:
    """Stop `first` before its statement `stop`, run `second` as far as it goes, let both end.

    The second value is the number of statements that `first` has.
    """
    stopped = SteppedStore(books.engine, stop=stop, is_unlocked=is_unlocked)
    other = SteppedStore(books.engine, is_unlocked=is_unlocked)
    one = asyncio.create_task(stopped.transact([first], owner_id=books.lease.id))
    await stopped.is_there.wait()
    two = asyncio.create_task(other.transact([second], owner_id=books.lease.id))
    has_waited = await is_waiting(books, two)
    stopped.go.set()
    [answered], [other_answered] = await asyncio.gather(one, two)
    await asyncio.gather(stopped.aclose(), other.aclose())
    return Seen(answered, other_answered, has_waited), len(stopped.statements)


async def is_waiting(books: Books, task: asyncio.Task) -> bool:
    """Whether `task` comes to wait for a lock; false once it has ended."""
    while not task.done():
        async with database.reading(books.engine) as connection:
            if await connection.scalar(sa.text(IS_LOCKED)):
                return True
    return False


async def everywhere(
    books: Books, start: Callable[[], Awaitable[tuple[Operation, Operation]]], *, is_unlocked: bool = False
) -> AsyncIterator[tuple[bool, Seen]]:
    """What is seen with the first stopped at each place, and whether it had the lock there; `start` sets the scene."""
    stop, count = 0, 1
    while stop <= count:
        first, second = await start()
        seen, count = await interleaved(books, stop, first, second, is_unlocked=is_unlocked)
        yield LOCK < stop < count, seen
        stop += 1
    assert count >= LOCK + 3, "begin, lock, read, write if there is anything to write, commit"


async def counters(books: Books, person: Person) -> tuple[int, int, int]:
    wallet = await books.row("wallets", person.wallet_id)
    return wallet["balance"], wallet["reserved"], wallet["seq"]


# ---- the pairs


async def test_a_replay_beside_its_original(books):
    """One of the two reserves and the other one is told so: never a refusal, never two holds."""
    people: list[Person] = []

    async def start() -> tuple[Operation, Operation]:
        people.append(await books.person(100))
        reserve = reserve_of(people[-1], 60)
        return reserve, reserve

    async for has_lock, seen in everywhere(books, start):
        assert {seen.stopped, seen.other} == {Reserved(60), Reserved(60, is_replay=True)}
        assert seen.has_waited == has_lock
        assert await counters(books, people[-1]) == (100, 60, 1)


async def one_of_two_gets_the_last_credits(books: Books, *, is_unlocked: bool = False) -> None:
    """Reserves of 60 and of 70 with 100 available, at every place: one is granted, the other refused."""
    people: list[Person] = []

    async def start() -> tuple[Operation, Operation]:
        people.append(await books.person(100))
        return reserve_of(people[-1], 60), reserve_of(people[-1], 70)

    async for has_lock, seen in everywhere(books, start, is_unlocked=is_unlocked):
        granted, refused = sorted((seen.stopped, seen.other), key=lambda outcome: isinstance(outcome, Refused))
        assert isinstance(granted, Reserved)
        assert isinstance(refused, Refused)
        assert refused.reason == Refusal.INSUFFICIENT_CREDITS
        assert is_unlocked or seen.has_waited == has_lock
        assert await counters(books, people[-1]) == (100, granted.amount, 1)


async def test_two_reserves_of_the_last_credits(books):
    """Exactly one is granted."""
    await one_of_two_gets_the_last_credits(books)


async def test_without_the_lock_both_get_the_last_credits(database_url):
    """The control: leave the lock out and what the test before this one asserts is false."""
    async with opened_books(database_url) as books:
        with pytest.raises(AssertionError):
            await one_of_two_gets_the_last_credits(books, is_unlocked=True)
        report = await books.audit()
    assert "I2" in {finding.name for finding in report.violations}


@pytest.mark.parametrize("is_settle_first", [True, False])
async def test_a_settle_beside_the_sweep(books, is_settle_first):
    """The call is charged once and in full, late if the sweep was first, and nothing stays held."""
    people: list[Person] = []

    async def start() -> tuple[Operation, Operation]:
        people.append(await books.person(100))
        reserve = reserve_of(people[-1], 60)
        await books.ledger.reserve(reserve)
        pair = settle_of(reserve, 25), Expire(id=reserve.id, wallet_id=reserve.wallet_id)
        return pair if is_settle_first else pair[::-1]

    orders = set()
    async for has_lock, seen in everywhere(books, start):
        settled, expired = (seen.stopped, seen.other) if is_settle_first else (seen.other, seen.stopped)
        assert settled == Settled(charged=25, shortfall=0, balance=75, is_late=settled.is_late)
        assert expired == Released(is_replay=not settled.is_late)
        assert seen.has_waited == has_lock
        assert await counters(books, people[-1]) == (75, 0, 2)
        orders.add(settled.is_late)
    assert orders == {True, False}


@pytest.mark.parametrize("is_top_up_first", [True, False])
async def test_a_top_up_beside_a_reserve(books, is_top_up_first):
    """No credit is lost, and the reserve is granted exactly when the top-up was there before it."""
    people: list[Person] = []

    async def start() -> tuple[Operation, Operation]:
        people.append(await books.person(50))
        top_up = Credit(wallet_id=people[-1].wallet_id, type=CreditType.TOPUP, amount=50, description="test")
        pair = top_up, reserve_of(people[-1], 60)
        return pair if is_top_up_first else pair[::-1]

    orders = set()
    async for has_lock, seen in everywhere(books, start):
        credited, reserved = (seen.stopped, seen.other) if is_top_up_first else (seen.other, seen.stopped)
        assert isinstance(credited, Credited)
        assert seen.has_waited == has_lock
        is_granted = reserved == Reserved(60)
        assert await counters(books, people[-1]) == (100, 60 if is_granted else 0, 2)
        orders.add(is_granted)
    assert orders == {True, False}


@pytest.mark.parametrize("is_settle_first", [True, False])
async def test_a_settle_beside_a_reserve(books, is_settle_first):
    """What one call frees the next one may have, and what neither has is never held."""
    people: list[Person] = []

    async def start() -> tuple[Operation, Operation]:
        people.append(await books.person(100))
        held = reserve_of(people[-1], 60)
        await books.ledger.reserve(held)
        pair = settle_of(held, 10), reserve_of(people[-1], 90)
        return pair if is_settle_first else pair[::-1]

    orders = set()
    async for has_lock, seen in everywhere(books, start):
        settled, reserved = (seen.stopped, seen.other) if is_settle_first else (seen.other, seen.stopped)
        assert settled.charged == 10
        assert seen.has_waited == has_lock
        is_granted = reserved == Reserved(90)
        assert await counters(books, people[-1]) == (90, 90 if is_granted else 0, 2)
        orders.add(is_granted)
    assert orders == {True, False}


# ---- the fence, which takes no wallet's lock


async def test_a_reserve_beside_its_fence(books):
    """Fenced before it looked it is refused; fenced after, it is granted and the next sweep frees it."""
    stop, count, seen = 0, 1, []
    while stop <= count:
        person = await books.person(100)
        async with opened_books(books.url) as fenced:
            store = SteppedStore(books.engine, stop=stop)
            reserving = asyncio.create_task(store.transact([reserve_of(person, 60)], owner_id=fenced.lease.id))
            await store.is_there.wait()
            await books.execute("UPDATE instances SET lease_until = 1 WHERE id = :id", id=fenced.lease.id)
            await books.lease.fence_expired()
            swept = await books.lease.sweep(books.ledger)
            store.go.set()
            [outcome] = await reserving
            await store.aclose()
        is_granted = outcome == Reserved(60)
        assert is_granted or outcome == Refused(reason=Refusal.FENCED)
        assert is_granted == (stop > FENCE)
        assert await books.lease.sweep(books.ledger) + swept == is_granted
        assert await counters(books, person) == (100, 0, 1)
        seen.append(is_granted)
        count = max(count, len(store.statements))
        stop += 1
    assert seen[0] is False
    assert seen[-1] is True


async def test_a_fence_beside_a_reserve(books):
    """A fence that is not committed yet holds up no reserve; once it is, the sweep finds what slipped through."""
    person = await books.person(100)
    async with opened_books(books.url) as fenced:
        store = PostgresStore(books.engine)
        async with database.writing(books.engine) as connection:
            await connection.execute(
                sa.text("UPDATE instances SET is_fenced = TRUE WHERE id = :id"), {"id": fenced.lease.id}
            )
            [outcome] = await store.transact([reserve_of(person, 60)], owner_id=fenced.lease.id)
        assert outcome == Reserved(60)
        assert await store.transact([reserve_of(person, 10)], owner_id=fenced.lease.id) == [
            Refused(reason=Refusal.FENCED)
        ]
        await store.aclose()
    assert await books.lease.sweep(books.ledger) == 1
    assert await counters(books, person) == (100, 0, 1)


# ---- the session


async def test_the_isolation_does_not_depend_on_the_server(books, postgres, database_url):
    """Whatever a database has for its default, the ledger reads what was committed before it had the lock."""
    name = sa.make_url(database_url).database
    await asyncio.to_thread(
        postgres.execute, f'ALTER DATABASE "{name}" SET default_transaction_isolation = "serializable"'
    )
    person = await books.person(100)
    store = SteppedStore(books.engine, stop=LOCK)
    reserving = asyncio.create_task(store.transact([reserve_of(person, 60)], owner_id=books.lease.id))
    await store.is_there.wait()
    shown = [await store._driver._driver.fetchval(f"SHOW {name}") for name in SESSION]
    store.go.set()
    assert await reserving == [Reserved(60)]
    await store.aclose()
    assert dict(zip(SESSION, shown, strict=True)) == SESSION


SESSION = {
    "default_transaction_isolation": "serializable",
    "transaction_isolation": "read committed",
    "statement_timeout": "5s",
}
