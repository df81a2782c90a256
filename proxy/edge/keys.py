"""`/api/v1/keys`: a user's own keys."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.edge.authentication import needs
from proxy.edge.credits import CallerRequest
from proxy.edge.errors import documented
from proxy.errors import BadRequest
from proxy.identity.keys import KeyTerms, change_key, create_key, read_key, revoke_key
from proxy.identity.keys import Scope as KeyScope
from proxy.identity.users import read_user
from proxy.pages import PAGE_DEFAULT
from proxy.shown.keys import KeyItem, KeyMade, KeyPage, key_item, key_made, key_page
from proxy.storage.database import writing
from proxy.units import AmountError, micros_of, now_micros, parse_credits

BODY_BYTES_MAX = 65_536
"""Of a key's terms: a hundred names of models at most."""

Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Amount = str | int
Period = Literal["day", "month"]


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """The terms of a new key; null is no limit. Amounts are in credits."""

    name: str = ""
    scope: KeyScope = KeyScope.INFERENCE
    expires_at: Instant | None = None
    allowed_models: list[str] | None = None
    limit_amount: Amount | None = None
    limit_period: Period | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls_max: int | None = None


class Changed(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be another way; what is left out stays as it is, null takes a limit away."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    expires_at: Instant | msgspec.UnsetType | None = msgspec.UNSET
    allowed_models: list[str] | msgspec.UnsetType | None = msgspec.UNSET
    limit_amount: Amount | msgspec.UnsetType | None = msgspec.UNSET
    limit_period: Period | msgspec.UnsetType | None = msgspec.UNSET
    requests_per_minute: int | msgspec.UnsetType | None = msgspec.UNSET
    tokens_per_minute: int | msgspec.UnsetType | None = msgspec.UNSET
    concurrent_calls_max: int | msgspec.UnsetType | None = msgspec.UNSET


@get("/api/v1/keys", opt=needs(KeyScope.MANAGE), summary="Your keys", responses=documented(400))
async def keys(
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
) -> KeyPage:
    """Every key of yours, revoked ones included."""
    return await key_page(engine, request.user.user_id, limit, cursor)


@post(
    "/api/v1/keys",
    opt=needs(KeyScope.MANAGE),
    summary="Make a key",
    request_max_body_size=BODY_BYTES_MAX,
    responses=documented(400, 404, 409, 413),
)
async def make_key(request: CallerRequest, engine: NamedDependency[AsyncEngine], data: JSONBody[Wanted]) -> KeyMade:
    """Make a key and answer it, this once. A key that asks gives no more than it has."""
    terms = terms_of(data)
    async with writing(engine) as connection:
        user = await read_user(connection, request.user.user_id)
        made = await create_key(connection, user, terms, by=request.user)
        key = await read_key(connection, user.id, made.id)
    return key_made(key, made.secret, now_micros())


@patch(
    "/api/v1/keys/{key_id:str}",
    opt=needs(KeyScope.MANAGE),
    summary="Change a key",
    request_max_body_size=BODY_BYTES_MAX,
    responses=documented(400, 404, 409, 413),
)
async def alter_key(
    request: CallerRequest, engine: NamedDependency[AsyncEngine], key_id: FromPath[str], data: JSONBody[Changed]
) -> KeyItem:
    """Give a key of yours other terms. They hold for its very next call."""
    async with writing(engine) as connection:
        key = await read_key(connection, request.user.user_id, key_id)
        await change_key(connection, key, changes_of(data), by=request.user)
        key = await read_key(connection, request.user.user_id, key_id)
    return key_item(key, now_micros())


@delete("/api/v1/keys/{key_id:str}", opt=needs(KeyScope.MANAGE), summary="Revoke a key", responses=documented(400, 404))
async def drop_key(request: CallerRequest, engine: NamedDependency[AsyncEngine], key_id: FromPath[str]) -> None:
    """Close a key of yours for good: its very next call is refused. Its charges stay in the books."""
    async with writing(engine) as connection:
        key = await read_key(connection, request.user.user_id, key_id)
        await revoke_key(connection, key, by=request.user)


def terms_of(wanted: Wanted) -> KeyTerms:
    """The terms of a new key. Raises `BadRequest`."""
    return KeyTerms(**_terms(msgspec.structs.asdict(wanted)))


def changes_of(changed: Changed) -> dict[str, Any]:
    """What of `KeyTerms` is to be another way. Raises `BadRequest`."""
    return _terms(given(changed))


def given(body: msgspec.Struct) -> dict[str, Any]:
    """The fields of a body that were sent."""
    return {name: value for name, value in msgspec.structs.asdict(body).items() if value is not msgspec.UNSET}


def _terms(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Wanted` as fields of `KeyTerms`."""
    amount, instant = given.get("limit_amount"), given.get("expires_at")
    if amount is not None:
        try:
            given["limit_amount"] = parse_credits(amount)
        except AmountError as exc:
            raise BadRequest(f"limit_amount: {exc}.", param="limit_amount", code="invalid_value") from exc
    if instant is not None:
        given["expires_at"] = micros_of(instant)
    return given
