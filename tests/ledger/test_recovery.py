"""Leases and the sweep: what a dead process held comes free, and one that comes back charges once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import sqlalchemy as sa
import structlog
from sqlalchemy.engine import make_url

from proxy.errors import LedgerFault, Unavailable
from proxy.ledger.batcher import BATCH_MAX
from proxy.ledger.decide import Settled
from proxy.ledger.recovery import LEASE_S, Lease, Swept, sweep_by_hand
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
    async with opened_books(books.url, is_second=True) as other:
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


async def test_a_lease_lasts_as_long_as_the_operator_says(books):
    """From its registration, and from each renewal."""
    lease = Lease(books.engine, is_embedded=False, lease_s=2.5)
    await lease.register()
    row = await books.row("instances", lease.id)
    assert row["lease_until"] - row["started_at"] == 2_500_000
    async with database.reading(books.engine) as connection:
        before = await database.database_now(connection)
    assert await lease.renew()
    until = (await books.row("instances", lease.id))["lease_until"]
    assert before + 2_500_000 <= until < before + LEASE_S * MICROS_PER_SECOND


async def test_an_instance_registers_on_the_databases_clock(books):
    """A lease of the server runs for twenty seconds from now, each registration is a row of its own."""
    lease = Lease(books.engine, is_embedded=False)
    await lease.register()
    first = await books.row("instances", lease.id)
    assert (first["lease_until"] - first["started_at"], first["is_fenced"]) == (LEASE_S * MICROS_PER_SECOND, 0)
    await lease.register()
    assert lease.id != first["id"]


async def test_a_lease_is_held_for_as_long_as_it_lasts(books):
    """From its registration on, by this process's own clock."""
    lease = Lease(books.engine, is_embedded=False, lease_s=0.2)
    assert not lease.is_held
    await lease.register()
    assert lease.is_held
    await asyncio.sleep(0.3)
    assert not lease.is_held


async def test_a_ledger_tells_how_much_it_has_to_do(books):
    """What waits for its turn, and the calls that have not ended."""
    reserve = reserve_of(await books.person(100), 10)
    assert (books.ledger.waiting, books.ledger.in_flight) == (0, 0)
    await books.ledger.reserve(reserve)
    assert books.ledger.in_flight == 1
    ending = asyncio.ensure_future(books.ledger.release(release_of(reserve)))
    await asyncio.sleep(0)
    assert books.ledger.waiting <= 1
    await ending
    assert (books.ledger.waiting, books.ledger.in_flight) == (0, 0)


async def test_an_embedded_lease_needs_no_renewal(books):
    """Its process is alone, as the lock file sees to: nobody is there to fence it."""
    lease = Lease(books.engine, is_embedded=True)
    await lease.register()
    assert lease.is_held
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


async def fenced(books: Books, *leases: Lease) -> list[bool]:
    return [bool((await books.row("instances", lease.id))["is_fenced"]) for lease in leases]


async def test_only_expired_leases_are_fenced(books, other):
    """A living instance is left alone, and so is the one that fences."""
    dead = Lease(books.engine, is_embedded=False)
    await dead.register()
    await end_lease(books, dead)
    await books.lease.fence_expired()
    assert await fenced(books, dead, books.lease, other.lease) == [True, False, False]


async def test_who_is_past_its_own_lease_fences_nobody(books, other):
    """What held it up may have held up everyone: it renews first."""
    await end_lease(books, books.lease, other.lease)
    await books.lease.fence_expired()
    assert await fenced(books, books.lease, other.lease) == [False, False]
    assert await books.lease.renew()
    await books.lease.fence_expired()
    assert await fenced(books, books.lease, other.lease) == [False, True]


async def test_who_is_fenced_fences_nobody(books, other):
    """It does not know any more what it knows."""
    dead = Lease(books.engine, is_embedded=False)
    await dead.register()
    await end_lease(books, other.lease)
    await books.lease.fence_expired()
    await end_lease(books, dead)
    await other.lease.fence_expired()
    assert await fenced(books, other.lease, dead) == [True, False]


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
    async with opened_books(books.url, is_second=True) as third:
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


# ---- what goes on while a process runs

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

SHORT_S = 1.0


@asynccontextmanager
async def held(books: Books, *, lease_s: float = SHORT_S, is_embedded: bool = False) -> AsyncIterator[Lease]:
    """A lease that is kept up at a faster pace than usual."""
    lease = Lease(books.engine, is_embedded=is_embedded, lease_s=lease_s, stray_s=0)
    async with lease.held(books.ledger):
        yield lease


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when `condition` holds."""
    async with asyncio.timeout(20):
        while not await condition():  # noqa: ASYNC110 - nobody tells us of what happens in a database
            await asyncio.sleep(0.01)


async def is_renewed(books: Books, lease: Lease) -> None:
    """Return when the lease has been extended twice: the second one began after the call."""
    for _ in range(2):
        before = (await books.row("instances", lease.id))["lease_until"]

        async def is_later(before=before) -> bool:
            return (await books.row("instances", lease.id))["lease_until"] > before

        await eventually(is_later)


@on_postgresql
async def test_a_running_process_keeps_its_lease(books):
    """It renews again and again, and never fences itself."""
    async with held(books) as lease:
        await is_renewed(books, lease)
        await is_renewed(books, lease)
        assert await fenced(books, lease) == [False]


@on_postgresql
async def test_a_running_process_that_was_fenced_registers_anew(books, logged):
    """Once it notices it holds another lease, and says so."""
    async with held(books) as lease:
        old = lease.id
        await books.execute("UPDATE instances SET is_fenced = TRUE WHERE id = :id", id=old)

        async def is_new() -> bool:
            return lease.id != old

        await eventually(is_new)
        await is_renewed(books, lease)
    assert {"event": "instance_fenced", "instance_id": old, "log_level": "error"} in logged


async def has_expired(books: Books, *calls) -> bool:
    return all([(await books.row("reservations", call.id))["state"] == "expired" for call in calls])


@on_postgresql
async def test_a_running_process_clears_up_after_the_dead(books, other):
    """But not before it has itself held its lease for the length of one."""
    person = await books.person(1000)
    calls = await holding(other, person, 3)
    await end_lease(books, other.lease)
    loop = asyncio.get_running_loop()
    async with held(books):
        began_at = loop.time()
        await eventually(lambda: has_expired(books, *calls))
        assert loop.time() - began_at > SHORT_S / 2
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 0


@on_postgresql
async def test_after_an_outage_a_running_process_fences_nobody_for_a_lease(books, other, postgres):
    """While the database was away nobody could renew: whoever comes back first must not expire the others' calls."""
    person = await books.person(1000)
    [call] = await holding(other, person, 1)
    name = make_url(books.url).database
    async with held(books, lease_s=2) as lease:
        await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        before = lease._steady_since

        async def has_noticed() -> bool:
            return lease._steady_since > before + 2

        await eventually(has_noticed)
        await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        await end_lease(books, other.lease)
        await eventually(lambda: has_expired(books, call))
        assert asyncio.get_running_loop().time() - lease._steady_since > 2


@on_postgresql
async def test_a_process_that_was_held_up_waits_for_a_lease(books, other):
    """Whoever finds its own lease run out counts anew: the rest may have been held up by the same thing."""
    await end_lease(books, books.lease)
    before = books.lease._steady_since
    assert await books.lease.renew()
    steady_since = books.lease._steady_since
    assert steady_since > before
    assert await books.lease.renew()
    assert books.lease._steady_since == steady_since


@on_postgresql
async def test_a_running_process_survives_a_fault_of_the_database(books, logged):
    """Whatever goes wrong is logged, and renewing and sweeping go on."""
    async with held(books) as lease:
        await books.execute("ALTER TABLE instances RENAME TO elsewhere")

        async def is_logged() -> bool:
            return {"renewal_failed", "sweep_failed"} <= {entry["event"] for entry in logged}

        await eventually(is_logged)
        await books.execute("ALTER TABLE elsewhere RENAME TO instances")
        await is_renewed(books, lease)
    assert {entry["log_level"] for entry in logged} == {"error"}


@on_postgresql
async def test_an_outage_is_a_warning(books, logged, postgres):
    """Nothing is broken when the database is away for a while."""
    name = make_url(books.url).database
    async with held(books) as lease:
        await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')

        async def is_logged() -> bool:
            return "sweep_failed" in {entry["event"] for entry in logged}

        await eventually(is_logged)
        await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        await is_renewed(books, lease)
    assert {entry["log_level"] for entry in logged} == {"warning"}


# ---- what a living process has leaked


def strays_of(books: Books, *, stray_s: float = 0) -> Lease:
    """The lease of `books`, to look for strays by hand."""
    lease = Lease(books.engine, is_embedded=False, stray_s=stray_s)
    lease.id = books.lease.id
    return lease


async def leaking(books: Books, person):
    """A reservation on the lease of `books` that its ledger knows nothing of."""
    leaked = reserve_of(person, 10)
    async with opened_books(books.url, is_second=True) as other:
        other.lease.id = books.lease.id
        await other.ledger.reserve(leaked)
    return leaked


async def test_what_belongs_to_no_call_is_freed(books, logged):
    """A reservation of ours that no call of ours has is expired when it is seen a second time, loudly."""
    person = await books.person(1000)
    leaked = await leaking(books, person)
    lease = strays_of(books)
    assert [await lease.expire_strays(books.ledger) for _ in range(3)] == [0, 1, 0]
    assert (await books.row("reservations", leaked.id))["state"] == "expired"
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 0
    assert logged == [{"event": "reservations_leaked", "count": 1, "request_ids": [leaked.id], "log_level": "error"}]


async def test_a_call_in_flight_is_no_stray(books):
    """However long it takes: it is in flight from its reserve until its end is booked."""
    person = await books.person(1000)
    [call] = await holding(books, person, 1)
    lease = strays_of(books)
    assert [await lease.expire_strays(books.ledger) for _ in range(3)] == [0, 0, 0]
    assert not (await books.ledger.settle(settle_of(call, 4))).is_late
    assert not books.ledger.is_in_flight(call.id)


async def test_what_has_just_been_reserved_is_no_stray(books):
    """Its release may be on its way: only what has been open for a while is looked at."""
    leaked = await leaking(books, await books.person(1000))
    lease = strays_of(books, stray_s=3600)
    assert [await lease.expire_strays(books.ledger) for _ in range(3)] == [0, 0, 0]
    await books.ledger.release(release_of(leaked))


async def test_what_others_hold_is_no_stray(books, other):
    """A process looks for its own alone."""
    [call] = await holding(other, await books.person(1000), 1)
    lease = strays_of(books)
    assert [await lease.expire_strays(books.ledger) for _ in range(3)] == [0, 0, 0]
    await other.ledger.release(release_of(call))


async def test_what_ended_between_two_looks_is_no_stray(books, logged):
    """What was only seen once may have been ending just then."""
    person = await books.person(1000)
    first, second = await leaking(books, person), await leaking(books, person)
    lease = strays_of(books)
    assert await lease.expire_strays(books.ledger) == 0
    await books.ledger.release(release_of(first))
    third = await leaking(books, person)
    assert await lease.expire_strays(books.ledger) == 1
    assert [(await books.row("reservations", call.id))["state"] for call in (first, second, third)] == [
        "released",
        "expired",
        "open",
    ]
    assert [entry["request_ids"] for entry in logged] == [[second.id]]
    await books.ledger.release(release_of(third))


async def test_a_call_whose_end_cannot_be_booked_is_freed(books):
    """An end that the database refuses for good does not hold its credits for good."""
    person = await books.person(1000)
    [call] = await holding(books, person, 1)
    with pytest.raises(LedgerFault):
        await books.ledger.settle(msgspec.structs.replace(settle_of(call, 4), cost=2**63))
    lease = strays_of(books)
    assert [await lease.expire_strays(books.ledger) for _ in range(2)] == [0, 1]
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 0


async def test_looking_for_strays_never_touches_a_call(books):
    """Under load, with nothing too young to be looked at, every call settles in time."""
    person = await books.person(10**6)
    lease = strays_of(books)

    async def caller() -> list[bool]:
        late = []
        for tokens in range(1, 51):
            reserve = reserve_of(person, 60)
            await books.ledger.reserve(reserve)
            late.append((await books.ledger.settle(settle_of(reserve, tokens))).is_late)
        return late

    calling = asyncio.gather(*(caller() for _ in range(20)))
    looks = 0
    while not calling.done():
        assert await lease.expire_strays(books.ledger) == 0
        looks += 1
    assert await calling == [[False] * 50] * 20
    assert looks > 5


async def test_a_running_process_frees_what_it_has_leaked(books):
    """On either database, without anybody asking."""
    person = await books.person(1000)
    is_embedded = books.url.startswith("sqlite")
    async with held(books, is_embedded=is_embedded) as lease:
        books.lease.id = lease.id
        leaked = await leaking(books, person)
        [call] = await holding(books, person, 1)
        await eventually(lambda: has_expired(books, leaked))
        assert not (await books.ledger.settle(settle_of(call, 4))).is_late


# ---- the sweep by hand


@on_postgresql
async def test_by_hand_only_the_silent_are_fenced(books, other, logged):
    """Of those past their lease, one that renews while it is watched lives; the other's calls expire."""
    person = await books.person(1000)
    async with opened_books(books.url, is_second=True) as third:
        dead, slow = await holding(other, person, 2), await holding(third, person, 1)
        await end_lease(books, other.lease, third.lease)
        sweeping = asyncio.create_task(sweep_by_hand(books.engine, books.ledger, is_sole=False, lease_s=SHORT_S))

        async def is_watching() -> bool:
            return bool(logged)

        await eventually(is_watching)
        assert await third.lease.renew()
        assert await sweeping == Swept(fenced=1, expired=2)
        assert await fenced(books, other.lease, third.lease) == [True, False]
        assert await has_expired(books, *dead)
        await asyncio.gather(*(third.ledger.release(release_of(call)) for call in slow))


@on_postgresql
async def test_by_hand_what_is_fenced_expires_at_once(books, other):
    """There is nobody to watch: whoever is fenced was taken for dead by a server, or holds nothing."""
    person = await books.person(1000)
    await holding(other, person, 2)
    idle = Lease(books.engine, is_embedded=False)
    await idle.register()
    await end_lease(books, other.lease, idle)
    await books.lease.fence_expired()
    assert await sweep_by_hand(books.engine, books.ledger, is_sole=False) == Swept(fenced=0, expired=2)


@on_postgresql
async def test_by_hand_the_living_are_left_alone(books, other):
    """A lease that runs is nobody's business."""
    [call] = await holding(other, await books.person(1000), 1)
    assert await sweep_by_hand(books.engine, books.ledger, is_sole=False) == Swept(fenced=0, expired=0)
    assert (await other.ledger.settle(settle_of(call, 4))).charged == 4


@on_postgresql
async def test_by_hand_an_outage_fences_nobody(books, other, logged, postgres):
    """While the database is away nobody can renew: the sweep ends, and says why."""
    [call] = await holding(other, await books.person(1000), 1)
    await end_lease(books, other.lease)
    name = make_url(books.url).database
    sweeping = asyncio.create_task(sweep_by_hand(books.engine, books.ledger, is_sole=False, lease_s=SHORT_S))

    async def is_watching() -> bool:
        return bool(logged)

    await eventually(is_watching)
    await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    with pytest.raises(Unavailable):
        await sweeping
    await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    assert await fenced(books, other.lease) == [False]
    await other.ledger.release(release_of(call))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_by_hand_all_is_swept_where_nobody_serves(books):
    """On an embedded database without a server everything open is a dead one's, whatever its lease says."""
    person = await books.person(1000)
    await holding(books, person, 3)
    async with opened_books(books.url) as command:
        assert await sweep_by_hand(command.engine, command.ledger, is_sole=True) == Swept(fenced=2, expired=3)
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 0
