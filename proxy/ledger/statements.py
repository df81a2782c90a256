"""The ledger's SQL, once for each database, made from one list of columns each.

Every read is by primary key and every write is one statement for all rows of a kind, whatever their number. SQLite
takes its rows by `executemany`. On PostgreSQL each message costs a round trip, and each value that the driver encodes
by itself costs more than the database's parsing of it: all reads are one statement that answers in JSON, all writes are
another one (`together`) that takes the rows of each kind as one JSON array of objects. What answers nothing shares a
message with its neighbour: the lock goes with the begin, the writes with the commit. A message of several statements
takes no parameters, so both are prepared once in each session, and executed with literals. Never join two such lists
with each other, and never read in the statement that locks: its snapshot is from before the wait.
"""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from proxy.storage.database import MICROS_POSTGRESQL

_TYPES = {"text": "text", "int": "bigint", "bool": "boolean", "json": "text"}
"""Of a column in a JSON object; JSON inside of JSON comes as text, and is cast where it is stored."""

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
    "provider": "text",
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
    "offers": "json",
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
_USAGE_KEY = {
    "wallet_id": "text",
    "day": "int",
    "user_id": "text",
    "key_id": "text",
    "model": "text",
    "provider": "text",
}
_USAGE_COUNTERS = {
    "calls": "int",
    "input_tokens": "int",
    "cached_input_tokens": "int",
    "output_tokens": "int",
    "charged": "int",
    "provider_cost": "int",
    "shortfall": "int",
    "refunded": "int",
    "released": "int",
    "perhaps_billed": "int",
    "perhaps_billed_amount": "int",
}

EVENT_COLUMNS = {
    "actor": "text",
    "action": "text",
    "subject": "text",
    "before": "json",
    "after": "json",
    "created_at": "int",
}


class Statement(NamedTuple):
    """One statement in both dialects; `columns` are those of the rows it reads, or takes as its parameter."""

    postgresql: str
    sqlite: str
    columns: tuple[str, ...]


def _read(table: str, columns: dict[str, str]) -> Statement:
    head = f"SELECT {', '.join(columns)} FROM {table} WHERE id"
    return Statement(f"{head} = ANY($1::text[])", f"{head} IN (SELECT value FROM json_each(?))", tuple(columns))


def _objects(columns: dict[str, str]) -> str:
    """The rows in the JSON array that is the parameter of a PostgreSQL statement."""
    definitions = ", ".join(f"{column} {_TYPES[type_]}" for column, type_ in columns.items())
    return f"json_to_recordset($1::text::json) AS rows ({definitions})"


def _values(columns: dict[str, str]) -> list[str]:
    return [f"rows.{column}::json" if type_ == "json" else f"rows.{column}" for column, type_ in columns.items()]


def _insert(table: str, columns: dict[str, str]) -> Statement:
    head = f"INSERT INTO {table} ({', '.join(columns)})"
    return Statement(
        f"{head} SELECT {', '.join(_values(columns))} FROM {_objects(columns)}",
        f"{head} VALUES ({', '.join('?' * len(columns))})",
        tuple(columns),
    )


def _update(table: str, columns: dict[str, str]) -> Statement:
    """`columns` begins with the primary key."""
    key, *others = columns
    changes = [f"{column} = {value}" for column, value in zip(columns, _values(columns), strict=True)][1:]
    return Statement(
        f"UPDATE {table} SET {', '.join(changes)} FROM {_objects(columns)} WHERE {table}.{key} = rows.{key}",
        f"UPDATE {table} SET {', '.join(f'{column} = ?{number}' for number, column in enumerate(others, 2))}"
        f" WHERE {key} = ?1",
        tuple(columns),
    )


def literal(text: str) -> str:
    """`text` as a string constant of PostgreSQL, in a session whose `standard_conforming_strings` are on.

    Raises `ValueError` for text with a NUL, which no message can carry.
    """
    if "\0" in text:
        raise ValueError("a NUL cannot be stored")
    if "'" in text:  # found far sooner than counted, which replacing does first
        text = text.replace("'", "''")
    return f"'{text}'"


def array(texts: Iterable[str]) -> str:
    """`texts` as the text of a `text[]`, which costs the driver far less to send than a list does."""
    words = list(texts)
    all_words = "".join(words)
    if "\\" in all_words or '"' in all_words:
        words = [word.replace("\\", "\\\\").replace('"', '\\"') for word in words]
    return '{"' + '","'.join(words) + '"}' if words else "{}"


def _add(table: str, key: dict[str, str], counters: dict[str, str]) -> Statement:
    """Add to the `counters` of the row with that primary key, which need not be there yet."""
    insert = _insert(table, {**key, **counters})
    changes = ", ".join(f"{column} = {table}.{column} + excluded.{column}" for column in counters)
    conflict = f" ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}"
    return Statement(insert.postgresql + conflict, insert.sqlite + conflict, insert.columns)


@cache
def together(statements: tuple[Statement, ...]) -> str:
    """Those writes as one statement of PostgreSQL, which takes their parameters in the same order.

    All of its parts see the database as it was before it: no two of them may write the same row.
    """
    *parts, last = (one.postgresql.replace("$1", f"${number}") for number, one in enumerate(statements, 1))
    if not parts:
        return last
    return f"WITH {', '.join(f'part_{number} AS ({part})' for number, part in enumerate(parts))} {last}"


def _as_json(table: str, columns: Iterable[str], condition: str) -> str:
    rows = f"SELECT {', '.join(columns)} FROM {table} WHERE {condition}"
    return f"(SELECT coalesce(json_agg(found)::text, '[]') FROM ({rows}) AS found) AS {table}"


PREPARE_LOCK_POSTGRESQL = (
    "PREPARE lock_wallets(text[]) AS SELECT FROM wallets WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE"
)
LOCK_POSTGRESQL = "EXECUTE lock_wallets"
"""To be followed by the wallets' ids, in parentheses."""

READ_WALLETS = _read("wallets", WALLET_COLUMNS)
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
INSERT_EVENTS = _insert("admin_events", {"id": "text", **EVENT_COLUMNS})
UPDATE_RESERVATIONS = _update("reservations", CLOSED_COLUMNS)
UPDATE_REFUNDED = _update("reservations", {"id": "text", "refunded": "int"})
UPDATE_WALLETS = _update("wallets", {"id": "text", **_WALLET_COUNTERS})
ADD_USAGE_DAYS = _add("usage_days", _USAGE_KEY, _USAGE_COUNTERS)
ADD_USAGE_MONTHS = _add("usage_months", _USAGE_KEY, _USAGE_COUNTERS)
UPDATE_KEYS = _update("api_keys", {"id": "text", **_KEY_COUNTERS})

READ_POSTGRESQL = ", ".join(
    [
        f"SELECT {MICROS_POSTGRESQL} AS now",
        "(SELECT is_fenced FROM instances WHERE id = $1) AS is_fenced",
        _as_json("wallets", WALLET_COLUMNS, "id = ANY($5::text::text[])"),
        _as_json("users", USER_COLUMNS, "id = ANY($2::text::text[])"),
        _as_json("reservations", RESERVATION_COLUMNS, "id = ANY($4::text::text[])"),
        _as_json(
            "api_keys",
            KEY_COLUMNS,
            "id IN (SELECT unnest($3::text::text[])"
            " UNION SELECT key_id FROM reservations WHERE id = ANY($4::text::text[]))",
        ),
    ]
)
"""The clock, whether the instance $1 is fenced, the users $2, the reservations $4, the keys $3 and those of $4,
and the wallets $5."""

READ_FENCE_SQLITE = "SELECT is_fenced FROM instances WHERE id = ?"

READ_FORGETFUL_POSTGRESQL = (
    "SELECT name FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')"
    " AND setting = 'off' ORDER BY name"
)
"""The settings with which a commit that was answered can be lost, as this session has them."""
