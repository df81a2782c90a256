"""The ledger's SQL, once for each database, made from one list of columns each.

Every read is by primary key and every write is one statement for all rows of a kind, whatever their number:
PostgreSQL takes its rows as arrays, a column each, SQLite by `executemany`. Never join two such lists with each
other, and never read in the statement that locks.
"""

from typing import NamedTuple

from proxy.storage.database import MICROS_POSTGRESQL

_TYPES = {"text": "text[]", "int": "bigint[]", "bool": "boolean[]", "json": "json[]"}

USER_COLUMNS = {
    "id": "text",
    "is_active": "bool",
    "token_version": "int",
    "allowed_models": "json",
    "requests_per_minute": "int",
    "tokens_per_minute": "int",
    "concurrent_calls_max": "int",
}
_WALLET_COUNTERS = {
    "balance": "int",
    "reserved": "int",
    "seq": "int",
    "window_start": "int",
    "window_requests": "int",
    "window_tokens": "int",
    "open_calls": "int",
}
WALLET_COLUMNS = {"id": "text", "owner_id": "text", "owed": "int", **_WALLET_COUNTERS}
_KEY_COUNTERS = {
    "spent": "int",
    "reserved": "int",
    "period_start": "int",
    "period_spent": "int",
    "window_start": "int",
    "window_requests": "int",
    "window_tokens": "int",
    "open_calls": "int",
}
KEY_COLUMNS = {
    "id": "text",
    "user_id": "text",
    "wallet_id": "text",
    "is_active": "bool",
    "expires_at": "int",
    "allowed_models": "json",
    "limit_amount": "int",
    "limit_period": "text",
    "requests_per_minute": "int",
    "tokens_per_minute": "int",
    "concurrent_calls_max": "int",
    **_KEY_COUNTERS,
}
RESERVATION_COLUMNS = {
    "id": "text",
    "wallet_id": "text",
    "user_id": "text",
    "key_id": "text",
    "amount": "int",
    "state": "text",
    "window_tokens": "int",
    "original_model": "text",
    "created_at": "int",
    "cost": "int",
    "charged": "int",
    "shortfall": "int",
    "refunded": "int",
    "is_late": "bool",
    "settled_at": "int",
}
RESERVED_COLUMNS = {
    "id": "text",
    "client_request_id": "text",
    "wallet_id": "text",
    "user_id": "text",
    "key_id": "text",
    "amount": "int",
    "state": "text",
    "owner_id": "text",
    "window_tokens": "int",
    "original_model": "text",
    "is_stream": "bool",
    "created_at": "int",
}
CLOSED_COLUMNS = {
    "id": "text",
    "state": "text",
    "cost": "int",
    "charged": "int",
    "shortfall": "int",
    "is_late": "bool",
    "settled_at": "int",
    "outcome": "text",
    "provider": "text",
    "request_model": "text",
    "response_model": "text",
    "usage": "json",
    "usage_source": "text",
    "price": "json",
    "markup_bps": "int",
    "provider_cost": "int",
    "ttft_ms": "int",
    "duration_ms": "int",
}
TRANSACTION_COLUMNS = {
    "wallet_id": "text",
    "user_id": "text",
    "seq": "int",
    "type": "text",
    "amount": "int",
    "description": "text",
    "balance_before": "int",
    "balance_after": "int",
    "reservation_id": "text",
    "idempotency_key": "text",
    "created_at": "int",
}


class Statement(NamedTuple):
    """One statement in both dialects; `columns` are those of its parameter rows, in order."""

    postgresql: str
    sqlite: str
    columns: tuple[str, ...]


def _read(table: str, columns: dict[str, str], *, suffix: str = "") -> Statement:
    head = f"SELECT {', '.join(columns)} FROM {table} WHERE id"
    return Statement(f"{head} = ANY($1::text[]){suffix}", f"{head} IN (SELECT value FROM json_each(?))", tuple(columns))


def _arrays(columns: dict[str, str]) -> str:
    return ", ".join(f"${number}::{_TYPES[type_]}" for number, type_ in enumerate(columns.values(), 1))


def _insert(table: str, columns: dict[str, str]) -> Statement:
    head = f"INSERT INTO {table} ({', '.join(columns)})"
    return Statement(
        f"{head} SELECT * FROM unnest({_arrays(columns)})",
        f"{head} VALUES ({', '.join('?' * len(columns))})",
        tuple(columns),
    )


def _update(table: str, columns: dict[str, str]) -> Statement:
    """`columns` begins with the primary key."""
    key, *others = columns
    changes = ", ".join(f"{column} = rows.{column}" for column in others)
    return Statement(
        f"UPDATE {table} SET {changes} FROM unnest({_arrays(columns)}) AS rows ({', '.join(columns)})"
        f" WHERE {table}.{key} = rows.{key}",
        f"UPDATE {table} SET {', '.join(f'{column} = ?{number}' for number, column in enumerate(others, 2))}"
        f" WHERE {key} = ?1",
        tuple(columns),
    )


LOCK_WALLETS = _read("wallets", WALLET_COLUMNS, suffix=" ORDER BY id FOR NO KEY UPDATE")
READ_USERS = _read("users", USER_COLUMNS)
READ_KEYS = _read("api_keys", KEY_COLUMNS)
READ_RESERVATIONS = _read("reservations", RESERVATION_COLUMNS)
READ_TRANSACTIONS = Statement(
    f"SELECT {', '.join(TRANSACTION_COLUMNS)} FROM credit_transactions"
    " WHERE wallet_id = ANY($1::text[]) AND idempotency_key = ANY($2::text[])",
    f"SELECT {', '.join(TRANSACTION_COLUMNS)} FROM credit_transactions"
    " WHERE wallet_id IN (SELECT value FROM json_each(?)) AND idempotency_key IN (SELECT value FROM json_each(?))",
    tuple(TRANSACTION_COLUMNS),
)

INSERT_RESERVATIONS = _insert("reservations", RESERVED_COLUMNS)
INSERT_TRANSACTIONS = _insert("credit_transactions", {"id": "text", **TRANSACTION_COLUMNS})
UPDATE_RESERVATIONS = _update("reservations", CLOSED_COLUMNS)
UPDATE_REFUNDED = _update("reservations", {"id": "text", "refunded": "int"})
UPDATE_WALLETS = _update("wallets", {"id": "text", **_WALLET_COUNTERS})
UPDATE_KEYS = _update("api_keys", {"id": "text", **_KEY_COUNTERS})

READ_FENCE_POSTGRESQL = f"SELECT {MICROS_POSTGRESQL}, (SELECT is_fenced FROM instances WHERE id = $1)"
READ_FENCE_SQLITE = "SELECT is_fenced FROM instances WHERE id = ?"

READ_FORGETFUL_POSTGRESQL = (
    "SELECT name FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')"
    " AND setting = 'off' ORDER BY name"
)
"""The settings with which a commit that was answered can be lost, as this session has them."""
