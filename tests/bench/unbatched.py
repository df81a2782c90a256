"""What the ledger is measured against: the same books, kept by one transaction for each operation.

Each of these locks the wallet, checks the caller, the limits and what is available, writes the reservation or the
deduction, and moves the counters of wallet, key and day, as the ledger does; `tollgate audit` passes on what they
leave. They are written for speed, with as few statements as they can do with, and lack what the benchmark does not ask
of them: limits by period, instances that were fenced, late settles, and an answer for an operation that is sent again.
"""

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import msgspec
import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import registry

from proxy.ledger.decide import WINDOW, Reserve, Settle, allows
from proxy.ledger.rollup import COUNTERS, day_of, month_of, tokens_of
from proxy.ledger.statements import (
    ADD_USAGE_DAYS,
    ADD_USAGE_MONTHS,
    CLOSED_COLUMNS,
    KEY_COLUMNS,
    RESERVATION_COLUMNS,
    RESERVED_COLUMNS,
    TRANSACTION_COLUMNS,
    USER_COLUMNS,
    WALLET_COLUMNS,
    Statement,
)
from proxy.storage import tables
from proxy.units import new_id, now_micros

CONNECTIONS = 20
WAIT_S_MAX = 120
"""How long a caller waits for a connection: longer than the slowest variant needs for one call of every caller."""


class Booker(Protocol):
    """Whatever keeps the books of calls."""

    async def reserve(self, operation: Reserve) -> object:
        """Hold credits for one call, durably."""

    async def settle(self, operation: Settle) -> object:
        """Charge for one call, durably."""


class NotBookedError(Exception):
    """An operation was refused, which no benchmark asks for."""


# ---- what each of them decides; `wallet`, `user`, `key` and `reservation` are asked by column


def _grant(operation: Reserve, wallet: Any, user: Any, key: Any, now: int) -> int:
    """What is held for the call. Raises `NotBookedError` when it may not be made, or cannot be borne."""
    if not (_may_call(operation, user, key, now) and _is_within(operation, user, wallet, now)):
        raise NotBookedError(operation.id)
    if not _is_within(operation, key, key, now):
        raise NotBookedError(operation.id)
    spendable = wallet["balance"] - wallet["reserved"] - wallet["owed"]
    if key["limit_amount"] is not None:
        spendable = min(spendable, key["limit_amount"] - key["reserved"] - key["spent"])
    if spendable < operation.at_least:
        raise NotBookedError(operation.id)
    return min(operation.at_most, spendable, max(operation.at_least, spendable // 4))


def _may_call(operation: Reserve, user: Any, key: Any, now: int) -> bool:
    return bool(
        user["is_active"]
        and key["is_active"]
        and key["user_id"] == operation.user_id
        and key["wallet_id"] == operation.wallet_id
        and (key["expires_at"] is None or key["expires_at"] > now)
        and all(allows(holder["allowed_models"], model) for holder in (user, key) for model in operation.models)
    )


def _is_within(operation: Reserve, limits: Any, counters: Any, now: int) -> bool:
    is_current = counters["window_start"] == _window(now)
    return (
        _is_below(limits["concurrent_calls_max"], counters["open_calls"] + 1)
        and _is_below(limits["requests_per_minute"], is_current * counters["window_requests"] + 1)
        and _is_below(limits["tokens_per_minute"], is_current * counters["window_tokens"] + operation.window_tokens)
    )


def _is_below(limit: int | None, count: int) -> bool:
    return limit is None or count <= limit


def _window(now: int) -> int:
    return now - now % WINDOW


def _charge(operation: Settle, wallet: Any, key: Any, reservation: Any) -> int:
    """What is charged for the call. Raises `NotBookedError` when it is not open."""
    if reservation["state"] != "open":
        raise NotBookedError(operation.id)
    more = max(0, wallet["balance"] - wallet["reserved"] - wallet["owed"])
    if key["limit_amount"] is not None:
        more = min(more, max(0, key["limit_amount"] - key["reserved"] - key["spent"]))
    return min(operation.cost, reservation["amount"] + more)


# ---- through the ORM


class _Row:
    """A mapped row, made of its columns, which can also be asked by column as a driver's can."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class _User(_Row): ...


class _Wallet(_Row): ...


class _Key(_Row): ...


class _Reservation(_Row): ...


class _Transaction(_Row): ...


class _UsageDay(_Row): ...


class _UsageMonth(_Row): ...


_mapping = registry(metadata=tables.metadata)
_mapping.map_imperatively(_User, tables.users)
_mapping.map_imperatively(_Wallet, tables.wallets)
_mapping.map_imperatively(_Key, tables.api_keys)
_mapping.map_imperatively(_Reservation, tables.reservations)
_mapping.map_imperatively(_UsageDay, tables.usage_days)
_mapping.map_imperatively(_UsageMonth, tables.usage_months)
_mapping.map_imperatively(  # `metadata` is a name that the ORM keeps to itself
    _Transaction, tables.credit_transactions, properties={"details": tables.credit_transactions.c.metadata}
)


class OrmBooker:
    """SQLAlchemy's ORM: a session and a transaction for each operation, over a pool of connections."""

    def __init__(self, engine: AsyncEngine, owner_id: str) -> None:
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)
        self._owner_id = owner_id

    async def reserve(self, operation: Reserve) -> None:
        """See `Booker`."""
        async with self._sessions.begin() as session:
            wallet = await _locked(session, operation.wallet_id)
            user = await session.get_one(_User, operation.user_id)
            key = await session.get_one(_Key, operation.key_id)
            now = now_micros()
            amount = _grant(operation, wallet, user, key, now)
            for holder in (wallet, key):
                _turn(holder, now)
                holder.reserved += amount
                holder.open_calls += 1
                holder.window_requests += 1
                holder.window_tokens += operation.window_tokens
            session.add(
                _Reservation(
                    id=operation.id,
                    client_request_id=operation.client_request_id,
                    wallet_id=operation.wallet_id,
                    user_id=operation.user_id,
                    key_id=operation.key_id,
                    amount=amount,
                    state="open",
                    owner_id=self._owner_id,
                    window_tokens=operation.window_tokens,
                    original_model=operation.original_model,
                    is_stream=operation.is_stream,
                    created_at=now,
                )
            )

    async def settle(self, operation: Settle) -> None:
        """See `Booker`."""
        async with self._sessions.begin() as session:
            wallet = await _locked(session, operation.wallet_id)
            reservation = await session.get_one(_Reservation, operation.id)
            key = await session.get_one(_Key, reservation.key_id)
            now = now_micros()
            charged = _charge(operation, wallet, key, reservation)
            for holder in (wallet, key):
                _turn(holder, now)
                holder.reserved -= reservation.amount
                holder.open_calls -= 1
                holder.window_tokens = max(0, holder.window_tokens + operation.tokens - reservation.window_tokens)
            session.add(
                _Transaction(
                    id=new_id("txn"),
                    wallet_id=wallet.id,
                    user_id=reservation.user_id,
                    seq=wallet.seq + 1,
                    type="deduction",
                    amount=-charged,
                    description=reservation.original_model,
                    balance_before=wallet.balance,
                    balance_after=wallet.balance - charged,
                    reservation_id=operation.id,
                    created_at=now,
                )
            )
            wallet.seq += 1
            wallet.balance -= charged
            key.spent += charged
            key.period_spent += charged
            _close(reservation, operation, charged, now)
            row = _usage_day(operation, reservation, charged, now)
            await _count(session, _UsageDay, row)
            await _count(session, _UsageMonth, row | {"day": month_of(row["day"])})


_DAY_KEY = ADD_USAGE_DAYS.columns[:6]


async def _count(session: AsyncSession, table: Any, row: dict[str, Any]) -> None:
    counted = await session.get(table, tuple(row[name] for name in _DAY_KEY))
    if counted is None:
        session.add(table(**row))
        return
    for name in COUNTERS:
        setattr(counted, name, counted[name] + row[name])


def _usage_day(operation: Settle, reservation: Any, charged: int, now: int) -> dict[str, Any]:
    """What a settled call adds to the sums of its day, whose first columns are their key."""
    input_tokens, cached_input_tokens, output_tokens = tokens_of(operation.receipt.usage)
    return dict.fromkeys(ADD_USAGE_DAYS.columns, 0) | {
        "wallet_id": operation.wallet_id,
        "day": day_of(now),
        "user_id": reservation["user_id"],
        "key_id": reservation["key_id"],
        "model": reservation["original_model"],
        "provider": operation.receipt.provider,
        "calls": 1,
        "input_tokens": input_tokens,
        "cached_input_tokens": cached_input_tokens,
        "output_tokens": output_tokens,
        "charged": charged,
        "provider_cost": operation.receipt.provider_cost,
        "shortfall": operation.cost - charged,
    }


async def _locked(session: AsyncSession, wallet_id: str) -> _Wallet:
    return await session.get_one(_Wallet, wallet_id, with_for_update={"key_share": True})


def _turn(counters: Any, now: int) -> None:
    if counters.window_start != _window(now):
        counters.window_start = _window(now)
        counters.window_requests = 0
        counters.window_tokens = 0


def _close(reservation: Any, operation: Settle, charged: int, now: int) -> None:
    receipt = operation.receipt
    reservation.state = "settled"
    reservation.cost = operation.cost
    reservation.charged = charged
    reservation.shortfall = operation.cost - charged
    reservation.is_late = False
    reservation.settled_at = now
    reservation.outcome = receipt.outcome
    reservation.provider = receipt.provider
    reservation.request_model = receipt.request_model
    reservation.response_model = receipt.response_model
    reservation.usage = msgspec.json.decode(receipt.usage)
    reservation.usage_source = receipt.usage_source
    reservation.price = msgspec.json.decode(receipt.price)
    reservation.markup_bps = receipt.markup_bps
    reservation.provider_cost = receipt.provider_cost
    reservation.ttft_ms = receipt.ttft_ms
    reservation.duration_ms = receipt.duration_ms


@asynccontextmanager
async def orm_booker(url: str, owner_id: str) -> AsyncIterator[OrmBooker]:
    """On PostgreSQL over 20 connections; on SQLite over one, for its writers would only hinder each other."""
    is_sqlite = url.startswith("sqlite")
    engine = create_async_engine(
        url, pool_size=1 if is_sqlite else CONNECTIONS, max_overflow=0, pool_timeout=WAIT_S_MAX
    )
    if is_sqlite:
        sa.event.listen(engine.sync_engine, "connect", _prepare)
        sa.event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        yield OrmBooker(engine, owner_id)
    finally:
        await engine.dispose()


def _prepare(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


# ---- straight through the drivers, from one text of each statement


def _columns(table: str, columns: dict[str, str], prefix: str = "") -> str:
    return ", ".join(f"{table}.{column} AS {prefix}{column}" for column in columns)


def _insert(table: str, columns: Iterable[str]) -> str:
    columns = tuple(columns)
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(f':{column}' for column in columns)})"


def _add(statement: Statement, names: dict[str, str]) -> str:
    """An upsert whose parameters have these names, by column."""
    head, values, conflict = re.split(r"VALUES \([?, ]+\)", statement.sqlite)[0], names.values(), " ON CONFLICT"
    placed = ", ".join(f":{name}" for name in values)
    return f"{head}VALUES ({placed}){conflict}{statement.sqlite.partition(conflict)[2]}"


_READ_WALLET = f"SELECT {_columns('wallets', WALLET_COLUMNS)} FROM wallets WHERE id = :wallet_id"
_LOCK_WALLET = f"{_READ_WALLET} FOR NO KEY UPDATE"
_READ_CALLER = (
    f"SELECT {_columns('users', USER_COLUMNS, 'user_')}, {_columns('api_keys', KEY_COLUMNS, 'key_')}"
    " FROM users JOIN api_keys ON api_keys.id = :key_id WHERE users.id = :user_id"
)
_READ_CALL = (
    f"SELECT {_columns('reservations', RESERVATION_COLUMNS, 'call_')}, {_columns('api_keys', KEY_COLUMNS, 'key_')}"
    " FROM reservations JOIN api_keys ON api_keys.id = reservations.key_id WHERE reservations.id = :id"
)
_HOLD = (
    "reserved = reserved + :amount, open_calls = open_calls + 1, window_start = :window,"
    " window_requests = CASE WHEN window_start = :window THEN window_requests ELSE 0 END + 1,"
    " window_tokens = CASE WHEN window_start = :window THEN window_tokens ELSE 0 END + :window_tokens"
)
_RESERVE = (
    _insert("reservations", RESERVED_COLUMNS),
    f"UPDATE api_keys SET {_HOLD} WHERE id = :key_id",
    f"UPDATE wallets SET {_HOLD} WHERE id = :wallet_id",
)
_FREE = (
    "reserved = reserved - :amount, open_calls = open_calls - 1, window_start = :window,"
    " window_requests = CASE WHEN window_start = :window THEN window_requests ELSE 0 END,"
    " window_tokens = CASE WHEN window_start <> :window OR window_tokens + :more_tokens < 0 THEN 0"
    " ELSE window_tokens + :more_tokens END"
)
_SETTLE = (
    f"UPDATE reservations SET {', '.join(f'{column} = :{column}' for column in CLOSED_COLUMNS)} WHERE id = :id",
    _insert("credit_transactions", ("id", *TRANSACTION_COLUMNS))
    .replace(":id,", ":transaction_id,")
    .replace(":amount", ":taken"),
    f"UPDATE api_keys SET spent = spent + :charged, period_spent = period_spent + :charged, {_FREE} WHERE id = :key_id",
    f"UPDATE wallets SET balance = :balance_after, seq = :seq, {_FREE} WHERE id = :wallet_id",
    _add(ADD_USAGE_DAYS, {column: f"day_{column}" for column in ADD_USAGE_DAYS.columns}),
    _add(ADD_USAGE_MONTHS, {column: f"day_{column}" for column in ADD_USAGE_MONTHS.columns} | {"day": "month"}),
)


class _Part:
    """The columns of one table in a row that was joined of two."""

    def __init__(self, row: Any, prefix: str) -> None:
        self._row = row
        self._prefix = prefix

    def __getitem__(self, name: str) -> Any:
        return self._row[f"{self._prefix}_{name}"]


def _reserve_values(operation: Reserve, wallet: Any, caller: Any, owner_id: str) -> dict[str, Any]:
    """What `_RESERVE` writes. Raises `NotBookedError` when the call may not be made, or cannot be borne."""
    now = now_micros()
    if caller is None:
        raise NotBookedError(operation.id)
    return {
        "id": operation.id,
        "client_request_id": operation.client_request_id,
        "wallet_id": operation.wallet_id,
        "user_id": operation.user_id,
        "key_id": operation.key_id,
        "amount": _grant(operation, wallet, _Part(caller, "user"), _Part(caller, "key"), now),
        "state": "open",
        "owner_id": owner_id,
        "window_tokens": operation.window_tokens,
        "original_model": operation.original_model,
        "is_stream": operation.is_stream,
        "offers": operation.offers,
        "created_at": now,
        "window": _window(now),
    }


def _settle_values(operation: Settle, wallet: Any, row: Any) -> dict[str, Any]:
    """What `_SETTLE` writes. Raises `NotBookedError` when the call is not open."""
    now = now_micros()
    if row is None:
        raise NotBookedError(operation.id)
    call, receipt = _Part(row, "call"), operation.receipt
    charged = _charge(operation, wallet, _Part(row, "key"), call)
    day = _usage_day(operation, call, charged, now)
    return {
        **{f"day_{column}": value for column, value in day.items()},
        "month": month_of(day["day"]),
        "id": operation.id,
        "state": "settled",
        "cost": operation.cost,
        "charged": charged,
        "shortfall": operation.cost - charged,
        "is_late": False,
        "settled_at": now,
        "outcome": receipt.outcome,
        "provider": receipt.provider,
        "request_model": receipt.request_model,
        "response_model": receipt.response_model,
        "usage": receipt.usage,
        "usage_source": receipt.usage_source,
        "price": receipt.price,
        "markup_bps": receipt.markup_bps,
        "provider_cost": receipt.provider_cost,
        "ttft_ms": receipt.ttft_ms,
        "duration_ms": receipt.duration_ms,
        "transaction_id": new_id("txn"),
        "wallet_id": operation.wallet_id,
        "user_id": call["user_id"],
        "seq": wallet["seq"] + 1,
        "type": "deduction",
        "taken": -charged,
        "description": call["original_model"],
        "balance_before": wallet["balance"],
        "balance_after": wallet["balance"] - charged,
        "reservation_id": operation.id,
        "idempotency_key": None,
        "created_at": now,
        "key_id": call["key_id"],
        "amount": call["amount"],
        "window": _window(now),
        "more_tokens": operation.tokens - call["window_tokens"],
    }


class _Numbered:
    """A statement with PostgreSQL's numbered parameters instead of named ones."""

    def __init__(self, *statements: str) -> None:
        """All but the last become data-modifying parts of it, so that one round trip writes everything."""
        *parts, last = statements
        named = f"WITH {', '.join(f'part_{n} AS ({part})' for n, part in enumerate(parts))} {last}" if parts else last
        self._names = tuple(dict.fromkeys(re.findall(r":(\w+)", named)))
        self.text = re.sub(r":(\w+)", lambda match: f"${self._names.index(match[1]) + 1}", named)

    def of(self, values: dict[str, Any]) -> list[Any]:
        return [values[name] for name in self._names]


class PostgresBooker:
    """asyncpg: lock, read, write and the ends of the transaction, each one round trip; a pool of connections."""

    _reserving = _Numbered(*_RESERVE)
    _settling = _Numbered(*_SETTLE)
    _lock_wallet = _Numbered(_LOCK_WALLET)
    _read_caller = _Numbered(_READ_CALLER)
    _read_call = _Numbered(_READ_CALL)

    def __init__(self, pool: asyncpg.Pool, owner_id: str) -> None:
        self._pool = pool
        self._owner_id = owner_id

    async def reserve(self, operation: Reserve) -> None:
        """See `Booker`."""
        async with self._pool.acquire() as connection, connection.transaction():
            wallet = await connection.fetchrow(self._lock_wallet.text, operation.wallet_id)
            caller = await connection.fetchrow(self._read_caller.text, operation.key_id, operation.user_id)
            values = _reserve_values(operation, wallet, caller, self._owner_id)
            await connection.execute(self._reserving.text, *self._reserving.of(values))

    async def settle(self, operation: Settle) -> None:
        """See `Booker`."""
        async with self._pool.acquire() as connection, connection.transaction():
            wallet = await connection.fetchrow(self._lock_wallet.text, operation.wallet_id)
            call = await connection.fetchrow(self._read_call.text, operation.id)
            await connection.execute(self._settling.text, *self._settling.of(_settle_values(operation, wallet, call)))


class SqliteBooker:
    """sqlite3: one connection in a thread of its own, one visit to it for each operation."""

    def __init__(self, file: Path, owner_id: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA synchronous = FULL")
        self._owner_id = owner_id

    async def reserve(self, operation: Reserve) -> None:
        """See `Booker`."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, self._reserve, operation)

    async def settle(self, operation: Settle) -> None:
        """See `Booker`."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, self._settle, operation)

    def close(self) -> None:
        """Give the connection back."""
        self._thread.shutdown()
        self._connection.close()

    def _transact(self, work: Callable[[Any, Any], None], operation: Reserve | Settle) -> None:
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            work(operation, execute(_READ_WALLET, {"wallet_id": operation.wallet_id}).fetchone())
        except BaseException:
            execute("ROLLBACK")
            raise
        execute("COMMIT")

    def _reserve(self, operation: Reserve, wallet: sqlite3.Row) -> None:
        named = {"key_id": operation.key_id, "user_id": operation.user_id}
        caller = self._connection.execute(_READ_CALLER, named).fetchone()
        values = _reserve_values(operation, wallet, caller, self._owner_id)
        for statement in _RESERVE:
            self._connection.execute(statement, values)

    def _settle(self, operation: Settle, wallet: sqlite3.Row) -> None:
        call = self._connection.execute(_READ_CALL, {"id": operation.id}).fetchone()
        values = _settle_values(operation, wallet, call)
        for statement in _SETTLE:
            self._connection.execute(statement, values)


@asynccontextmanager
async def driver_booker(url: str, owner_id: str) -> AsyncIterator[PostgresBooker | SqliteBooker]:
    """On PostgreSQL over 20 connections, on SQLite over one."""
    if url.startswith("sqlite"):
        booker = SqliteBooker(Path(make_url(url).database), owner_id)
        try:
            yield booker
        finally:
            booker.close()
        return
    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    async with asyncpg.create_pool(address, min_size=CONNECTIONS, max_size=CONNECTIONS, reset=_keep) as pool:
        yield PostgresBooker(pool, owner_id)


async def _keep(_connection: object) -> None:
    """Nothing that these transactions do outlives them, so the pool need not spend a round trip on resetting."""
