"""The batcher's contract, over a store in memory that does as it is told, on a loop whose clock leaps."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Sequence

import pytest
import structlog

from proxy.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    InsufficientCredits,
    KeyLimitReached,
    LedgerFault,
    ModelNotAllowed,
    NotFound,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from proxy.ledger.batcher import BATCH_MAX, RESERVES_WAITING_MAX, Batcher
from proxy.ledger.decide import (
    Credit,
    CreditType,
    Expire,
    Fault,
    Faulted,
    Key,
    Operation,
    Outcome,
    Refusal,
    Refused,
    Released,
    Reserve,
    Reserved,
    Settled,
    State,
    User,
    Wallet,
    decide,
)
from proxy.ledger.ledger import CREDIT_WAIT_S_MAX, RESERVE_WAIT_S_MAX, Ledger
from proxy.ledger.store import StoreLostError, StoreRefusedError
from proxy.units import NANOS_PER_CREDIT
from tests.books import Person, release_of, reserve_of, settle_of

PERSON = Person(user_id="u", wallet_id="w", key_id="k", key="secret", email="u@example.com")
BALANCE = NANOS_PER_CREDIT


@pytest.fixture(autouse=True)
def logged():
    """What is logged, as entries."""
    with structlog.testing.capture_logs() as entries:
        yield entries


class LeapingLoop(asyncio.SelectorEventLoop):
    """A loop that never waits: when nothing is left to do now, its clock leaps to what comes next.

    When nothing would ever come, it fails at once instead of hanging.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._select = self._selector.select
        self._selector.select = self._leap

    def time(self) -> float:
        return self._now

    def _leap(self, timeout_s: float | None):
        events = self._select(0)
        if not events and timeout_s is None:
            raise RuntimeError("everything waits, and nothing will ever happen")
        if not events:
            self._now += timeout_s
        return events


def leaping(test):
    """Run an asynchronous test on a `LeapingLoop`."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        with asyncio.Runner(loop_factory=LeapingLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


async def at_rest() -> None:
    """Go on when everyone else waits for something: on a leaping loop the clock moves only then."""
    await asyncio.sleep(0.001)


def never(_operation: Operation) -> bool:
    return False


class ScriptedStore:
    """Decides in memory; can block, lose the connection before or after it commits, refuse and break."""

    def __init__(self) -> None:
        self.state = State(
            now=0,
            is_fenced=False,
            wallets={"w": Wallet(id="w", owner_id="u", balance=BALANCE)},
            users={"u": User(id="u", is_active=True, token_version=0)},
            keys={"k": Key(id="k", user_id="u", wallet_id="w", is_active=True)},
            reservations={},
            transactions={},
        )
        self.batches: list[list[Operation]] = []
        self.owners: list[str | None] = []
        self.losses: deque[str] = deque()
        self.refuses: Callable[[Operation], bool] = never
        self.breaks_at: Callable[[Operation], bool] = never
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.as_it_answers: Callable[[], object] = lambda: None
        self.is_closed = False

    @property
    def wallet(self) -> Wallet:
        return self.state.wallets["w"]

    async def transact(self, operations: Sequence[Operation], *, owner_id: str | None) -> list[Outcome]:
        self.batches.append(list(operations))
        self.owners.append(owner_id)
        await self.may_begin.wait()
        asyncio.get_running_loop().call_soon(self.as_it_answers)
        loss = self.losses.popleft() if self.losses else None
        if loss == "before commit":
            raise StoreLostError(loss)
        if any(map(self.refuses, operations)):
            raise StoreRefusedError("CHECK constraint failed")
        if any(map(self.breaks_at, operations)):
            raise ZeroDivisionError("a bug")
        _, outcomes = decide(self.state, operations)
        await self.may_answer.wait()
        if loss == "after commit":
            raise StoreLostError(loss)
        return outcomes

    async def aclose(self) -> None:
        self.is_closed = True


def opened(store) -> Ledger:
    ledger = Ledger(store, lambda: "instance")
    ledger.start()
    return ledger


def topup(amount: int, idempotency_key: str | None = None) -> Credit:
    return Credit(
        wallet_id="w", type=CreditType.TOPUP, amount=amount, description="test", idempotency_key=idempotency_key
    )


async def gathered(futures) -> list:
    return await asyncio.gather(*futures, return_exceptions=True)


# ---- batches


@leaping
async def test_a_lone_caller_is_written_at_once():
    """With nothing to wait for there is no timer: the clock has not moved when the answer is there."""
    store = ScriptedStore()
    ledger = opened(store)
    reserve = reserve_of(PERSON, 10)
    assert await ledger.reserve(reserve) == Reserved(10)
    assert (store.batches, store.owners) == ([[reserve]], ["instance"])
    assert asyncio.get_running_loop().time() == 0
    await ledger.aclose()


@leaping
async def test_what_waits_while_a_batch_is_written_becomes_the_next():
    """In the order of arrival, and no more than one transaction's worth at a time."""
    store = ScriptedStore()
    batcher = Batcher(store, lambda: "instance")
    batcher.start()
    store.may_begin.clear()
    first = batcher.submit(reserve_of(PERSON, 1))
    await at_rest()
    operations = [reserve_of(PERSON, 1) for _ in range(BATCH_MAX + 100)]
    futures = [batcher.submit(operation) for operation in operations]
    await at_rest()
    assert len(store.batches) == 1
    store.may_begin.set()
    assert await gathered([first, *futures]) == [Reserved(1)] * (BATCH_MAX + 101)
    assert store.batches[1:] == [operations[:BATCH_MAX], operations[BATCH_MAX:]]
    await batcher.aclose()


@leaping
async def test_the_owner_is_asked_for_at_each_batch():
    """After a new registration the next batch holds what it reserves on the new lease."""
    store = ScriptedStore()
    owner = "first"
    batcher = Batcher(store, lambda: owner)
    batcher.start()
    await batcher.submit(reserve_of(PERSON, 1))
    owner = "second"
    await batcher.submit(reserve_of(PERSON, 1))
    assert store.owners == ["first", "second"]
    await batcher.aclose()


@leaping
async def test_the_same_operation_twice_is_decided_once():
    """In one batch both are given its outcome, later it is a replay; either way it is booked once."""
    store = ScriptedStore()
    ledger = opened(store)
    reserve = reserve_of(PERSON, 10)
    assert await gathered([ledger.reserve(reserve), ledger.reserve(reserve)]) == [Reserved(10)] * 2
    assert store.batches == [[reserve]]
    assert await ledger.reserve(reserve) == Reserved(10, is_replay=True)
    settles = await gathered([ledger.settle(settle_of(reserve, 4)) for _ in range(3)])
    assert {outcome.is_replay for outcome in settles} == {False}
    keyed = await gathered([ledger.credit(topup(7, "once")) for _ in range(3)])
    assert {outcome.transaction.seq for outcome in keyed} == {2}
    assert (store.wallet.balance, store.wallet.reserved) == (BALANCE - 4 + 7, 0)
    await ledger.aclose()


@leaping
async def test_two_top_ups_alike_are_two():
    """Without an idempotency key the same amount again is meant, even by the same object."""
    store = ScriptedStore()
    ledger = opened(store)
    again = topup(7)
    outcomes = await gathered([ledger.credit(again), ledger.credit(again), ledger.credit(topup(7))])
    assert [outcome.is_replay for outcome in outcomes] == [False] * 3
    assert store.wallet.balance == BALANCE + 21
    await ledger.aclose()


# ---- a lost connection


def every_kind(reserve: Reserve) -> list[Operation]:
    return [topup(7), topup(7), topup(8, "once"), reserve_of(PERSON, 10), settle_of(reserve, 4)]


@pytest.mark.parametrize("losses", [["before commit"], ["after commit"], ["before commit", "after commit"] * 3])
@leaping
async def test_a_lost_connection_is_nobodys_failure(losses):
    """The same operations are sent until the database answers; all succeed, and each is booked once."""
    store = ScriptedStore()
    batcher = Batcher(store, lambda: "instance")
    batcher.start()
    reserve = reserve_of(PERSON, 10)
    await batcher.submit(reserve)
    store.losses.extend(losses)
    outcomes = await gathered([batcher.submit(operation) for operation in every_kind(reserve)])
    assert [type(outcome).__name__ for outcome in outcomes] == ["Credited"] * 3 + ["Reserved", "Settled"]
    assert (store.wallet.balance, store.wallet.reserved) == (BALANCE + 22 - 4, 10)
    sent = store.batches[1:]
    assert len(sent) == len(losses) + 1
    assert all(batch == sent[0] for batch in sent)
    await batcher.aclose()


@leaping
async def test_it_is_known_to_be_lost_until_it_answers(logged):
    """Health checks see a lost database, the log says it once, and the pauses between attempts grow to a second."""
    store = ScriptedStore()
    ledger = opened(store)
    store.losses.extend(["before commit"] * 7)
    waiting = asyncio.create_task(ledger.credit(topup(1)))
    await at_rest()
    assert ledger.is_lost
    await waiting
    assert not ledger.is_lost
    assert [entry["event"] for entry in logged] == ["ledger_lost"]
    assert asyncio.get_running_loop().time() == pytest.approx(0.05 + 0.1 + 0.2 + 0.5 + 1 + 1 + 1)
    await ledger.aclose()


@leaping
async def test_what_comes_while_it_is_lost_waits():
    """Those behind the lost batch are sent after it, and are answered too."""
    store = ScriptedStore()
    ledger = opened(store)
    store.losses.extend(["after commit"] * 3)
    first = asyncio.create_task(ledger.reserve(reserve_of(PERSON, 10)))
    await at_rest()
    second = asyncio.create_task(ledger.reserve(reserve_of(PERSON, 20)))
    assert await gathered([first, second]) == [Reserved(10, is_replay=True), Reserved(20)]
    assert [len(batch) for batch in store.batches] == [1, 1, 1, 1, 1]
    await ledger.aclose()


# ---- what cannot be booked


@pytest.mark.parametrize("where", [0, 37, 99])
@pytest.mark.parametrize("cause", ["refuses", "breaks_at"])
@leaping
async def test_a_poisoned_operation_fails_alone(cause, where, logged):
    """Of a hundred, ninety-nine are booked, whether the database refuses the one or a bug breaks on it."""
    store = ScriptedStore()
    ledger = opened(store)
    reserves = [reserve_of(PERSON, 1) for _ in range(100)]
    setattr(store, cause, lambda operation: operation.id == reserves[where].id)
    outcomes = await gathered(map(ledger.reserve, reserves))
    failed = outcomes.pop(where)
    assert isinstance(failed, LedgerFault)
    assert isinstance(failed.__cause__, StoreRefusedError | ZeroDivisionError)
    assert "CHECK" not in str(failed)
    assert outcomes == [Reserved(1)] * 99
    assert store.wallet.reserved == 99
    assert [entry["operation"] for entry in logged] == [repr(reserves[where])]
    assert await ledger.reserve(reserve_of(PERSON, 1)) == Reserved(1)
    await ledger.aclose()


@leaping
async def test_a_poisoned_operation_sent_twice_fails_twice():
    """Everyone who waits for it is told."""
    store = ScriptedStore()
    store.refuses = lambda operation: isinstance(operation, Reserve)
    ledger = opened(store)
    reserve = reserve_of(PERSON, 1)
    outcomes = await gathered([ledger.reserve(reserve), ledger.reserve(reserve)])
    assert [type(outcome) for outcome in outcomes] == [LedgerFault] * 2
    await ledger.aclose()


@pytest.mark.parametrize("kind", [Expire, Reserve])
@leaping
async def test_a_poisoned_operation_whose_caller_has_left_is_only_logged(kind, logged):
    """There is nobody to tell, and the next operation is booked."""
    store = ScriptedStore()
    store.refuses = lambda operation: isinstance(operation, kind)
    store.may_begin.clear()
    ledger = opened(store)
    asked = ledger.expire(Expire(id="?", wallet_id="w")) if kind is Expire else ledger.reserve(reserve_of(PERSON, 1))
    leaving = asyncio.create_task(asked)
    await at_rest()
    leaving.cancel()
    store.may_begin.set()
    assert (await ledger.credit(topup(7))).transaction.balance_after == BALANCE + 7
    assert [entry["event"] for entry in logged] == ["ledger_refused"]
    await ledger.aclose()


@leaping
async def test_a_batch_that_is_lost_and_then_refused_is_still_divided():
    """The poison is found after the connection is back, and in each half the lost are sent again."""
    store = ScriptedStore()
    ledger = opened(store)
    reserves = [reserve_of(PERSON, 1) for _ in range(8)]
    store.refuses = lambda operation: operation.id == reserves[3].id
    store.losses.extend(["before commit", "", "", "after commit", "before commit"])
    outcomes = await gathered(map(ledger.reserve, reserves))
    assert isinstance(outcomes.pop(3), LedgerFault)
    assert {outcome.amount for outcome in outcomes} == {1}
    assert store.wallet.reserved == 7
    await ledger.aclose()


# ---- callers that leave


@leaping
async def test_a_caller_that_leaves_before_anything_was_sent_asks_for_nothing():
    """Its reserve is dropped from the queue, and never reaches the database."""
    store = ScriptedStore()
    ledger = opened(store)
    store.may_begin.clear()
    first = asyncio.create_task(ledger.reserve(reserve_of(PERSON, 1)))
    await at_rest()
    second = asyncio.create_task(ledger.reserve(reserve_of(PERSON, 2)))
    await at_rest()
    second.cancel()
    await at_rest()
    store.may_begin.set()
    assert await first == Reserved(1)
    await ledger.aclose()
    assert second.cancelled()
    assert len(store.batches) == 1


@pytest.mark.parametrize("gate", ["may_begin", "may_answer"])
@leaping
async def test_a_caller_that_leaves_while_its_reserve_is_written_holds_nothing(gate):
    """What is granted to nobody is released, whether it left before the commit or after."""
    store = ScriptedStore()
    ledger = opened(store)
    getattr(store, gate).clear()
    reserve = reserve_of(PERSON, 10)
    leaving = asyncio.create_task(ledger.reserve(reserve))
    await at_rest()
    leaving.cancel()
    await at_rest()
    getattr(store, gate).set()
    await at_rest()
    assert leaving.cancelled()
    assert store.state.reservations[reserve.id].state == "released"
    assert store.wallet.reserved == 0
    await ledger.aclose()


async def cancelled_with_the_answer(ledger: Ledger, store: ScriptedStore, reserve: Reserve) -> asyncio.Task:
    """A caller of `reserve` that is cancelled when its answer is there and it has not run on yet."""
    leaving = asyncio.create_task(ledger.reserve(reserve))
    store.as_it_answers = leaving.cancel
    await gathered([leaving])
    store.as_it_answers = lambda: None
    return leaving


@leaping
async def test_a_caller_that_leaves_in_the_moment_of_the_answer_holds_nothing():
    """An answer that nobody saw is taken back, and the cancellation goes on."""
    store = ScriptedStore()
    ledger = opened(store)
    reserve = reserve_of(PERSON, 10)
    leaving = await cancelled_with_the_answer(ledger, store, reserve)
    await ledger.aclose()
    assert leaving.cancelled()
    assert store.state.reservations[reserve.id].state == "released"
    assert store.wallet.reserved == 0


@pytest.mark.parametrize("amount", [-1, 2 * BALANCE])
@leaping
async def test_a_failure_in_the_moment_of_leaving_does_not_stop_the_leaving(amount):
    """A cancelled caller stays cancelled, whatever its reserve would have been answered."""
    store = ScriptedStore()
    store.breaks_at = lambda operation: operation.at_least < 0
    ledger = opened(store)
    leaving = await cancelled_with_the_answer(ledger, store, reserve_of(PERSON, amount))
    await ledger.aclose()
    assert leaving.cancelled()
    assert len(store.batches) == 1


@leaping
async def test_each_end_of_a_call_is_answered():
    """Settle, release and expiry say what became of what was held."""
    ledger = opened(ScriptedStore())
    reserves = [reserve_of(PERSON, 10) for _ in range(3)]
    await gathered(map(ledger.reserve, reserves))
    assert await ledger.settle(settle_of(reserves[0], 4)) == Settled(charged=4, shortfall=0, balance=BALANCE - 4)
    assert await ledger.release(release_of(reserves[1])) == Released()
    assert await ledger.expire(Expire(id=reserves[2].id, wallet_id="w")) == Released()
    await ledger.aclose()


@leaping
async def test_ends_of_calls_do_not_depend_on_who_asked():
    """A settle, release, expiry or top-up is booked though its caller left while it was queued."""
    store = ScriptedStore()
    ledger = opened(store)
    reserves = [reserve_of(PERSON, 10) for _ in range(4)]
    await gathered(map(ledger.reserve, reserves))
    store.may_begin.clear()
    blocking = asyncio.create_task(ledger.settle(settle_of(reserves[0], 1)))
    await at_rest()
    leaving = [
        asyncio.create_task(ledger.settle(settle_of(reserves[1], 4))),
        asyncio.create_task(ledger.release(release_of(reserves[2]))),
        asyncio.create_task(ledger.expire(Expire(id=reserves[3].id, wallet_id="w"))),
        asyncio.create_task(ledger.credit(topup(100))),
    ]
    await at_rest()
    for task in leaving:
        task.cancel()
    store.may_begin.set()
    await blocking
    await ledger.aclose()
    assert [store.state.reservations[reserve.id].state for reserve in reserves] == [
        "settled",
        "settled",
        "released",
        "expired",
    ]
    assert (store.wallet.balance, store.wallet.reserved) == (BALANCE - 5 + 100, 0)


@leaping
async def test_a_call_is_in_flight_until_its_end_is_answered():
    """From before its reserve is sent, though nobody waits for its end any more."""
    store = ScriptedStore()
    ledger = opened(store)
    store.may_begin.clear()
    reserve = reserve_of(PERSON, 10)
    reserving = asyncio.create_task(ledger.reserve(reserve))
    await at_rest()
    assert ledger.is_in_flight(reserve.id)
    store.may_begin.set()
    await reserving
    assert ledger.is_in_flight(reserve.id)
    store.may_begin.clear()
    leaving = asyncio.create_task(ledger.settle(settle_of(reserve, 4)))
    await at_rest()
    leaving.cancel()
    await at_rest()
    assert leaving.cancelled()
    assert ledger.is_in_flight(reserve.id)
    store.may_begin.set()
    await ledger.aclose()
    await at_rest()
    assert store.wallet.balance == BALANCE - 4
    assert not ledger.is_in_flight(reserve.id)


@pytest.mark.parametrize("ending", ["refused", "broken", "given up", "cancelled", "too many"])
@leaping
async def test_a_call_that_holds_nothing_is_not_in_flight(ending):
    """Whatever came of its reserve, the ledger keeps no trace of it."""
    store = ScriptedStore()
    ledger = opened(store)
    reserve = reserve_of(PERSON, 2 * BALANCE if ending == "refused" else 10)
    if ending == "broken":
        store.breaks_at = lambda operation: isinstance(operation, Reserve)
    if ending in {"given up", "cancelled", "too many"}:
        store.may_begin.clear()
    blocking = []
    if ending == "too many":
        blocking = [asyncio.create_task(ledger.reserve(reserve_of(PERSON, 0)))]
        await at_rest()
        blocking += [asyncio.create_task(ledger.reserve(reserve_of(PERSON, 0))) for _ in range(RESERVES_WAITING_MAX)]
        await asyncio.sleep(0)
    reserving = asyncio.create_task(ledger.reserve(reserve))
    await asyncio.sleep(0)
    if ending == "cancelled":
        reserving.cancel()
    await gathered([reserving])
    assert not ledger.is_in_flight(reserve.id)
    store.may_begin.set()
    await gathered(blocking)
    await ledger.aclose()
    assert store.wallet.reserved == 0


# ---- load and time


@leaping
async def test_reserves_are_refused_for_load_and_ends_of_calls_never():
    """When too many reserves wait, one more is refused at once; whatever ends a call is always taken."""
    store = ScriptedStore()
    batcher = Batcher(store, lambda: "instance")
    batcher.start()
    held = reserve_of(PERSON, 10)
    await batcher.submit(held)
    store.may_begin.clear()
    first = batcher.submit(reserve_of(PERSON, 1))
    await at_rest()
    waiting = [batcher.submit(reserve_of(PERSON, 1)) for _ in range(RESERVES_WAITING_MAX)]
    with pytest.raises(Unavailable):
        batcher.submit(reserve_of(PERSON, 1))
    ending = batcher.submit(settle_of(held, 4))
    store.may_begin.set()
    assert isinstance(await ending, Settled)
    assert await gathered([first, *waiting]) == [Reserved(1)] * (RESERVES_WAITING_MAX + 1)
    assert await batcher.submit(reserve_of(PERSON, 1)) == Reserved(1)
    await batcher.aclose()


@pytest.mark.parametrize("is_first", [True, False])
@leaping
async def test_a_reserve_that_takes_too_long_is_refused_and_holds_nothing(is_first):
    """After five seconds the caller is told; if the database had it already, what it grants is released."""
    store = ScriptedStore()
    ledger = opened(store)
    store.may_begin.clear()
    if not is_first:
        blocking = asyncio.create_task(ledger.credit(topup(1)))
        await at_rest()
    began_at = asyncio.get_running_loop().time()
    with pytest.raises(Unavailable) as refusal:
        await ledger.reserve(reserve_of(PERSON, 10))
    assert asyncio.get_running_loop().time() - began_at == pytest.approx(RESERVE_WAIT_S_MAX)
    assert refusal.value.retry_after_s == 2
    store.may_begin.set()
    if not is_first:
        await blocking
    await ledger.aclose()
    assert (store.wallet.reserved, store.wallet.open_calls) == (0, 0)
    assert len(store.state.reservations) == is_first


@leaping
async def test_a_credit_whose_outcome_stays_unknown_can_be_sent_again():
    """After thirty seconds the caller is told to repeat its key; it was booked once."""
    store = ScriptedStore()
    ledger = opened(store)
    store.may_answer.clear()
    with pytest.raises(Unavailable):
        await ledger.credit(topup(7, "once"))
    assert asyncio.get_running_loop().time() == pytest.approx(CREDIT_WAIT_S_MAX)
    store.may_answer.set()
    assert (await ledger.credit(topup(7, "once"))).is_replay
    assert store.wallet.balance == BALANCE + 7
    await ledger.aclose()


@leaping
async def test_a_settle_waits_as_long_as_it_takes():
    """However long the database is away, whoever settles is not told of a failure."""
    store = ScriptedStore()
    ledger = opened(store)
    reserve = reserve_of(PERSON, 10)
    await ledger.reserve(reserve)
    store.losses.extend(["before commit"] * 600)
    assert (await ledger.settle(settle_of(reserve, 4))).charged == 4
    assert asyncio.get_running_loop().time() > 590
    await ledger.aclose()


@leaping
async def test_closing_books_what_is_queued():
    """Everything that was taken is written before the store is closed; new calls are refused from then on."""
    store = ScriptedStore()
    ledger = opened(store)
    reserves = [reserve_of(PERSON, 10) for _ in range(3)]
    await gathered(map(ledger.reserve, reserves))
    store.may_begin.clear()
    blocking = asyncio.create_task(ledger.settle(settle_of(reserves[0], 1)))
    await at_rest()
    queued = [asyncio.create_task(ledger.settle(settle_of(reserve, 4))) for reserve in reserves[1:]]
    await at_rest()
    closing = asyncio.create_task(ledger.aclose())
    await at_rest()
    with pytest.raises(Unavailable):
        await ledger.reserve(reserve_of(PERSON, 1))
    assert not store.is_closed
    store.may_begin.set()
    await closing
    assert [outcome.charged for outcome in await gathered([blocking, *queued])] == [1, 4, 4]
    assert store.is_closed
    assert store.wallet.balance == BALANCE - 9


@leaping
async def test_closing_does_not_wait_for_ever(logged):
    """What a lost database does not take in time is given up, loudly; its caller is told that it is out of reach."""
    store = ScriptedStore()
    ledger = opened(store)
    reserve = reserve_of(PERSON, 10)
    await ledger.reserve(reserve)
    store.losses.extend(["before commit"] * 1000)
    settle = asyncio.create_task(ledger.settle(settle_of(reserve, 1)))
    await at_rest()
    started_at = asyncio.get_running_loop().time()
    await ledger.aclose(wait_s=7)
    assert 7 <= asyncio.get_running_loop().time() - started_at < 10
    assert store.is_closed
    with pytest.raises(Unavailable):
        await settle
    assert "ledger_given_up" in [entry["event"] for entry in logged]


@leaping
async def test_closing_does_not_wait_for_callers_that_have_left(logged):
    """A reserve that nobody waits for holds no process back."""
    store = ScriptedStore()
    ledger = opened(store)
    store.losses.extend(["before commit"] * 1000)
    with pytest.raises(Unavailable):
        await ledger.reserve(reserve_of(PERSON, 10))
    started_at = asyncio.get_running_loop().time()
    await ledger.aclose()
    assert asyncio.get_running_loop().time() - started_at < 3


@leaping
async def test_a_ledger_that_never_worked_closes():
    """Closing what was not started only closes the store."""
    store = ScriptedStore()
    await Ledger(store).aclose()
    assert store.is_closed


# ---- what callers are told


class AnsweringStore:
    """Answers every operation with `outcome`."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    async def transact(self, operations: Sequence[Operation], *, owner_id: str | None) -> list[Outcome]:
        return [self.outcome] * len(operations)

    async def aclose(self) -> None:
        pass


REFUSALS = {
    Refusal.FENCED: (Unavailable, {}),
    Refusal.UNKNOWN_CALLER: (Unauthenticated, {}),
    Refusal.INACTIVE_USER: (Forbidden, {"code": "inactive_user"}),
    Refusal.INVALID_KEY: (Unauthenticated, {}),
    Refusal.STALE_TOKEN: (Unauthenticated, {}),
    Refusal.MODEL_NOT_ALLOWED: (ModelNotAllowed, {"code": "model_not_allowed", "allowed": ("p/m",)}),
    Refusal.REQUEST_RATE: (RateLimited, {"retry_after_s": 4}),
    Refusal.TOKEN_RATE: (RateLimited, {"retry_after_s": 4}),
    Refusal.CONCURRENCY: (RateLimited, {"retry_after_s": 4}),
    Refusal.KEY_LIMIT: (KeyLimitReached, {"required": 1, "available": 2}),
    Refusal.INSUFFICIENT_CREDITS: (
        InsufficientCredits,
        {"required": 1, "available": 2, "reserved": 3, "is_temporary": True},
    ),
}


@pytest.mark.parametrize("reason", Refusal)
@leaping
async def test_a_refusal_is_an_error_with_its_facts(reason):
    """Each refusal is told as its own error, with the amounts or the wait that the ledger found."""
    error, facts = REFUSALS[reason]
    outcome = Refused(
        reason=reason, required=1, available=2, reserved=3, is_temporary=True, retry_after_s=4, allowed=("p/m",)
    )
    ledger = opened(AnsweringStore(outcome))
    with pytest.raises(error) as raised:
        await ledger.reserve(reserve_of(PERSON, 1))
    assert {name: getattr(raised.value, name) for name in facts} == facts
    await ledger.aclose()


CREDIT_FAULTS = {
    Fault.UNKNOWN_WALLET: NotFound,
    Fault.UNKNOWN_RESERVATION: NotFound,
    Fault.OTHER_VALUES: Conflict,
    Fault.NOT_OPEN: LedgerFault,
    Fault.OUT_OF_RANGE: BadRequest,
    Fault.BELOW_RESERVED: BadRequest,
    Fault.ABOVE_CHARGE: BadRequest,
}


@pytest.mark.parametrize("fault", Fault)
@leaping
async def test_a_fault_is_the_callers_in_a_credit_and_ours_elsewhere(fault):
    """Whoever books by hand is told what was wrong with it; for a call any fault is a bug."""
    ledger = opened(AnsweringStore(Faulted(fault)))
    with pytest.raises(CREDIT_FAULTS[fault]):
        await ledger.credit(topup(1))
    reserve = reserve_of(PERSON, 1)
    for ending in (
        ledger.reserve(reserve),
        ledger.settle(settle_of(reserve, 1)),
        ledger.release(release_of(reserve)),
        ledger.expire(Expire(id=reserve.id, wallet_id="w")),
    ):
        with pytest.raises(LedgerFault, match=fault):
            await ending
    await ledger.aclose()


@leaping
async def test_an_outcome_of_another_operation_is_a_fault():
    """An answer that cannot be is not taken for a success."""
    ledger = opened(AnsweringStore(Released()))
    for operation in (ledger.credit(topup(1)), ledger.reserve(reserve_of(PERSON, 1))):
        with pytest.raises(LedgerFault):
            await operation
    await ledger.aclose()
