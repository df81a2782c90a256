"""Accounts, to their owners."""

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.identity.accounts import Login
from proxy.identity.users import User
from proxy.shown.credits import read_balance
from proxy.storage.database import reading
from proxy.units import format_instant


class Account(msgspec.Struct):
    """An account, to its owner. The balance is in credits."""

    id: str
    email: str | None
    full_name: str | None
    email_verified: bool
    is_admin: bool
    credits_balance: str
    created_at: str


class Token(msgspec.Struct):
    """To be sent as `Authorization: Bearer …` wherever an API key is; `expires_in` is in seconds."""

    access_token: str
    expires_in: int
    token_type: str = "bearer"  # noqa: S105 - a word, not a secret


def token_of(login: Login) -> Token:
    """What a login gives."""
    return Token(access_token=login.access_token, expires_in=login.expires_in_s)


async def account_of(engine: AsyncEngine, user: User) -> Account:
    """The account of a user, with its balance."""
    async with reading(engine) as connection:
        found = await read_balance(connection, user.wallet_id)
    return Account(
        id=user.id,
        email=user.email,
        full_name=user.full_name,
        email_verified=user.email_verified,
        is_admin=user.is_admin,
        credits_balance=found.balance,
        created_at=format_instant(user.created_at),
    )
