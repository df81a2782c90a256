"""Users and their personal wallets."""

import msgspec
import sqlalchemy as sa
from email_validator import EmailNotValidError, validate_email
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.errors import BadRequest, Conflict, NotFound
from proxy.storage.tables import users, wallets
from proxy.units import new_id, now_micros


class User(msgspec.Struct, frozen=True):
    """Who may call, and who pays: a personal wallet has its user's id."""

    id: str
    email: str
    is_active: bool
    is_admin: bool

    @property
    def wallet_id(self) -> str:
        """The wallet that pays for this user."""
        return self.id


def normalise_email(email: str) -> str:
    """`email` in the one spelling that is stored: checked, and in lower case.

    Raises `BadRequest` when it is no e-mail address. Nothing is looked up in the DNS.
    """
    try:
        return validate_email(email, check_deliverability=False).normalized.lower()
    except EmailNotValidError as exc:
        raise BadRequest(str(exc), param="email", code="invalid_email") from exc


async def create_user(
    connection: AsyncConnection, email: str, *, password_hash: str | None = None, is_admin: bool = False
) -> User:
    """Add a user with an empty wallet.

    Raises `BadRequest` for an address that is none, `Conflict` for one that is taken.
    """
    user = User(id=new_id("usr"), email=normalise_email(email), is_active=True, is_admin=is_admin)
    now = now_micros()
    try:
        await connection.execute(
            users.insert().values(
                id=user.id,
                email=user.email,
                password_hash=password_hash,
                is_active=True,
                is_admin=is_admin,
                email_verified=False,
                token_version=0,
                created_at=now,
                updated_at=now,
            )
        )
    except IntegrityError as exc:
        raise Conflict(f"There is a user {user.email} already.", code="email_taken") from exc
    await connection.execute(wallets.insert().values(id=user.wallet_id, owner_id=user.id))
    return user


async def find_user(connection: AsyncConnection, email: str) -> User:
    """The user with this address. Raises `NotFound` when there is none, `BadRequest` when it is no address."""
    normal = normalise_email(email)
    row = (
        await connection.execute(
            sa.select(users.c.id, users.c.email, users.c.is_active, users.c.is_admin).where(users.c.email == normal)
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"There is no user {normal}.")
    return User(id=row.id, email=row.email, is_active=bool(row.is_active), is_admin=bool(row.is_admin))


async def has_users(connection: AsyncConnection) -> bool:
    """Whether anybody has an account yet."""
    return await connection.scalar(sa.select(users.c.id).limit(1)) is not None
