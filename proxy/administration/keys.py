"""Anybody's keys, as an operator makes, changes and revokes them."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration import record
from proxy.identity.keys import Caller, Key, KeyTerms, NewKey, change_key, create_key, read_key, revoke_key
from proxy.identity.users import read_user
from proxy.storage.database import writing
from proxy.units import format_credits, format_instant


async def create(
    engine: AsyncEngine, actor: str, user_id: str, terms: KeyTerms, *, by: Caller | None = None
) -> tuple[NewKey, Key]:
    """Give a user a new key. `by` is the admin's own key or token: it gives no more than it has.

    Raises `NotFound` when there is no such user, else as `create_key`.
    """
    async with writing(engine) as connection:
        user = await read_user(connection, user_id)
        made = await create_key(connection, user, terms, by=by)
        await record(connection, actor, "key.create", made.id, None, {"user_id": user.id, **_shown(terms)})
        return made, await read_key(connection, user.id, made.id)


async def change(  # noqa: PLR0913 - whose key, which one, what, and who says so
    engine: AsyncEngine, actor: str, user_id: str, key_id: str, changes: dict[str, Any], *, by: Caller | None = None
) -> Key:
    """Give a key other terms, which hold for its very next call. Raises as `change_key`, and `NotFound`."""
    async with writing(engine) as connection:
        before = await read_key(connection, user_id, key_id)
        await change_key(connection, before, changes, by=by)
        after = await read_key(connection, user_id, key_id)
        was, is_now = _shown(before), _shown(after)
        changed = [name for name in was if was[name] != is_now[name]]
        if changed:
            await record(
                connection,
                actor,
                "key.change",
                key_id,
                {name: was[name] for name in changed},
                {name: is_now[name] for name in changed},
            )
        return after


async def revoke(engine: AsyncEngine, actor: str, user_id: str, key_id: str, *, by: Caller | None = None) -> Key:
    """Close a key for good; twice is once. Raises as `revoke_key`, and `NotFound`."""
    async with writing(engine) as connection:
        key = await read_key(connection, user_id, key_id)
        await revoke_key(connection, key, by=by)
        if key.is_active:
            await record(connection, actor, "key.revoke", key_id, {"is_active": True}, {"is_active": False})
        return key


def _shown(terms: KeyTerms) -> dict[str, Any]:
    """The terms, for the record: nothing of the key itself."""
    shown = {name: getattr(terms, name) for name in KeyTerms.__struct_fields__}
    shown["scope"] = str(terms.scope)
    shown["expires_at"] = None if terms.expires_at is None else format_instant(terms.expires_at)
    shown["limit_amount"] = None if terms.limit_amount is None else format_credits(terms.limit_amount)
    return shown
