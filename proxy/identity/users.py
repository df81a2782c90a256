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

NAME_CHARACTERS_MAX = 200
EMAIL_CHARACTERS_MAX = 254
"""Of an address in RFC 5321's envelope."""


class User(msgspec.Struct, frozen=True):
    """Who may call, and who pays: a personal wallet has its user's id."""

    id: str
    email: str | None
    is_active: bool
    is_admin: bool
    full_name: str | None = None
    email_verified: bool = False
    token_version: int = 0
    starting_credits: Nanos | None = None
    """Promised and not booked yet."""
    created_at: Micros = 0

    @property
    def wallet_id(self) -> str:
        """The wallet that pays for this user."""
        return self.id

    @property
    def shown_name(self) -> str:
        """The user for people."""
        return self.email or self.id


_COLUMNS = [users.c[name] for name in User.__struct_fields__]


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
) -> User:
    """Add a user with an empty wallet. `starting_credits` are promised, not booked: see `Accounts`.

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
    )
    try:
        await connection.execute(
            users.insert().values(**msgspec.structs.asdict(user), password_hash=password_hash, updated_at=now)
        )
    except IntegrityError as exc:
        raise Conflict(f"There is a user {user.email} already.", code="email_taken") from exc
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


async def read_user(connection: AsyncConnection, user_id: str) -> User:
    """The user with this id. Raises `NotFound` when there is none."""
    row = (await connection.execute(sa.select(*_COLUMNS).where(users.c.id == user_id))).one_or_none()
    if row is None:
        raise NotFound(f"There is no user {user_id}.")
    return _user(row)


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


def _user(row: Any) -> User:
    return User(**{name: getattr(row, name) for name in User.__struct_fields__})
