"""Any history at all, on both databases: after every step the books are those of a small model, and audit clean.

`TOLLGATE_TEST_THOROUGH=1` lives through many more and longer histories.
"""

import asyncio
import os
from typing import ClassVar

import msgspec
import pytest
import sqlalchemy as sa
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from proxy.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    InsufficientCredits,
    KeyLimitReached,
    LedgerFault,
    TollgateError,
    Unauthenticated,
)
from proxy.ledger.decide import Credit, CreditType, Expire, Released, Reserve, Settle, Settled
from proxy.ledger.ledger import Ledger
from proxy.ledger.recovery import Lease
from proxy.storage import database
from proxy.units import MICROS_PER_DAY, new_id
from tests.books import Books, Person, release_of, reserve_of, settle_of, store_at

IS_THOROUGH = os.environ.get("TOLLGATE_TEST_THOROUGH") == "1"
HISTORIES = 300 if IS_THOROUGH else 15
STEPS = 60 if IS_THOROUGH else 25

MONTH = 31 * MICROS_PER_DAY
"""However long this month is, so long ago was another."""


class Call(msgspec.Struct):
    """What the model knows of a reservation."""

    reserve: Reserve
    account: "Account"
    amount: int
    state: str = "open"
    cost: int | None = None
    charged: int = 0
    refunded: int = 0


class Account(msgspec.Struct):
    """What the model knows of a person: sums, and the limit of the key."""

    person: Person
    balance: int = 0
    transactions: int = 0
    limit: int | None = None
    spent: int = 0
    spent_this_month: int = 0
    is_month_current: bool = False
    calls: list[Call] = msgspec.field(default_factory=list)
    top_ups: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def held(self) -> int:
        return sum(call.amount for call in self.calls if call.state == "open")

    @property
    def free(self) -> int:
        return self.balance - self.held

    @property
    def left_of_limit(self) -> int:
        """What the key may still spend; more than anyone has when it has no limit."""
        spent = self.spent_this_month if self.is_month_current else 0
        return 2**62 if self.limit is None else self.limit - self.held - spent

    def book(self, amount: int) -> None:
        self.balance += amount
        self.transactions += 1

    def turn(self) -> None:
        """What the first change of a key in a new month does to it."""
        if not self.is_month_current:
            self.spent_this_month, self.is_month_current = 0, True

    def settle(self, call: Call, cost: int) -> None:
        more = max(0, min(self.free, self.left_of_limit))
        call.charged = min(cost, more + (call.amount if call.state == "open" else 0))
        self.turn()
        call.state, call.cost = "settled", cost
        self.spent += call.charged
        self.spent_this_month += call.charged
        self.book(-call.charged)

    def end(self, call: Call, state: str) -> None:
        self.turn()
        call.state = state


class LedgerMachine(RuleBasedStateMachine):
    """Two people, one process at a time, and everything that may be asked of the ledger."""

    url: ClassVar[str]
    calls = Bundle("calls")
    whose = st.integers(0, 1)
    amounts = st.integers(0, 120)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.engine = database.connect(self.url)
        self.runner.run(self.open())
        self.accounts = [Account(self.runner.run(self.books.person())) for _ in range(2)]
        for account in self.accounts:
            self.execute("UPDATE api_keys SET limit_period = 'month' WHERE id = :id", id=account.person.key_id)
            self.top_up_fresh(account, 200)

    def teardown(self) -> None:
        for account in self.accounts:
            for call in account.calls:
                if call.state == "open":
                    self.ask(self.ledger.expire(Expire(id=call.reserve.id, wallet_id=call.reserve.wallet_id)))
        self.runner.run(self.ledger.aclose())
        self.runner.run(self.engine.dispose())
        self.runner.close()

    # -- driving

    async def open(self) -> None:
        """Start as a new process does: a new instance, a connection of its own."""
        self.lease = Lease(self.engine, is_embedded=False)
        await self.lease.register()
        self.store = store_at(self.url, self.engine)
        self.ledger = Ledger(self.store, lambda: self.lease.id)
        self.ledger.start()
        self.books = Books(self.url, self.engine, self.ledger, self.lease)

    async def crash(self, settle: Settle | None = None, *, turns: int = 0) -> None:
        """Die, `turns` of the loop into `settle` if there is one, and come back as the one who sweeps up."""
        if settle is not None:
            waiting = asyncio.create_task(self.ledger.settle(settle))
            for _ in range(turns):
                await asyncio.sleep(0)
        batches = self.ledger._batcher._task
        batches.cancel()
        await asyncio.gather(batches, return_exceptions=True)
        await self.store.aclose()
        if settle is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        dead = self.lease.id
        await self.open()
        await self.books.execute("UPDATE instances SET lease_until = 1 WHERE id = :id", id=dead)
        await self.lease.fence_expired()
        await self.lease.sweep(self.ledger)

    def ask(self, asked):
        """The answer, or the error that it was."""
        try:
            return self.runner.run(asked)
        except TollgateError as error:
            return error

    def execute(self, sql: str, **values: object) -> None:
        self.runner.run(self.books.execute(sql, **values))

    # -- credits by hand

    def top_up_fresh(self, account: Account, amount: int) -> None:
        credited = self.ask(self.books.top_up(account.person.wallet_id, amount))
        account.book(amount)
        assert credited.transaction.balance_after == account.balance

    @rule(whose=whose, amount=st.integers(1, 100))
    def top_up(self, whose, amount):
        self.top_up_fresh(self.accounts[whose], amount)

    @rule(whose=whose, amount=st.integers(1, 3), key=st.sampled_from("ab"))
    def top_up_once(self, whose, amount, key):
        account = self.accounts[whose]
        answer = self.ask(self.books.top_up(account.person.wallet_id, amount, idempotency_key=key))
        before = account.top_ups.setdefault(key, amount)
        if before != amount:
            assert isinstance(answer, Conflict)
            return
        if not answer.is_replay:
            account.book(amount)
        assert answer.transaction.amount == amount

    @rule(whose=whose, amount=st.integers(-100, 100))
    def adjust(self, whose, amount):
        account = self.accounts[whose]
        wallet_id = account.person.wallet_id
        answer = self.ask(
            self.ledger.credit(
                Credit(wallet_id=wallet_id, type=CreditType.ADJUSTMENT, amount=amount, description="by hand")
            )
        )
        if amount and account.free + amount >= 0:
            account.book(amount)
            assert answer.transaction.balance_after == account.balance
        else:
            assert isinstance(answer, BadRequest)

    @rule(call=calls, amount=st.integers(1, 60))
    def refund(self, call, amount):
        answer = self.ask(
            self.ledger.credit(
                Credit(
                    wallet_id=call.reserve.wallet_id,
                    type=CreditType.REFUND,
                    amount=amount,
                    description="by hand",
                    reservation_id=call.reserve.id,
                )
            )
        )
        if amount > call.charged - call.refunded:
            assert isinstance(answer, BadRequest)
            return
        call.refunded += amount
        call.account.book(amount)
        assert answer.transaction.balance_after == call.account.balance

    # -- reserves

    @rule(target=calls, whose=whose, at_least=amounts, more=st.sampled_from([0, 0, 100]))
    def reserve(self, whose, at_least, more):
        account = self.accounts[whose]
        operation = reserve_of(account.person, at_least, at_most=at_least + more)
        answer = self.ask(self.ledger.reserve(operation))
        if account.free < at_least:
            assert isinstance(answer, InsufficientCredits)
            return multiple()
        if account.left_of_limit < at_least:
            assert isinstance(answer, KeyLimitReached)
            return multiple()
        spendable = min(account.free, account.left_of_limit)
        amount = min(at_least + more, spendable, max(at_least, spendable // 4))
        assert answer.amount == amount
        account.turn()
        call = Call(operation, account, amount)
        account.calls.append(call)
        return call

    @rule(call=calls)
    def reserve_again(self, call):
        answer = self.ask(self.ledger.reserve(call.reserve))
        if call.state == "open":
            assert (answer.amount, answer.is_replay) == (call.amount, True)
        else:
            assert isinstance(answer, LedgerFault)

    @rule(call=calls)
    def reserve_again_with_other_values(self, call):
        more = call.amount + 1
        other = msgspec.structs.replace(call.reserve, at_least=more, at_most=more)
        assert isinstance(self.ask(self.ledger.reserve(other)), LedgerFault)

    @rule(whose=whose, stranger=st.sampled_from(["user_id", "wallet_id", "key_id"]))
    def reserve_as_a_stranger(self, whose, stranger):
        operation = reserve_of(self.accounts[whose].person, 1, **{stranger: new_id("none")})
        assert isinstance(self.ask(self.ledger.reserve(operation)), Unauthenticated)

    @rule(whose=whose)
    def reserve_while_inactive(self, whose):
        person = self.accounts[whose].person
        self.execute("UPDATE users SET is_active = FALSE WHERE id = :id", id=person.user_id)
        assert isinstance(self.ask(self.ledger.reserve(reserve_of(person, 1))), Forbidden)
        self.execute("UPDATE users SET is_active = TRUE WHERE id = :id", id=person.user_id)

    # -- ends of calls

    @rule(call=calls, cost=amounts)
    def settle(self, call, cost):
        state = call.state
        if state == "settled" and cost != call.cost:
            assert isinstance(self.ask(self.ledger.settle(settle_of(call.reserve, cost))), LedgerFault)
            return
        if state == "released":
            assert isinstance(self.ask(self.ledger.settle(settle_of(call.reserve, cost))), LedgerFault)
            return
        answer = self.ask(self.ledger.settle(settle_of(call.reserve, cost)))
        if state != "settled":
            call.account.settle(call, cost)
            assert answer.is_late == (state == "expired")
        self.check_settled(call, answer, is_replay=state == "settled")

    @rule(call=calls)
    def settle_all_that_is_held(self, call):
        self.settle(call, call.amount)

    @rule(call=calls)
    def settle_again(self, call):
        if call.state == "settled":
            self.settle(call, call.cost)

    def check_settled(self, call: Call, answer: Settled, *, is_replay: bool) -> None:
        assert (answer.charged, answer.shortfall) == (call.charged, call.cost - call.charged)
        assert (answer.balance, answer.is_replay) == (call.account.balance, is_replay)

    @rule(call=calls)
    def release(self, call):
        answer = self.ask(self.ledger.release(release_of(call.reserve)))
        if call.state == "settled":
            assert isinstance(answer, LedgerFault)
            return
        assert answer == Released(is_replay=call.state != "open")
        if call.state == "open":
            call.account.end(call, "released")

    @rule(call=calls)
    def undelivered(self, call):
        if call.state != "settled":
            self.release(call)
            return
        answer = self.ask(self.ledger.release(release_of(call.reserve, is_undelivered=True)))
        left = call.charged - call.refunded
        assert answer == Released(call.charged, is_replay=bool(call.refunded and not left))
        if left:
            call.account.book(left)
            call.refunded = call.charged

    @rule(call=calls)
    def expire(self, call):
        answer = self.ask(self.ledger.expire(Expire(id=call.reserve.id, wallet_id=call.reserve.wallet_id)))
        assert answer == Released(is_replay=call.state != "open")
        if call.state == "open":
            call.account.end(call, "expired")

    # -- what happens around

    @rule(whose=whose, limit=st.none() | st.integers(0, 200))
    def change_the_limit(self, whose, limit):
        account = self.accounts[whose]
        account.limit = limit
        self.execute("UPDATE api_keys SET limit_amount = :limit WHERE id = :id", limit=limit, id=account.person.key_id)

    @rule(whose=whose)
    def a_month_goes_by(self, whose):
        """All that happened is moved into the past; the journal has no instants that anyone decides by."""
        account = self.accounts[whose]
        account.is_month_current = False
        self.execute(
            "UPDATE api_keys SET period_start = period_start - :month, window_start = window_start - :month"
            " WHERE id = :id AND period_start > 0",
            month=MONTH,
            id=account.person.key_id,
        )
        self.execute(
            "UPDATE reservations SET created_at = created_at - :month, settled_at = settled_at - :month"
            " WHERE wallet_id = :id",
            month=MONTH,
            id=account.person.wallet_id,
        )
        # No two rows may meet on the way.
        for there_and_back in (f"{MONTH // MICROS_PER_DAY} - day", "-day"):
            self.execute(
                f"UPDATE usage_days SET day = {there_and_back} WHERE wallet_id = :id", id=account.person.wallet_id
            )
        self.runner.run(self.books.recount_months())

    @rule()
    def crash_and_reopen(self):
        self.runner.run(self.crash())
        self.expire_all()

    @rule(call=calls, cost=amounts, turns=st.sampled_from([1, 2, 4, 8, 16, 1000]))
    def crash_while_settling(self, call, cost, turns):
        """The settle is sent again by whoever kept it: it was booked before the end, or is settled late now."""
        if call.state != "open":
            return
        settle = settle_of(call.reserve, cost)
        self.runner.run(self.crash(settle, turns=turns))
        answer = self.ask(self.ledger.settle(settle))
        if answer.is_late:
            self.expire_all()
            call.account.settle(call, cost)
        else:
            call.account.settle(call, cost)
            self.expire_all()
        self.check_settled(call, answer, is_replay=not answer.is_late)

    def expire_all(self) -> None:
        for account in self.accounts:
            for call in account.calls:
                if call.state == "open":
                    account.end(call, "expired")

    # -- what holds after every step

    @invariant()
    def the_books_are_the_models(self):
        wallets, keys, calls = self.runner.run(self.read())
        for account in self.accounts:
            is_open = sum(call.state == "open" for call in account.calls)
            assert wallets[account.person.wallet_id] == (account.balance, account.held, is_open, account.transactions)
            assert keys[account.person.key_id] == (account.spent, account.held, is_open, account.spent_this_month)
            for call in account.calls:
                expected = (call.state, call.amount, call.cost, call.charged, call.refunded)
                assert calls.pop(call.reserve.id) == expected
        assert not calls

    async def read(self) -> tuple[dict, dict, dict]:
        """Rows by id: of the wallets and keys of both people, and of all their calls."""
        ids = {"one": self.accounts[0].person.wallet_id, "two": self.accounts[1].person.wallet_id}
        async with database.reading(self.engine) as connection:
            tables = [
                (await connection.execute(sa.text(f"SELECT id, {columns} IN (:one, :two)"), ids)).all()
                for columns in (
                    "balance, reserved, open_calls, seq FROM wallets WHERE id",
                    "spent, reserved, open_calls, period_spent FROM api_keys WHERE wallet_id",
                    "state, amount, cost, charged, refunded FROM reservations WHERE wallet_id",
                )
            ]
        return tuple({row[0]: tuple(row[1:]) for row in rows} for rows in tables)

    @invariant()
    def the_audit_is_clean(self):
        report = self.runner.run(self.books.audit())
        assert report.is_clean, report.as_text()


@pytest.mark.timeout(3600 if IS_THOROUGH else 120)
def test_any_history(database_url):
    """Whatever is asked in whatever order, the books are the model's and every invariant holds."""
    machine = type("Machine", (LedgerMachine,), {"url": database_url})
    with structlog.testing.capture_logs():
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=HISTORIES,
                stateful_step_count=STEPS,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
