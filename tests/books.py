"""The ledger as tests drive it: over a real database, with shorthands for calls and people."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.identity.keys import create_key, find_key, hash_key
from proxy.identity.users import create_user
from proxy.ledger.audit import Report, audit
from proxy.ledger.decide import Credit, Credited, CreditType, Receipt, Release, Reserve, Settle
from proxy.ledger.ledger import Ledger
from proxy.ledger.recovery import Lease
from proxy.ledger.rollup import UsageDay, by_month
from proxy.ledger.store import PostgresStore, SqliteStore, Store
from proxy.pricing import Price, cost, provider_cost
from proxy.routing import Terms
from proxy.storage import database, tables
from proxy.units import Usage, new_id

PRICE = Price(input=10**6, cached_input=10**6, cache_write=10**6, audio_input=10**6, output=10**6, audio_output=10**6)
"""A nano-dollar a token: without markup a usage of n tokens costs n nano-credits."""

OFFERS = msgspec.json.encode([Terms("fake", "model", PRICE, 0)]).decode()
"""What calls of that model are reserved at."""


class Person(msgspec.Struct, frozen=True):
    """A user with a wallet and one API key."""

    user_id: str
    wallet_id: str
    key_id: str
    key: str
    email: str


class Books:
    """A ledger over the database at `url`, and an engine to look at it."""

    def __init__(self, url: str, engine: AsyncEngine, ledger: Ledger, lease: Lease) -> None:
        self.url = url
        self.engine = engine
        self.ledger = ledger
        self.lease = lease

    async def person(self, nanos: int = 0) -> Person:
        """A new user with a key and `nanos` to spend."""
        async with database.writing(self.engine) as connection:
            user = await create_user(connection, f"{new_id('u')}@example.com")
            key = (await create_key(connection, user)).secret
        async with database.reading(self.engine) as connection:
            record = await find_key(connection, hash_key(key))
        if nanos:
            await self.top_up(user.wallet_id, nanos)
        return Person(user.id, user.wallet_id, record.caller.key_id, key, user.email)

    async def top_up(self, wallet_id: str, nanos: int, **more: str) -> Credited:
        """Book a top-up."""
        return await self.ledger.credit(
            Credit(wallet_id=wallet_id, type=CreditType.TOPUP, amount=nanos, description="test", **more)
        )

    async def recount_months(self) -> None:
        """Add the sums of days up to those of months anew, after a test has moved them in time."""
        async with database.writing(self.engine) as connection:
            rows = (await connection.execute(sa.select(tables.usage_days))).mappings().all()
            await connection.execute(tables.usage_months.delete())
            months = [msgspec.structs.asdict(one) for one in by_month(UsageDay(**row) for row in rows)]
            if months:
                await connection.execute(tables.usage_months.insert(), months)

    async def audit(self) -> Report:
        """Check the invariants."""
        return await audit(self.engine)

    async def row(self, table: str, row_id: str) -> dict:
        """One row by its id."""
        async with database.reading(self.engine) as connection:
            rows = await connection.execute(sa.text(f"SELECT * FROM {table} WHERE id = :id"), {"id": row_id})
            return dict(rows.mappings().one())

    async def ids(self, table: str) -> list[str]:
        """The ids of all rows, in order."""
        async with database.reading(self.engine) as connection:
            return list(await connection.scalars(sa.text(f"SELECT id FROM {table} ORDER BY id")))

    async def execute(self, sql: str, **values: object) -> None:
        """Change the database behind the ledger's back."""
        async with database.writing(self.engine) as connection:
            await connection.execute(sa.text(sql), values)


def reserve_of(person: Person, amount: int, *, request_id: str | None = None, **more: object) -> Reserve:
    """A reserve of exactly `amount`, unless `at_least` and `at_most` say otherwise."""
    values = {
        "id": request_id or new_id("req"),
        "wallet_id": person.wallet_id,
        "user_id": person.user_id,
        "key_id": person.key_id,
        "at_least": amount,
        "at_most": amount,
        "window_tokens": 1,
        "models": ("fake/model",),
        "original_model": "model",
        "is_stream": False,
    }
    return Reserve(**{**values, **more})


def settle_of(reserve: Reserve, tokens: int) -> Settle:
    """A settle of `tokens` tokens at a nano-credit each, with a receipt that an audit can follow."""
    usage = Usage(output=tokens)
    return Settle(
        id=reserve.id,
        wallet_id=reserve.wallet_id,
        cost=cost(usage, PRICE, 0),
        tokens=tokens,
        receipt=Receipt(
            outcome="completed",
            provider="fake",
            request_model="model",
            usage=msgspec.json.encode(usage).decode(),
            usage_source="reported",
            price=msgspec.json.encode(PRICE).decode(),
            markup_bps=0,
            provider_cost=provider_cost(usage, PRICE),
        ),
    )


def release_of(reserve: Reserve, *, is_undelivered: bool = False) -> Release:
    """A release of what `reserve` holds."""
    return Release(
        id=reserve.id,
        wallet_id=reserve.wallet_id,
        receipt=Receipt(outcome="nothing_delivered"),
        is_undelivered=is_undelivered,
    )


def store_at(url: str, engine: AsyncEngine) -> Store:
    """A store of its own on the database at `url`."""
    if url.startswith("sqlite"):
        return SqliteStore(Path(url.removeprefix("sqlite+aiosqlite:///")), checkpoints=True)
    return PostgresStore(engine)


def second_store(url: str, engine: AsyncEngine) -> Store:
    """What a second process has: a store of its own, which on SQLite never checkpoints."""
    if url.startswith("sqlite"):
        return SqliteStore(Path(url.removeprefix("sqlite+aiosqlite:///")), checkpoints=False)
    return PostgresStore(engine)


@asynccontextmanager
async def opened_books(url: str, *, is_second: bool = False) -> AsyncIterator[Books]:
    """An open ledger over the migrated database at `url`, of the process that serves or of a second one beside it."""
    engine = database.connect(url, pooled=False)
    lease = Lease(engine, is_embedded=url.startswith("sqlite"))
    await lease.register()
    ledger = Ledger((second_store if is_second else store_at)(url, engine), lambda: lease.id)
    ledger.start()
    try:
        yield Books(url, engine, ledger, lease)
    finally:
        await ledger.aclose()
        await engine.dispose()


def migrate_now(url: str) -> None:
    """Create the schema in the empty database at `url`, from synchronous code."""

    async def migrate() -> None:
        engine = database.connect(url, pooled=False)
        await database.migrate(engine)
        await engine.dispose()

    asyncio.run(migrate())
