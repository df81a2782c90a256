"""Users as an operator makes and changes them."""

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration import record
from proxy.errors import Conflict
from proxy.identity.keys import check_limits
from proxy.identity.passwords import Passwords, check_password
from proxy.identity.users import (
    Standing,
    User,
    add_identity,
    change_user,
    check_name,
    create_user,
    has_other_admin,
    normalise_email,
    read_standing,
    read_user,
    replace_password,
)
from proxy.storage.database import writing

CHANGEABLE = (
    "email",
    "full_name",
    "is_active",
    "is_admin",
    "email_verified",
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_calls_max",
    "allowed_models",
)
"""The fields of `User` that an operator sets, and that events show."""

Identity = tuple[str, str]
"""An issuer, and the `sub` by which it knows a user."""


async def create(  # noqa: PLR0913 - what is known of a person
    engine: AsyncEngine,
    passwords: Passwords,
    actor: str,
    wanted: Mapping[str, Any],
    *,
    password: str | None = None,
    identity: Identity | None = None,
) -> Standing:
    """Add a user with an empty wallet; `wanted` are fields of `CHANGEABLE`, the e-mail address among them.

    Raises `BadRequest` for what is not acceptable, `Conflict` for an address or identity that is somebody's.
    """
    fields = _checked(User(id="", email=None, is_active=True, is_admin=False), wanted)
    password_hash = None
    if password is not None:
        check_password(password, *_related(fields["email"], fields.get("full_name")))
        password_hash = await passwords.hash(password)
    async with writing(engine) as connection:
        user = await create_user(connection, password_hash=password_hash, **fields)
        if identity is not None:
            await add_identity(connection, user.id, *identity)
        after = {
            **_shown(user, CHANGEABLE),
            "has_password": password is not None,
            "identity": None if identity is None else list(identity),
        }
        await record(connection, actor, "user.create", user.id, None, after)
        return await read_standing(connection, user.id)


async def change(engine: AsyncEngine, actor: str, user_id: str, changes: Mapping[str, Any]) -> Standing:
    """Give a user other values of `CHANGEABLE`; they hold from its very next call on.

    Who is deactivated or demoted has to log in anew. An address that is changed is not verified any more, unless that
    is said too. Raises `NotFound`, `BadRequest`, and `Conflict` for an address that is taken, and for the last active
    admin when it would be none any more: then nobody could change anything here.
    """
    async with writing(engine) as connection:
        takes_rank = changes.get("is_admin") is False or changes.get("is_active") is False
        has_other = not takes_rank or await has_other_admin(connection, user_id)
        before = await read_user(connection, user_id, is_locked=True)
        values = _checked(before, changes)
        if "email" in values and values["email"] != before.email:
            values.setdefault("email_verified", False)
        values = {name: value for name, value in values.items() if value != getattr(before, name)}
        if not values:
            return await read_standing(connection, user_id)
        after = msgspec.structs.replace(before, **values)
        if (before.is_active and not after.is_active) or (before.is_admin and not after.is_admin):
            if before.is_active and before.is_admin and not has_other:
                raise Conflict("This is the last active admin. Make another one first.", code="last_admin")
            values["token_version"] = before.token_version + 1
        await change_user(connection, user_id, values)
        changed = [name for name in CHANGEABLE if name in values]
        await record(connection, actor, "user.change", user_id, _shown(before, changed), _shown(after, changed))
        return await read_standing(connection, user_id)


async def set_password(engine: AsyncEngine, passwords: Passwords, actor: str, user: User, password: str) -> None:
    """Set a user's password: every token issued before is void. Raises `BadRequest`, and `Conflict` in a race."""
    check_password(password, *_related(user.email, user.full_name))
    password_hash = await passwords.hash(password)
    async with writing(engine) as connection:
        await replace_password(connection, user, password_hash)
        await record(connection, actor, "user.password", user.id, None, None)


def _checked(user: User, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` as they are stored."""
    values = dict(changes)
    if "email" in values:
        values["email"] = normalise_email(values["email"])
    if "full_name" in values:
        values["full_name"] = check_name(values["full_name"])
    check_limits(msgspec.structs.replace(user, **values))
    return values


def _related(email: str | None, full_name: str | None) -> tuple[str | None, ...]:
    """What a password must not be."""
    return email, (email or "").partition("@")[0], full_name


def _shown(user: User, names: Any) -> dict[str, Any]:
    return {name: getattr(user, name) for name in names}
