"""How rows travel: one batch that writes a row twice, and text that cannot be sent, on real databases."""

import pytest

from proxy.errors import LedgerFault, NotFound
from proxy.ledger.decide import Credit, Credited, CreditType, Released, Reserved, Settled
from tests.books import release_of, reserve_of, settle_of, store_at


async def test_a_reservation_made_and_closed_in_one_batch_is_closed(books):
    """A release right behind its reserve, and a settle right behind another, leave nothing held."""
    person = await books.person(1000)
    released, settled = reserve_of(person, 60), reserve_of(person, 70)
    store = store_at(books.url, books.engine)
    outcomes = await store.transact(
        [released, settled, release_of(released), settle_of(settled, 7)], owner_id=books.lease.id
    )
    await store.aclose()
    assert [type(outcome) for outcome in outcomes] == [Reserved, Reserved, Released, Settled]
    assert [(await books.row("reservations", one.id))["state"] for one in (released, settled)] == [
        "released",
        "settled",
    ]
    wallet = await books.row("wallets", person.wallet_id)
    assert (wallet["balance"], wallet["reserved"], wallet["open_calls"]) == (993, 0, 0)


async def test_a_charge_booked_and_refunded_in_one_batch_is_both(books):
    """A refund right behind its settle keeps what the settle has written of the same call."""
    person = await books.person(1000)
    reserve = reserve_of(person, 60)
    await books.ledger.reserve(reserve)
    refund = Credit(
        wallet_id=person.wallet_id,
        type=CreditType.REFUND,
        amount=5,
        description="goodwill",
        reservation_id=reserve.id,
    )
    store = store_at(books.url, books.engine)
    outcomes = await store.transact([settle_of(reserve, 7), refund], owner_id=books.lease.id)
    await store.aclose()
    assert [type(outcome) for outcome in outcomes] == [Settled, Credited]
    row = await books.row("reservations", reserve.id)
    assert (row["state"], row["charged"], row["refunded"]) == ("settled", 7, 5)
    assert (await books.row("wallets", person.wallet_id))["balance"] == 998


@pytest.mark.parametrize("text", ["a\x00b", "\ud800"])
async def test_text_that_cannot_be_stored_is_refused(books, text):
    """It fails at once, since sending it again cannot help, and nothing after it does; SQLite can store a NUL."""
    person = await books.person(1000)
    reserve = reserve_of(person, 60, original_model=text)
    if books.url.startswith("sqlite") and "\x00" in text:
        assert await books.ledger.reserve(reserve) == Reserved(60)
    else:
        with pytest.raises(LedgerFault):
            await books.ledger.reserve(reserve)
    assert await books.ledger.reserve(reserve_of(person, 1)) == Reserved(1)


@pytest.mark.parametrize("text", ["it's; COMMIT; --", "'); DROP TABLE wallets; --", r"\'", "''"])
async def test_text_that_looks_like_a_statement_is_text(books, text):
    """Whatever quotes and backslashes a caller's text has, it is stored as it is, and nothing of it is run."""
    person = await books.person(1000)
    reserve = reserve_of(person, 60, original_model=text, client_request_id=text)
    assert await books.ledger.reserve(reserve) == Reserved(60)
    row = await books.row("reservations", reserve.id)
    assert (row["original_model"], row["client_request_id"]) == (text, text)
    unknown = Credit(wallet_id=text, type=CreditType.TOPUP, amount=5, description="test")
    with pytest.raises(NotFound):
        await books.ledger.credit(unknown)


async def test_a_wallet_whose_name_cannot_be_sent_is_refused(books):
    """PostgreSQL takes no NUL and fails at once; SQLite takes it, and knows no such wallet."""
    credit = Credit(wallet_id="a\x00b", type=CreditType.TOPUP, amount=5, description="test")
    with pytest.raises((LedgerFault, NotFound)):
        await books.ledger.credit(credit)
