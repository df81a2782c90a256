"""Accounts over HTTP: register, log in, look at oneself, change the password."""

from typing import Any

import msgspec
from litestar import Request, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.edge.addresses import Addresses
from proxy.edge.authentication import needs
from proxy.edge.credits import CallerRequest
from proxy.edge.errors import documented
from proxy.identity.accounts import Accounts
from proxy.identity.keys import Scope as KeyScope
from proxy.identity.users import read_user
from proxy.shown.accounts import Account, Token, account_of, token_of
from proxy.storage.database import reading

BODY_BYTES_MAX = 16_384
"""Of what people fill in: the longest password and everything beside it several times over."""


class Registration(msgspec.Struct, forbid_unknown_fields=True):
    """What a new account is made of; nothing else can be set by whoever makes it."""

    email: str
    password: str
    full_name: str | None = None


class Credentials(msgspec.Struct, forbid_unknown_fields=True):
    """What opens an account."""

    email: str
    password: str


class PasswordChange(msgspec.Struct, forbid_unknown_fields=True):
    """The password that is, and the one that is to be."""

    current_password: str
    new_password: str


@post(
    "/register",
    summary="Make an account",
    request_max_body_size=BODY_BYTES_MAX,
    responses=documented(400, 403, 409, 413, 429, 503, is_public=True),
)
async def register(
    request: Request[Any, Any, Any],
    data: JSONBody[Registration],
    engine: NamedDependency[AsyncEngine],
    accounts: NamedDependency[Accounts],
    addresses: NamedDependency[Addresses],
) -> Account:
    """Make an account with an empty wallet, or with the operator's starting credits."""
    address = _address(request, addresses)
    user = await accounts.register(data.email, data.password, data.full_name, address=address)
    return await account_of(engine, user)


@post(
    "/login",
    status_code=200,
    summary="Log in",
    request_max_body_size=BODY_BYTES_MAX,
    responses=documented(400, 401, 403, 413, 429, 503, is_public=True),
)
async def login(
    request: Request[Any, Any, Any],
    data: JSONBody[Credentials],
    accounts: NamedDependency[Accounts],
    addresses: NamedDependency[Addresses],
) -> Token:
    """Answer a token for the right password."""
    return token_of(await accounts.login(data.email, data.password, address=_address(request, addresses)))


@get("/me", opt=needs(KeyScope.MANAGE), summary="Your account", responses=documented())
async def me(request: CallerRequest, engine: NamedDependency[AsyncEngine]) -> Account:
    """Who you are here, and what you have."""
    async with reading(engine) as connection:
        user = await read_user(connection, request.user.user_id)
    return await account_of(engine, user)


@post(
    "/me/password",
    status_code=200,
    opt=needs(KeyScope.MANAGE),
    summary="Change your password",
    request_max_body_size=BODY_BYTES_MAX,
    responses=documented(400, 409, 413, 429),
)
async def change_password(
    request: CallerRequest,
    data: JSONBody[PasswordChange],
    accounts: NamedDependency[Accounts],
    addresses: NamedDependency[Addresses],
) -> Token:
    """Change the password. Every token issued before is void at once; the one answered is good."""
    address = _address(request, addresses)
    return token_of(
        await accounts.change_password(request.user, data.current_password, data.new_password, address=address)
    )


def _address(request: Request[Any, Any, Any], addresses: Addresses) -> str:
    return addresses.holder_of(request.scope["client"], request.scope["headers"])
