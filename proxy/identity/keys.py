"""API keys: random, shown once, stored as their hash."""

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.errors import BadRequest, Conflict, Forbidden, NotFound, Unauthenticated
from proxy.identity.users import User
from proxy.ledger.decide import period_start
from proxy.storage.database import database_now
from proxy.storage.tables import api_keys, reservations, users, wallets
from proxy.units import MICROS_PER_DAY, NANOS_MAX, Micros, Nanos, is_id, new_id, now_micros

PREFIX = "sk-tg-"
_SECRET_BYTES = 32
_SHOWN_CHARACTERS = 6
"""How much of the random part identifies a key to people; 36 of its 256 bits."""

NAME_CHARACTERS_MAX = 100
MODELS_MAX = 100
KEYS_MAX = 200
"""Active keys of one user."""

COUNT_MAX = 10**9
"""Of a limit on requests, tokens or calls: more is no limit."""

_PATTERN = re.compile(r"[A-Za-z0-9_./:@+*?-]{1,200}")
"""Names of models with `*` and `?`. No sets in brackets: nobody needs them, and they can be written wrongly."""

_STRICTNESS = (None, "month", "day")
"""Of the same amount: for ever is the strictest limit, by day the loosest."""


class Scope(StrEnum):
    """What a key may be used for; each includes those before it."""

    INFERENCE = "inference"
    MANAGE = "manage"
    ADMIN = "admin"

    def includes(self, other: "Scope") -> bool:
        """Whether whoever has this scope may do what `other` is for."""
        return _RANKS[self] >= _RANKS[other]


_RANKS = {scope: rank for rank, scope in enumerate(Scope)}


class Caller(msgspec.Struct, frozen=True):
    """The authenticated user plus the API key used, if any."""

    user_id: str
    wallet_id: str
    key_id: str | None
    scope: Scope
    is_admin: bool
    token_version: int | None = None


class Credential(msgspec.Struct, frozen=True):
    """What is known about a key or token, as far as authentication needs it."""

    caller: Caller
    is_active: bool
    is_user_active: bool
    expires_at: Micros | None

    def is_valid(self, now: Micros) -> bool:
        """Whether it opens the door at `now`; whether its user may act is another question."""
        return self.is_active and (self.expires_at is None or self.expires_at > now)


class KeyTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What a key may be used for, and how much; None is no limit.

    `allowed_models` are names with `*` and `?`, matched against what may serve a call (`provider/model`, or without
    its provider). `limit_period` is None for a limit of the key's whole life, "day" or "month" (UTC).
    """

    name: str = ""
    scope: Scope = Scope.INFERENCE
    expires_at: Micros | None = None
    allowed_models: list[str] | None = None
    limit_amount: Nanos | None = None
    limit_period: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls_max: int | None = None


class Key(KeyTerms, frozen=True, kw_only=True):
    """A key as it is stored: everything but the key itself."""

    id: str
    user_id: str
    wallet_id: str
    prefix: str
    is_active: bool
    created_at: Micros
    last_used_at: Micros | None = None
    spent: Nanos = 0
    reserved: Nanos = 0
    period_start: Micros = 0
    period_spent: Nanos = 0

    def spent_in_period(self, now: Micros) -> Nanos:
        """What of its limit is spent: in the period that holds `now`, or ever where it has none."""
        if self.limit_period is None:
            return self.spent
        return self.period_spent if self.period_start == period_start(now, self.limit_period) else 0


class NewKey(msgspec.Struct, frozen=True):
    """A key that was just made. `secret` is the key itself: it is not stored, and cannot be shown again."""

    id: str
    secret: str


_RATES = ("requests_per_minute", "tokens_per_minute", "concurrent_calls_max")
_COLUMNS = [api_keys.c[name] for name in Key.__struct_fields__]


def hash_key(key: str) -> str:
    """What is stored instead of `key`: its SHA-256 in hexadecimal digits; 256 random bits need no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


# ---- what may be asked for


def check_terms(terms: KeyTerms, now: Micros) -> None:
    """Raises `BadRequest` for what no key can have."""
    if len(terms.name) > NAME_CHARACTERS_MAX or not terms.name.isprintable():
        raise _wrong("name", f"A key's name has at most {NAME_CHARACTERS_MAX} printable characters.")
    if terms.expires_at is not None and terms.expires_at <= now:
        raise _wrong("expires_at", "A key must expire in the future.")
    check_limits(terms)
    if terms.limit_amount is not None and not 0 <= terms.limit_amount <= NANOS_MAX:
        raise _wrong("limit_amount", "A limit must not be below zero.")
    if terms.limit_period not in _STRICTNESS:
        raise _wrong("limit_period", "A limit is by day, by month, or for ever (null).")
    if terms.limit_period is not None and terms.limit_amount is None:
        raise _wrong("limit_period", "A period needs a limit_amount.")


def check_limits(limits: KeyTerms | User) -> None:
    """Raises `BadRequest` for models and rates to which neither a key nor a user can be limited."""
    models = limits.allowed_models
    if models is not None and (len(models) > MODELS_MAX or not all(map(_PATTERN.fullmatch, models))):
        raise _wrong("allowed_models", f"At most {MODELS_MAX} names of models, with * and ? for what may vary.")
    for name in _RATES:
        rate = getattr(limits, name)
        if rate is not None and not 0 <= rate <= COUNT_MAX:
            raise _wrong(name, f"A limit must be from 0 to {COUNT_MAX}.")


def _wrong(param: str, message: str) -> BadRequest:
    return BadRequest(message, param=param, code="invalid_value")


def check_within(terms: KeyTerms, own: KeyTerms) -> None:
    """Raises `Forbidden` unless a key of `terms` may do nothing that a key of `own` may not."""
    if not own.scope.includes(terms.scope):
        raise _more("scope")
    if own.expires_at is not None and (terms.expires_at is None or terms.expires_at > own.expires_at):
        raise _more("expires_at")
    if own.allowed_models is not None and not (
        terms.allowed_models is not None and all(_is_within(one, own.allowed_models) for one in terms.allowed_models)
    ):
        raise _more("allowed_models")
    if own.limit_amount is not None:
        if terms.limit_amount is None or terms.limit_amount > own.limit_amount:
            raise _more("limit_amount")
        if _STRICTNESS.index(terms.limit_period) > _STRICTNESS.index(own.limit_period):
            raise _more("limit_period")
    for name in _RATES:
        limit, asked = getattr(own, name), getattr(terms, name)
        if limit is not None and (asked is None or asked > limit):
            raise _more(name)


def _more(field: str) -> Forbidden:
    return Forbidden(f"A key cannot grant more than it has: {field}.", code="key_grants_more")


def _is_within(pattern: str, own: Sequence[str]) -> bool:
    """Whether all that `pattern` matches is matched by `own`: it is one of them, or a name that they match.

    Or it is a name with a tail of `*`, and one of `own` is a shorter one.
    """
    if pattern in own:
        return True
    head = pattern.removesuffix("*")
    if "*" in head or "?" in head:
        return False
    if head == pattern:
        return any(fnmatchcase(pattern, one) for one in own)
    return any(one.endswith("*") and not set("*?") & set(one[:-1]) and head.startswith(one[:-1]) for one in own)


# ---- making, changing, revoking


async def create_key(
    connection: AsyncConnection, user: User, terms: KeyTerms | None = None, *, by: Caller | None = None
) -> NewKey:
    """Give `user` a new key.

    `by` is who asks: a key among them gives no more than it has, and what it gives of its spending limit is taken off
    its own, or a limited key could make itself as many limits as it likes. Raises `BadRequest` for terms that no key
    can have, `Forbidden` for more than whoever asks has and for an admin key of a user who is none, `Conflict` for one
    key too many.
    """
    terms = terms or KeyTerms()
    now = now_micros()
    check_terms(terms, now)
    if terms.scope is Scope.ADMIN and not user.is_admin:
        raise Forbidden(f"{user.shown_name} is not an admin.", code="not_an_admin")
    await _lock_wallets(connection, user.wallet_id, *([by.wallet_id] if by is not None else []))
    if by is not None:
        await _give(connection, by, terms)
        await _check_count(connection, user.id)
    secret = PREFIX + base64.urlsafe_b64encode(os.urandom(_SECRET_BYTES)).rstrip(b"=").decode()
    key_id = new_id("key")
    await connection.execute(
        api_keys.insert().values(
            **msgspec.structs.asdict(terms),
            id=key_id,
            user_id=user.id,
            wallet_id=user.wallet_id,
            prefix=secret[: len(PREFIX) + _SHOWN_CHARACTERS],
            key_hash=hash_key(secret),
            is_active=True,
            created_at=now,
        )
    )
    return NewKey(key_id, secret)


async def _give(connection: AsyncConnection, by: Caller, terms: KeyTerms) -> None:
    """Let the caller's key pass on what `terms` ask for."""
    if not by.scope.includes(terms.scope):
        raise _more("scope")
    if by.key_id is None:
        return
    own = await _own(connection, by.user_id, by.key_id)
    check_within(terms, own)
    if own.limit_amount is None or terms.limit_amount is None:
        return
    spent = own.spent_in_period(await database_now(connection))
    if terms.limit_amount > own.limit_amount - own.reserved - spent:
        raise _more("limit_amount")
    await connection.execute(
        api_keys.update()
        .where(api_keys.c.id == own.id)
        .values(limit_amount=api_keys.c.limit_amount - terms.limit_amount)
    )


async def _own(connection: AsyncConnection, user_id: str, key_id: str) -> Key:
    """The key that asks, as it is now: it may have been revoked since it was let in."""
    own = await read_key(connection, user_id, key_id)
    if not own.is_active:
        raise Unauthenticated("The API key is revoked.")
    return own


async def _check_count(connection: AsyncConnection, user_id: str) -> None:
    query = sa.select(sa.func.count()).select_from(api_keys)
    count = await connection.scalar(query.where(api_keys.c.user_id == user_id, api_keys.c.is_active))
    if (count or 0) >= KEYS_MAX:
        raise Conflict(f"An account has at most {KEYS_MAX} keys. Revoke some first.", code="too_many_keys")


async def change_key(
    connection: AsyncConnection, key: Key, changes: dict[str, Any], *, by: Caller | None = None
) -> None:
    """Give `key` other terms; `changes` are fields of `KeyTerms` except `scope`.

    A key that has limits of its own may tighten others, and loosen none. Raises as `create_key` does, and `Conflict`
    when the key is revoked.
    """
    await _lock_wallets(connection, key.wallet_id)
    key = await read_key(connection, key.user_id, key.id)
    if not key.is_active:
        raise Conflict("This key is revoked.", code="key_revoked")
    _check_rank(key, by)
    terms = KeyTerms(**{name: changes.get(name, getattr(key, name)) for name in KeyTerms.__struct_fields__})
    if terms.limit_amount is None and "limit_period" not in changes:
        terms = msgspec.structs.replace(terms, limit_period=None)
    check_terms(terms, now_micros() if "expires_at" in changes else 0)
    if by is not None and by.key_id is not None and _is_limited(await _own(connection, by.user_id, by.key_id)):
        check_within(terms, key)
    values = msgspec.structs.asdict(terms)
    if terms.limit_period != key.limit_period:
        values |= await _period(connection, key, terms.limit_period)
    await connection.execute(api_keys.update().where(api_keys.c.id == key.id).values(**values))


def _is_limited(key: KeyTerms) -> bool:
    limits = ("expires_at", "allowed_models", "limit_amount", *_RATES)
    return any(getattr(key, name) is not None for name in limits)


async def _period(connection: AsyncConnection, key: Key, period: str | None) -> dict[str, int]:
    """The counters of a key whose limit is by another `period` from now on."""
    start = period_start(await database_now(connection), period)
    if not start:
        return {"period_start": 0, "period_spent": key.spent}
    table = reservations
    oldest = f"req_{max(0, start - MICROS_PER_DAY) // 1000:012x}"  # no call of a day before can settle in it
    spent = await connection.scalar(
        sa.select(sa.cast(sa.func.coalesce(sa.func.sum(table.c.charged), 0), sa.BigInteger)).where(
            table.c.wallet_id == key.wallet_id,
            table.c.id >= oldest,
            table.c.key_id == key.id,
            table.c.settled_at >= start,
        )
    )
    return {"period_start": start, "period_spent": spent or 0}


async def revoke_key(connection: AsyncConnection, key: Key, *, by: Caller | None = None) -> None:
    """Close `key` for good; twice is once. Raises `Forbidden` when it has more scope than the key that asks."""
    await _lock_wallets(connection, key.wallet_id)
    _check_rank(key, by)
    await connection.execute(api_keys.update().where(api_keys.c.id == key.id).values(is_active=False))


def _check_rank(key: Key, by: Caller | None) -> None:
    if by is not None and not by.scope.includes(key.scope):
        raise Forbidden("A key cannot change a key of more scope.", code="insufficient_scope")


async def _lock_wallets(connection: AsyncConnection, *wallet_ids: str) -> None:
    """Wait for the calls that are just being booked, as the ledger does: limits change between two of them."""
    query = sa.select(wallets.c.id).where(wallets.c.id.in_(wallet_ids)).order_by(wallets.c.id)
    await connection.execute(query.with_for_update(key_share=True))


# ---- reading


async def read_key(connection: AsyncConnection, user_id: str, key_id: str) -> Key:
    """The user's key with this id. Raises `NotFound` when there is none, or it is somebody else's."""
    if is_id(key_id, "key") and is_id(user_id, "usr"):
        query = sa.select(*_COLUMNS).where(api_keys.c.id == key_id, api_keys.c.user_id == user_id)
        row = (await connection.execute(query)).one_or_none()
        if row is not None:
            return _key(row)
    raise NotFound(f"There is no such key: {key_id!r}.")


async def list_keys(connection: AsyncConnection, user_id: str, *, limit: int, before: str | None = None) -> list[Key]:
    """The user's keys, newest first, revoked ones included; at most `limit`, those made before the key `before`."""
    query = sa.select(*_COLUMNS).where(api_keys.c.user_id == user_id)
    if before is not None:
        query = query.where(api_keys.c.id < before)
    rows = (await connection.execute(query.order_by(api_keys.c.id.desc()).limit(limit))).all()
    return [_key(row) for row in rows]


def _key(row: Any) -> Key:
    values = {name: getattr(row, name) for name in Key.__struct_fields__}
    return Key(**{**values, "scope": Scope(row.scope)})


async def find_key(connection: AsyncConnection, key_hash: str) -> Credential | None:
    """What is stored under `key_hash`; None when there is no such key."""
    row = (
        await connection.execute(
            sa.select(
                api_keys.c.id,
                api_keys.c.user_id,
                api_keys.c.wallet_id,
                api_keys.c.scope,
                api_keys.c.is_active,
                api_keys.c.expires_at,
                users.c.is_active.label("is_user_active"),
                users.c.is_admin,
            )
            .join(users, users.c.id == api_keys.c.user_id)
            .where(api_keys.c.key_hash == key_hash)
        )
    ).one_or_none()
    if row is None:
        return None
    return Credential(
        caller=Caller(
            user_id=row.user_id,
            wallet_id=row.wallet_id,
            key_id=row.id,
            scope=Scope(row.scope),
            is_admin=bool(row.is_admin),
        ),
        is_active=bool(row.is_active),
        is_user_active=bool(row.is_user_active),
        expires_at=row.expires_at,
    )


async def allowed_models(connection: AsyncConnection, caller: Caller) -> list[list[str] | None]:
    """The patterns of models to which the caller's user and key are restricted; None where they are not."""
    found = [await connection.scalar(sa.select(users.c.allowed_models).where(users.c.id == caller.user_id))]
    if caller.key_id is not None:
        found.append(
            await connection.scalar(sa.select(api_keys.c.allowed_models).where(api_keys.c.id == caller.key_id))
        )
    return found
