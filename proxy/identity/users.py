"""Users, their personal wallets, and how other issuers know them."""

from typing import Any

import msgspec
import sqlalchemy as sa
from email_validator import EmailNotValidError, validate_email
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.errors import BadRequest, Conflict, NotFound
from proxy.storage.tables import identities, users, wallets
from proxy.units import Micros, Nanos, is_id, new_id, now_micros

TEXT_CHARACTERS_MAX = 200
"""Of what users are searched by."""

NAME_CHARACTERS_MAX = 200
EMAIL_CHARACTERS_MAX = 254
"""Of an address in RFC 5321's envelope."""


class User(msgspec.Struct, frozen=True):
    """Who may call, and who pays: a personal wallet has its user's id. The limits are the operator's; None is none."""

    id: str
    email: str | None
    is_active: bool
    is_admin: bool
    full_name: str | None = None
    email_verified: bool = False
    token_version: int = 0
    starting_credits: Nanos | None = None
    """Promised and not booked yet."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls_max: int | None = None
    allowed_models: list[str] | None = None
    created_at: Micros = 0
    updated_at: Micros = 0

    @property
    def wallet_id(self) -> str:
        """The wallet that pays for this user."""
        return self.id

    @property
    def shown_name(self) -> str:
        """The user for people."""
        return self.email or self.id


class Wallet(msgspec.Struct, frozen=True):
    """What a user has, in nano-credits."""

    balance: Nanos
    reserved: Nanos
    owed: Nanos

    @property
    def available(self) -> Nanos:
        """What a new call may use; negative while more is owed than is left."""
        return self.balance - self.reserved - self.owed


class Standing(msgspec.Struct, frozen=True):
    """A user, and what it has."""

    user: User
    wallet: Wallet


_COLUMNS = [users.c[name] for name in User.__struct_fields__]
_WALLET_COLUMNS = [wallets.c[name] for name in Wallet.__struct_fields__]


def normalise_email(email: str) -> str:
    """`email` in the one spelling that is stored: checked, and in lower case.

    Raises `BadRequest` when it is no e-mail address. Nothing is looked up in the DNS.
    """
    if len(email) > EMAIL_CHARACTERS_MAX:
        raise BadRequest("The e-mail address is too long.", param="email", code="invalid_email")
    try:
        return validate_email(email, check_deliverability=False).normalized.lower()
    except EmailNotValidError as exc:
        raise BadRequest(str(exc), param="email", code="invalid_email") from exc


def check_name(full_name: str | None) -> str | None:
    """`full_name` without white space around it; None for an empty one. Raises `BadRequest` for what is no name."""
    name = (full_name or "").strip()
    if len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
        raise BadRequest(
            f"A name has at most {NAME_CHARACTERS_MAX} printable characters.", param="full_name", code="invalid_value"
        )
    return name or None


async def create_user(  # noqa: PLR0913 - what is known of a person
    connection: AsyncConnection,
    email: str | None,
    *,
    password_hash: str | None = None,
    is_admin: bool = False,
    full_name: str | None = None,
    email_verified: bool = False,
    starting_credits: Nanos = 0,
    **limits: Any,
) -> User:
    """Add a user with an empty wallet. `starting_credits` are promised, not booked: see `Accounts`.

    `limits` are fields of `User`, checked by whoever sets them.

    Raises `BadRequest` for an address that is none, `Conflict` for one that is taken.
    """
    now = now_micros()
    user = User(
        id=new_id("usr"),
        email=None if email is None else normalise_email(email),
        is_active=True,
        is_admin=is_admin,
        full_name=check_name(full_name),
        email_verified=email_verified,
        starting_credits=starting_credits or None,
        created_at=now,
        updated_at=now,
        **limits,
    )
    try:
        await connection.execute(users.insert().values(**msgspec.structs.asdict(user), password_hash=password_hash))
    except IntegrityError as exc:
        raise _taken(user.email) from exc
    await connection.execute(wallets.insert().values(id=user.wallet_id, owner_id=user.id))
    return user


async def find_user(connection: AsyncConnection, email: str) -> User:
    """The user with this address, or with this id. Raises `NotFound` when there is none, `BadRequest` for neither."""
    if is_id(email, "usr"):
        return await read_user(connection, email)
    normal = normalise_email(email)
    row = (await connection.execute(sa.select(*_COLUMNS).where(users.c.email == normal))).one_or_none()
    if row is None:
        raise NotFound(f"There is no user {normal}.")
    return _user(row)


async def read_user(connection: AsyncConnection, user_id: str, *, is_locked: bool = False) -> User:
    """The user with this id, to stay as it is until the transaction ends if `is_locked`.

    Raises `NotFound` when there is none.
    """
    query = sa.select(*_COLUMNS).where(users.c.id == user_id)
    if is_locked:
        query = query.with_for_update()
    row = (await connection.execute(query)).one_or_none() if is_id(user_id, "usr") else None
    if row is None:
        raise NotFound(f"There is no user {user_id!r}.")
    return _user(row)


async def read_standing(connection: AsyncConnection, user_id: str) -> Standing:
    """Likewise, with the wallet."""
    query = _STANDINGS.where(users.c.id == user_id)
    row = (await connection.execute(query)).one_or_none() if is_id(user_id, "usr") else None
    if row is None:
        raise NotFound(f"There is no user {user_id!r}.")
    return _standing(row)


async def list_users(
    connection: AsyncConnection,
    *,
    limit: int,
    before: str | None = None,
    email: str | None = None,
    text: str | None = None,
) -> list[Standing]:
    """Users, newest first; at most `limit`, those made before the user `before`.

    `email` is a whole address, or the beginning of one; `text` is part of an address or a name, or an id. Raises
    `BadRequest` when they are too long to be any, or hold what no text can.
    """
    query = _STANDINGS
    if before is not None:
        query = query.where(users.c.id < before)
    if email is not None:
        query = query.where(_has_email(_searchable(email, "email")))
    if text is not None:
        text = _searchable(text, "q")
        named = (users.c[name].icontains(text, autoescape=True) for name in ("email", "full_name"))
        query = query.where(sa.or_(users.c.id == text, *named))
    return [_standing(row) for row in await connection.execute(query.order_by(users.c.id.desc()).limit(limit))]


def _has_email(email: str) -> sa.ColumnElement[bool]:
    begins = users.c.email.startswith(email.lower(), autoescape=True)
    try:
        return sa.or_(users.c.email == normalise_email(email), begins)
    except BadRequest:
        return begins


def _searchable(text: str, param: str) -> str:
    if len(text) > TEXT_CHARACTERS_MAX or not text.isprintable():
        raise BadRequest(
            f"At most {TEXT_CHARACTERS_MAX} printable characters can be searched for.",
            param=param,
            code="invalid_value",
        )
    return text


async def change_user(connection: AsyncConnection, user_id: str, values: dict[str, Any]) -> None:
    """Write `values`, which are fields of `User`, checked before. Raises `Conflict` for an address that is taken."""
    try:
        await connection.execute(users.update().where(users.c.id == user_id).values(**values, updated_at=now_micros()))
    except IntegrityError as exc:
        raise _taken(values.get("email")) from exc


def _taken(email: str | None) -> Conflict:
    return Conflict(f"There is a user {email} already.", code="email_taken")


async def has_other_admin(connection: AsyncConnection, user_id: str) -> bool:
    """Whether an active admin is left without this user, until the transaction ends: nobody else can take one away."""
    admins = sa.select(users.c.id).where(users.c.is_admin, users.c.is_active).order_by(users.c.id)
    return any(admin != user_id for admin in await connection.scalars(admins.with_for_update()))


async def has_users(connection: AsyncConnection) -> bool:
    """Whether anybody has an account yet."""
    return await connection.scalar(sa.select(users.c.id).limit(1)) is not None


# ---- passwords


async def find_password(connection: AsyncConnection, email: str) -> tuple[User, str | None] | None:
    """The user with this normal address and the hash of its password; None when there is no such user."""
    query = sa.select(*_COLUMNS, users.c.password_hash).where(users.c.email == email)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else (_user(row), row.password_hash)


async def read_password(connection: AsyncConnection, user_id: str) -> tuple[User, str | None]:
    """Likewise, by the user's id. Raises `NotFound` when there is none."""
    query = sa.select(*_COLUMNS, users.c.password_hash).where(users.c.id == user_id)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        raise NotFound(f"There is no user {user_id}.")
    return _user(row), row.password_hash


async def replace_password(connection: AsyncConnection, user: User, password_hash: str) -> int:
    """Store another password and return the next token version: the older tokens are void.

    Raises `Conflict` when somebody else has changed it since `user` was read.
    """
    version = user.token_version + 1
    done = await connection.execute(
        users.update()
        .where(users.c.id == user.id, users.c.token_version == user.token_version)
        .values(password_hash=password_hash, token_version=version, updated_at=now_micros())
    )
    if done.rowcount != 1:
        raise Conflict("The password was changed meanwhile.", code="password_changed")
    return version


async def forget_starting_credits(connection: AsyncConnection, user_id: str) -> None:
    """They are booked."""
    await connection.execute(users.update().where(users.c.id == user_id).values(starting_credits=None))


# ---- other issuers


async def find_identity(connection: AsyncConnection, issuer: str, subject: str) -> User | None:
    """The user whom `issuer` calls `subject`; never found by an e-mail address."""
    query = (
        sa.select(*_COLUMNS)
        .join(identities, identities.c.user_id == users.c.id)
        .where(identities.c.issuer == issuer, identities.c.subject == subject)
    )
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else _user(row)


async def add_identity(connection: AsyncConnection, user_id: str, issuer: str, subject: str) -> None:
    """From now on tokens of `issuer` for `subject` are the user's. Raises `Conflict` when they are somebody's."""
    try:
        await connection.execute(
            identities.insert().values(issuer=issuer, subject=subject, user_id=user_id, created_at=now_micros())
        )
    except IntegrityError as exc:
        raise Conflict("This identity has a user already.", code="identity_taken") from exc


_STANDINGS = sa.select(*_COLUMNS, *_WALLET_COLUMNS).join(wallets, wallets.c.id == users.c.id)


def _standing(row: Any) -> Standing:
    return Standing(_user(row), Wallet(**{name: getattr(row, name) for name in Wallet.__struct_fields__}))


def _user(row: Any) -> User:
    return User(**{name: getattr(row, name) for name in User.__struct_fields__})
