"""Users with their wallets."""

from typing import Annotated

import msgspec
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration.users import CHANGEABLE
from proxy.identity.users import Standing, list_users
from proxy.pages import check_page
from proxy.storage.database import reading
from proxy.units import format_credits, format_instant

Amount = Annotated[str, Meta(examples=["12.5"])]


class WalletItem(msgspec.Struct):
    """Credits. `available` is `balance` − `reserved` − `owed`: what a new call may use."""

    balance: Amount
    reserved: Amount
    owed: Amount
    available: Amount


class UserItem(msgspec.Struct):
    """A user with its wallet, and the limits that hold for all of its keys and tokens; null is none."""

    id: str
    email: str | None
    full_name: str | None
    is_active: bool
    is_admin: bool
    email_verified: bool
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_calls_max: int | None
    allowed_models: list[str] | None
    wallet: WalletItem
    created_at: str
    updated_at: str


class UserPage(msgspec.Struct):
    """Newest first. `next_cursor` asks for the next page; null on the last."""

    items: list[UserItem]
    next_cursor: str | None


async def user_page(
    engine: AsyncEngine, limit: int, cursor: str | None, *, email: str | None = None, text: str | None = None
) -> UserPage:
    """A page of all users, or of those that `list_users` finds. Raises `BadRequest`."""
    check_page(limit, cursor, "usr")
    async with reading(engine) as connection:
        found = await list_users(connection, limit=limit + 1, before=cursor, email=email, text=text)
    items = [user_item(standing) for standing in found[:limit]]
    return UserPage(items, items[-1].id if len(found) > limit else None)


def user_item(standing: Standing) -> UserItem:
    """A user with its wallet, as they are shown."""
    user, wallet = standing.user, standing.wallet
    return UserItem(
        **{name: getattr(user, name) for name in ("id", *CHANGEABLE)},
        wallet=WalletItem(
            balance=format_credits(wallet.balance),
            reserved=format_credits(wallet.reserved),
            owed=format_credits(wallet.owed),
            available=format_credits(wallet.available),
        ),
        created_at=format_instant(user.created_at),
        updated_at=format_instant(user.updated_at),
    )
