"""What the command line and the HTTP edge share, where HTTP does not show it."""

import asyncio

import msgspec
import pytest
import sqlalchemy as sa

from proxy.administration import COMMAND_LINE, config
from proxy.administration.credits import Order, book
from proxy.administration.keys import change as change_key_of
from proxy.administration.keys import create as create_key_for
from proxy.administration.users import change, create, set_password
from proxy.edge import admin_records
from proxy.edge.admin_records import Auditor
from proxy.errors import BadRequest, Conflict, Unavailable
from proxy.identity.keys import KeyTerms
from proxy.identity.passwords import Passwords
from proxy.identity.users import find_identity, read_password, read_user
from proxy.ledger.decide import CreditType
from proxy.ledger.ledger import Ledger
from proxy.settings import Settings
from proxy.storage import database
from proxy.storage.tables import admin_events
from tests.books import second_store

PASSWORD = "a password of some length"

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""Where the database makes no difference."""


async def events(books) -> list:
    async with database.reading(books.engine) as connection:
        return (await connection.execute(sa.select(admin_events).order_by(admin_events.c.id))).all()


@on_sqlite
async def test_a_user_with_an_identity_and_a_password(books):
    """Both are on record as facts, the password not at all; an identity is one user's, and nothing is half made."""
    wanted = {"email": "Ann@Example.com", "full_name": "Ann"}
    made = await create(
        books.engine, Passwords(), COMMAND_LINE, wanted, password=PASSWORD, identity=("https://issuer/", "ann")
    )
    user = made.user
    async with database.reading(books.engine) as connection:
        assert await find_identity(connection, "https://issuer/", "ann") == user
        _, password_hash = await read_password(connection, user.id)
    assert await Passwords().is_right(PASSWORD, password_hash)
    with pytest.raises(Conflict):
        await create(
            books.engine, Passwords(), COMMAND_LINE, {"email": "b@example.com"}, identity=("https://issuer/", "ann")
        )
    with pytest.raises(BadRequest):
        await create(
            books.engine,
            Passwords(),
            COMMAND_LINE,
            {"email": "ann.of.somewhere@example.com"},
            password="ann.of.somewhere",
        )
    (event,) = await events(books)
    assert (event.actor, event.action, event.subject) == (COMMAND_LINE, "user.create", user.id)
    assert (event.after["has_password"], event.after["identity"]) == (True, ["https://issuer/", "ann"])
    assert len(await books.ids("users")) == 1


@on_sqlite
async def test_who_loses_rank_loses_tokens(books):
    """Another version, once for each loss; other changes leave tokens alone."""
    person = await books.person()
    boss = await books.person()
    await change(books.engine, "x", boss.user_id, {"is_admin": True})
    versions = []
    for changes in (
        {"is_admin": True},
        {"full_name": "Ann"},
        {"is_admin": False},
        {"is_admin": False},
        {"is_active": False},
        {"is_active": True},
    ):
        await change(books.engine, "x", person.user_id, changes)
        versions.append((await books.row("users", person.user_id))["token_version"])
    assert versions == [0, 0, 1, 1, 2, 2]
    await set_password(books.engine, Passwords(), "x", await _user(books, person), PASSWORD)
    assert (await _user(books, person)).token_version == 3


async def _user(books, person):
    async with database.reading(books.engine) as connection:
        return await read_user(connection, person.user_id)


@on_sqlite
async def test_what_stays_as_it_is_is_no_event(books):
    """Neither of a user nor of a key."""
    person = await books.person()
    _, key = await create_key_for(books.engine, "x", person.user_id, KeyTerms(name="one"))
    before = len(await events(books))
    await change(books.engine, "x", person.user_id, {"is_active": True})
    await change_key_of(books.engine, "x", person.user_id, key.id, {"name": "one"})
    assert len(await events(books)) == before


async def test_a_row_of_settings_that_is_none(books):
    """Shown as if it were not there, and put right by setting it."""
    await books.execute(
        "INSERT INTO system_config (key, value, description, updated_at) VALUES ('expose', '\"all\"', '', 1)"
    )
    found = {one.name: one for one in await config.known(books.engine, Settings())}
    assert (found["expose"].value, found["expose"].updated_at) == ("priced", None)
    one = await config.set_value(books.engine, Settings(), "x", "expose", "listed")
    assert (one.value, one.default) == ("listed", "priced")
    (event,) = await events(books)
    assert (event.subject, event.before, event.after) == ("expose", "priced", "listed")


@on_sqlite
async def test_an_audit_is_for_everybody_who_asks_meanwhile_and_takes_its_time_at_most(books, monkeypatch):
    """One report for all of them; one that takes too long is given up with a reason."""
    auditor = Auditor(books.engine)
    one, other = await asyncio.gather(auditor.report(), auditor.report())
    assert one is other
    assert one.is_clean
    assert await auditor.report() is not one
    monkeypatch.setattr(admin_records, "AUDIT_S_MAX", 0)
    with pytest.raises(Unavailable, match="tollgate audit"):
        await auditor.report()


@on_sqlite
@pytest.mark.parametrize("stored", ['"x"', "true", '"-1"', "null", '{"a": 1}'])
async def test_a_markup_that_is_none_can_be_set_anew(books, stored):
    """What somebody wrote there by hand counts for nothing: what the configuration says was the one before."""
    await books.execute(
        "INSERT INTO system_config (key, value, description, updated_at) VALUES ('markup_percent', :stored, '', 1)",
        stored=stored,
    )
    assert await config.set_default_markup(books.engine, Settings(), "x", 20.5) == "20.5"
    (event,) = await events(books)
    assert (event.action, event.before, event.after) == ("config.set", "15", "20.5")


# ---- credits


def lose(engine, statement_of: str) -> None:
    """Break the connection at every statement about this table from now on."""

    def broken(_connection, _cursor, statement, *_more) -> None:
        if statement_of in statement:
            raise ConnectionResetError

    sa.event.listen(engine.sync_engine, "before_cursor_execute", broken)


@on_sqlite
@pytest.mark.parametrize("is_booked", [False, True])
async def test_an_order_whose_outcome_is_not_known(books, is_booked):
    """It names the idempotency key that it was given, by which it is booked once, whether it had been or not."""
    person = await books.person()
    order = Order(type=CreditType.TOPUP, amount=7)
    engine = database.connect(books.url, pooled=False)
    lose(engine, "credit_transactions")
    ledger = Ledger(second_store(books.url, engine), lambda: books.lease.id)
    ledger.start()
    if not is_booked:
        await ledger.aclose()
    with pytest.raises(Unavailable, match="It may yet be booked") as caught:
        await book(engine, ledger, "boss", person.user_id, order)
    if is_booked:
        await ledger.aclose()
    await engine.dispose()
    order = msgspec.structs.replace(order, idempotency_key=str(caught.value).split()[-1])
    booked = await book(books.engine, books.ledger, "boss", person.user_id, order)
    assert (booked.entry.balance_after, booked.is_replay) == (7, is_booked)
