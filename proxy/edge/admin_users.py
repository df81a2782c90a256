"""`/api/v1/admin/users/*`: users, their limits and their keys, for admins."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Router, delete, get, patch, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration import keys as keys_by_admins
from proxy.administration import users as users_by_admins
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.edge.keys import (
    BODY_BYTES_MAX,
    Changed,
    Wanted,
    changes_of,
    given,
    terms_of,
)
from proxy.identity.accounts import Accounts
from proxy.identity.keys import Caller, Scope
from proxy.identity.users import read_standing, read_user
from proxy.pages import PAGE_DEFAULT
from proxy.shown.keys import KeyItem, KeyMade, KeyPage, key_item, key_made, key_page
from proxy.shown.users import UserItem, UserPage, user_item, user_page
from proxy.storage.database import reading
from proxy.units import now_micros

AdminRequest = Request[Caller, Any, Any]

Email = Annotated[str, Meta(examples=["ann@example.com"])]
Models = Annotated[list[str], Meta(examples=[["gpt-4o*", "demo-chat"]])]
Rate = Annotated[int, Meta(examples=[600])]


class NewUser(msgspec.Struct, forbid_unknown_fields=True):
    """A user to be made. Without a password nobody logs in; API keys work. A limit of null is none."""

    email: Email
    password: str | None = None
    full_name: str | None = None
    is_admin: bool = False
    email_verified: bool = False
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    concurrent_calls_max: Rate | None = None
    allowed_models: Models | None = None


class UserChanged(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be another way; what is left out stays as it is, null takes a name or a limit away."""

    email: Email | msgspec.UnsetType = msgspec.UNSET
    full_name: str | msgspec.UnsetType | None = msgspec.UNSET
    is_active: bool | msgspec.UnsetType = msgspec.UNSET
    is_admin: bool | msgspec.UnsetType = msgspec.UNSET
    email_verified: bool | msgspec.UnsetType = msgspec.UNSET
    requests_per_minute: Rate | msgspec.UnsetType | None = msgspec.UNSET
    tokens_per_minute: Rate | msgspec.UnsetType | None = msgspec.UNSET
    concurrent_calls_max: Rate | msgspec.UnsetType | None = msgspec.UNSET
    allowed_models: Models | msgspec.UnsetType | None = msgspec.UNSET


class NewPassword(msgspec.Struct, forbid_unknown_fields=True):
    """The password that is to be."""

    password: str


_ERRORS = documented(400, 404, 409, 413)


@get("/", summary="The users", responses=documented(400))
async def users(
    engine: NamedDependency[AsyncEngine],
    email: FromQuery[str | None] = None,
    q: FromQuery[str | None] = None,
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
) -> UserPage:
    """Everybody, or who is searched for.

    `email` is a whole address, or the beginning of one. `q` is part of an address or of a name, or an id.
    """
    return await user_page(engine, limit, cursor, email=email, text=q)


@post("/", summary="Make a user", request_max_body_size=BODY_BYTES_MAX, responses=_ERRORS)
async def make_user(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    accounts: NamedDependency[Accounts],
    data: JSONBody[NewUser],
) -> UserItem:
    """Add a user with an empty wallet."""
    wanted = msgspec.structs.asdict(data)
    password = wanted.pop("password")
    admin = request.user
    return user_item(await users_by_admins.create(engine, accounts.passwords, admin.user_id, wanted, password=password))


@get("/{user_id:str}", summary="One user", responses=documented(400, 404))
async def user(engine: NamedDependency[AsyncEngine], user_id: FromPath[str]) -> UserItem:
    """One user, by id."""
    async with reading(engine) as connection:
        return user_item(await read_standing(connection, user_id))


@patch("/{user_id:str}", summary="Change a user", request_max_body_size=BODY_BYTES_MAX, responses=_ERRORS)
async def alter_user(
    request: AdminRequest, engine: NamedDependency[AsyncEngine], user_id: FromPath[str], data: JSONBody[UserChanged]
) -> UserItem:
    """Change what a user is and may do, from its very next call on.

    Who is deactivated or demoted has to log in anew. The last active admin can be neither.
    """
    return user_item(await users_by_admins.change(engine, request.user.user_id, user_id, given(data)))


@delete("/{user_id:str}", summary="Deactivate a user", responses=documented(400, 404, 409))
async def deactivate_user(request: AdminRequest, engine: NamedDependency[AsyncEngine], user_id: FromPath[str]) -> None:
    """Refuse everything to a user from its very next call on. Its keys, wallet and charges stay in the books."""
    await users_by_admins.change(engine, request.user.user_id, user_id, {"is_active": False})


@put(
    "/{user_id:str}/password",
    status_code=204,
    summary="Set a user's password",
    request_max_body_size=BODY_BYTES_MAX,
    responses=_ERRORS,
)
async def set_user_password(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    accounts: NamedDependency[Accounts],
    user_id: FromPath[str],
    data: JSONBody[NewPassword],
) -> None:
    """Let a user log in by another password. Every token issued before is void at once."""
    async with reading(engine) as connection:
        found = await read_user(connection, user_id)
    await users_by_admins.set_password(engine, accounts.passwords, request.user.user_id, found, data.password)


# ---- keys


@get("/{user_id:str}/keys", summary="A user's keys", responses=documented(400, 404))
async def user_keys(
    engine: NamedDependency[AsyncEngine],
    user_id: FromPath[str],
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
) -> KeyPage:
    """Every key of a user, revoked ones included."""
    async with reading(engine) as connection:
        await read_user(connection, user_id)
    return await key_page(engine, user_id, limit, cursor)


@post("/{user_id:str}/keys", summary="Make a key for a user", request_max_body_size=BODY_BYTES_MAX, responses=_ERRORS)
async def make_user_key(
    request: AdminRequest, engine: NamedDependency[AsyncEngine], user_id: FromPath[str], data: JSONBody[Wanted]
) -> KeyMade:
    """Make a key for a user and answer it, this once. A key that asks gives no more than it has."""
    admin = request.user
    made, key = await keys_by_admins.create(engine, admin.user_id, user_id, terms_of(data), by=admin)
    return key_made(key, made.secret, now_micros())


@patch(
    "/{user_id:str}/keys/{key_id:str}",
    summary="Change a user's key",
    request_max_body_size=BODY_BYTES_MAX,
    responses=_ERRORS,
)
async def alter_user_key(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    user_id: FromPath[str],
    key_id: FromPath[str],
    data: JSONBody[Changed],
) -> KeyItem:
    """Give a key of a user other terms. They hold for its very next call."""
    admin = request.user
    key = await keys_by_admins.change(engine, admin.user_id, user_id, key_id, changes_of(data), by=admin)
    return key_item(key, now_micros())


@delete("/{user_id:str}/keys/{key_id:str}", summary="Revoke a user's key", responses=documented(400, 404))
async def drop_user_key(
    request: AdminRequest, engine: NamedDependency[AsyncEngine], user_id: FromPath[str], key_id: FromPath[str]
) -> None:
    """Close a key of a user for good: its very next call is refused. Its charges stay in the books."""
    admin = request.user
    await keys_by_admins.revoke(engine, admin.user_id, user_id, key_id, by=admin)


router = Router(
    "/api/v1/admin/users",
    opt=needs(Scope.ADMIN),
    route_handlers=[
        users,
        make_user,
        user,
        alter_user,
        deactivate_user,
        set_user_password,
        user_keys,
        make_user_key,
        alter_user_key,
        drop_user_key,
    ],
)
