"""What an auditor finds when one row is wrong, and that it finds nothing else."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import pytest
import sqlalchemy as sa

from proxy.ledger.audit import CHECKS, ROWS_MAX, Report, Totals, audit
from proxy.ledger.decide import Credit, CreditType
from proxy.ledger.ledger import Ledger
from proxy.pricing import cost, provider_cost
from proxy.storage import database
from proxy.units import Usage
from tests.books import OFFERS, PRICE, Books, Person, opened_books, release_of, reserve_of, settle_of


class Kept(NamedTuple):
    """Books in which everything has happened once: 1,000 paid in, 35 charged, 4 refunded, 60 held."""

    books: Books
    person: Person
    ids: dict[str, str]
    """Of the wallet, the key, the instance and the calls `paid`, `refunded`, `released` and `open`."""


@pytest.fixture
async def kept(database_url):
    """Books that are not audited at the end: the tests falsify them."""
    async with opened_books(database_url) as books:
        person = await books.person(1000)
        calls = {name: reserve_of(person, 60) for name in ("paid", "refunded", "released", "open")}
        for call in calls.values():
            await books.ledger.reserve(call)
        await books.ledger.settle(settle_of(calls["paid"], 25))
        await books.ledger.settle(settle_of(calls["refunded"], 10))
        await books.ledger.credit(
            Credit(
                wallet_id=person.wallet_id,
                type=CreditType.REFUND,
                amount=4,
                description="test",
                reservation_id=calls["refunded"].id,
            )
        )
        await books.ledger.release(release_of(calls["released"]))
        ids = {name: call.id for name, call in calls.items()}
        yield Kept(books, person, {**ids, "wallet": person.wallet_id, "key": person.key_id, "instance": books.lease.id})


async def falsify(kept: Kept, statements: Sequence[str]) -> None:
    """Change rows without triggers and constraints in the way; `:paid` and the like are ids."""
    is_sqlite = kept.books.url.startswith("sqlite")
    unlocking = ["PRAGMA ignore_check_constraints = ON", "DROP TRIGGER append_only_update"]
    if not is_sqlite:
        unlocking = [
            "DROP TRIGGER append_only ON credit_transactions",
            "ALTER TABLE credit_transactions DROP CONSTRAINT ck_credit_transactions_chained",
            "ALTER TABLE wallets DROP CONSTRAINT ck_wallets_covered",
            "ALTER TABLE reservations DROP CONSTRAINT ck_reservations_cost",
        ]
    async with database.writing(kept.books.engine) as connection:
        for statement in (*unlocking, *statements):
            used = {name: id_ for name, id_ in kept.ids.items() if f":{name}" in statement}
            await connection.execute(sa.text(statement), used)


def found(report: Report) -> list[tuple[str, str]]:
    return [(finding.name, finding.says) for finding in report.violations]


async def test_clean_books_are_clean(kept):
    """Nothing is found, and the totals are those of the settled calls."""
    report = await kept.books.audit()
    assert (report.is_clean, report.violations, report.notes) == (True, [], [])
    assert report.totals == Totals(calls=2, charged=35, shortfall=0, provider_cost=35, markup=0, deducted=35)


async def test_empty_books_are_clean(books):
    """Before the first user there is nothing to find."""
    report = await books.audit()
    assert (report.is_clean, report.totals) == (True, Totals())


def booked(wallet: str, seq: int, type_: str, amount: int, before: int, call: str = "NULL") -> str:
    return (
        "INSERT INTO credit_transactions (id, wallet_id, user_id, seq, type, amount, description, balance_before,"
        f" balance_after, reservation_id, created_at) VALUES ('forged', {wallet}, 'nobody', {seq}, '{type_}', {amount},"
        f" 'forged', {before}, {before + amount}, {call}, 1)"
    )


A_PRICE = msgspec.json.format(msgspec.json.encode(PRICE), indent=0).decode()
"""With a space after each colon, which would else begin the name of a parameter."""

A_RECEIPT = f"usage = '{{}}', price = '{A_PRICE}', markup_bps = 0, provider_cost = 0"


class Falsehood(NamedTuple):
    """One corruption, the check that must report it first, what its first row must show, and which sums are wrong too.

    `days_say` is what the sums by day are not, in which the call was counted as it was.
    """

    statements: list[str]
    name: str
    says: str
    shows: dict[str, object]
    sum_says: str | None = None
    days_say: str | None = None


BALANCE = "a wallet's balance is the sum of its transactions"
CHAIN = "a wallet's transactions are chained by seq, without gaps, from zero to its balance"
LAST = "a wallet's seq is that of its last transaction"
ORPHAN = "every transaction and every reservation has a wallet"
AMOUNT = "each transaction changes the balance by its amount"
HELD = "a wallet's reserved credits and open calls are those of its open reservations"
COVERED = "nobody has reserved more than there is"
KEY = "a key's counters are those of its reservations"
PERIOD = "a key's spending in its period is that of the calls settled in it"
DEDUCTION = "every deduction has a settled reservation of its amount"
SETTLED = "every settled reservation has one deduction"
REFUNDS = "what a call gave back is the sum of its refunds"
LEASE = "nothing is open of an instance whose lease ended over a minute ago"
CHARGE = "each charge follows from its stored usage, prices and markup"
AS_RESERVED = "each charge is at the markup, and within the prices, that its call was reserved at"
MARGIN = "all charges and shortfalls are the providers' cost and the markup"
TAKEN = "all charges are what the journal deducted"
SUMS_TABLES = ("usage_days", "usage_months")
DAYS = "the sums by day are those of the calls that ended on them"
MONTHS = "the sums by month are those of the days"
MONTH = "a month's sums are those of its days"
TOKENS = "the tokens in the sums of a wallet are those of its calls"

FALSEHOODS = {
    "a balance from nowhere": Falsehood(
        ["UPDATE wallets SET balance = balance + 1"], "I1", BALANCE, {"balance": 970, "transactions": 969}
    ),
    "a balance without any transaction": Falsehood(
        ["INSERT INTO wallets (id, owner_id, balance) VALUES ('forged', 'nobody', 5)"],
        "I1",
        BALANCE,
        {"wallet_id": "forged", "balance": 5, "transactions": 0},
    ),
    "a transaction that does not follow the one before": Falsehood(
        [
            "UPDATE credit_transactions SET balance_before = balance_before + 1 WHERE seq = 4",
            "UPDATE credit_transactions SET balance_after = balance_after + 1 WHERE seq = 4",
        ],
        "I1",
        CHAIN,
        {"seq": 4, "balance_before": 966, "previous_after": 965},
    ),
    "a gap in the chain": Falsehood(
        ["UPDATE credit_transactions SET seq = 5 WHERE seq = 4", "UPDATE wallets SET seq = 5"],
        "I1",
        CHAIN,
        {"seq": 5, "previous_seq": 3},
    ),
    "a first transaction that is not the first": Falsehood(
        [
            "INSERT INTO wallets (id, owner_id, balance, seq) VALUES ('forged', 'nobody', 5, 2)",
            booked("'forged'", 2, "topup", 5, 0),
        ],
        "I1",
        CHAIN,
        {"wallet_id": "forged", "seq": 2, "previous_seq": 0},
    ),
    "a wallet that has lost count": Falsehood(["UPDATE wallets SET seq = seq + 1"], "I1", LAST, {"seq": 5, "last": 4}),
    "a transaction without a wallet": Falsehood(
        [booked("'gone'", 1, "topup", 5, 0)], "I1", ORPHAN, {"id": "forged", "wallet_id": "gone"}
    ),
    "a call without a wallet": Falsehood(
        ["UPDATE reservations SET wallet_id = 'gone' WHERE id = :released"],
        "I1",
        ORPHAN,
        {"id": ":released", "wallet_id": "gone"},
        days_say=DAYS,
    ),
    "a transaction that changes the balance by more": Falsehood(
        ["UPDATE credit_transactions SET amount = 1001 WHERE seq = 1", "UPDATE wallets SET balance = balance + 1"],
        "I1",
        AMOUNT,
        {"wallet_id": ":wallet", "seq": 1},
    ),
    "more reserved than calls hold": Falsehood(
        ["UPDATE wallets SET reserved = reserved + 1"], "I2", HELD, {"reserved": 61, "open_amount": 60}
    ),
    "more open calls than there are": Falsehood(
        ["UPDATE wallets SET open_calls = open_calls + 1"], "I2", HELD, {"open_calls": 2, "open_reservations": 1}
    ),
    "more reserved than there is": Falsehood(
        [
            booked(":wallet", 5, "adjustment", -910, 969),
            "UPDATE wallets SET balance = 59, seq = 5",
        ],
        "I3",
        COVERED,
        {"wallet_id": ":wallet", "balance": 59, "reserved": 60},
    ),
    "a key that spent what no call cost": Falsehood(
        ["UPDATE api_keys SET spent = spent + 1"], "I4", KEY, {"key_id": ":key", "spent": 36, "charged": 35}
    ),
    "a key that holds what no call does": Falsehood(
        ["UPDATE api_keys SET reserved = reserved - 1"], "I4", KEY, {"reserved": 59, "held": 60}
    ),
    "a key with calls that are not": Falsehood(
        ["UPDATE api_keys SET open_calls = 0"], "I4", KEY, {"open_calls": 0, "calls": 1}
    ),
    "a key that spent more in its period": Falsehood(
        ["UPDATE api_keys SET period_spent = period_spent - 1"], "I4", PERIOD, {"period_spent": 34, "charged": 35}
    ),
    "a key that counts an earlier period": Falsehood(
        [f"UPDATE api_keys SET period_start = {2**60}"], "I4", PERIOD, {"period_spent": 35, "charged": 0}
    ),
    "a deduction for a call that did not settle": Falsehood(
        [booked(":wallet", 5, "deduction", 0, 969, ":released"), "UPDATE wallets SET seq = 5"],
        "I6",
        DEDUCTION,
        {"transaction_id": "forged", "reservation_id": ":released", "state": None},
    ),
    "a deduction for a call that is not": Falsehood(
        [booked(":wallet", 5, "deduction", 0, 969, "'gone'"), "UPDATE wallets SET seq = 5"],
        "I6",
        DEDUCTION,
        {"transaction_id": "forged", "reservation_id": "gone"},
    ),
    "a settled call without a deduction": Falsehood(
        [f"UPDATE reservations SET state = 'settled', cost = 0, {A_RECEIPT} WHERE id = :released"],
        "I6",
        SETTLED,
        {"reservation_id": ":released", "deductions": 0},
        days_say=DAYS,
    ),
    "a refund that was not booked": Falsehood(
        ["UPDATE reservations SET refunded = 5 WHERE id = :refunded"],
        "I6",
        REFUNDS,
        {"reservation_id": ":refunded", "refunded": 5, "refunds": 4},
        days_say=DAYS,
    ),
    "a call that nobody sweeps": Falsehood(
        ["UPDATE instances SET lease_until = 1"], "I7", LEASE, {"reservation_id": ":open", "owner_id": ":instance"}
    ),
    "a call of an instance that is not": Falsehood(
        ["UPDATE reservations SET owner_id = 'gone' WHERE id = :open"],
        "I7",
        LEASE,
        {"reservation_id": ":open", "owner_id": "gone"},
    ),
    "another usage": Falsehood(
        ["UPDATE reservations SET usage = '{\"output\": 26}' WHERE id = :paid"],
        "I8",
        CHARGE,
        {"reservation_id": ":paid", "cost": 25, "expected": 26},
        days_say=TOKENS,
    ),
    "another markup": Falsehood(
        ["UPDATE reservations SET markup_bps = 10000 WHERE id = :paid"],
        "I8",
        CHARGE,
        {"cost": 25, "expected": 50},
        MARGIN,
    ),
    "another price": Falsehood(
        [f"UPDATE reservations SET price = '{A_PRICE.replace('1', '2')}' WHERE id = :paid"],
        "I8",
        CHARGE,
        {"cost": 25, "expected": 50},
    ),
    "another cost to the operator": Falsehood(
        ["UPDATE reservations SET provider_cost = 24 WHERE id = :paid"],
        "I8",
        CHARGE,
        {"reservation_id": ":paid"},
        MARGIN,
        DAYS,
    ),
    "another cost": Falsehood(
        ["UPDATE reservations SET cost = 26, shortfall = 1 WHERE id = :paid"],
        "I8",
        CHARGE,
        {"cost": 26, "expected": 25},
        MARGIN,
        DAYS,
    ),
    "no usage": Falsehood(
        ["UPDATE reservations SET usage = NULL WHERE id = :paid"], "I8", CHARGE, {"expected": None}, days_say=TOKENS
    ),
    "no price": Falsehood(["UPDATE reservations SET price = NULL WHERE id = :paid"], "I8", CHARGE, {"expected": None}),
    "no markup": Falsehood(
        ["UPDATE reservations SET markup_bps = NULL WHERE id = :paid"], "I8", CHARGE, {"expected": None}
    ),
    "no cost to the operator": Falsehood(
        ["UPDATE reservations SET provider_cost = NULL WHERE id = :paid"], "I8", CHARGE, {"expected": 25}, MARGIN, DAYS
    ),
    **{
        f"one too many in {sum_} of a day": Falsehood(
            [f"UPDATE {table} SET {sum_} = {sum_} + 1 WHERE provider = 'fake'" for table in SUMS_TABLES],
            "I10",
            DAYS,
            {sum_: 1, "provider": "fake"},
        )
        for sum_ in (
            "calls",
            "charged",
            "provider_cost",
            "shortfall",
            "refunded",
            "released",
            "perhaps_billed",
            "perhaps_billed_amount",
        )
    },
    **{
        f"one too many in {sum_} of a day": Falsehood(
            [f"UPDATE {table} SET {sum_} = {sum_} + 1 WHERE provider = 'fake'" for table in SUMS_TABLES],
            "I10",
            TOKENS,
            {"wallet_id": ":wallet", "used": (0, 0, 35)},
        )
        for sum_ in ("input_tokens", "cached_input_tokens", "output_tokens")
    },
    "tokens of a wallet that used none": Falsehood(
        [
            f"INSERT INTO {table} (wallet_id, day, user_id, key_id, model, provider, input_tokens)"
            " VALUES ('forged', 0, '', '', '', '', 5)"
            for table in SUMS_TABLES
        ],
        "I10",
        TOKENS,
        {"wallet_id": "forged", "counted": (5, 0, 0), "used": None},
    ),
    "a price that is none": Falsehood(
        ['UPDATE reservations SET price = \'{"input": "dear"}\' WHERE id = :paid'], "I8", CHARGE, {"expected": None}
    ),
}


@pytest.mark.parametrize("falsehood", FALSEHOODS.values(), ids=FALSEHOODS.keys())
async def test_one_wrong_row_is_found_by_one_check(kept, falsehood):
    """Exactly the check whose invariant is broken reports it and shows the row, and the sum that it makes wrong."""
    await falsify(kept, falsehood.statements)
    report = await kept.books.audit()
    sums = [] if falsehood.sum_says is None else [("I9", falsehood.sum_says)]
    days = [] if falsehood.days_say is None else [("I10", falsehood.days_say)]
    assert sorted(found(report)) == sorted([(falsehood.name, falsehood.says), *sums, *days])
    finding = next(one for one in report.violations if one.name == falsehood.name)
    shows = {name: kept.ids.get(str(value).removeprefix(":"), value) for name, value in falsehood.shows.items()}
    assert shows.items() <= finding.rows[0].items()
    assert (finding.count, len(finding.rows)) == (1, 1)
    assert not report.is_clean


@pytest.mark.parametrize(
    ("charged_at", "is_kept"),
    [
        ({}, True),
        ({"price": PRICE.marked_up(-5000)}, True),
        ({"price": PRICE.marked_up(1)}, False),
        ({"markup_bps": 1}, False),
        ({"provider": "other"}, False),
        ({"request_model": "other"}, False),
    ],
)
async def test_a_charge_is_at_what_its_call_was_reserved_at(kept, charged_at, is_kept):
    """At the markup of one of its offers, and at no more than its prices: a cheaper service tier may have served."""
    reserve = reserve_of(kept.person, 10, offers=OFFERS)
    await kept.books.ledger.reserve(reserve)
    used = Usage(output=10)
    price, bps = charged_at.get("price", PRICE), charged_at.get("markup_bps", 0)
    facts = {name: value for name, value in charged_at.items() if name != "price"}
    plain = settle_of(reserve, 10)
    receipt = msgspec.structs.replace(
        plain.receipt,
        price=msgspec.json.encode(price).decode(),
        provider_cost=provider_cost(used, price),
        **facts,
    )
    settle = msgspec.structs.replace(plain, cost=cost(used, price, bps), receipt=receipt)
    await kept.books.ledger.settle(settle)
    assert found(await kept.books.audit()) == ([] if is_kept else [("I8", AS_RESERVED)])


async def test_offers_that_cannot_be_read_are_found(kept):
    """They would prove nothing."""
    reserve = reserve_of(kept.person, 10, offers='[{"provider":1}]')
    await kept.books.ledger.reserve(reserve)
    await kept.books.ledger.settle(settle_of(reserve, 10))
    assert found(await kept.books.audit()) == [("I8", AS_RESERVED)]


async def test_a_call_counted_on_another_day_is_found_on_both(kept):
    """One day has what the other lacks."""
    await falsify(kept, ["UPDATE usage_days SET day = day - 1 WHERE provider = 'fake'"])
    await kept.books.recount_months()
    [finding] = (await kept.books.audit()).violations
    assert (finding.says, sorted(row["calls"] for row in finding.rows)) == (DAYS, [-2, 2])


async def test_a_month_that_has_not_what_its_days_have_is_found(kept):
    """In all, or only under another month."""
    await falsify(kept, ["UPDATE usage_months SET day = day - 400 WHERE provider = 'fake'"])
    [finding] = (await kept.books.audit()).violations
    assert (finding.says, sorted(row["calls"] for row in finding.rows)) == (MONTH, [-2, 2])
    await kept.books.recount_months()
    await kept.books.execute("UPDATE usage_months SET input_tokens = input_tokens + 1 WHERE provider = 'fake'")
    wallets, months = (await kept.books.audit()).violations
    assert (wallets.says, wallets.rows[0]["input_tokens"]) == (MONTHS, 1)
    assert (months.says, [row["input_tokens"] for row in months.rows]) == (MONTH, [1])


async def test_a_charge_that_is_not_the_cost_breaks_the_totals_too(kept):
    """Sums that do not agree are reported beside the call that is at fault."""
    await falsify(kept, ["UPDATE reservations SET shortfall = 1 WHERE id = :paid"])
    report = await kept.books.audit()
    assert found(report) == [("I10", DAYS), ("I8", CHARGE), ("I9", MARGIN)]
    assert report.violations[2].rows == [
        {"calls": 2, "charged": 35, "shortfall": 1, "provider_cost": 35, "markup": 0, "deducted": 35}
    ]


async def test_a_deduction_that_is_not_its_charge_breaks_the_totals_too(kept):
    """Money that the journal took and no call was charged is missed by its sum, whatever else is set right."""
    await falsify(
        kept,
        [
            "UPDATE credit_transactions SET amount = -26 WHERE reservation_id = :paid",
            "UPDATE credit_transactions SET balance_after = balance_after - 1 WHERE seq >= 2",
            "UPDATE credit_transactions SET balance_before = balance_before - 1 WHERE seq > 2",
            "UPDATE wallets SET balance = balance - 1",
        ],
    )
    report = await kept.books.audit()
    assert found(report) == [("I6", DEDUCTION), ("I9", TAKEN)]
    assert report.violations[1].rows[0]["deducted"] == 36


async def test_the_markup_of_the_totals_is_computed_anew(books):
    """What the operator keeps is what the prices and the markups say, whatever the charges are."""
    person = await books.person(1000)
    usage = Usage(output=100)
    for markup_bps in (1500, 1, 0):
        reserve = reserve_of(person, 200)
        await books.ledger.reserve(reserve)
        plain = settle_of(reserve, 100)
        charged = cost(usage, PRICE, markup_bps)
        receipt = msgspec.structs.replace(plain.receipt, markup_bps=markup_bps)
        await books.ledger.settle(msgspec.structs.replace(plain, cost=charged, receipt=receipt))
    report = await books.audit()
    assert report.totals == Totals(calls=3, charged=316, provider_cost=300, markup=16, deducted=316)


@pytest.mark.parametrize("period", ["NULL", "'day'"])
async def test_a_limit_that_was_lowered_is_a_note(kept, period):
    """An operator may do that: it is shown, and the books are clean."""
    await falsify(kept, [f"UPDATE api_keys SET limit_amount = 94, limit_period = {period}"])
    report = await kept.books.audit()
    assert report.is_clean
    [note] = report.notes
    assert (note.name, note.count, note.rows[0]["key_id"]) == ("I5", 1, kept.person.key_id)
    assert "note I5" in report.as_text()


async def test_a_limit_that_is_just_kept_is_no_note(kept):
    """Spent and reserved may be all of it."""
    await falsify(kept, ["UPDATE api_keys SET limit_amount = 95"])
    assert (await kept.books.audit()).notes == []


async def test_many_wrong_rows_are_counted_and_some_shown(kept):
    """A report stays readable whatever has happened."""
    wallets = ", ".join(f"('forged{number}', 'nobody', 1)" for number in range(ROWS_MAX + 5))
    await falsify(kept, [f"INSERT INTO wallets (id, owner_id, balance) VALUES {wallets}"])
    [finding] = (await kept.books.audit()).violations
    assert (finding.count, len(finding.rows)) == (ROWS_MAX + 5, ROWS_MAX)


async def test_many_wrong_charges_are_counted_and_some_shown(kept):
    """Likewise for what is computed anew call by call."""
    reserves = [reserve_of(kept.person, 1) for _ in range(ROWS_MAX + 5)]
    for reserve in reserves:
        await kept.books.ledger.reserve(reserve)
        await kept.books.ledger.settle(settle_of(reserve, 1))
    await falsify(kept, ["UPDATE reservations SET markup_bps = 10000 WHERE cost = 1"])
    finding, _ = (await kept.books.audit()).violations
    assert (finding.name, finding.count, len(finding.rows)) == ("I8", ROWS_MAX + 5, ROWS_MAX)


async def test_a_report_is_for_programs_and_people(kept):
    """As an object it is JSON with the verdict in front; as text it says what is wrong, where."""
    clean = await kept.books.audit()
    assert msgspec.json.decode(msgspec.json.encode(clean.as_object())) == {
        "clean": True,
        "violations": [],
        "notes": [],
        "totals": {"calls": 2, "charged": 35, "shortfall": 0, "provider_cost": 35, "markup": 0, "deducted": 35},
    }
    assert clean.as_text() == "2 settled calls; the books add up."
    await falsify(kept, ["UPDATE wallets SET seq = seq + 1"])
    report = await kept.books.audit()
    broken = msgspec.json.decode(msgspec.json.encode(report.as_object()))
    assert broken["clean"] is False
    assert broken["violations"][0]["rows"] == [{"wallet_id": kept.person.wallet_id, "seq": 5, "last": 4}]
    text = report.as_text()
    assert text.startswith("2 settled calls; the books DO NOT ADD UP.\n")
    assert f"VIOLATED I1: {LAST}: 1 rows" in text
    assert kept.person.wallet_id in text


# ---- the bank test


async def test_an_audit_sees_one_moment(books):
    """While two processes reserve, settle, release, refund and top up, every audit sees books that add up.

    Nor does any see credits that nobody paid in, or miss some: what wallets hold is what was paid in and given back,
    less what was charged.
    """
    people = [await books.person(10_000) for _ in range(4)]
    audited: list[Totals] = []
    async with opened_books(books.url, is_second=True) as other:

        async def call(ledger: Ledger, number: int) -> None:
            person = people[number % len(people)]
            for tokens in range(1, 31):
                paid, dropped = reserve_of(person, 50), reserve_of(person, 20)
                await ledger.reserve(paid)
                await ledger.reserve(dropped)
                await ledger.settle(settle_of(paid, tokens))
                await ledger.release(release_of(dropped))
                if tokens == 5:
                    await ledger.release(release_of(paid, is_undelivered=True))
                await books.top_up(person.wallet_id, 3)

        calling = asyncio.gather(*(call((books, other)[number % 2].ledger, number) for number in range(20)))
        while not calling.done():
            report = await books.audit()
            assert report.is_clean, report.as_text()
            assert await sums(books) == (0, 0)
            audited.append(report.totals)
        await calling
    assert (await books.audit()).totals.calls == 600
    between = {totals.calls for totals in audited} - {0, 600}
    assert len(between) > 2, "the audits were not taken under load"


async def sums(books: Books) -> tuple[int, int]:
    """What wallets hold and what calls hold, beyond what they must, by sums over everything in one statement."""
    async with database.reading(books.engine, is_snapshot=True) as connection:
        row = (
            await connection.execute(
                sa.text(
                    "SELECT (SELECT COALESCE(SUM(balance), 0) FROM wallets)"
                    " - (SELECT COALESCE(SUM(amount), 0) FROM credit_transactions WHERE type <> 'deduction')"
                    " + (SELECT COALESCE(SUM(charged), 0) FROM reservations) AS balance,"
                    " (SELECT COALESCE(SUM(reserved), 0) FROM wallets)"
                    " - (SELECT COALESCE(SUM(amount), 0) FROM reservations WHERE state = 'open') AS reserved"
                )
            )
        ).one()
    return int(row.balance), int(row.reserved)


async def test_an_audit_tells_how_far_it_is(kept):
    """Its share rises from nothing to all, with each check and each charge."""
    told: list[float] = []
    report = await audit(kept.books.engine, told.append)
    assert told == sorted(told)
    assert (told[0], told[-2:]) == (0, [1, 1])
    assert len(told) == len(CHECKS) + report.totals.calls + 1
