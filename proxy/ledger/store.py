"""One transaction of the ledger, on PostgreSQL and on SQLite: lock, read, decide, write, commit.

A store owns one connection and runs one transaction at a time; whoever shares it waits (see `batcher`).
"""

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar

import asyncpg
import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.deadline import within
from proxy.errors import SettingsError, Unavailable, forget_frames
from proxy.ledger import statements as sql
from proxy.ledger.decide import (
    Changes,
    Credit,
    Key,
    Operation,
    Outcome,
    Reservation,
    Reserve,
    State,
    Transaction,
    User,
    Wallet,
    decide,
)
from proxy.ledger.rollup import UsageDay, by_month
from proxy.units import new_id, now_micros

Row = msgspec.Struct
Holder = TypeVar("Holder", User, Key)
Found = TypeVar("Found", User, Wallet, Key, Reservation)
T = TypeVar("T")

TRANSACTION_S_MAX = 10.0
"""After this the connection is given up and the outcome unknown. Longer than the server's own statement timeout."""

STATEMENT_MS_MAX = 5_000

IDLE_MS_MAX = 2_000
"""How long a transaction may wait for its own process between two statements, which follow each other at once.

A process that is stopped there, or whose machine is gone, would hold its wallets' locks against every other process.
"""

SQLITE_BUSY_MS_MAX = 5_000
"""How long to wait for the command line, the only other writer of an embedded database."""


_SYNCHRONOUS_FULL = 2
"""How SQLite says FULL: the log is flushed at every commit."""


class StoreLostError(Exception):
    """The database could not be reached, or was lost on the way.

    The outcome is unknown: the same operations must be sent again until an answer comes.
    """


class StoreRefusedError(Exception):
    """The database refused the transaction for what is in it; nothing was written."""


class Store(Protocol):
    """Where a batch of operations is decided and made durable."""

    async def transact(self, operations: Sequence[Operation], *, owner_id: str | None) -> list[Outcome]:
        """Decide and write `operations` in one transaction, durable on return; outcomes in the operations' order.

        `owner_id` is the instance that holds what is reserved; None, for the command line, cannot reserve. Raises
        `StoreLostError` and `StoreRefusedError`.
        """
        ...

    async def check(self) -> None:
        """Connect, and see to it that what is committed over this connection is kept.

        Raises `SettingsError` when the database is set to forget it in a crash, `Unavailable` when it is out of reach.
        """
        ...

    async def aclose(self) -> None:
        """Give the connection back."""
        ...


class _Ids(msgspec.Struct):
    """What the operations name."""

    wallets: list[str]
    users: list[str]
    keys: list[str]
    reservations: list[str]
    idempotency_keys: list[str]


def _ids(operations: Iterable[Operation]) -> _Ids:
    wallets: set[str] = set()
    users: set[str] = set()
    keys: set[str] = set()
    reservations: set[str] = set()
    idempotency_keys: set[str] = set()
    for operation in operations:
        wallets.add(operation.wallet_id)
        if type(operation) is Credit:
            if operation.reservation_id is not None:
                reservations.add(operation.reservation_id)
            if operation.idempotency_key is not None:
                idempotency_keys.add(operation.idempotency_key)
            continue
        reservations.add(operation.id)
        if type(operation) is Reserve:
            users.add(operation.user_id)
            if operation.key_id is not None:
                keys.add(operation.key_id)
    return _Ids(sorted(wallets), list(users), list(keys), list(reservations), list(idempotency_keys))


def _by_id(rows: Iterable[Found]) -> dict[str, Found]:
    return {row.id: row for row in rows}


def _writes(changes: Changes, owner_id: str | None) -> list[tuple[sql.Statement, list[Row]]]:
    """The statements of a batch with their rows, in an order that both databases can take."""
    days = list(changes.days.values())
    writes = [
        (sql.INSERT_RESERVATIONS, _reserved_rows(changes, owner_id)),
        (sql.UPDATE_RESERVATIONS, _closed_rows(changes)),
        (sql.UPDATE_REFUNDED, _rows(sql.UPDATE_REFUNDED, changes.refunded.values())),
        (sql.INSERT_TRANSACTIONS, _transaction_rows(changes)),
        (sql.ADD_USAGE_DAYS, _rows(sql.ADD_USAGE_DAYS, days)),
        (sql.ADD_USAGE_MONTHS, _rows(sql.ADD_USAGE_MONTHS, by_month(days))),
        (sql.INSERT_EVENTS, _event_rows(changes)),
        (sql.UPDATE_WALLETS, _rows(sql.UPDATE_WALLETS, changes.wallets.values())),
        (sql.UPDATE_KEYS, _rows(sql.UPDATE_KEYS, changes.keys.values())),
    ]
    return [(statement, rows) for statement, rows in writes if rows]


def _reserved_rows(changes: Changes, owner_id: str | None) -> list[Row]:
    row = _row_type(sql.INSERT_RESERVATIONS.columns)
    return [
        row(
            reservation.id,
            operation.client_request_id,
            reservation.wallet_id,
            reservation.user_id,
            reservation.key_id,
            reservation.amount,
            "open",
            owner_id,
            reservation.window_tokens,
            reservation.original_model,
            operation.is_stream,
            reservation.created_at,
            operation.offers,
        )
        for reservation, operation in changes.reserved.values()
    ]


def _closed_rows(changes: Changes) -> list[Row]:
    row = _row_type(sql.UPDATE_RESERVATIONS.columns)
    return [
        row(
            reservation.id,
            reservation.state,
            reservation.cost,
            reservation.charged,
            reservation.shortfall,
            reservation.is_late,
            reservation.settled_at,
            receipt.outcome,
            receipt.provider,
            receipt.request_model,
            receipt.response_model,
            receipt.usage,
            receipt.usage_source,
            receipt.price,
            receipt.markup_bps,
            receipt.provider_cost,
            receipt.ttft_ms,
            receipt.duration_ms,
        )
        for reservation, receipt in changes.closed.values()
    ]


def _rows(statement: sql.Statement, structs: Collection[Wallet | Key | Reservation | UsageDay]) -> list[Row]:
    if not structs:
        return []
    row = _row_type(statement.columns)
    return [row(*values) for values in map(attrgetter(*statement.columns), structs)]


def _transaction_rows(changes: Changes) -> list[Row]:
    row = _row_type(sql.INSERT_TRANSACTIONS.columns)
    return [
        row(
            new_id("txn"),
            transaction.wallet_id,
            transaction.user_id,
            transaction.seq,
            transaction.type,
            transaction.amount,
            transaction.description,
            transaction.balance_before,
            transaction.balance_after,
            transaction.reservation_id,
            transaction.idempotency_key,
            transaction.created_at,
        )
        for transaction in changes.transactions
    ]


def _event_rows(changes: Changes) -> list[Row]:
    row = _row_type(sql.INSERT_EVENTS.columns)
    return [
        row(new_id("event"), event.actor, event.action, event.subject, event.before, event.after, event.created_at)
        for event in changes.events
    ]


@cache
def _row_type(columns: tuple[str, ...]) -> type[Row]:
    """Rows of these columns, which are encoded three times as fast as dicts."""
    return msgspec.defstruct("Row", columns, gc=False)


# ---- PostgreSQL

_SESSION = f"""
SET standard_conforming_strings = on;
SET statement_timeout = {STATEMENT_MS_MAX};
SET idle_in_transaction_session_timeout = {IDLE_MS_MAX};
SET enable_seqscan = off;
SET enable_hashjoin = off;
SET enable_mergejoin = off;
SET plan_cache_mode = force_generic_plan;
{sql.PREPARE_LOCK_POSTGRESQL};
"""
"""Every access is by primary key. Left to itself the server may plan a statement while the tables are still small, as a
scan of the whole table, and keep that plan while they grow: after 6,000 calls a batch took five times as long. Or it
plans anew each time, which takes longer than the work of a small batch.
"""

_REPLANNED_AFTER = frozenset({32, 128, 512, 2048, 8192, 32_768})
"""After so many transactions of a session its statements are planned anew. In a table that was empty two indexes look
alike, and PostgreSQL 18 can find an id by skipping through the one that begins with the wallet: once there were 1,000
wallets, each transaction took three times as long, until the server analyzed the table by itself.
"""

_REFUSING_CLASSES = ("22", "23", "42")
"""Data exception, integrity violation, syntax error or access rule (PostgreSQL manual, appendix A): sending it again
cannot help. Everything else may pass.
"""


class PostgresStore:
    """The ledger on PostgreSQL, over one connection of its own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._connection: AsyncConnection | None = None
        self._driver: Any = None
        self._reading: Any = None
        self._transactions = 0
        self._prepared: dict[tuple[sql.Statement, ...], str] = {}
        """The writes that this session has prepared, with what executes them."""

    async def transact(self, operations: Sequence[Operation], *, owner_id: str | None) -> list[Outcome]:
        """See `Store`."""
        try:
            with within(TRANSACTION_S_MAX):
                if self._driver is None:
                    await self._connect()
                return await self._transact(self._driver, operations, owner_id)
        except BaseException as exc:
            await self._after(exc)
            refused = isinstance(exc, asyncpg.PostgresError) and str(exc.sqlstate).startswith(_REFUSING_CLASSES)
            if refused or isinstance(exc, asyncpg.exceptions.DataError | OverflowError | ValueError):
                raise StoreRefusedError(str(exc)) from exc
            if isinstance(exc, OSError | asyncpg.PostgresError | asyncpg.InterfaceError | asyncpg.InternalClientError):
                forget_frames(exc)
                raise StoreLostError(str(exc) or type(exc).__name__) from exc
            raise

    async def check(self) -> None:
        """See `Store`."""
        try:
            async with asyncio.timeout(TRANSACTION_S_MAX):
                if self._driver is None:
                    await self._connect()
                rows = await self._driver.fetch(sql.READ_FORGETFUL_POSTGRESQL)
        except (StoreLostError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
            raise Unavailable("The database is out of reach just now.", retry_after_s=2) from exc
        if rows:
            settings = ", ".join(f"{row['name']}=off" for row in rows)
            raise SettingsError(f"PostgreSQL would lose charges in a crash: it runs with {settings}; set it to on")

    async def aclose(self) -> None:
        """See `Store`."""
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            with suppress(Exception):
                await connection.invalidate()
                await connection.close()

    async def _connect(self) -> None:
        """Raises `StoreLostError` whatever goes wrong: nothing was sent yet, so it is not about the operations."""
        try:
            self._connection = await self._engine.connect()
            raw = await self._connection.get_raw_connection()
            self._driver = raw.driver_connection
            self._prepared.clear()
            self._transactions = 0
            await self._driver.execute(_SESSION)
            self._reading = await self._driver.prepare(sql.READ_POSTGRESQL)
        except Exception as exc:
            forget_frames(exc)
            raise StoreLostError(str(exc) or type(exc).__name__) from exc

    async def _transact(self, driver: Any, operations: Sequence[Operation], owner_id: str | None) -> list[Outcome]:
        ids = _ids(operations)
        wallets = sql.array(ids.wallets)
        self._transactions += 1
        replan = ["DISCARD PLANS"] if self._transactions in _REPLANNED_AFTER else []
        lock = f"{sql.LOCK_POSTGRESQL}({sql.literal(wallets)})"
        await self._send(*replan, "BEGIN ISOLATION LEVEL READ COMMITTED", lock)
        found = await self._read(
            owner_id, sql.array(ids.users), sql.array(ids.keys), sql.array(ids.reservations), wallets
        )
        booked = (
            await driver.fetch(sql.READ_TRANSACTIONS.postgresql, ids.wallets, ids.idempotency_keys)
            if ids.idempotency_keys
            else ()
        )
        state = State(
            now=found["now"],
            is_fenced=found["is_fenced"] is not False,
            wallets=_by_id(_WALLETS.decode(found["wallets"])),
            users=_by_id(_USERS.decode(found["users"])),
            keys=_by_id(_KEYS.decode(found["api_keys"])),
            reservations=_by_id(_RESERVATIONS.decode(found["reservations"])),
            transactions={(row["wallet_id"], row["idempotency_key"]): Transaction(**row) for row in booked},
        )
        changes, outcomes = decide(state, operations)
        writes = _writes(changes, owner_id)
        steps = [[write] for write in writes] if _writes_a_row_twice(changes) else [writes]
        await self._send(*[await self._written(step) for step in steps if step], "COMMIT")
        return outcomes

    async def _written(self, writes: list[tuple[sql.Statement, list[Row]]]) -> str:
        """What writes all those rows at once, with a statement that is prepared by now."""
        statements = tuple(statement for statement, _ in writes)
        execute = self._prepared.get(statements)
        if execute is None:
            name = f"write_{len(self._prepared)}"
            types = ", ".join(["text"] * len(statements))
            await self._driver.execute(f"PREPARE {name}({types}) AS {sql.together(statements)}")
            self._prepared[statements] = execute = f"EXECUTE {name}"
        return f"{execute}({', '.join(sql.literal(_as_json(rows)) for _, rows in writes)})"

    async def _read(self, *values: str | None) -> Any:
        """The one row that `READ_POSTGRESQL` answers."""
        return await self._reading.fetchrow(*values)

    async def _send(self, *statements: str) -> None:
        """Run `statements`, which answer nothing, in one message."""
        await self._driver.execute(";".join(statements))

    async def _after(self, exc: BaseException) -> None:
        """Leave no transaction open: roll back if the server can still be talked to, else drop the connection."""
        if isinstance(exc, asyncpg.PostgresError) and self._driver is not None and not self._driver.is_closed():
            try:
                async with asyncio.timeout(1):
                    await self._driver.execute("ROLLBACK")
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                pass
            else:
                return
        if self._driver is not None:
            self._driver.terminate()
        await self.aclose()


_WALLETS = msgspec.json.Decoder(list[Wallet])
_USERS = msgspec.json.Decoder(list[User])
_KEYS = msgspec.json.Decoder(list[Key])
_RESERVATIONS = msgspec.json.Decoder(list[Reservation])


def _as_json(rows: list[Row]) -> str:
    return msgspec.json.encode(rows).decode()


def _writes_a_row_twice(changes: Changes) -> bool:
    """Whether a reservation is both made and closed, or closed and refunded, in this batch."""
    closed = changes.closed.keys()
    return not closed.isdisjoint(changes.reserved) or not changes.refunded.keys().isdisjoint(
        closed | changes.reserved.keys()
    )


# ---- SQLite


class SqliteStore:
    """The ledger on SQLite: the only connection of its process that writes charges, in a thread of its own.

    A whole transaction runs in one visit to the thread. `checkpoints` is true in the server alone: SQLite before
    3.51.3 can damage a write-ahead log that two connections checkpoint.
    """

    def __init__(self, file: Path, *, checkpoints: bool) -> None:
        self._file = file
        self._checkpoints = checkpoints
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")

    async def transact(self, operations: Sequence[Operation], *, owner_id: str | None) -> list[Outcome]:
        """See `Store`."""
        return await self._run(lambda: self._transact(operations, owner_id))

    async def check(self) -> None:
        """See `Store`."""
        try:
            await self._run(lambda: self._connection or self._connect())
        except sqlite3.Error as exc:
            raise Unavailable("The database is out of reach just now.", retry_after_s=2) from exc

    async def aclose(self) -> None:
        """See `Store`."""
        await self._run(self._close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _transact(self, operations: Sequence[Operation], owner_id: str | None) -> list[Outcome]:
        try:
            connection = self._connection or self._connect()
            connection.execute("BEGIN IMMEDIATE")
            try:
                outcomes = self._decide(connection, operations, owner_id)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError, OverflowError) as exc:
            raise StoreRefusedError(str(exc)) from exc
        except sqlite3.Error as exc:
            raise StoreLostError(str(exc)) from exc
        return outcomes

    def _decide(
        self, connection: sqlite3.Connection, operations: Sequence[Operation], owner_id: str | None
    ) -> list[Outcome]:
        ids = _ids(operations)

        def read(statement: sql.Statement, *lists: Collection[str]) -> list[dict[str, Any]]:
            if not all(lists):
                return []
            found = connection.execute(statement.sqlite, [msgspec.json.encode(ids).decode() for ids in lists])
            return [dict(zip(statement.columns, row, strict=True)) for row in found]

        fence = connection.execute(sql.READ_FENCE_SQLITE, (owner_id,)).fetchone()
        reservations = _by_id(Reservation(**row) for row in read(sql.READ_RESERVATIONS, ids.reservations))
        keys = {*ids.keys, *(row.key_id for row in reservations.values() if row.key_id is not None)}
        booked = read(sql.READ_TRANSACTIONS, ids.wallets, ids.idempotency_keys)
        state = State(
            now=now_micros(),
            is_fenced=fence is None or bool(fence[0]),
            wallets=_by_id(Wallet(**row) for row in read(sql.READ_WALLETS, ids.wallets)),
            users=_by_id(_with_patterns(User(**row)) for row in read(sql.READ_USERS, ids.users)),
            keys=_by_id(_with_patterns(Key(**row)) for row in read(sql.READ_KEYS, keys)),
            reservations=reservations,
            transactions={(row["wallet_id"], row["idempotency_key"]): Transaction(**row) for row in booked},
        )
        changes, outcomes = decide(state, operations)
        for statement, written in _writes(changes, owner_id):
            connection.executemany(statement.sqlite, map(msgspec.structs.astuple, written))
        return outcomes

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._file.as_uri()}?mode=rw",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=SQLITE_BUSY_MS_MAX / 1000,
        )
        connection.execute("PRAGMA synchronous = FULL")
        if not self._checkpoints:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
        kept = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
        if kept != ["wal", _SYNCHRONOUS_FULL]:
            connection.close()
            raise SettingsError(
                f"{self._file} would lose charges in a crash: SQLite runs with journal_mode={kept[0]} and"
                f" synchronous={kept[1]} instead of wal and {_SYNCHRONOUS_FULL}"
            )
        self._connection = connection
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _with_patterns(holder: Holder) -> Holder:
    """`holder` with its allowed models as a list, which this driver gives as JSON text."""
    if isinstance(holder.allowed_models, str):
        holder.allowed_models = msgspec.json.decode(holder.allowed_models)
    return holder
