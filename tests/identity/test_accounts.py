"""Accounts over real databases: made once, opened by their own password or token, given what was promised."""

import asyncio
import time

import pytest
import sqlalchemy as sa

from proxy.errors import BadRequest, Conflict, Forbidden, RateLimited, Unauthenticated, WrongPassword
from proxy.identity.accounts import Accounts, Welcome
from proxy.identity.attempts import Attempts
from proxy.identity.issuers import Issuers
from proxy.identity.keys import Scope
from proxy.identity.tokens import Tokens
from proxy.identity.users import add_identity, create_user, find_user
from proxy.ledger.decide import Reserve
from proxy.settings import IssuerSettings
from proxy.storage import database
from proxy.units import NANOS_PER_CREDIT, new_id
from tests.identity.tokens import AUDIENCE, ISSUER, SECRET, IssuerKey, key_set

KEY = IssuerKey()
OTHER_ISSUER = "https://other.example.com/"
PASSWORD = "a password of some length"
HERE = "192.0.2.1"


on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""Where the database makes no difference, but passwords take their time."""


async def published(_url: str) -> bytes:
    return key_set(KEY)


@pytest.fixture
def accounts(books):
    return made(books)


def made(books, *, starting_credits=0, is_open=True, provision=True, account_failures=1000, tokens=True) -> Accounts:
    """Accounts as the server builds them."""
    settings = [
        IssuerSettings(issuer=issuer, audience=AUDIENCE, jwks_url="https://x/", provision=provision)
        for issuer in (ISSUER, OTHER_ISSUER)
    ]
    return Accounts(
        books.engine,
        books.ledger,
        tokens=Tokens(SECRET, 3600) if tokens else None,
        issuers=Issuers(settings, published),
        by_address=Attempts(1000, 60, time.monotonic),
        by_account=Attempts(account_failures, 3600, time.monotonic),
        welcome=lambda: Welcome(is_open, starting_credits),
    )


async def count(books, table: str) -> int:
    async with database.reading(books.engine) as connection:
        return await connection.scalar(sa.text(f"SELECT count(*) FROM {table}"))


async def test_register_log_in_change_the_password(accounts, books):
    """The address is one in any spelling; a new password voids every token, and the ledger knows it at once."""
    user = await accounts.register(" Ann@Example.COM ".strip(), PASSWORD, " Ann B ", address=HERE)
    assert (user.email, user.full_name, user.is_admin, user.email_verified) == (
        "ann@example.com",
        "Ann B",
        False,
        False,
    )
    row = await books.row("users", user.id)
    assert row["password_hash"].startswith("$argon2id$")
    assert PASSWORD not in str(row)
    login = await accounts.login("ANN@example.com", PASSWORD, address=HERE)
    caller = (await accounts.credential(login.access_token)).caller
    assert (caller.user_id, caller.key_id, caller.scope, caller.token_version) == (user.id, None, Scope.MANAGE, 0)
    await books.top_up(caller.wallet_id, NANOS_PER_CREDIT)
    assert (await books.ledger.reserve(reserve_by(caller))).amount == 1
    with pytest.raises(WrongPassword):
        await accounts.change_password(caller, "not the password", "another password", address=HERE)
    with pytest.raises(BadRequest):
        await accounts.change_password(caller, PASSWORD, "password", address=HERE)
    fresh = await accounts.change_password(caller, PASSWORD, "another password of length", address=HERE)
    with pytest.raises(Unauthenticated):
        await accounts.credential(login.access_token)
    with pytest.raises(Unauthenticated):
        await books.ledger.reserve(reserve_by(caller))
    assert (await accounts.credential(fresh.access_token)).caller.token_version == 1
    with pytest.raises(WrongPassword):
        await accounts.login("ann@example.com", PASSWORD, address=HERE)
    await accounts.login("ann@example.com", "another password of length", address=HERE)


def reserve_by(caller) -> Reserve:
    return Reserve(
        id=new_id("req"),
        wallet_id=caller.wallet_id,
        user_id=caller.user_id,
        key_id=caller.key_id,
        at_least=1,
        at_most=1,
        window_tokens=1,
        models=("fake/model",),
        original_model="model",
        is_stream=False,
        token_version=caller.token_version,
    )


@on_sqlite
@pytest.mark.parametrize(
    ("email", "password", "name", "param"),
    [
        ("no address", PASSWORD, None, "email"),
        ("a@b\0.example.com", PASSWORD, None, "email"),
        (f"{'a' * 300}@example.com", PASSWORD, None, "email"),
        ("' OR 1=1 --@example.com", PASSWORD, None, "email"),
        ("a@example.com", "short", None, "password"),
        ("a@example.com", PASSWORD, "a\0b", "full_name"),
        ("a@example.com", PASSWORD, "x" * 201, "full_name"),
    ],
)
async def test_what_cannot_be_stored_is_refused(accounts, books, email, password, name, param):
    """Each by its own field, before anything is written."""
    with pytest.raises(BadRequest) as raised:
        await accounts.register(email, password, name, address=HERE)
    assert raised.value.param == param
    assert await count(books, "users") == 0


async def test_quotes_are_letters(accounts):
    """SQL in a name or a password is a name or a password."""
    evil = "x'); DROP TABLE users; --"
    user = await accounts.register("o'hara@example.com", f"my {evil}", evil, address=HERE)
    assert user.full_name == evil
    assert (await accounts.login("o'hara@example.com", f"my {evil}", address=HERE)).expires_in_s == 3600


async def test_an_address_has_one_account(accounts):
    """The second is told so, and of two at once one is."""
    tries = [accounts.register(f"{letter}nn@example.com", PASSWORD, None, address=HERE) for letter in "aA"]
    found = await asyncio.gather(*tries, return_exceptions=True)
    assert sorted(type(one).__name__ for one in found) == ["Conflict", "User"]
    with pytest.raises(Conflict):
        await accounts.register("ann@example.com", PASSWORD, None, address=HERE)


@on_sqlite
async def test_registration_can_be_closed(books):
    """Then nobody gets in by it."""
    with pytest.raises(Forbidden) as raised:
        await made(books, is_open=False).register("a@example.com", PASSWORD, None, address=HERE)
    assert raised.value.code == "registration_closed"


@on_sqlite
async def test_unknown_wrong_and_passwordless_accounts_are_alike(accounts, books):
    """The same words after the same work: nobody learns which half was wrong, or who has an account."""
    await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    async with database.writing(books.engine) as connection:
        await create_user(connection, "keys-only@example.com")
    times: dict[str, list[float]] = {}
    messages = set()
    for _ in range(2):
        for email in ("ann@example.com", "nobody@example.com", "keys-only@example.com", "a\0b@x"):
            started = time.perf_counter()
            with pytest.raises(WrongPassword) as raised:
                await accounts.login(email, "not the password", address=HERE)
            times.setdefault(email, []).append(time.perf_counter() - started)
            messages.add(str(raised.value))
    assert len(messages) == 1
    known = min(times["ann@example.com"])
    assert all(min(one) > known / 2 for one in times.values()), times


@on_sqlite
async def test_guessing_at_one_account_ends(books):
    """After so many wrong passwords not even the right one opens it, from anywhere; unknown accounts end alike."""
    accounts = made(books, account_failures=2)
    await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    for _ in range(3):
        await accounts.login("ann@example.com", PASSWORD, address=HERE)
    for email in ("ann@example.com", "nobody@example.com"):
        for number in range(2):
            with pytest.raises(WrongPassword):
                await accounts.login(email, "not the password", address=f"192.0.2.{number}")
        with pytest.raises(RateLimited):
            await accounts.login(email.upper().replace("EXAMPLE", "ＥＸＡＭＰＬＥ"), PASSWORD, address="192.0.2.9")


@on_sqlite
async def test_without_a_secret_nobody_logs_in_and_no_token_of_ours_is_good(books):
    """Registration and other issuers go on."""
    accounts = made(books, tokens=False)
    await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    with pytest.raises(Forbidden) as raised:
        await accounts.login("ann@example.com", PASSWORD, address=HERE)
    assert raised.value.code == "login_not_configured"
    with pytest.raises(Unauthenticated):
        await accounts.credential(Tokens(SECRET, 60).issue("usr_x", 0))
    assert (await accounts.credential(KEY.sign())).caller.scope is Scope.MANAGE


async def test_a_token_of_nobody_is_no_token(accounts):
    """A signature of ours for a user who is not there opens nothing."""
    with pytest.raises(Unauthenticated):
        await accounts.credential(Tokens(SECRET, 60).issue(new_id("usr"), 0))


@on_sqlite
async def test_an_inactive_account_stays_closed(accounts, books):
    """Whoever knows the password is told so; a token is no way around it."""
    user = await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    login = await accounts.login("ann@example.com", PASSWORD, address=HERE)
    await books.execute("UPDATE users SET is_active = false")
    with pytest.raises(Forbidden) as raised:
        await accounts.login("ann@example.com", PASSWORD, address=HERE)
    assert raised.value.code == "inactive_user"
    assert not (await accounts.credential(login.access_token)).is_user_active
    assert user.is_active


@pytest.mark.parametrize(
    ("limit", "error"),
    [("allowed_models = '[\"other\"]'", Forbidden), ("requests_per_minute = 0", RateLimited)],
)
async def test_the_operators_limits_bind_tokens_too(accounts, books, limit, error):
    """A login is no way around what the operator allows the user."""
    await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    login = await accounts.login("ann@example.com", PASSWORD, address=HERE)
    caller = (await accounts.credential(login.access_token)).caller
    await books.top_up(caller.wallet_id, 10)
    await books.ledger.reserve(reserve_by(caller))
    await books.execute(f"UPDATE users SET {limit}")
    with pytest.raises(error):
        await books.ledger.reserve(reserve_by(caller))


# ---- other issuers


async def test_a_newcomer_gets_one_account(accounts, books):
    """Twenty first calls at once make one; afterwards issuer and subject find it, whatever the address says."""
    token = KEY.sign(sub="new", email="new@example.com", email_verified=True, name="New Comer")
    found = await asyncio.gather(*(accounts.credential(token) for _ in range(20)))
    (user_id,) = {one.caller.user_id for one in found}
    row = await books.row("users", user_id)
    assert (row["email"], row["full_name"], bool(row["email_verified"])) == ("new@example.com", "New Comer", True)
    assert not row["is_admin"]
    again = await accounts.credential(KEY.sign(sub="new", email="other@example.com", email_verified=True))
    assert again.caller.user_id == user_id
    assert again.caller.token_version is None
    assert (await count(books, "users"), await count(books, "wallets"), await count(books, "identities")) == (1, 1, 1)


async def test_an_address_opens_nobody_elses_account(accounts, books):
    """Somebody whose issuer calls them ann@example.com is not the Ann who registered here, nor another issuer's."""
    ann = await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    first = await accounts.credential(KEY.sign(sub="x", email="ann@example.com", email_verified=True, is_admin=True))
    second = await accounts.credential(KEY.sign(sub="x", iss=OTHER_ISSUER, email="ann@example.com"))
    assert len({ann.id, first.caller.user_id, second.caller.user_id}) == 3
    assert (await books.row("users", first.caller.user_id))["email"] is None
    assert not first.caller.is_admin


async def test_strangers_of_a_closed_issuer_are_refused_until_they_are_entered(books):
    """The operator enters an identity by hand; it has one user."""
    accounts = made(books, provision=False)
    with pytest.raises(Forbidden) as raised:
        await accounts.credential(KEY.sign(sub="known"))
    assert raised.value.code == "no_account"
    async with database.writing(books.engine) as connection:
        user = await create_user(connection, "known@example.com", is_admin=True)
        await add_identity(connection, user.id, ISSUER, "known")
        assert await find_user(connection, user.id) == await find_user(connection, "Known@example.com")
    caller = (await accounts.credential(KEY.sign(sub="known"))).caller
    assert (caller.user_id, caller.scope) == (user.id, Scope.ADMIN)
    with pytest.raises(Conflict):
        async with database.writing(books.engine) as connection:
            await add_identity(connection, user.id, ISSUER, "known")


# ---- starting credits


async def test_starting_credits_are_booked_once(books):
    """At the registration, through the ledger; logins and more of them add nothing."""
    accounts = made(books, starting_credits=2 * NANOS_PER_CREDIT)
    user = await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    for _ in range(2):
        await accounts.login("ann@example.com", PASSWORD, address=HERE)
    wallet = await books.row("wallets", user.wallet_id)
    assert (wallet["balance"], wallet["seq"]) == (2 * NANOS_PER_CREDIT, 1)
    assert (await books.row("users", user.id))["starting_credits"] is None
    found = await asyncio.gather(*(accounts.credential(KEY.sign(sub="new")) for _ in range(5)))
    wallet = await books.row("wallets", found[0].caller.wallet_id)
    assert (wallet["balance"], wallet["seq"]) == (2 * NANOS_PER_CREDIT, 1)


async def test_a_promise_outlives_a_crash_and_a_change_of_the_settings(books):
    """An account whose registration broke off between its making and its credits gets them with its next login."""
    accounts = made(books, starting_credits=NANOS_PER_CREDIT)
    user = await accounts.register("ann@example.com", PASSWORD, None, address=HERE)
    await books.execute("UPDATE users SET starting_credits = 1000000000")  # booked, and died before it said so
    later = made(books, starting_credits=5)
    await later.login("ann@example.com", PASSWORD, address=HERE)
    assert (await books.row("wallets", user.wallet_id))["balance"] == NANOS_PER_CREDIT
    async with database.writing(books.engine) as connection:
        lost = await create_user(connection, "lost@example.com", starting_credits=7)
        await add_identity(connection, lost.id, ISSUER, "lost")
    await later.credential(KEY.sign(sub="lost"))
    assert (await books.row("wallets", lost.id))["balance"] == 7
