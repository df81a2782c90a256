"""API keys: random, shown once, stored as their hash."""

import base64
import hashlib
import os
from enum import StrEnum

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.errors import BadRequest, Forbidden
from proxy.identity.users import User
from proxy.storage.tables import api_keys, users
from proxy.units import Micros, new_id, now_micros

PREFIX = "sk-tg-"
_SECRET_BYTES = 32
_SHOWN_CHARACTERS = 6
"""How much of the random part identifies a key to people; 36 of its 256 bits."""

NAME_CHARACTERS_MAX = 100


class Scope(StrEnum):
    """What a key may be used for; each includes those before it."""

    INFERENCE = "inference"
    MANAGE = "manage"
    ADMIN = "admin"


class Caller(msgspec.Struct, frozen=True):
    """The authenticated user plus the API key used, if any."""

    user_id: str
    wallet_id: str
    key_id: str | None
    scope: Scope
    is_admin: bool
    token_version: int | None = None


class KeyRecord(msgspec.Struct, frozen=True):
    """What is stored about a key, as far as authentication needs it."""

    caller: Caller
    is_active: bool
    is_user_active: bool
    expires_at: Micros | None

    def is_valid(self, now: Micros) -> bool:
        """Whether it opens the door at `now`; whether its user may act is another question."""
        return self.is_active and (self.expires_at is None or self.expires_at > now)


def hash_key(key: str) -> str:
    """What is stored instead of `key`: its SHA-256 in hexadecimal digits; 256 random bits need no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


async def create_key(connection: AsyncConnection, user: User, *, name: str = "", scope: Scope = Scope.INFERENCE) -> str:
    """Give `user` a new key and return it: it is not stored, and cannot be shown again.

    Raises `BadRequest` for a name over 100 characters, `Forbidden` for an admin key of a user who is none.
    """
    if len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
        raise BadRequest(
            f"A key's name has at most {NAME_CHARACTERS_MAX} printable characters.", param="name", code="invalid_value"
        )
    if scope is Scope.ADMIN and not user.is_admin:
        raise Forbidden(f"{user.email} is not an admin.", code="not_an_admin")
    key = PREFIX + base64.urlsafe_b64encode(os.urandom(_SECRET_BYTES)).rstrip(b"=").decode()
    await connection.execute(
        api_keys.insert().values(
            id=new_id("key"),
            user_id=user.id,
            wallet_id=user.wallet_id,
            name=name,
            scope=scope,
            prefix=key[: len(PREFIX) + _SHOWN_CHARACTERS],
            key_hash=hash_key(key),
            is_active=True,
            created_at=now_micros(),
        )
    )
    return key


async def find_key(connection: AsyncConnection, key_hash: str) -> KeyRecord | None:
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
    return KeyRecord(
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
