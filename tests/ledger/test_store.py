"""The ledger's transactions on real databases: the rows they leave, what is refused, and what no fault can break."""

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import msgspec
import pytest
import sqlalchemy as sa
import structlog
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError

from proxy.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    InsufficientCredits,
    KeyLimitReached,
    LedgerFault,
    SettingsError,
    Unauthenticated,
    Unavailable,
)
from proxy.ledger import statements
from proxy.ledger.decide import Credit, CreditType, Expire, Released, Reserved, Settled
from proxy.ledger.ledger import Ledger
from proxy.ledger.store import PostgresStore, SqliteStore, StoreLostError, StoreRefusedError
from proxy.storage import database
from proxy.storage.tables import admin_events
from proxy.units import NANOS_MAX, new_id
from tests.books import OFFERS, Books, release_of, reserve_of, second_store, settle_of

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture(autouse=True)
def logged():
    """What is logged, as entries: many failures here are meant."""
    with structlog.testing.capture_logs() as entries:
        yield entries


@asynccontextmanager
async def second_ledger(books: Books) -> AsyncIterator[Ledger]:
    ledger = Ledger(second_store(books.url, books.engine), lambda: books.lease.id)
    ledger.start()
    try:
        yield ledger
    finally:
        await ledger.aclose()


async def rows(books: Books, sql: str, **values: object) -> list[dict]:
    async with database.reading(books.engine) as connection:
        return [dict(row) for row in (await connection.execute(sa.text(sql), values)).mappings()]


async def transactions(books: Books, wallet_id: str) -> list[dict]:
    return await rows(books, "SELECT * FROM credit_transactions WHERE wallet_id = :id ORDER BY seq", id=wallet_id)


def stored(value: object) -> object:
    """A JSON column's value, which one driver gives as text."""
    return msgspec.json.decode(value) if isinstance(value, str) else value


def part(row: dict, *names: str) -> tuple:
    return tuple(row[name] for name in names)


# ---- what each operation leaves


async def test_a_reserve_is_on_record(books):
    """An open reservation of this instance, and its amount in the counters of wallet and key."""
    person = await books.person(1000)
    reserve = reserve_of(person, 60, window_tokens=7, is_stream=True, client_request_id="theirs", offers=OFFERS)
    assert await books.ledger.reserve(reserve) == Reserved(60)
    row = await books.row("reservations", reserve.id)
    assert part(row, "wallet_id", "user_id", "key_id", "amount", "state", "owner_id") == (
        person.wallet_id,
        person.user_id,
        person.key_id,
        60,
        "open",
        books.lease.id,
    )
    assert part(row, "client_request_id", "window_tokens", "original_model", "is_stream") == ("theirs", 7, "model", 1)
    assert part(row, "cost", "charged", "settled_at", "outcome", "usage") == (None, 0, None, None, None)
    assert stored(row["offers"]) == msgspec.json.decode(OFFERS)
    for holder in (await books.row("wallets", person.wallet_id), await books.row("api_keys", person.key_id)):
        assert part(holder, "reserved", "open_calls", "window_requests", "window_tokens") == (60, 1, 1, 7)
        assert 0 <= row["created_at"] - holder["window_start"] < 60_000_000


async def test_a_settle_is_on_record(books):
    """The charge with its receipt, one deduction chained to the top-up, and the rest of the amount free again."""
    person = await books.person(1000)
    reserve = reserve_of(person, 60)
    await books.ledger.reserve(reserve)
    assert await books.ledger.settle(settle_of(reserve, 25)) == Settled(charged=25, shortfall=0, balance=975)
    row = await books.row("reservations", reserve.id)
    assert part(row, "state", "cost", "charged", "shortfall", "refunded", "is_late") == ("settled", 25, 25, 0, 0, 0)
    assert part(row, "outcome", "provider", "request_model", "usage_source") == (
        "completed",
        "fake",
        "model",
        "reported",
    )
    assert part(row, "markup_bps", "provider_cost") == (0, 25)
    assert row["settled_at"] >= row["created_at"]
    first, deduction = await transactions(books, person.wallet_id)
    assert part(first, "seq", "type", "amount", "balance_before", "balance_after") == (1, "topup", 1000, 0, 1000)
    assert part(deduction, "seq", "type", "amount", "balance_before", "balance_after") == (
        2,
        "deduction",
        -25,
        1000,
        975,
    )
    assert part(deduction, "reservation_id", "user_id", "created_at") == (
        reserve.id,
        person.user_id,
        row["settled_at"],
    )
    wallet, key = await books.row("wallets", person.wallet_id), await books.row("api_keys", person.key_id)
    assert part(wallet, "balance", "reserved", "seq", "open_calls", "window_tokens") == (975, 0, 2, 0, 25)
    assert part(key, "spent", "period_spent", "reserved", "open_calls", "window_tokens") == (25, 25, 0, 0, 25)


@pytest.mark.parametrize("state", ["released", "expired"])
async def test_an_end_without_charge_is_on_record(books, state):
    """Nothing is held any more, nothing was booked, and the record says why."""
    person = await books.person(1000)
    reserve = reserve_of(person, 60, offers=OFFERS)
    await books.ledger.reserve(reserve)
    if state == "released":
        assert await books.ledger.release(release_of(reserve)) == Released()
    else:
        assert await books.ledger.expire(Expire(id=reserve.id, wallet_id=person.wallet_id)) == Released()
    row = await books.row("reservations", reserve.id)
    outcome = "nothing_delivered" if state == "released" else "expired"
    assert part(row, "state", "outcome", "cost", "charged") == (state, outcome, None, 0)
    assert stored(row["offers"]) == msgspec.json.decode(OFFERS)
    assert row["settled_at"] is not None
    assert len(await transactions(books, person.wallet_id)) == 1
    wallet, key = await books.row("wallets", person.wallet_id), await books.row("api_keys", person.key_id)
    assert part(wallet, "balance", "reserved", "open_calls") == (1000, 0, 0)
    assert part(key, "spent", "reserved", "open_calls") == (0, 0, 0)


async def test_a_late_settle_is_on_record(books):
    """It charges what others have left of the wallet, once, and the record tells it from the rest."""
    person = await books.person(100)
    late, other = reserve_of(person, 60, offers=OFFERS), reserve_of(person, 80)
    await books.ledger.reserve(late)
    await books.ledger.expire(Expire(id=late.id, wallet_id=person.wallet_id))
    await books.ledger.reserve(other)
    first = await books.ledger.settle(settle_of(late, 50))
    again = await books.ledger.settle(settle_of(late, 50))
    assert first == Settled(charged=20, shortfall=30, balance=80, is_late=True)
    assert again == Settled(charged=20, shortfall=30, balance=80, is_late=True, is_replay=True)
    row = await books.row("reservations", late.id)
    assert part(row, "state", "cost", "charged", "shortfall", "is_late") == ("settled", 50, 20, 30, 1)
    assert stored(row["offers"]) == msgspec.json.decode(OFFERS)
    wallet = await books.row("wallets", person.wallet_id)
    assert part(wallet, "balance", "reserved", "seq") == (80, 80, 2)


async def test_an_undelivered_charge_goes_back_once(books):
    """A refund that names its call, and the call knows what it gave back."""
    person = await books.person(100)
    reserve = reserve_of(person, 60)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(reserve, 25))
    outcomes = [await books.ledger.release(release_of(reserve, is_undelivered=True)) for _ in range(2)]
    assert outcomes == [Released(25), Released(25, is_replay=True)]
    refund = (await transactions(books, person.wallet_id))[-1]
    assert part(refund, "type", "amount", "balance_after", "reservation_id") == ("refund", 25, 100, reserve.id)
    assert part(await books.row("reservations", reserve.id), "state", "charged", "refunded") == ("settled", 25, 25)


async def test_credits_by_hand_are_on_record(books):
    """Top-up, adjustment and refund are rows of one chain, each as it was asked for."""
    person = await books.person(100)
    reserve = reserve_of(person, 60)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(reserve, 25))
    for type_, amount, more in [
        (CreditType.TOPUP, 10, {"idempotency_key": "once"}),
        (CreditType.ADJUSTMENT, -5, {}),
        (CreditType.REFUND, 20, {"reservation_id": reserve.id}),
    ]:
        await books.ledger.credit(
            Credit(wallet_id=person.wallet_id, type=type_, amount=amount, description="why", **more)
        )
    booked = await transactions(books, person.wallet_id)
    assert [part(row, "type", "amount", "balance_after", "reservation_id", "description") for row in booked[2:]] == [
        ("topup", 10, 85, None, "why"),
        ("adjustment", -5, 80, None, "why"),
        ("refund", 20, 100, reserve.id, "why"),
    ]
    assert booked[2]["idempotency_key"] == "once"
    assert (await books.row("reservations", reserve.id))["refunded"] == 20
    assert await books.ids("admin_events") == []


async def test_who_books_by_hand_is_written_with_it(books):
    """In the transaction of the credit: together with it, or not at all."""
    person = await books.person(100)
    credit = Credit(
        wallet_id=person.wallet_id,
        type=CreditType.TOPUP,
        amount=10,
        description='with "quotes", ü',
        idempotency_key="once",
        actor="boss",
    )
    for _ in range(2):
        await books.ledger.credit(credit)
    (event_id,) = await books.ids("admin_events")
    async with database.reading(books.engine) as connection:
        row = (await connection.execute(sa.select(admin_events))).one()
    assert (row.id, row.actor, row.action, row.subject) == (event_id, "boss", "credits.topup", person.user_id)
    assert row.before == {"balance": "0.0000001"}
    assert row.after["description"] == 'with "quotes", ü'
    await books.execute("CREATE UNIQUE INDEX one_each ON admin_events (actor)")
    with pytest.raises(LedgerFault):
        await books.ledger.credit(msgspec.structs.replace(credit, idempotency_key="other"))
    assert (await books.row("wallets", person.wallet_id))["balance"] == 110


# ---- what is read


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("UPDATE users SET is_active = FALSE WHERE id = :user_id", Forbidden),
        ("UPDATE users SET allowed_models = '[\"other\"]' WHERE id = :user_id", Forbidden),
        ('UPDATE api_keys SET allowed_models = \'["fake/m*l", "x"]\' WHERE id = :key_id', None),
        ("UPDATE api_keys SET allowed_models = '[]' WHERE id = :key_id", Forbidden),
        ("UPDATE api_keys SET is_active = FALSE WHERE id = :key_id", Unauthenticated),
        ("UPDATE api_keys SET expires_at = 1 WHERE id = :key_id", Unauthenticated),
        (f"UPDATE api_keys SET expires_at = {2**62} WHERE id = :key_id", None),
        ("DELETE FROM api_keys WHERE id = :key_id", Unauthenticated),
        ("UPDATE api_keys SET limit_amount = 9 WHERE id = :key_id", KeyLimitReached),
        ("UPDATE api_keys SET limit_amount = 10, limit_period = 'month' WHERE id = :key_id", None),
        ("UPDATE wallets SET owed = 91 WHERE id = :wallet_id", InsufficientCredits),
    ],
)
async def test_a_reserve_sees_what_is_stored_now(books, change, error):
    """A change of user, key or wallet holds from the next reserve on, without any cache in between."""
    person = await books.person(100)
    names = ("user_id", "key_id", "wallet_id")
    await books.execute(change, **{name: getattr(person, name) for name in names if f":{name}" in change})
    if error is None:
        assert await books.ledger.reserve(reserve_of(person, 10)) == Reserved(10)
        return
    with pytest.raises(error):
        await books.ledger.reserve(reserve_of(person, 10))


async def test_a_charge_belongs_to_the_key_of_its_call(books):
    """Ends of calls do not name a key: it is that of the reservation, and its limit bounds the charge."""
    person = await books.person(100)
    reserve = reserve_of(person, 10)
    await books.ledger.reserve(reserve)
    await books.execute("UPDATE api_keys SET limit_amount = 30 WHERE id = :id", id=person.key_id)
    assert await books.ledger.settle(settle_of(reserve, 50)) == Settled(charged=30, shortfall=20, balance=70)
    assert (await books.row("api_keys", person.key_id))["spent"] == 30


async def test_a_call_by_token_touches_no_key(books):
    """It is held and charged on the wallet alone, for as long as the token is of the user's current version."""
    person = await books.person(100)
    reserve = reserve_of(person, 10, key_id=None, token_version=0)
    await books.ledger.reserve(reserve)
    assert (await books.ledger.settle(settle_of(reserve, 4))).balance == 96
    key = await books.row("api_keys", person.key_id)
    assert part(key, "spent", "window_requests") == (0, 0)
    with pytest.raises(Unauthenticated):
        await books.ledger.reserve(reserve_of(person, 10, key_id=None, token_version=1))


async def test_without_an_instance_nothing_can_be_reserved(books):
    """The command line can book credits, and holds nothing that somebody would have to sweep."""
    person = await books.person(100)
    store = second_store(books.url, books.engine)
    ledger = Ledger(store)
    ledger.start()
    with pytest.raises(Unavailable):
        await ledger.reserve(reserve_of(person, 10))
    await ledger.credit(Credit(wallet_id=person.wallet_id, type=CreditType.TOPUP, amount=5, description="test"))
    await ledger.aclose()
    assert (await books.row("wallets", person.wallet_id))["balance"] == 105


async def test_a_fenced_instance_cannot_reserve_but_settles(books):
    """What it promised before is charged; it promises nothing more."""
    person = await books.person(100)
    reserve = reserve_of(person, 60)
    await books.ledger.reserve(reserve)
    await books.execute("UPDATE instances SET is_fenced = TRUE")
    with pytest.raises(Unavailable):
        await books.ledger.reserve(reserve_of(person, 10))
    assert (await books.ledger.settle(settle_of(reserve, 25))).charged == 25


# ---- what is refused


@pytest.mark.parametrize("kind", ["cost", "tokens", "window_tokens", "amount"])
async def test_what_does_not_fit_in_64_bits_is_refused_alone(books, kind):
    """One impossible number among others of its batch fails, and they do not."""
    person = await books.person(1000)
    reserves = [reserve_of(person, 10) for _ in range(5)]
    await asyncio.gather(*map(books.ledger.reserve, reserves))
    good = [books.ledger.settle(settle_of(reserve, 4)) for reserve in reserves[:4]]
    settle = settle_of(reserves[4], 4)
    bad = {
        "cost": lambda: books.ledger.settle(type(settle)(**{**fields(settle), "cost": 2**63})),
        "tokens": lambda: books.ledger.settle(type(settle)(**{**fields(settle), "tokens": 2**63})),
        "window_tokens": lambda: books.ledger.reserve(reserve_of(person, 1, window_tokens=2**63)),
        "amount": lambda: books.top_up(person.wallet_id, NANOS_MAX),
    }[kind]()
    *outcomes, failed = await asyncio.gather(*good, bad, return_exceptions=True)
    assert [outcome.charged for outcome in outcomes] == [4] * 4
    assert isinstance(failed, BadRequest if kind == "amount" else LedgerFault)
    await books.ledger.release(release_of(reserves[4]))
    wallet = await books.row("wallets", person.wallet_id)
    assert part(wallet, "balance", "reserved") == (984, 0)


def fields(struct) -> dict:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE credit_transactions SET amount = amount",
        "UPDATE credit_transactions SET description = 'other' WHERE seq = 1",
        "DELETE FROM credit_transactions",
    ],
)
async def test_the_journal_is_append_only(books, sql):
    """The database itself refuses to change or remove what was booked."""
    await books.person(100)
    with pytest.raises(IntegrityError, match="append-only"):
        await books.execute(sql)


@on_postgresql
async def test_the_journal_cannot_be_truncated(books):
    """Nor can it be emptied in one go."""
    await books.person(100)
    with pytest.raises(IntegrityError, match="append-only"):
        await books.execute("TRUNCATE credit_transactions")


BOOKED = (
    "INSERT INTO credit_transactions (id, wallet_id, user_id, seq, type, amount, description, balance_before,"
    " balance_after, reservation_id, idempotency_key, created_at) SELECT 'txn_forged', wallet_id, user_id, {}"
    " FROM credit_transactions WHERE seq = 2"
)


IMPOSSIBLE = [
    "UPDATE wallets SET reserved = -1",
    "UPDATE wallets SET reserved = balance + 1",
    "UPDATE wallets SET balance = reserved - 1",
    "UPDATE wallets SET owed = -1",
    "UPDATE api_keys SET spent = -1",
    "UPDATE api_keys SET period_spent = -1",
    "UPDATE api_keys SET reserved = -1",
    "UPDATE api_keys SET limit_period = 'week'",
    "UPDATE api_keys SET scope = 'root'",
    "UPDATE reservations SET state = 'lost'",
    "UPDATE reservations SET state = 'open'",
    "UPDATE reservations SET cost = NULL",
    "UPDATE reservations SET amount = -1",
    "UPDATE reservations SET charged = -1",
    "UPDATE reservations SET charged = charged + 1",
    "UPDATE reservations SET shortfall = -1",
    "UPDATE reservations SET refunded = charged + 1",
    "UPDATE reservations SET refunded = -1",
    BOOKED.format("3, 'topup', -5, 'x', 75, 70, NULL, NULL, 1"),
    BOOKED.format("3, 'topup', 0, 'x', 75, 75, NULL, NULL, 1"),
    BOOKED.format("3, 'adjustment', 0, 'x', 75, 75, NULL, NULL, 1"),
    BOOKED.format("3, 'refund', -5, 'x', 75, 70, NULL, NULL, 1"),
    BOOKED.format("3, 'deduction', 5, 'x', 75, 80, 'other', NULL, 1"),
    BOOKED.format("3, 'deduction', -5, 'x', 75, 70, NULL, NULL, 1"),
    BOOKED.format("3, 'deduction', -5, 'x', 75, 70, reservation_id, NULL, 1"),
    BOOKED.format("3, 'gift', 5, 'x', 75, 80, NULL, NULL, 1"),
    BOOKED.format("3, 'topup', 5, 'x', 75, 81, NULL, NULL, 1"),
    BOOKED.format("2, 'topup', 5, 'x', 75, 80, NULL, NULL, 1"),
    BOOKED.format("3, 'topup', 5, 'x', 75, 80, NULL, 'once', 1"),
]


async def test_the_database_refuses_what_cannot_be(books):
    """The constraints are the last defence: no bug of ours gets past them."""
    person = await books.person()
    await books.top_up(person.wallet_id, 100, idempotency_key="once")
    reserve = reserve_of(person, 60)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(reserve, 25))
    taken = []
    for sql in IMPOSSIBLE:
        try:
            await books.execute(sql)
        except IntegrityError:
            continue
        taken.append(sql)
    assert taken == []


async def test_a_refused_transaction_leaves_nothing_and_the_store_goes_on(books):
    """The store says that it was refused, has rolled everything back, and takes the next batch."""
    person = await books.person(100)
    store = second_store(books.url, books.engine)
    fine, bad = reserve_of(person, 10), reserve_of(person, 10, window_tokens=2**63)
    with pytest.raises(StoreRefusedError):
        await store.transact([fine, bad], owner_id=books.lease.id)
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 0
    assert await store.transact([fine], owner_id=books.lease.id) == [Reserved(10)]
    await store.aclose()


async def test_a_credit_without_an_idempotency_key_is_booked_each_time(books):
    """The store takes it as it is; only who sends it again knows that it is the same."""
    person = await books.person(100)
    store = second_store(books.url, books.engine)
    top_up = Credit(wallet_id=person.wallet_id, type=CreditType.TOPUP, amount=5, description="test")
    for balance in (105, 110):
        [credited] = await store.transact([top_up], owner_id=None)
        assert credited.transaction.balance_after == balance
    await store.aclose()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_sqlite_has_rolled_back_itself_is_refused(books):
    """There is no transaction left to roll back, and the next one begins as usual."""
    person = await books.person(100)
    store = second_store(books.url, books.engine)
    await books.execute("CREATE TRIGGER stop BEFORE UPDATE ON wallets BEGIN SELECT RAISE(ROLLBACK, 'no'); END")
    with pytest.raises(StoreRefusedError):
        await store.transact([reserve_of(person, 10)], owner_id=books.lease.id)
    await books.execute("DROP TRIGGER stop")
    assert await store.transact([reserve_of(person, 10)], owner_id=books.lease.id) == [Reserved(10)]
    await store.aclose()


class CutAtRollback(PostgresStore):
    """A store that loses its connection when it would roll back."""

    async def _connect(self) -> None:
        await super()._connect()
        driver = self._driver

        async def execute(statement: str, *values: object) -> object:
            if statement == "ROLLBACK":
                driver.terminate()
            return await driver.execute(statement, *values)

        self._driver = SimpleNamespace(
            execute=execute,
            fetch=driver.fetch,
            fetchrow=driver.fetchrow,
            is_closed=driver.is_closed,
            terminate=driver.terminate,
        )


@on_postgresql
async def test_a_connection_that_cannot_roll_back_is_dropped(books):
    """The refusal is told all the same, and the next transaction has a connection of its own."""
    person = await books.person(100)
    store = CutAtRollback(books.engine)
    await books.execute("ALTER TABLE wallets ADD CONSTRAINT stop CHECK (reserved < 5)")
    with pytest.raises(StoreRefusedError):
        await store.transact([reserve_of(person, 10)], owner_id=books.lease.id)
    await books.execute("ALTER TABLE wallets DROP CONSTRAINT stop")
    assert await store.transact([reserve_of(person, 10)], owner_id=books.lease.id) == [Reserved(10)]
    await store.aclose()


# ---- two processes


def shuffled(seed: int, operations: list) -> list:
    return random.Random(seed).sample(operations, len(operations))  # noqa: S311 - an order, not a secret


async def test_two_processes_book_the_same_operations_once(books):
    """Batches over the same wallets in different orders end without a deadlock, and each operation counts once."""
    people = [await books.person(10_000) for _ in range(6)]
    reserves = [reserve_of(person, 60) for person in people for _ in range(20)]
    async with second_ledger(books) as other:
        ledgers = (books.ledger, other)

        async def both(operations: list, name: str) -> list:
            calls = [
                getattr(ledger, name)(operation)
                for seed, ledger in enumerate(ledgers)
                for operation in shuffled(seed, operations)
            ]
            return await asyncio.gather(*calls)

        reserved = await both(reserves, "reserve")
        settled = await both([settle_of(reserve, 25) for reserve in reserves[::2]], "settle")
        released = await both([release_of(reserve) for reserve in reserves[1::2]], "release")
    for outcomes, count in ((reserved, 120), (settled, 60), (released, 60)):
        assert sum(not outcome.is_replay for outcome in outcomes) == count
    for person in people:
        wallet = await books.row("wallets", person.wallet_id)
        assert part(wallet, "balance", "reserved", "seq") == (10_000 - 10 * 25, 0, 11)


async def test_two_processes_race_for_the_last_credits(books):
    """Together they reserve what there is and not a nano more."""
    person = await books.person(100)
    async with second_ledger(books) as other:
        outcomes = await asyncio.gather(
            *(ledger.reserve(reserve_of(person, 10)) for _ in range(10) for ledger in (books.ledger, other)),
            return_exceptions=True,
        )
    assert sum(isinstance(outcome, Reserved) for outcome in outcomes) == 10
    assert sum(isinstance(outcome, InsufficientCredits) for outcome in outcomes) == 10


async def test_an_idempotency_key_holds_across_connections(books):
    """Twenty times the same top-up by two processes is one; another under its key is a conflict in both."""
    person = await books.person()
    async with second_ledger(books) as other:
        top_ups = [
            Credit(
                wallet_id=person.wallet_id,
                type=CreditType.TOPUP,
                amount=70,
                description="test",
                idempotency_key="once",
            )
            for _ in range(10)
        ]
        outcomes = await asyncio.gather(
            *(ledger.credit(top_up) for top_up in top_ups for ledger in (books.ledger, other))
        )
        assert {outcome.transaction for outcome in outcomes} == {outcomes[0].transaction}
        for ledger in (books.ledger, other):
            with pytest.raises(Conflict):
                await ledger.credit(
                    Credit(
                        wallet_id=person.wallet_id,
                        type=CreditType.TOPUP,
                        amount=71,
                        description="test",
                        idempotency_key="once",
                    )
                )
    assert len(await transactions(books, person.wallet_id)) == 1


# ---- a lost connection


async def cut(books: Books) -> None:
    """End every other connection to the database, as an administrator or a crash of the server would."""
    await rows(
        books,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )


@on_postgresql
async def test_killed_connections_lose_nothing_and_charge_nothing_twice(books, logged):
    """Calls flow while their connection is cut again and again: each is charged once, and nobody sees a failure."""
    person = await books.person(10**6)
    finished = 0
    is_due = asyncio.Event()

    async def caller() -> int:
        nonlocal finished
        charged = 0
        for tokens in range(1, 11):
            reserve = reserve_of(person, 60)
            assert (await books.ledger.reserve(reserve)).amount == 60
            charged += (await books.ledger.settle(settle_of(reserve, tokens))).charged
            await books.top_up(person.wallet_id, 1)
            finished += 1
            if finished % 20 == 0:
                is_due.set()
        return charged

    async def cutter() -> None:
        while True:
            await is_due.wait()
            is_due.clear()
            await cut(books)

    cutting = asyncio.create_task(cutter())
    charged = await asyncio.gather(*(caller() for _ in range(20)))
    cutting.cancel()
    await asyncio.gather(cutting, return_exceptions=True)
    assert charged == [55] * 20
    assert {entry["event"] for entry in logged} == {"ledger_lost"}
    wallet = await books.row("wallets", person.wallet_id)
    assert part(wallet, "balance", "reserved", "seq") == (10**6 - 20 * 55 + 200, 0, 401)


@on_postgresql
async def test_a_connection_that_is_cut_while_idle_is_lost(books):
    """However far the news of it has come, the next transaction finds it lost and the one after that succeeds."""
    person = await books.person(100)
    store = PostgresStore(books.engine)
    reserve = reserve_of(person, 10)
    await store.transact([reserve], owner_id=books.lease.id)
    for turns in range(30):
        await cut(books)
        for _ in range(turns):
            await asyncio.sleep(0)
        with suppress(StoreLostError):
            await store.transact([reserve], owner_id=books.lease.id)
        assert await store.transact([reserve], owner_id=books.lease.id) == [Reserved(10, is_replay=True)]
    await store.aclose()


@on_postgresql
async def test_a_database_that_takes_no_connections_is_lost_and_not_refusing(books, postgres):
    """Until the server lets us in again every attempt is an unknown outcome, then the same operations succeed."""
    person = await books.person(100)
    store = PostgresStore(books.engine)
    reserve = reserve_of(person, 10)
    assert await store.transact([reserve], owner_id=books.lease.id) == [Reserved(10)]
    name = make_url(books.url).database
    await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    await asyncio.to_thread(
        postgres.execute, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    )
    for _ in range(3):
        with pytest.raises(StoreLostError):
            await store.transact([reserve], owner_id=books.lease.id)
    await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    assert await store.transact([reserve], owner_id=books.lease.id) == [Reserved(10, is_replay=True)]
    await store.aclose()


async def test_a_database_that_is_not_there_is_lost(tmp_path):
    """No server, or no file: the outcome is unknown, for it may come back."""
    engine = database.connect("postgresql+asyncpg://nobody@127.0.0.1:1/none", pooled=False)
    operation = Expire(id=new_id("req"), wallet_id="w")
    for store in (PostgresStore(engine), SqliteStore(tmp_path / "none.db", checkpoints=False)):
        with pytest.raises(StoreLostError):
            await store.transact([operation], owner_id=None)
        await store.aclose()
    await engine.dispose()


WAITS_FOR_A_LOCK = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@on_postgresql
async def test_a_transaction_that_is_given_up_leaves_no_lock(books):
    """A batch that is cancelled while it waits for a wallet drops its connection, and the wallet can be had again."""
    person = await books.person(100)
    store = PostgresStore(books.engine)
    async with database.writing(books.engine) as connection:
        await connection.execute(sa.text("SELECT 1 FROM wallets FOR UPDATE"))
        waiting = asyncio.create_task(store.transact([reserve_of(person, 10)], owner_id=books.lease.id))
        while not await rows(books, WAITS_FOR_A_LOCK):
            assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await store.transact([reserve_of(person, 100)], owner_id=books.lease.id) == [Reserved(100)]
    await store.aclose()


@on_postgresql
async def test_a_process_that_stops_in_a_transaction_does_not_stop_the_others(books):
    """Its locks are taken from it while its calls still wait; when it comes back it sends them again."""
    person = await books.person(1000)
    stopped = second_store(books.url, books.engine)
    try:
        await stopped.transact([reserve_of(person, 100)], owner_id=books.lease.id)
        await stopped._driver.execute("BEGIN")
        await stopped._driver.execute(f"SELECT 1 FROM wallets WHERE id = '{person.wallet_id}' FOR NO KEY UPDATE")
        call = reserve_of(person, 100)
        assert (await books.ledger.reserve(call)).amount == 100
        again = [settle_of(call, 7)]
        with pytest.raises(StoreLostError):
            await stopped.transact(again, owner_id=books.lease.id)
        [settled] = await stopped.transact(again, owner_id=books.lease.id)
        assert settled.charged == 7
    finally:
        await stopped.aclose()
    assert (await books.row("wallets", person.wallet_id))["reserved"] == 100


# ---- what a database must promise


async def test_a_database_that_keeps_what_it_commits_is_accepted(books):
    """The check connects, and the connection that was checked is the one that writes."""
    store = second_store(books.url, books.engine)
    await store.check()
    await store.check()
    person = await books.person(100)
    assert await store.transact([reserve_of(person, 10)], owner_id=books.lease.id) == [Reserved(10)]
    await store.aclose()


@on_postgresql
async def test_a_postgresql_that_forgets_is_refused(books, postgres):
    """By what the ledger's own session has, wherever it was set."""
    name = make_url(books.url).database
    await asyncio.to_thread(postgres.execute, f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    store = PostgresStore(books.engine)
    with pytest.raises(SettingsError, match="synchronous_commit=off"):
        await store.check()
    await store.aclose()


async def test_a_sqlite_file_without_a_log_is_refused(tmp_path):
    """Only a write-ahead log that is flushed at every commit is what the ledger relies on."""
    file = tmp_path / "plain.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE wallets (id TEXT)")
    connection.close()
    store = SqliteStore(file, checkpoints=True)
    with pytest.raises(SettingsError, match="journal_mode=delete and synchronous=2 instead of wal and 2"):
        await store.check()
    await store.aclose()


async def test_a_database_that_is_not_there_cannot_be_checked(tmp_path):
    """No server, or no file: that is said as an outage."""
    engine = database.connect("postgresql+asyncpg://nobody@127.0.0.1:1/none", pooled=False)
    for store in (PostgresStore(engine), SqliteStore(tmp_path / "none.db", checkpoints=False)):
        with pytest.raises(Unavailable):
            await store.check()
        await store.aclose()
    await engine.dispose()


# ---- where the guard is


async def credits_given_away(books: Books, *, is_reserved: bool) -> tuple[int, int]:
    """Ten calls that cost 60 each race for 100 credits; how many a provider serves, and what nobody pays for.

    Not reserved, they are let in by holding nothing, and their settles are what is left to guard the wallet.
    """
    person = await books.person(100)

    async def call() -> Settled | None:
        reserve = reserve_of(person, 60 if is_reserved else 0)
        try:
            await books.ledger.reserve(reserve)
        except InsufficientCredits:
            return None
        return await books.ledger.settle(settle_of(reserve, 60))

    served = [settled for settled in await asyncio.gather(*(call() for _ in range(10))) if settled is not None]
    return len(served), sum(settled.shortfall for settled in served)


async def overspends_nothing(books: Books, *, is_reserved: bool) -> None:
    """What a provider serves is paid."""
    served, given_away = await credits_given_away(books, is_reserved=is_reserved)
    assert served > 0
    assert given_away == 0


async def test_nobody_overspends(books):
    """With the guard on the reserve the last call that is let in can be paid."""
    await overspends_nothing(books, is_reserved=True)


async def test_a_guard_on_the_settle_gives_the_last_calls_away(books):
    """The control: let calls in without a hold, and what the test before this one asserts is false."""
    with pytest.raises(AssertionError):
        await overspends_nothing(books, is_reserved=False)
    assert await credits_given_away(books, is_reserved=False) == (10, 500)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_plans_of_small_tables_do_not_stay(books):
    """What finds a reservation by its id when there are none is not kept for when there are many wallets."""
    await books.execute("ANALYZE reservations")  # it is known to be empty
    for _ in range(40):
        reserve = reserve_of(await books.person(100), 10)
        await books.ledger.reserve(reserve)
        await books.ledger.settle(settle_of(reserve, 1))
    driver = books.ledger._batcher._store._driver
    name = await driver.fetchval(
        "SELECT name FROM pg_prepared_statements WHERE statement = $1", statements.READ_POSTGRESQL
    )
    lines = await driver.fetch(f"EXPLAIN EXECUTE {name}(NULL, '{{}}', '{{}}', '{{req_x}}', '{{}}')")
    plan = "\n".join(line[0] for line in lines)
    assert "pk_reservations" in plan
    assert "ix_reservations_wallet_id_id" not in plan
