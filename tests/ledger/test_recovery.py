"""Leases and the sweep: what a dead process held comes free, and one that comes back charges once."""

import asyncio

import pytest
import sqlalchemy as sa
import structlog

from proxy.errors import Unavailable
from proxy.ledger.batcher import BATCH_MAX
from proxy.ledger.decide import Settled
from proxy.ledger.recovery import LEASE_S, Lease
from proxy.storage import database
from proxy.units import MICROS_PER_SECOND
from tests.books import Books, opened_books, release_of, reserve_of, settle_of


@pytest.fixture(autouse=True)
def logged():
    """What is logged, as entries."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
async def other(books):
    """A second process over the same database."""
    async with opened_books(books.url) as other:
        yield other


async def end_lease(books: Books, *leases: Lease, ago_s: int = 1) -> None:
    """Let the leases have run out, as they do when nobody renews them."""
    async with database.reading(books.engine) as connection:
        now = await database.database_now(connection)
    for lease in leases:
        await books.execute(
            "UPDATE instances SET lease_until = :until WHERE id = :id",
            until=now - ago_s * MICROS_PER_SECOND,
            id=lease.id,
        )


async def states(books: Books) -> list[str]:
    async with database.reading(books.engine) as connection:
        return list(await connection.scalars(sa.text("SELECT state FROM reservations ORDER BY id")))


async def holding(books: Books, person, count: int) -> list:
    """`count` calls of `person`, open on the lease of `books`."""
    reserves = [reserve_of(person, 10) for _ in range(count)]
    await asyncio.gather(*map(books.ledger.reserve, reserves))
    return reserves


# ---- leases


async def test_an_instance_registers_on_the_databases_clock(books):
    """A lease of the server runs for twenty seconds from now, each registration is a row of its own."""
    lease = Lease(books.engine, is_embedded=False)
    await lease.register()
    first = await books.row("instances", lease.id)
    assert (first["lease_until"] - first["started_at"], first["is_fenced"]) == (LEASE_S * MICROS_PER_SECOND, 0)
    await lease.register()
    assert lease.id != first["id"]


async def test_a_lease_lasts_as_long_as_the_operator_says(books):
    """From its registration, and from each renewal."""
    lease = Lease(books.engine, is_embedded=False, lease_s=2.5)
    await lease.register()
    row = await books.row("instances", lease.id)
    assert row["lease_until"] - row["started_at"] == 2_500_000
    await end_lease(books, lease)
    async with database.reading(books.engine) as connection:
        before = await database.database_now(connection)
    assert await lease.renew()
    until = (await books.row("instances", lease.id))["lease_until"]
    assert before + 2_500_000 <= until < before + LEASE_S * MICROS_PER_SECOND


async def test_an_embedded_lease_needs_no_renewal(books):
    """Its process is alone, as the lock file sees to: nobody is there to fence it."""
    lease = Lease(books.engine, is_embedded=True)
    await lease.register()
    assert (await books.row("instances", lease.id))["lease_until"] == 2**62


async def test_a_lease_is_renewed_from_now(books):
    """Even one that has run out, as long as nobody has fenced it."""
    lease = Lease(books.engine, is_embedded=False)
    await lease.register()
    before = (await books.row("instances", lease.id))["lease_until"]
    await end_lease(books, lease, ago_s=100)
    assert await lease.renew()
    assert (await books.row("instances", lease.id))["lease_until"] >= before


async def test_a_fenced_instance_cannot_renew(books, other):
    """It is told so, and nothing changes."""
    await end_lease(books, other.lease)
    await books.lease.fence_expired()
    before = await books.row("instances", other.lease.id)
    assert before["is_fenced"]
    assert not await other.lease.renew()
    assert await books.row("instances", other.lease.id) == before


async def test_only_expired_leases_are_fenced(books, other):
    """A living instance is left alone, and so is the one that fences, though its own lease has run out."""
    dead = Lease(books.engine, is_embedded=False)
    await dead.register()
    await end_lease(books, dead, books.lease)
    await books.lease.fence_expired()
    fenced = [bool((await books.row("instances", lease.id))["is_fenced"]) for lease in (dead, books.lease, other.lease)]
    assert fenced == [True, False, False]


# ---- the sweep


async def test_what_a_dead_instance_held_expires_in_full(books, other):
    """Every open reservation of it comes free, of any wallet; those of the living and those that ended stay."""
    people = [await books.person(1000) for _ in range(2)]
    dead = [reserve for person in people for reserve in await holding(other, person, 3)]
    await other.ledger.settle(settle_of(dead[0], 4))
    await other.ledger.release(release_of(dead[1]))
    await holding(books, people[0], 2)
    await end_lease(books, other.lease)
    await books.lease.fence_expired()
    assert await books.lease.sweep(books.ledger) == 4
    assert sorted(await states(books)) == ["expired"] * 4 + ["open"] * 2 + ["released", "settled"]
    wallets = [await books.row("wallets", person.wallet_id) for person in people]
    assert [(wallet["balance"], wallet["reserved"], wallet["open_calls"]) for wallet in wallets] == [
        (996, 20, 2),
        (1000, 0, 0),
    ]


async def test_more_than_a_batch_expires_in_one_sweep(books, other, logged):
    """The sweep goes on until nothing is left, a transaction's worth at a time."""
    person = await books.person(10**6)
    await holding(other, person, BATCH_MAX + 10)
    await end_lease(books, other.lease)
    await books.lease.fence_expired()
    assert await books.lease.sweep(books.ledger) == BATCH_MAX + 10
    assert [entry["count"] for entry in logged] == [BATCH_MAX, 10]
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 0


async def test_an_expired_lease_alone_frees_nothing(books, other):
    """Only what is fenced is swept: its owner cannot reserve any more from then on."""
    person = await books.person(100)
    await holding(other, person, 1)
    await end_lease(books, other.lease)
    assert await books.lease.sweep(books.ledger) == 0
    assert await states(books) == ["open"]


async def test_sweeping_twice_is_harmless(books, other):
    """By one process after the other, or by both at once: each reservation comes free once."""
    person = await books.person(1000)
    async with opened_books(books.url) as third:
        await holding(third, person, 20)
        await end_lease(books, third.lease)
        await asyncio.gather(books.lease.fence_expired(), other.lease.fence_expired())
        await asyncio.gather(books.lease.sweep(books.ledger), other.lease.sweep(other.ledger))
        assert await books.lease.sweep(books.ledger) == 0
    assert await states(books) == ["expired"] * 20
    wallet = await books.row("wallets", person.wallet_id)
    assert (wallet["balance"], wallet["reserved"], wallet["open_calls"]) == (1000, 0, 0)


# ---- coming back


async def test_who_comes_back_registers_anew_and_settles_late_once(books, other):
    """A process that was stopped for longer than its lease charges for its old calls once, and takes new ones."""
    person = await books.person(100)
    old, ended = await holding(other, person, 2)
    await end_lease(books, other.lease)
    await books.lease.fence_expired()
    await books.lease.sweep(books.ledger)
    with pytest.raises(Unavailable):
        await other.ledger.reserve(reserve_of(person, 10))
    fenced = other.lease.id
    assert not await other.lease.renew()
    await other.lease.register()
    assert other.lease.id != fenced
    settles = await asyncio.gather(*(other.ledger.settle(settle_of(old, 4)) for _ in range(3)))
    assert set(settles) == {Settled(charged=4, shortfall=0, balance=96, is_late=True)}
    assert (await other.ledger.settle(settle_of(old, 4))).is_replay
    assert (await other.ledger.release(release_of(ended))).is_replay
    new = reserve_of(person, 10)
    await other.ledger.reserve(new)
    assert (await books.row("reservations", new.id))["owner_id"] == other.lease.id
    assert await books.lease.sweep(books.ledger) == 0
    assert (await other.ledger.settle(settle_of(new, 10))).balance == 86


async def test_a_settle_and_a_sweep_at_once_charge_once(books, other):
    """Whichever comes first, the call is charged in full from a wallet that bears it, and nothing stays held."""
    person = await books.person(1000)
    calls = await holding(other, person, 20)
    await end_lease(books, other.lease)
    await books.lease.fence_expired()
    settled, _ = await asyncio.gather(
        asyncio.gather(*(other.ledger.settle(settle_of(call, 4)) for call in calls)),
        books.lease.sweep(books.ledger),
    )
    assert [outcome.charged for outcome in settled] == [4] * 20
    wallet = await books.row("wallets", person.wallet_id)
    assert (wallet["balance"], wallet["reserved"], wallet["open_calls"]) == (920, 0, 0)


# ---- a whole start


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_an_embedded_start_sweeps_all_that_is_open(books):
    """Everything open belongs to a dead process, whatever its lease says: it is free before anyone is served."""
    person = await books.person(1000)
    await holding(books, person, 3)
    await end_lease(books, books.lease, ago_s=-1000)
    async with opened_books(books.url) as next_process:
        lease = Lease(next_process.engine, is_embedded=True)
        async with lease.held(next_process.ledger):
            assert await states(books) == ["expired"] * 3
            assert not (await books.row("instances", lease.id))["is_fenced"]
            assert (await books.row("instances", books.lease.id))["is_fenced"]
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_server_start_leaves_others_alone(books, other):
    """Who has just started fences nobody, not even the expired: after an outage nobody has renewed yet."""
    person = await books.person(1000)
    [call] = await holding(other, person, 1)
    await end_lease(books, other.lease)
    lease = Lease(books.engine, is_embedded=False)
    async with lease.held(books.ledger):
        assert lease.id is not None
        assert await states(books) == ["open"]
        assert not (await books.row("instances", other.lease.id))["is_fenced"]
    assert {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"lease", "sweeper"})
    await other.ledger.release(release_of(call))
