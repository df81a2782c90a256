"""Accounts: made, opened by a password or by a token, and given what a new one was promised."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.errors import BadRequest, Conflict, Forbidden, NotFound, Unauthenticated, WrongPassword
from proxy.identity.attempts import Attempts
from proxy.identity.issuers import ExternalClaims, Issuers
from proxy.identity.keys import Caller, Credential, Scope
from proxy.identity.passwords import Passwords, check_password
from proxy.identity.tokens import Tokens, unverified
from proxy.identity.users import (
    EMAIL_CHARACTERS_MAX,
    NAME_CHARACTERS_MAX,
    User,
    add_identity,
    check_name,
    create_user,
    find_identity,
    find_password,
    forget_starting_credits,
    normalise_email,
    read_password,
    read_user,
    replace_password,
)
from proxy.ledger.decide import Credit, CreditType
from proxy.ledger.ledger import Ledger
from proxy.settings import OWN_ISSUER
from proxy.storage.database import reading, writing
from proxy.units import Micros, Nanos

STARTING_CREDITS_KEY = "starting-credits"
"""The idempotency key of what an account begins with."""


class Login(msgspec.Struct, frozen=True):
    """A token, and for how long it is good."""

    access_token: str
    expires_in_s: int


class Welcome(msgspec.Struct, frozen=True):
    """What strangers find: whether they may register, and what every new account gets, in nano-credits."""

    registration_open: bool
    starting_credits: Nanos


class Accounts:
    """What can be done with accounts from outside.

    `tokens` is None where nobody can log in, since no secret is configured. `by_address` and `by_account` count
    attempts; `welcome` is asked for each newcomer.
    """

    def __init__(  # noqa: PLR0913 - all that it works with is handed in
        self,
        engine: AsyncEngine,
        ledger: Ledger,
        *,
        tokens: Tokens | None,
        issuers: Issuers,
        by_address: Attempts,
        by_account: Attempts,
        welcome: Callable[[], Welcome],
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._tokens = tokens
        self._issuers = issuers
        self._by_address = by_address
        self._by_account = by_account
        self._welcome = welcome
        self.passwords = Passwords()

    # ---- passwords

    async def register(self, email: str, password: str, full_name: str | None, *, address: str) -> User:
        """Make an account for whoever asks from `address`.

        Raises `RateLimited`, `Forbidden` when registration is closed, `BadRequest` for what is not acceptable,
        `Conflict` for an address that has an account.
        """
        self._by_address.take(address)
        if not self._welcome().registration_open:
            raise Forbidden("Registration is closed here. Ask the operator for an account.", code="registration_closed")
        normal = normalise_email(email)
        check_password(password, normal, normal.partition("@")[0], check_name(full_name))
        password_hash = await self.passwords.hash(password)
        async with writing(self._engine) as connection:
            user = await create_user(
                connection,
                normal,
                password_hash=password_hash,
                full_name=full_name,
                starting_credits=self._welcome().starting_credits,
            )
        await self._book_promised(user)
        return user

    async def login(self, email: str, password: str, *, address: str) -> Login:
        """A token for the account of `email`.

        Raises `WrongPassword` when there is none, or the password is another, after the same time; `RateLimited`,
        `Forbidden` when the account is not active or nobody can log in here.
        """
        tokens = self._tokens_or_refuse()
        self._by_address.take(address)
        normal, account = None, email.lower()[:EMAIL_CHARACTERS_MAX]
        with suppress(BadRequest):
            normal = account = normalise_email(email)
        self._by_account.take(account)
        found = None
        if normal is not None:
            async with reading(self._engine) as connection:
                found = await find_password(connection, normal)
        user, password_hash = found or (None, None)
        if not await self.passwords.is_right(password, password_hash) or user is None:
            raise WrongPassword
        self._by_account.give_back(account)
        if not user.is_active:
            raise Forbidden("This account is not active.", code="inactive_user")
        await self._book_promised(user)
        return self._login(tokens, user.id, user.token_version)

    async def change_password(self, caller: Caller, current: str, password: str, *, address: str) -> Login:
        """Replace the caller's password: all tokens issued before are void, and the one returned is good.

        Raises `WrongPassword` when `current` is not it, `Forbidden` for an account without one, else as `login` and
        `register` do.
        """
        tokens = self._tokens_or_refuse()
        self._by_address.take(address)
        async with reading(self._engine) as connection:
            user, password_hash = await read_password(connection, caller.user_id)
        if password_hash is None:
            raise Forbidden("This account has no password.", code="no_password")
        self._by_account.take(user.id)
        if not await self.passwords.is_right(current, password_hash):
            raise WrongPassword
        self._by_account.give_back(user.id)
        related = (user.email, (user.email or "").partition("@")[0], user.full_name)
        check_password(password, *related, param="new_password")
        replacement = await self.passwords.hash(password)
        async with writing(self._engine) as connection:
            version = await replace_password(connection, user, replacement)
        return self._login(tokens, user.id, version)

    def _tokens_or_refuse(self) -> Tokens:
        if self._tokens is None:
            raise Forbidden(
                "Nobody can log in here until the operator has set TOLLGATE_JWT_SECRET. API keys work.",
                code="login_not_configured",
            )
        return self._tokens

    @staticmethod
    def _login(tokens: Tokens, user_id: str, version: int) -> Login:
        return Login(tokens.issue(user_id, version), tokens.lifetime_s)

    # ---- tokens

    async def credential(self, token: str) -> Credential:
        """Who comes with `token`, ours or another issuer's.

        Raises `Unauthenticated` when it is not valid or its user is gone, `Forbidden` for a stranger whose issuer
        provisions nobody, `Unavailable` when the database or its issuer is out of reach.
        """
        header, claims = unverified(token)
        if claims.get("iss") == OWN_ISSUER:
            return await self._own(token)
        external = await self._issuers.verify(token, header, claims)
        user = await self._known(external) or await self._provisioned(external)
        await self._book_promised(user)
        return _credential(user, external.expires_at, token_version=None)

    async def _own(self, token: str) -> Credential:
        if self._tokens is None:
            raise Unauthenticated("The token is not valid.")
        claims = self._tokens.verify(token)
        async with reading(self._engine) as connection:
            try:
                user = await read_user(connection, claims.user_id)
            except NotFound as exc:
                raise Unauthenticated("The token is not valid.") from exc
        if user.token_version != claims.token_version:
            raise Unauthenticated("The token was revoked. Log in again.")
        return _credential(user, claims.expires_at, token_version=claims.token_version)

    async def _known(self, external: ExternalClaims) -> User | None:
        async with reading(self._engine) as connection:
            return await find_identity(connection, external.issuer, external.subject)

    async def _provisioned(self, external: ExternalClaims) -> User:
        """An account for somebody who was never here. An address that has an account already stays that one's."""
        if not self._issuers.provisions(external.issuer):
            raise Forbidden("There is no account for this identity. Ask the operator for one.", code="no_account")
        name = external.full_name or ""
        full_name = name if len(name.strip()) <= NAME_CHARACTERS_MAX and name.strip().isprintable() else None

        async def add(email: str | None) -> User:
            async with writing(self._engine) as connection:
                user = await create_user(
                    connection,
                    email,
                    full_name=full_name,
                    email_verified=email is not None,
                    starting_credits=self._welcome().starting_credits,
                )
                await add_identity(connection, user.id, external.issuer, external.subject)
                return user

        return await self._added(external, add)

    async def _added(self, external: ExternalClaims, add: Callable[[str | None], Awaitable[User]]) -> User:
        for email in (external.email, None):
            try:
                return await add(email)
            except (Conflict, BadRequest):
                known = await self._known(external)  # another call of the same newcomer was faster
                if known is not None:
                    return known
        raise Conflict("The account could not be made.", code="identity_taken")

    # ---- promises

    async def _book_promised(self, user: User) -> None:
        """Book the starting credits that `user` was promised, once: however often this is done, and by whomever."""
        if user.starting_credits is None:
            return
        await self._ledger.credit(
            Credit(
                wallet_id=user.wallet_id,
                type=CreditType.TOPUP,
                amount=user.starting_credits,
                description="starting credits",
                idempotency_key=STARTING_CREDITS_KEY,
            )
        )
        async with writing(self._engine) as connection:
            await forget_starting_credits(connection, user.id)


def _credential(user: User, expires_at: Micros, *, token_version: int | None) -> Credential:
    return Credential(
        caller=Caller(
            user_id=user.id,
            wallet_id=user.wallet_id,
            key_id=None,
            scope=Scope.ADMIN if user.is_admin else Scope.MANAGE,
            is_admin=user.is_admin,
            token_version=token_version,
        ),
        is_active=True,
        is_user_active=user.is_active,
        expires_at=expires_at,
    )
