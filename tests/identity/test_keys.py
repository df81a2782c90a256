"""Keys over real databases: their terms, who may give what to whom, and what a change does to their counters."""

import msgspec
import pytest

from proxy.errors import BadRequest, Conflict, Forbidden, KeyLimitReached, NotFound, Unauthenticated
from proxy.identity import keys as module
from proxy.identity.keys import (
    Caller,
    KeyTerms,
    Scope,
    change_key,
    check_terms,
    check_within,
    create_key,
    find_key,
    hash_key,
    list_keys,
    read_key,
    revoke_key,
)
from proxy.identity.last_used import COARSE_S, LastUsed
from proxy.identity.users import find_user
from proxy.ledger.decide import allows
from proxy.storage import database
from proxy.units import MICROS_PER_DAY, NANOS_MAX, now_micros
from tests.books import Person, reserve_of, settle_of

LATER = now_micros() + MICROS_PER_DAY


@pytest.mark.parametrize(
    ("terms", "param"),
    [
        ({"name": "x" * 101}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"expires_at": 1}, "expires_at"),
        ({"allowed_models": [""]}, "allowed_models"),
        ({"allowed_models": ["a b"]}, "allowed_models"),
        ({"allowed_models": ["a[b]"]}, "allowed_models"),
        ({"allowed_models": ["a\0"]}, "allowed_models"),
        ({"allowed_models": ["'; DROP TABLE api_keys; --"]}, "allowed_models"),
        ({"allowed_models": ["x" * 201]}, "allowed_models"),
        ({"allowed_models": ["x"] * 101}, "allowed_models"),
        ({"limit_amount": -1}, "limit_amount"),
        ({"limit_amount": NANOS_MAX + 1}, "limit_amount"),
        ({"limit_amount": 1, "limit_period": "year"}, "limit_period"),
        ({"limit_period": "day"}, "limit_period"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"tokens_per_minute": 2**63}, "tokens_per_minute"),
        ({"concurrent_calls_max": 10**9 + 1}, "concurrent_calls_max"),
    ],
)
def test_what_no_key_can_have(terms, param):
    """Refused by its own field, before a database is asked."""
    with pytest.raises(BadRequest) as raised:
        check_terms(KeyTerms(**terms), now_micros())
    assert raised.value.param == param


OWN = KeyTerms(
    scope=Scope.MANAGE,
    expires_at=LATER,
    allowed_models=["gpt-*", "fake/one", "exact?"],
    limit_amount=100,
    limit_period="month",
    requests_per_minute=5,
    tokens_per_minute=50,
    concurrent_calls_max=2,
)
LESS = msgspec.structs.replace(OWN, scope=Scope.INFERENCE, allowed_models=["gpt-4o"])


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"scope": Scope.MANAGE},
        {"limit_amount": 0},
        {"limit_period": None},
        {"allowed_models": []},
        {"allowed_models": ["gpt-*", "gpt-4*", "fake/one", "exactx", "exact?"]},
        {"expires_at": LATER - 1},
    ],
)
def test_less_may_be_given(other):
    """Or as much."""
    check_within(msgspec.structs.replace(LESS, **other), OWN)


@pytest.mark.parametrize(
    "other",
    [
        {"scope": Scope.ADMIN},
        {"expires_at": None},
        {"expires_at": LATER + 1},
        {"allowed_models": None},
        {"allowed_models": ["*"]},
        {"allowed_models": ["gpt*"]},
        {"allowed_models": ["g?t-4"]},
        {"allowed_models": ["fake/*"]},
        {"allowed_models": ["*gpt-4"]},
        {"allowed_models": ["exact*"]},
        {"allowed_models": ["gpt-4o", "other"]},
        {"limit_amount": None},
        {"limit_amount": 101},
        {"limit_period": "day"},
        {"requests_per_minute": None},
        {"requests_per_minute": 6},
        {"tokens_per_minute": 51},
        {"concurrent_calls_max": None},
    ],
)
def test_more_may_not(other):
    """In any field."""
    with pytest.raises(Forbidden) as raised:
        check_within(msgspec.structs.replace(LESS, **other), OWN)
    assert raised.value.code == "key_grants_more"


def test_patterns_mean_the_same_to_the_ledger():
    """What a pattern within another allows, that other allows."""
    for pattern, own, model in (("gpt-4*", "gpt-*", "openai/gpt-4o"), ("fake/one", "fake/*", "fake/one")):
        assert module._is_within(pattern, [own])
        assert allows([pattern], model)
        assert allows([own], model)


# ---- over a database


async def key_of(books, person: Person, **terms) -> tuple[Person, Caller]:
    """Another key of `person`, as somebody to call with and as somebody who asks."""
    async with database.writing(books.engine) as connection:
        made = await create_key(connection, await find_user(connection, person.user_id), KeyTerms(**terms))
        caller = (await find_key(connection, hash_key(made.secret))).caller
    return Person(person.user_id, person.wallet_id, made.id, made.secret, person.email), caller


async def mint(books, by: Caller, **terms) -> str:
    async with database.writing(books.engine) as connection:
        user = await find_user(connection, by.user_id)
        return (await create_key(connection, user, KeyTerms(**terms), by=by)).id


async def change(books, key_id: str, by: Caller, **changes) -> None:
    async with database.writing(books.engine) as connection:
        await change_key(connection, await read_key(connection, by.user_id, key_id), changes, by=by)


def login_of(person: Person) -> Caller:
    """The person by a token, who has all rights of a user."""
    return Caller(person.user_id, person.wallet_id, None, Scope.MANAGE, is_admin=False, token_version=0)


async def spend(books, person: Person, amount: int) -> None:
    reserve = reserve_of(person, amount)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(reserve, amount))


@pytest.fixture
async def ann(books):
    return await books.person(10_000)


async def test_a_key_is_stored_as_its_hash(books, ann):
    """The key itself is nowhere in its row; what people see of it is its beginning."""
    row = await books.row("api_keys", ann.key_id)
    assert ann.key not in str(row)
    assert ann.key.startswith(row["prefix"])
    assert len(ann.key) == len("sk-tg-") + 43


async def test_a_limited_key_passes_on_part_of_what_it_has(books, ann):
    """What it gives is taken off its own limit, so that many keys may spend no more than the one."""
    limited, by = await key_of(books, ann, scope=Scope.MANAGE, limit_amount=100)
    await spend(books, limited, 30)
    with pytest.raises(Forbidden):
        await mint(books, by, limit_amount=71)
    child = await mint(books, by, limit_amount=50)
    assert (await books.row("api_keys", child))["limit_amount"] == 50
    assert (await books.row("api_keys", limited.key_id))["limit_amount"] == 50
    with pytest.raises(Forbidden):
        await mint(books, by, limit_amount=21)
    with pytest.raises(Forbidden):
        await mint(books, by)
    with pytest.raises(KeyLimitReached):
        await books.ledger.reserve(reserve_of(limited, 21))
    await spend(books, limited, 20)


async def test_what_is_held_by_open_calls_cannot_be_given_away(books, ann):
    """Nor what is spent in the period, and only that."""
    limited, by = await key_of(books, ann, scope=Scope.MANAGE, limit_amount=100, limit_period="day")
    held = reserve_of(limited, 60)
    await books.ledger.reserve(held)
    with pytest.raises(Forbidden):
        await mint(books, by, limit_amount=41, limit_period="day")
    await books.ledger.settle(settle_of(held, 10))
    await mint(books, by, limit_amount=90, limit_period="day")


async def test_a_limited_key_loosens_none(books, ann):
    """Not another, and not itself; it may tighten both."""
    limited, by = await key_of(books, ann, scope=Scope.MANAGE, limit_amount=100)
    other, _ = await key_of(books, ann, limit_amount=10)
    for changes in ({"limit_amount": 11}, {"limit_amount": None}, {"limit_period": "day"}):
        with pytest.raises(Forbidden):
            await change(books, other.key_id, by, **changes)
    with pytest.raises(Forbidden):
        await change(books, limited.key_id, by, limit_amount=101)
    await change(books, other.key_id, by, limit_amount=5, name="tight")
    assert (await books.row("api_keys", other.key_id))["limit_amount"] == 5


async def test_a_key_changes_none_of_more_scope(books, ann):
    """Neither its terms nor its life."""
    await books.execute("UPDATE users SET is_admin = true")
    admin, _ = await key_of(books, ann, scope=Scope.ADMIN)
    _, by = await key_of(books, ann, scope=Scope.MANAGE)
    with pytest.raises(Forbidden):
        await change(books, admin.key_id, by, name="x")
    with pytest.raises(Forbidden):
        async with database.writing(books.engine) as connection:
            await revoke_key(connection, await read_key(connection, by.user_id, admin.key_id), by=by)
    with pytest.raises(Forbidden):
        await mint(books, by, scope=Scope.ADMIN)


async def test_only_an_admin_has_admin_keys(books, ann):
    """Not even the operator's command line makes one for somebody else."""
    with pytest.raises(Forbidden) as raised:
        await key_of(books, ann, scope=Scope.ADMIN)
    assert raised.value.code == "not_an_admin"


async def test_a_revoked_key_asks_for_nothing(books, ann):
    """Even if it was let in a moment before; a revoked one has no terms to change."""
    _, by = await key_of(books, ann, scope=Scope.MANAGE)
    async with database.writing(books.engine) as connection:
        await revoke_key(connection, await read_key(connection, by.user_id, by.key_id))
    with pytest.raises(Unauthenticated):
        await mint(books, by)
    with pytest.raises(Conflict):
        await change(books, by.key_id, by, name="x")


async def test_limits_and_revocation_bite_on_the_very_next_call(books, ann):
    """The ledger reads them again with each reserve, whatever a replica remembers."""
    by = login_of(ann)
    key, _ = await key_of(books, ann)
    await spend(books, key, 10)
    await change(books, key.key_id, by, limit_amount=15)
    with pytest.raises(KeyLimitReached):
        await books.ledger.reserve(reserve_of(key, 6))
    await change(books, key.key_id, by, limit_amount=None, allowed_models=["other"])
    with pytest.raises(Forbidden):
        await books.ledger.reserve(reserve_of(key, 1))
    await change(books, key.key_id, by, allowed_models=["fake/*"])
    await spend(books, key, 1)
    async with database.writing(books.engine) as connection:
        await revoke_key(connection, await read_key(connection, by.user_id, key.key_id))
    with pytest.raises(Unauthenticated):
        await books.ledger.reserve(reserve_of(key, 1))


@pytest.mark.parametrize(("before", "after"), [(None, "day"), ("day", "month"), ("month", None), ("day", None)])
async def test_a_change_of_period_keeps_what_was_spent(books, ann, before, after):
    """What was spent in the new period counts against it at once; the audit finds nothing."""
    by = login_of(ann)
    key, _ = await key_of(books, ann, limit_amount=100, limit_period=before)
    await spend(books, key, 60)
    await change(books, key.key_id, by, limit_period=after)
    with pytest.raises(KeyLimitReached):
        await books.ledger.reserve(reserve_of(key, 41))
    await spend(books, key, 40)
    async with database.reading(books.engine) as connection:
        stored = await read_key(connection, ann.user_id, key.key_id)
    assert stored.spent_in_period(now_micros()) == stored.spent == 100
    if after is not None:
        assert stored.spent_in_period(now_micros() + 40 * MICROS_PER_DAY) == 0


async def test_taking_a_limit_away_takes_its_period_along(books, ann):
    """A period without an amount is nothing."""
    by = login_of(ann)
    key, _ = await key_of(books, ann, limit_amount=100, limit_period="day")
    await change(books, key.key_id, by, limit_amount=None)
    row = await books.row("api_keys", key.key_id)
    assert (row["limit_amount"], row["limit_period"]) == (None, None)


async def test_nobody_reads_anothers_keys(books, ann):
    """By no id: what is somebody else's is not there."""
    bob = await books.person()
    async with database.reading(books.engine) as connection:
        assert [key.id for key in await list_keys(connection, bob.user_id, limit=10)] == [bob.key_id]
        for key_id in (ann.key_id, "key_x", "'; DROP TABLE api_keys; --", "a\0b", ""):
            with pytest.raises(NotFound):
                await read_key(connection, bob.user_id, key_id)


async def test_keys_are_listed_page_by_page(books, ann):
    """Newest first."""
    made = [ann.key_id] + [(await key_of(books, ann))[0].key_id for _ in range(3)]
    async with database.reading(books.engine) as connection:
        first = await list_keys(connection, ann.user_id, limit=3)
        rest = await list_keys(connection, ann.user_id, limit=3, before=first[-1].id)
    assert {key.id for key in first} | {rest[0].id} == set(made)
    assert [key.id for key in (*first, *rest)] == sorted(made, reverse=True)


async def test_there_is_an_end_to_keys(books, ann, monkeypatch):
    """Of active ones; revoking makes room."""
    monkeypatch.setattr(module, "KEYS_MAX", 3)
    _, by = await key_of(books, ann)
    spare = await mint(books, by)
    with pytest.raises(Conflict):
        await mint(books, by)
    async with database.writing(books.engine) as connection:
        await revoke_key(connection, await read_key(connection, by.user_id, spare))
    await mint(books, by)


# ---- last used


async def last_used(books, key_id: str) -> int | None:
    return (await books.row("api_keys", key_id))["last_used_at"]


async def test_the_last_use_is_written_once_a_minute(books, ann):
    """However many calls there are, and never by a call itself."""
    uses = LastUsed(books.engine)
    for offset in range(1000):
        uses.note(ann.key_id, 10**15 + offset)
    assert await last_used(books, ann.key_id) is None
    await uses.write()
    assert await last_used(books, ann.key_id) == 10**15
    uses.note(ann.key_id, 10**15 + (COARSE_S - 1) * 10**6)
    await uses.write()
    assert await last_used(books, ann.key_id) == 10**15
    uses.note(ann.key_id, 10**15 + COARSE_S * 10**6)
    await uses.write()
    assert await last_used(books, ann.key_id) == 10**15 + COARSE_S * 10**6


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_locked_key_is_written_later(books, ann):
    """Whoever holds no wallet's lock waits for no key's: nothing can wait in a circle."""
    uses = LastUsed(books.engine)
    free, _ = await key_of(books, ann)
    uses.note(ann.key_id, 10**15)
    uses.note(free.key_id, 10**15)
    async with database.writing(books.engine) as connection:
        await change_key(connection, await read_key(connection, ann.user_id, ann.key_id), {"name": "held"})
        await uses.write()
        assert await last_used(books, free.key_id) == 10**15
        assert await last_used(books, ann.key_id) is None
    await uses.write()
    assert await last_used(books, ann.key_id) == 10**15
