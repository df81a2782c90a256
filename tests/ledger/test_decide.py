"""Tables of events and outcomes: what `decide` answers, and what it leaves behind."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.ledger.decide import (
    WINDOW,
    Changes,
    Credit,
    Credited,
    CreditType,
    Expire,
    Fault,
    Faulted,
    Key,
    Operation,
    Outcome,
    Receipt,
    Refusal,
    Refused,
    Release,
    Released,
    Reservation,
    Reserve,
    Reserved,
    Settle,
    Settled,
    State,
    Transaction,
    User,
    Wallet,
    allows,
    decide,
    period_start,
)
from proxy.units import MICROS_PER_DAY, MICROS_PER_SECOND, NANOS_MAX


def at(text: str) -> int:
    """An instant of UTC in microseconds."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * MICROS_PER_SECOND


NOW = at("2026-11-23T10:30:45")
MINUTE = at("2026-11-23T10:30:00")
TODAY = at("2026-11-23")
THIS_MONTH = at("2026-11-01")
TO_THE_NEXT_MINUTE_S = 15
RECEIPT = Receipt(outcome="completed")


def state_of(
    *,
    now: int = NOW,
    is_fenced: bool = False,
    wallet: dict | None = None,
    user: dict | None = None,
    key: dict | None = None,
) -> State:
    """User `u` with key `k` and 100 in wallet `w`, but for what is said otherwise."""
    return State(
        now=now,
        is_fenced=is_fenced,
        wallets={"w": Wallet(**{"id": "w", "owner_id": "u", "balance": 100, **(wallet or {})})},
        users={"u": User(**{"id": "u", "is_active": True, "token_version": 3, **(user or {})})},
        keys={"k": Key(**{"id": "k", "user_id": "u", "wallet_id": "w", "is_active": True, **(key or {})})},
        reservations={},
        transactions={},
    )


def reserve(request_id: str, at_least: int, at_most: int | None = None, **more: object) -> Reserve:
    """A reserve of exactly `at_least` unless `at_most` is given, for one token of `fake/model`."""
    values = {
        "id": request_id,
        "wallet_id": "w",
        "user_id": "u",
        "key_id": "k",
        "at_least": at_least,
        "at_most": at_least if at_most is None else at_most,
        "window_tokens": 1,
        "models": ("fake/model",),
        "original_model": "model",
        "is_stream": False,
    }
    return Reserve(**{**values, **more})


def settle(request_id: str, cost: int, *, tokens: int = 1, wallet_id: str = "w") -> Settle:
    return Settle(id=request_id, wallet_id=wallet_id, cost=cost, tokens=tokens, receipt=RECEIPT)


def release(request_id: str, *, wallet_id: str = "w") -> Release:
    return Release(id=request_id, wallet_id=wallet_id, receipt=RECEIPT)


def undelivered(request_id: str) -> Release:
    return Release(id=request_id, wallet_id="w", receipt=RECEIPT, is_undelivered=True)


def expire(request_id: str, *, wallet_id: str = "w") -> Expire:
    return Expire(id=request_id, wallet_id=wallet_id)


def credit(type_: CreditType, amount: int | None, **more: object) -> Credit:
    return Credit(**{"wallet_id": "w", "type": type_, "amount": amount, "description": "by hand", **more})


def topup(amount: int | None, **more: object) -> Credit:
    return credit(CreditType.TOPUP, amount, **more)


def adjustment(amount: int, **more: object) -> Credit:
    return credit(CreditType.ADJUSTMENT, amount, **more)


def refund(amount: int | None, request_id: str | None, **more: object) -> Credit:
    return credit(CreditType.REFUND, amount, reservation_id=request_id, **more)


def happens(state: State, operations: Sequence[Operation]) -> list[Outcome]:
    """The outcomes of `operations`, a transaction each."""
    return [decide(state, [operation])[1][0] for operation in operations]


def settled(charged: int, balance: int, *, shortfall: int = 0, is_late: bool = False, is_replay: bool = False):
    return Settled(charged=charged, shortfall=shortfall, balance=balance, is_late=is_late, is_replay=is_replay)


# ---- who may


def invalid(reason: Refusal) -> Refused:
    return Refused(reason=reason)


@pytest.mark.parametrize(
    ("conditions", "asked", "refused"),
    [
        ({"is_fenced": True}, {}, invalid(Refusal.FENCED)),
        ({}, {"wallet_id": "?"}, invalid(Refusal.UNKNOWN_CALLER)),
        ({}, {"user_id": "?"}, invalid(Refusal.UNKNOWN_CALLER)),
        ({"user": {"is_active": False}}, {}, invalid(Refusal.INACTIVE_USER)),
        ({}, {"token_version": 2}, invalid(Refusal.STALE_TOKEN)),
        ({}, {"key_id": "?"}, invalid(Refusal.INVALID_KEY)),
        ({"key": {"is_active": False}}, {}, invalid(Refusal.INVALID_KEY)),
        ({"key": {"expires_at": NOW}}, {}, invalid(Refusal.INVALID_KEY)),
        ({"key": {"user_id": "other"}}, {}, invalid(Refusal.INVALID_KEY)),
        ({"key": {"wallet_id": "other"}}, {}, invalid(Refusal.INVALID_KEY)),
        ({"user": {"allowed_models": []}}, {}, invalid(Refusal.MODEL_NOT_ALLOWED)),
        ({"key": {"allowed_models": ["other"]}}, {}, invalid(Refusal.MODEL_NOT_ALLOWED)),
    ],
)
def test_who_may_not_reserve(conditions, asked, refused):
    """A reserve is refused for what is wrong with its caller, and nothing is written."""
    assert decide(state_of(**conditions), [reserve("a", 10, **asked)]) == (Changes(), [refused])


@pytest.mark.parametrize(
    ("conditions", "asked"),
    [
        ({}, {}),
        ({}, {"token_version": 3}),
        ({}, {"key_id": None}),
        ({"key": {"is_active": False}}, {"key_id": None}),
        ({"key": {"expires_at": NOW + 1}}, {}),
    ],
)
def test_who_may_reserve(conditions, asked):
    """A current token, no key at all, and a key up to the microsecond of its expiry open the door."""
    assert happens(state_of(**conditions), [reserve("a", 10, **asked)]) == [Reserved(10)]


@pytest.mark.parametrize(
    ("patterns", "model", "is_allowed"),
    [
        (None, "openai/gpt-5", True),
        ([], "openai/gpt-5", False),
        (["gpt-5"], "openai/gpt-5", True),
        (["gpt-4", "gpt-5"], "openai/gpt-5", True),
        (["openai/gpt-5"], "openai/gpt-5", True),
        (["azure/gpt-5"], "openai/gpt-5", False),
        (["gpt-*"], "openai/gpt-5", True),
        (["openai/*"], "openai/gpt-5", True),
        (["*/gpt-5"], "openai/gpt-5", True),
        (["*"], "openai/gpt-5", True),
        (["GPT-5"], "openai/gpt-5", False),
        (["gpt-5"], "openai/gpt-5-mini", False),
        (["meta/llama"], "openrouter/meta/llama", True),
    ],
)
def test_patterns_of_models(patterns, model, is_allowed):
    """A pattern matches the whole name with or without its provider; none allow all, an empty list nothing."""
    assert allows(patterns, model) is is_allowed


@pytest.mark.parametrize(
    ("of_user", "of_key", "models", "allowed"),
    [
        (["a*"], ["*b"], ("p/ab",), ("p/ab",)),
        (["a*"], ["*b"], ("p/ac",), ()),
        (["a*"], ["*b"], ("p/cb",), ()),
        (["p/*"], None, ("p/a", "q/a"), ("p/a",)),
        (["p/*", "q/*"], ["a"], ("p/b", "q/a", "p/a", "r/a"), ("q/a", "p/a")),
        (["a"], None, ("p/a", "q/a"), ("p/a", "q/a")),
    ],
)
def test_user_and_key_must_both_allow_every_candidate(of_user, of_key, models, allowed):
    """What may serve a call is all of it allowed, by the user and by the key, or the refusal says what of it is."""
    state = state_of(user={"allowed_models": of_user}, key={"allowed_models": of_key})
    refused = Refused(reason=Refusal.MODEL_NOT_ALLOWED, allowed=allowed)
    outcome = Reserved(10) if allowed == models else refused
    assert happens(state, [reserve("a", 10, models=models)]) == [outcome]


# ---- how often and how much


def at_limit(limit: str, counter: str, holder: str, *, stands_at: int) -> dict:
    """Conditions under which `counter` of the wallet (whose user has the limit) or key stands where it is told."""
    limited, counted = ("user", "wallet") if holder == "wallet" else ("key", "key")
    conditions = {limited: {limit: 5}, counted: {}}
    conditions[counted] |= {limit: 5} if holder == "key" else {}
    conditions[counted] |= {counter: stands_at, "window_start": MINUTE}
    return conditions


@pytest.mark.parametrize("holder", ["wallet", "key"])
@pytest.mark.parametrize(
    ("limit", "counter", "refused"),
    [
        ("concurrent_calls_max", "open_calls", Refused(reason=Refusal.CONCURRENCY, retry_after_s=1)),
        (
            "requests_per_minute",
            "window_requests",
            Refused(reason=Refusal.REQUEST_RATE, retry_after_s=TO_THE_NEXT_MINUTE_S),
        ),
        ("tokens_per_minute", "window_tokens", Refused(reason=Refusal.TOKEN_RATE, retry_after_s=TO_THE_NEXT_MINUTE_S)),
    ],
)
def test_limits_hold_to_the_last_one(holder, limit, counter, refused):
    """The fifth of five is served, the sixth refused with how long to wait; and nothing is written for it."""
    state = state_of(**at_limit(limit, counter, holder, stands_at=4))
    assert happens(state, [reserve("a", 1), reserve("b", 1)]) == [Reserved(1), refused]
    assert decide(state, [reserve("c", 1)]) == (Changes(), [refused])


@pytest.mark.parametrize("holder", ["wallet", "key"])
@pytest.mark.parametrize(
    ("limit", "counter", "is_served"),
    [
        ("concurrent_calls_max", "open_calls", False),
        ("requests_per_minute", "window_requests", True),
        ("tokens_per_minute", "window_tokens", True),
    ],
)
def test_a_new_minute_forgets_rates_and_no_open_call(holder, limit, counter, is_served):
    """Requests and tokens are counted by the clock minute, calls for as long as they are open."""
    conditions = at_limit(limit, counter, holder, stands_at=5)
    state = state_of(now=NOW + WINDOW, **conditions)
    assert isinstance(happens(state, [reserve("a", 1)])[0], Reserved) is is_served


def test_the_wait_is_rounded_up():
    """In the first microsecond of a minute the wait is all of it, in the last a second."""
    waits = [
        happens(state_of(now=now, user={"requests_per_minute": 0}), [reserve("a", 1)])[0].retry_after_s
        for now in (MINUTE, MINUTE + 1, MINUTE + WINDOW - 1)
    ]
    assert waits == [60, 60, 1]


@pytest.mark.parametrize(
    ("wallet", "required", "refused"),
    [
        ({"balance": 9}, 10, {"available": 9}),
        ({"balance": 0}, 10, {"available": 0}),
        ({"balance": 30, "reserved": 25}, 10, {"available": 5, "reserved": 25, "is_temporary": True}),
        ({"balance": 9, "reserved": 5}, 10, {"available": 4, "reserved": 5}),
        ({"balance": 30, "owed": 25}, 10, {"available": 5}),
        ({"balance": 30, "reserved": 10, "owed": 25}, 10, {"available": 0, "reserved": 10}),
        ({"balance": 30, "reserved": 10, "owed": 20}, 10, {"available": 0, "reserved": 10, "is_temporary": True}),
    ],
)
def test_a_wallet_that_does_not_cover_the_least(wallet, required, refused):
    """What is reserved or owed is not available; only where open calls alone stand in the way does it say so."""
    expected = Refused(reason=Refusal.INSUFFICIENT_CREDITS, required=required, **refused)
    assert decide(state_of(wallet=wallet), [reserve("a", required)]) == (Changes(), [expected])


@pytest.mark.parametrize(
    ("key", "available"),
    [
        ({"limit_amount": 50, "spent": 41}, 9),
        ({"limit_amount": 50, "spent": 30, "reserved": 11}, 9),
        ({"limit_amount": 50, "spent": 60}, 0),
        ({"limit_amount": 50, "limit_period": "day", "period_start": TODAY, "period_spent": 41}, 9),
        ({"limit_amount": 50, "limit_period": "month", "period_start": THIS_MONTH, "period_spent": 50}, 0),
        ({"limit_amount": 50, "limit_period": "day", "period_start": TODAY - 1, "reserved": 45}, 5),
        ({"limit_amount": 0}, 0),
    ],
)
def test_a_key_that_may_not_spend_the_least(key, available):
    """A key's limit counts what it spent, in its period if it has one, and what its open calls hold."""
    expected = Refused(reason=Refusal.KEY_LIMIT, required=10, available=available, reserved=key.get("reserved", 0))
    assert decide(state_of(key=key), [reserve("a", 10)]) == (Changes(), [expected])


@pytest.mark.parametrize(
    "key",
    [
        {"limit_amount": 50, "spent": 40},
        {"limit_amount": 50, "limit_period": "day", "period_start": TODAY, "period_spent": 40, "spent": 10**6},
        {"limit_amount": 50, "limit_period": "day", "period_start": TODAY - MICROS_PER_DAY, "period_spent": 50},
        {"limit_amount": 50, "limit_period": "month", "period_start": at("2026-10-01"), "period_spent": 50},
        {"spent": 10**6},
    ],
)
def test_a_key_that_may_spend_the_least(key):
    """A limit is kept to the last nano; a new day or month forgets the last one's spending."""
    assert happens(state_of(key=key), [reserve("a", 10)]) == [Reserved(10)]


@pytest.mark.parametrize(
    ("now", "period", "start"),
    [
        ("2026-11-23T10:30:45", None, None),
        ("2026-11-23T00:00:00", "day", "2026-11-23"),
        ("2026-11-23T23:59:59", "day", "2026-11-23"),
        ("2026-11-30T23:59:59", "month", "2026-11-01"),
        ("2026-12-01T00:00:00", "month", "2026-12-01"),
        ("2027-01-01T00:00:00", "month", "2027-01-01"),
        ("2028-02-29T12:00:00", "month", "2028-02-01"),
        ("2028-02-29T12:00:00", "day", "2028-02-29"),
        ("2028-03-01T00:00:00", "day", "2028-03-01"),
    ],
)
def test_periods_are_those_of_utc(now, period, start):
    """Days begin at midnight and months with their first day, UTC, to the microsecond; without a period at zero."""
    assert period_start(at(now) + 999_999, period) == (0 if start is None else at(start))


LADDER = [
    (Refusal.FENCED, {"is_fenced": True}),
    (Refusal.UNKNOWN_CALLER, {"is_unknown": True}),
    (Refusal.INACTIVE_USER, {"user": {"is_active": False}}),
    (Refusal.STALE_TOKEN, {"user": {"token_version": 9}}),
    (Refusal.INVALID_KEY, {"key": {"is_active": False}}),
    (Refusal.MODEL_NOT_ALLOWED, {"key": {"allowed_models": []}}),
    (Refusal.CONCURRENCY, {"user": {"concurrent_calls_max": 0}}),
    (Refusal.REQUEST_RATE, {"user": {"requests_per_minute": 0}}),
    (Refusal.TOKEN_RATE, {"user": {"tokens_per_minute": 0}}),
    (Refusal.CONCURRENCY, {"key": {"concurrent_calls_max": 0}}),
    (Refusal.REQUEST_RATE, {"key": {"requests_per_minute": 0}}),
    (Refusal.TOKEN_RATE, {"key": {"tokens_per_minute": 0}}),
    (Refusal.INSUFFICIENT_CREDITS, {"wallet": {"balance": 0}}),
    (Refusal.KEY_LIMIT, {"key": {"limit_amount": 0}}),
]


@pytest.mark.parametrize("rung", range(len(LADDER)))
def test_the_first_rung_that_fails_is_the_answer(rung):
    """Whatever else is wrong behind it, a reserve is refused for the first reason of the ladder."""
    conditions = {"user": {}, "key": {}, "wallet": {}}
    for _, wrong in LADDER[rung:]:
        for name, value in wrong.items():
            conditions[name] = conditions[name] | value if isinstance(value, dict) else value
    is_unknown = conditions.pop("is_unknown", False)
    outcome = happens(state_of(**conditions), [reserve("a", 1, user_id="?" if is_unknown else "u", token_version=3)])[0]
    assert outcome.reason == LADDER[rung][0]


# ---- how much is held


@pytest.mark.parametrize(
    ("balance", "at_least", "at_most", "limit", "held"),
    [
        (1000, 10, 200, None, 200),  # all that was asked, within a quarter
        (1000, 10, 900, None, 250),  # a quarter of what there is
        (100, 60, 900, None, 60),  # the least, where that is more than a quarter
        (100, 100, 900, None, 100),
        (100, 10, 10, None, 10),
        (1000, 10, 900, 400, 100),  # a quarter of what the key may still spend
        (400, 10, 900, 1000, 100),
        (3, 0, 9, None, 0),  # a quarter rounds down
        (0, 0, 9, None, 0),
    ],
)
def test_what_is_held_of_a_range(balance, at_least, at_most, limit, held):
    """Between the least and the most, a quarter of what wallet and key leave: one call never takes it all unasked."""
    state = state_of(wallet={"balance": balance}, key={"limit_amount": limit})
    assert happens(state, [reserve("a", at_least, at_most)]) == [Reserved(held)]
    assert state.wallets["w"].reserved == state.keys["k"].reserved == held


def test_greedy_in_arrival_order():
    """Of 100 available, 60, 50, 30 and 10 accepts 60, 30 and 10: who does not fit stands in nobody's way."""
    state = state_of()
    operations = [reserve(name, amount) for name, amount in [("a", 60), ("b", 50), ("c", 30), ("d", 10)]]
    _, outcomes = decide(state, operations)
    refused = Refused(reason=Refusal.INSUFFICIENT_CREDITS, required=50, available=40, reserved=60, is_temporary=True)
    assert outcomes == [Reserved(60), refused, Reserved(30), Reserved(10)]
    assert state.wallets["w"].available == 0


def test_settles_come_before_reserves():
    """What a settle, release, expiry or top-up of the same batch frees is there for its reserves."""
    state = state_of()
    decide(state, [reserve(name, 25) for name in "abcd"])
    operations = [reserve("e", 130), settle("a", 5), release("b"), expire("c"), topup(20)]
    _, outcomes = decide(state, operations)
    refused = Refused(reason=Refusal.INSUFFICIENT_CREDITS, required=130, available=90, reserved=25, is_temporary=False)
    assert outcomes[:4] == [refused, settled(5, 95), Released(), Released()]
    assert happens(state, [reserve("f", 90)]) == [Reserved(90)]


def test_the_end_of_a_call_waits_for_its_own_beginning():
    """Reserve and end of one call in one batch are decided in their order, and the batch holds both rows."""
    state = state_of()
    changes, outcomes = decide(state, [reserve("a", 60), settle("a", 40), reserve("b", 60), release("b")])
    assert outcomes == [Reserved(60), settled(40, 60), Reserved(60), Released()]
    assert [reservation.state for reservation, _ in changes.closed.values()] == ["settled", "released"]
    assert set(changes.reserved) == {"a", "b"}
    assert state.wallets["w"].reserved == 0


# ---- how a call ends


class Ending(NamedTuple):
    """A call that holds 60 of 100, what becomes of it, and what is left in balance and reserve."""

    events: list[Operation]
    outcomes: list[Outcome]
    balance: int
    reserved: int = 0
    wallet: dict = {}  # noqa: RUF012 - never changed
    key: dict = {}  # noqa: RUF012 - never changed


ENDINGS = {
    "under": Ending([settle("a", 25)], [settled(25, 75)], 75),
    "nothing used": Ending([settle("a", 0)], [settled(0, 100)], 100),
    "at": Ending([settle("a", 60)], [settled(60, 40)], 40),
    "over, and the wallet bears it": Ending([settle("a", 90)], [settled(90, 10)], 10),
    "over, to the last": Ending([settle("a", 100)], [settled(100, 0)], 0),
    "over, and the wallet does not": Ending([settle("a", 130)], [settled(100, 0, shortfall=30)], 0),
    "over, beside another call": Ending(
        [reserve("b", 30), settle("a", 130)], [Reserved(30), settled(70, 30, shortfall=60)], 30, 30
    ),
    "over what is owed": Ending([settle("a", 130)], [settled(70, 30, shortfall=60)], 30, wallet={"owed": 30}),
    "more is owed than is there": Ending([settle("a", 130)], [settled(60, 40, shortfall=70)], 40, wallet={"owed": 40}),
    "over the key's limit": Ending([settle("a", 90)], [settled(70, 30, shortfall=20)], 30, key={"limit_amount": 70}),
    "over the key's period's limit": Ending(
        [settle("a", 90)],
        [settled(65, 35, shortfall=25)],
        35,
        key={"limit_amount": 70, "limit_period": "day", "period_start": TODAY, "period_spent": 5},
    ),
    "settled again": Ending([settle("a", 25)] * 2, [settled(25, 75), settled(25, 75, is_replay=True)], 75),
    "settled again with its shortfall": Ending(
        [settle("a", 130)] * 2, [settled(100, 0, shortfall=30), settled(100, 0, shortfall=30, is_replay=True)], 0
    ),
    "settled at another cost": Ending(
        [settle("a", 25), settle("a", 26)], [settled(25, 75), Faulted(Fault.OTHER_VALUES)], 75
    ),
    "released": Ending([release("a")], [Released()], 100),
    "released again": Ending([release("a")] * 2, [Released(), Released(is_replay=True)], 100),
    "released, then settled": Ending([release("a"), settle("a", 9)], [Released(), Faulted(Fault.NOT_OPEN)], 100),
    "settled, then released": Ending([settle("a", 9), release("a")], [settled(9, 91), Faulted(Fault.NOT_OPEN)], 91),
    "expired": Ending([expire("a")], [Released()], 100),
    "expired again": Ending([expire("a")] * 2, [Released(), Released(is_replay=True)], 100),
    "settled, then expired": Ending([settle("a", 9), expire("a")], [settled(9, 91), Released(is_replay=True)], 91),
    "expired, then released": Ending([expire("a"), release("a")], [Released(), Released(is_replay=True)], 100),
    "released, then expired": Ending([release("a"), expire("a")], [Released(), Released(is_replay=True)], 100),
    "late": Ending([expire("a"), settle("a", 25)], [Released(), settled(25, 75, is_late=True)], 75),
    "late twice": Ending(
        [expire("a"), settle("a", 25), settle("a", 25)],
        [Released(), settled(25, 75, is_late=True), settled(25, 75, is_late=True, is_replay=True)],
        75,
    ),
    "late at another cost": Ending(
        [expire("a"), settle("a", 25), settle("a", 24)],
        [Released(), settled(25, 75, is_late=True), Faulted(Fault.OTHER_VALUES)],
        75,
    ),
    "late, and others hold the rest": Ending(
        [expire("a"), reserve("b", 80), settle("a", 60)],
        [Released(), Reserved(80), settled(20, 80, shortfall=40, is_late=True)],
        80,
        80,
    ),
    "late, over the key's limit": Ending(
        [expire("a"), reserve("b", 40), settle("a", 60)],
        [Released(), Reserved(40), settled(30, 70, shortfall=30, is_late=True)],
        70,
        40,
        key={"limit_amount": 70},
    ),
    "expired again after a late settle": Ending(
        [expire("a"), settle("a", 25), expire("a")],
        [Released(), settled(25, 75, is_late=True), Released(is_replay=True)],
        75,
    ),
    "undelivered while open": Ending([undelivered("a")], [Released()], 100),
    "undelivered after the charge": Ending([settle("a", 25), undelivered("a")], [settled(25, 75), Released(25)], 100),
    "undelivered twice": Ending(
        [settle("a", 25), undelivered("a"), undelivered("a")],
        [settled(25, 75), Released(25), Released(25, is_replay=True)],
        100,
    ),
    "undelivered, nothing charged": Ending(
        [settle("a", 0), undelivered("a"), undelivered("a")], [settled(0, 100), Released(0), Released(0)], 100
    ),
    "undelivered, with a shortfall": Ending(
        [settle("a", 130), undelivered("a")], [settled(100, 0, shortfall=30), Released(100)], 100
    ),
    "undelivered after expiry": Ending([expire("a"), undelivered("a")], [Released(), Released(is_replay=True)], 100),
    "undelivered after a late settle": Ending(
        [expire("a"), settle("a", 25), undelivered("a")],
        [Released(), settled(25, 75, is_late=True), Released(25)],
        100,
    ),
    "settle replayed after the refund": Ending(
        [settle("a", 25), undelivered("a"), settle("a", 25)],
        [settled(25, 75), Released(25), settled(25, 100, is_replay=True)],
        100,
    ),
    "settle of an unknown call": Ending([settle("?", 9)], [Faulted(Fault.UNKNOWN_RESERVATION)], 100, 60),
    "release of an unknown call": Ending([release("?")], [Faulted(Fault.UNKNOWN_RESERVATION)], 100, 60),
    "expiry of an unknown call": Ending([expire("?")], [Faulted(Fault.UNKNOWN_RESERVATION)], 100, 60),
    "other wallet": Ending(
        [settle("a", 9, wallet_id="v"), release("a", wallet_id="v"), expire("a", wallet_id="v")],
        [Faulted(Fault.UNKNOWN_RESERVATION)] * 3,
        100,
        60,
    ),
    "unknown wallet": Ending(
        [settle("a", 9, wallet_id="?"), release("a", wallet_id="?"), expire("a", wallet_id="?")],
        [Faulted(Fault.UNKNOWN_RESERVATION)] * 3,
        100,
        60,
    ),
    "reserved again": Ending([reserve("a", 60)], [Reserved(60, is_replay=True)], 100, 60),
    "reserved again, a range around it": Ending([reserve("a", 10, 80)], [Reserved(60, is_replay=True)], 100, 60),
    "reserved again for more": Ending([reserve("a", 61)], [Faulted(Fault.OTHER_VALUES)], 100, 60),
    "reserved again for less": Ending([reserve("a", 59)], [Faulted(Fault.OTHER_VALUES)], 100, 60),
    "reserved again by another user": Ending([reserve("a", 60, user_id="v")], [Faulted(Fault.OTHER_VALUES)], 100, 60),
    "reserved again without its key": Ending([reserve("a", 60, key_id=None)], [Faulted(Fault.OTHER_VALUES)], 100, 60),
    "reserved again from another wallet": Ending(
        [reserve("a", 60, wallet_id="v")], [Faulted(Fault.OTHER_VALUES)], 100, 60
    ),
    "reserved again after its end": Ending(
        [settle("a", 25), reserve("a", 60)], [settled(25, 75), Faulted(Fault.NOT_OPEN)], 75
    ),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_how_a_call_ends(ending):
    """A call charges once, at most what wallet and key bear, frees what it held, and replays change nothing."""
    state = state_of(wallet=ending.wallet, key=ending.key)
    state.wallets["v"] = Wallet(id="v", owner_id="v", balance=100)
    assert happens(state, [reserve("a", 60)]) == [Reserved(60)]
    assert happens(state, ending.events) == ending.outcomes
    assert (state.wallets["w"].balance, state.wallets["w"].reserved) == (ending.balance, ending.reserved)
    assert state.keys["k"].reserved == ending.reserved
    assert state.wallets["w"].open_calls == state.keys["k"].open_calls == (1 if ending.reserved else 0)
    assert state.wallets["v"] == Wallet(id="v", owner_id="v", balance=100)


def test_a_reserve_is_answered_again_even_when_fenced_or_inactive():
    """A replay asks nothing anew: what is held is held."""
    state = state_of()
    happens(state, [reserve("a", 60)])
    state.is_fenced, state.users["u"].is_active = True, False
    assert happens(state, [reserve("a", 60), settle("a", 25)]) == [Reserved(60, is_replay=True), settled(25, 75)]


def test_a_fenced_instance_ends_its_calls():
    """The fence is before reserves alone."""
    state = state_of()
    happens(state, [reserve(name, 10) for name in "abc"])
    state.is_fenced = True
    assert happens(state, [settle("a", 5), release("b"), expire("c"), topup(1)])[:3] == [
        settled(5, 95),
        Released(),
        Released(),
    ]


@pytest.mark.parametrize("key_id", [None, "gone"])
def test_a_call_without_a_key_touches_none(key_id):
    """A call by token, or by a key that has been removed since, ends with its wallet alone."""
    state = state_of(wallet={"reserved": 60, "open_calls": 1})
    state.reservations["a"] = Reservation(
        id="a",
        wallet_id="w",
        user_id="u",
        key_id=key_id,
        amount=60,
        state="open",
        window_tokens=1,
        original_model="model",
        created_at=NOW,
    )
    changes, outcomes = decide(state, [settle("a", 25)])
    assert (outcomes, changes.keys) == ([settled(25, 75)], {})


def test_what_is_written_of_a_settle():
    """The reservation, its receipt, one deduction that names it, the wallet and the key: whole rows, once each."""
    state = state_of()
    happens(state, [reserve("a", 60)])
    changes, _ = decide(state, [settle("a", 130, tokens=7)])
    assert changes.closed == {"a": (state.reservations["a"], RECEIPT)}
    assert state.reservations["a"] == Reservation(
        id="a",
        wallet_id="w",
        user_id="u",
        key_id="k",
        amount=60,
        state="settled",
        window_tokens=1,
        original_model="model",
        created_at=NOW,
        cost=130,
        charged=100,
        shortfall=30,
        is_late=False,
        settled_at=NOW,
    )
    assert changes.transactions == [
        Transaction(
            wallet_id="w",
            user_id="u",
            seq=1,
            type="deduction",
            amount=-100,
            description="model",
            balance_before=100,
            balance_after=0,
            reservation_id="a",
            idempotency_key=None,
            created_at=NOW,
        )
    ]
    assert (changes.wallets, changes.keys) == (state.wallets, state.keys)
    assert (state.keys["k"].spent, state.keys["k"].period_spent) == (100, 100)
    assert (changes.reserved, changes.refunded) == ({}, {})


def test_what_is_written_of_an_undelivered_charge():
    """A refund that names its call, and how much of the charge went back; the key's spending stays as it was."""
    state = state_of()
    happens(state, [reserve("a", 60), settle("a", 25), refund(5, "a")])
    changes, outcomes = decide(state, [undelivered("a")])
    assert outcomes == [Released(25)]
    assert [(row.type, row.amount, row.reservation_id) for row in changes.transactions] == [("refund", 20, "a")]
    assert (changes.refunded["a"].refunded, changes.closed, state.keys["k"].spent) == (25, {}, 25)


def test_an_expiry_says_so():
    """The sweeper has no receipt: the outcome on record is that nobody came back."""
    state = state_of()
    happens(state, [reserve("a", 60)])
    changes, _ = decide(state, [expire("a")])
    assert changes.closed == {"a": (state.reservations["a"], Receipt(outcome="expired"))}


# ---- the window


@pytest.mark.parametrize(
    ("ends_after", "ending", "wallet_tokens"),
    [
        (0, settle("a", 1, tokens=70), 70),  # less than reserved for: the rest is given back
        (0, settle("a", 1, tokens=130), 130),
        (0, release("a"), 0),
        (0, expire("a"), 100),
        (WINDOW, settle("a", 1, tokens=70), 0),  # the minute it counted in is over
        (WINDOW, settle("a", 1, tokens=130), 30),  # what it used beyond counts now
        (WINDOW, release("a"), 0),
    ],
)
def test_the_window_is_corrected_by_what_was_used(ends_after, ending, wallet_tokens):
    """Tokens a minute count what was used, in the minute of the reserve; later only what went beyond it."""
    state = state_of()
    happens(state, [reserve("a", 10, window_tokens=100)])
    assert (state.wallets["w"].window_tokens, state.wallets["w"].window_requests) == (100, 1)
    state.now += ends_after
    happens(state, [ending])
    assert state.wallets["w"].window_tokens == state.keys["k"].window_tokens == wallet_tokens
    assert state.wallets["w"].window_requests == state.keys["k"].window_requests == (0 if ends_after else 1)


def test_a_call_from_an_earlier_minute_takes_nothing_from_this_one():
    """What it used less than was reserved for was counted in a minute that is over."""
    state = state_of()
    happens(state, [reserve("a", 10, window_tokens=100), reserve("b", 10, window_tokens=100)])
    state.now += WINDOW
    happens(state, [reserve("c", 10, window_tokens=40), settle("a", 1, tokens=70), release("b")])
    assert state.wallets["w"].window_tokens == state.keys["k"].window_tokens == 40


def test_a_correction_never_takes_the_window_below_zero():
    """A window that was counted anew in between gives back no more than it holds."""
    state = state_of()
    happens(state, [reserve("a", 10, window_tokens=100)])
    state.wallets["w"].window_tokens = 5
    happens(state, [release("a")])
    assert state.wallets["w"].window_tokens == 0


def test_a_settle_counts_in_the_period_in_which_it_is_booked():
    """A call over midnight is spent on the new day, and the lifetime's spending keeps both."""
    state = state_of(key={"limit_amount": 50, "limit_period": "day"})
    happens(state, [reserve("a", 30), reserve("b", 20), settle("a", 30)])
    state.now = TODAY + MICROS_PER_DAY
    happens(state, [settle("b", 20)])
    key = state.keys["k"]
    assert (key.period_start, key.period_spent, key.spent) == (TODAY + MICROS_PER_DAY, 20, 50)


def test_a_settle_is_bounded_by_the_limit_of_its_own_period():
    """What was spent yesterday leaves today's limit whole, before a single charge was booked on it."""
    state = state_of(key={"limit_amount": 50, "limit_period": "day"})
    happens(state, [reserve("a", 30), settle("a", 30), reserve("b", 20)])
    state.now = TODAY + MICROS_PER_DAY
    assert happens(state, [settle("b", 60)]) == [settled(50, 20, shortfall=10)]
    assert (state.keys["k"].period_spent, state.keys["k"].spent) == (50, 80)


# ---- credits by hand


@pytest.mark.parametrize(
    ("operation", "balance"),
    [
        (topup(1), 101),
        (topup(NANOS_MAX - 100), NANOS_MAX),
        (adjustment(5), 105),
        (adjustment(-40), 60),
        (refund(25, "paid"), 125),
        (refund(1, "paid"), 101),
    ],
)
def test_credits_that_are_booked(operation, balance):
    """The transaction is chained to the one before and belongs to the wallet's owner."""
    state = with_charge()
    outcome = happens(state, [operation])[0]
    transaction = Transaction(
        wallet_id="w",
        user_id="u",
        seq=2,
        type=operation.type,
        amount=operation.amount,
        description="by hand",
        balance_before=100,
        balance_after=balance,
        reservation_id=operation.reservation_id,
        idempotency_key=None,
        created_at=NOW,
    )
    assert outcome == Credited(transaction=transaction)
    assert (state.wallets["w"].balance, state.wallets["w"].seq) == (balance, 2)


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        (topup(1, wallet_id="?"), Fault.UNKNOWN_WALLET),
        (topup(0), Fault.OUT_OF_RANGE),
        (topup(-1), Fault.OUT_OF_RANGE),
        (topup(NANOS_MAX - 99), Fault.OUT_OF_RANGE),
        (topup(2**64), Fault.OUT_OF_RANGE),
        (adjustment(0), Fault.OUT_OF_RANGE),
        (adjustment(NANOS_MAX), Fault.OUT_OF_RANGE),
        (adjustment(-101), Fault.BELOW_RESERVED),
        (adjustment(-41), Fault.BELOW_RESERVED),
        (refund(5, None), Fault.UNKNOWN_RESERVATION),
        (refund(5, "?"), Fault.UNKNOWN_RESERVATION),
        (refund(5, "paid", wallet_id="v"), Fault.UNKNOWN_RESERVATION),
        (refund(0, "paid"), Fault.OUT_OF_RANGE),
        (refund(-5, "paid"), Fault.OUT_OF_RANGE),
        (refund(26, "paid"), Fault.ABOVE_CHARGE),
        (refund(1, "open"), Fault.ABOVE_CHARGE),
        (refund(None, "open"), Fault.ABOVE_CHARGE),
        (refund(None, "?"), Fault.UNKNOWN_RESERVATION),
        (topup(None), Fault.OUT_OF_RANGE),
        (credit(CreditType.DEDUCTION, -5), Fault.OUT_OF_RANGE),
    ],
)
def test_credits_that_cannot_be(operation, fault):
    """A wrong amount, wallet or call is named, and nothing is written."""
    assert decide(with_charge(), [operation]) == (Changes(), [Faulted(fault)])


def with_charge() -> State:
    """A wallet of 100, of which call `open` holds 60, that has paid 25 for the call `paid`."""
    state = state_of(wallet={"balance": 125})
    state.wallets["v"] = Wallet(id="v", owner_id="v", balance=100)
    happens(state, [reserve("paid", 25), settle("paid", 25), reserve("open", 60)])
    return state


def test_refunds_add_up_to_the_charge():
    """However it is divided, a charge is given back once."""
    state = with_charge()
    events = [refund(20, "paid"), refund(6, "paid"), refund(5, "paid"), refund(1, "paid"), undelivered("paid")]
    first, over, last, more, release_ = happens(state, events)
    assert [type(outcome) for outcome in (first, last)] == [Credited, Credited]
    assert [over, more] == [Faulted(Fault.ABOVE_CHARGE)] * 2
    assert release_ == Released(25, is_replay=True)
    assert state.wallets["w"].balance == 125


def test_a_refund_without_an_amount_gives_back_what_is_left():
    """Its key answers for it again, and for no part of it; another one finds nothing left."""
    state = with_charge()
    whole = refund(None, "paid", idempotency_key="whole")
    part, all_of_it, again, other = happens(
        state,
        [refund(20, "paid", idempotency_key="part"), whole, whole, refund(None, "paid", idempotency_key="other")],
    )
    assert (part.transaction.amount, all_of_it.transaction.amount) == (20, 5)
    assert again == Credited(transaction=all_of_it.transaction, is_replay=True)
    assert other == Faulted(Fault.ABOVE_CHARGE)
    assert happens(state, [refund(4, "paid", idempotency_key="whole")]) == [Faulted(Fault.OTHER_VALUES)]


def test_a_key_of_a_part_is_not_one_of_the_whole():
    """As long as anything is left, all of it would be another amount."""
    state = with_charge()
    happens(state, [refund(20, "paid", idempotency_key="once")])
    assert happens(state, [refund(None, "paid", idempotency_key="once")]) == [Faulted(Fault.OTHER_VALUES)]


def test_what_an_operator_books_is_on_record():
    """With who, what, before and after, once; what Tollgate books by itself, or refuses, is not."""
    state = with_charge()
    wanted = refund(7, "paid", actor="boss", idempotency_key="once")
    changes, _ = decide(state, [topup(1), topup(0, actor="boss"), wanted, wanted])
    (event,) = changes.events
    assert (event.actor, event.action, event.subject, event.created_at) == ("boss", "credits.refund", "u", NOW)
    assert msgspec.json.decode(event.before) == {"balance": "0.000000101"}
    assert msgspec.json.decode(event.after) == {
        "balance": "0.000000108",
        "amount": "0.000000007",
        "description": "by hand",
        "request_id": "paid",
        "idempotency_key": "once",
    }


@pytest.mark.parametrize(
    "operation",
    [
        topup(7, idempotency_key="once"),
        adjustment(-7, idempotency_key="once"),
        refund(7, "paid", idempotency_key="once"),
    ],
)
@pytest.mark.parametrize("is_one_batch", [True, False])
def test_an_idempotency_key_books_once(operation, is_one_batch):
    """The same credit again is answered with the transaction that it already is."""
    state = with_charge()
    outcomes = decide(state, [operation] * 2)[1] if is_one_batch else happens(state, [operation] * 2)
    first, second = outcomes
    assert second == Credited(transaction=first.transaction, is_replay=True)
    assert state.wallets["w"].balance == 100 + operation.amount
    assert state.reservations["paid"].refunded == (7 if operation.type == CreditType.REFUND else 0)


@pytest.mark.parametrize(
    "other",
    [
        topup(8, idempotency_key="once"),
        adjustment(7, idempotency_key="once"),
        topup(7, idempotency_key="once", description="other"),
        refund(7, "paid", idempotency_key="once"),
        refund(999, "?", idempotency_key="once"),
    ],
)
def test_an_idempotency_key_is_for_one_credit(other):
    """Under a key that was used, any other credit is refused, whether it could be booked or not."""
    state = with_charge()
    happens(state, [topup(7, idempotency_key="once")])
    assert decide(state, [other]) == (Changes(), [Faulted(Fault.OTHER_VALUES)])


def test_an_idempotency_key_belongs_to_its_wallet():
    """Two wallets may use the same word."""
    state = with_charge()
    first, second = happens(state, [topup(7, idempotency_key="once"), topup(8, idempotency_key="once", wallet_id="v")])
    assert (first.transaction.amount, second.transaction.amount) == (7, 8)


# ---- what holds for every history

WALLETS = ("w", "v")
LIMIT = 120
CALLS_MAX = 4
REQUESTS_MAX = 6


def fresh() -> State:
    """Two users with a wallet of 200 each and a key with limits."""
    return State(
        now=NOW,
        is_fenced=False,
        wallets={name: Wallet(id=name, owner_id=f"u{name}", balance=200, owed=5) for name in WALLETS},
        users={
            f"u{name}": User(
                id=f"u{name}",
                is_active=True,
                token_version=0,
                concurrent_calls_max=CALLS_MAX,
                requests_per_minute=REQUESTS_MAX,
            )
            for name in WALLETS
        },
        keys={
            f"k{name}": Key(
                id=f"k{name}",
                user_id=f"u{name}",
                wallet_id=name,
                is_active=True,
                limit_amount=LIMIT,
                limit_period="day",
            )
            for name in WALLETS
        },
        reservations={},
        transactions={},
    )


AMOUNTS = st.integers(0, 150)


def calls(wallet_id: str) -> st.SearchStrategy[str]:
    """Few ids, so that replays, conflicts and ends of calls that are none come often."""
    return st.sampled_from([f"{wallet_id}{number}" for number in range(5)])


def operations_of(wallet_id: str) -> st.SearchStrategy[Operation]:
    ids, whose = calls(wallet_id), st.just(wallet_id)
    receipts = st.just(RECEIPT)
    return st.one_of(
        st.builds(
            lambda request_id, at_least, more, tokens, key_id: reserve(
                request_id,
                at_least,
                at_least + more,
                wallet_id=wallet_id,
                user_id=f"u{wallet_id}",
                key_id=key_id,
                window_tokens=tokens,
            ),
            ids,
            AMOUNTS,
            st.sampled_from([0, 0, 50]),
            st.integers(0, 9),
            st.sampled_from([f"k{wallet_id}", f"k{wallet_id}", None, "?"]),
        ),
        st.builds(Settle, id=ids, wallet_id=whose, cost=AMOUNTS, tokens=st.integers(0, 9), receipt=receipts),
        st.builds(Release, id=ids, wallet_id=whose, receipt=receipts, is_undelivered=st.booleans()),
        st.builds(Expire, id=ids, wallet_id=whose),
        st.builds(
            Credit,
            wallet_id=whose,
            type=st.sampled_from(CreditType),
            amount=st.integers(-60, 60),
            description=st.just("by hand"),
            idempotency_key=st.uuids().map(str) | st.sampled_from(["once", "twice"]),
            reservation_id=st.none() | ids,
        ),
    )


ANY = st.one_of(*map(operations_of, WALLETS))
HISTORIES = st.lists(st.lists(ANY, max_size=8), max_size=6)


def lived(batches: Sequence[Sequence[Operation]]) -> tuple[State, list[Transaction]]:
    """The state after `batches`, half a day apart, and all transactions that were booked."""
    state, booked = fresh(), []
    for batch in batches:
        changes, _ = decide(state, batch)
        booked += changes.transactions
        state.now += MICROS_PER_DAY // 2
    return state, booked


def succeeded(outcome: Outcome) -> bool:
    return not isinstance(outcome, Refused | Faulted) and not outcome.is_replay


def counters(state: State) -> dict:
    return msgspec.to_builtins([state.wallets, state.keys, state.reservations])


@given(HISTORIES)
def test_nobody_ever_holds_more_than_there_is(batches):
    """Whatever happens, a wallet covers what is reserved, and a key stays within its limit."""
    state = fresh()
    for batch in batches:
        decide(state, batch)
        for wallet in state.wallets.values():
            assert 0 <= wallet.reserved <= wallet.balance
            assert wallet.open_calls <= CALLS_MAX
            assert wallet.window_requests <= REQUESTS_MAX
        for key in state.keys.values():
            assert 0 <= key.reserved <= LIMIT
            assert 0 <= key.period_spent <= LIMIT - key.reserved
        state.now += MICROS_PER_DAY // 2


@given(HISTORIES)
def test_counters_are_sums(batches):
    """A balance is the sum of its transactions; reserved, open calls and spent are those of the reservations."""
    state, booked = lived(batches)
    for wallet in state.wallets.values():
        own = [row for row in booked if row.wallet_id == wallet.id]
        held = [row for row in state.reservations.values() if row.wallet_id == wallet.id and row.state == "open"]
        assert wallet.balance == 200 + sum(row.amount for row in own)
        assert [row.seq for row in own] == list(range(1, wallet.seq + 1))
        assert (wallet.reserved, wallet.open_calls) == (sum(row.amount for row in held), len(held))
    for key in state.keys.values():
        own = [row for row in state.reservations.values() if row.key_id == key.id]
        held = [row for row in own if row.state == "open"]
        assert (key.reserved, key.open_calls) == (sum(row.amount for row in held), len(held))
        assert key.spent == sum(row.charged for row in own)
    for row in state.reservations.values():
        assert (row.cost is not None) == (row.state == "settled")
        assert row.cost is None or row.charged + row.shortfall == row.cost
        assert 0 <= row.refunded <= row.charged
        deductions = [-each.amount for each in booked if (each.reservation_id, each.type) == (row.id, "deduction")]
        assert deductions == ([row.charged] if row.state == "settled" else [])


@given(HISTORIES, st.lists(ANY, max_size=8))
def test_what_was_booked_is_not_booked_again(batches, last):
    """When the answer to a batch is lost and its operations are sent again, those that succeeded change nothing."""
    state, _ = lived(batches)
    _, outcomes = decide(state, last)
    before = counters(state)
    again = [operation for operation, outcome in zip(last, outcomes, strict=True) if succeeded(outcome)]
    changes, replayed = decide(state, again)
    assert counters(state) == before
    assert changes == Changes()
    assert not any(succeeded(outcome) for outcome in replayed if outcome != Released(0))


@given(st.lists(st.lists(ANY, max_size=8), max_size=4))
def test_other_wallets_do_not_matter(batches):
    """A wallet fares the same whether or not others are in its batches."""
    together, apart = fresh(), fresh()
    for batch in batches:
        own = [operation for operation in batch if operation.wallet_id == "w"]
        _, outcomes = decide(together, batch)
        _, alone = decide(apart, own)
        assert [outcomes[batch.index(operation)] for operation in dict.fromkeys(own)] == [
            alone[own.index(operation)] for operation in dict.fromkeys(own)
        ]
    for name in ("wallets", "keys"):
        rows = {id_: row for id_, row in getattr(together, name).items() if id_.endswith("w")}
        assert rows == {id_: row for id_, row in getattr(apart, name).items() if id_.endswith("w")}


@given(HISTORIES, st.lists(ANY, max_size=8))
def test_a_batch_is_its_operations_one_by_one(batches, last):
    """Outcomes come in the operations' order, and are those of each alone: settles first, else in arrival order."""
    reserving = {operation.id for operation in last if isinstance(operation, Reserve)}

    def waits(operation: Operation) -> bool:
        return not isinstance(operation, Credit) and operation.id in reserving

    state, _ = lived(batches)
    _, outcomes = decide(state, last)
    alone, _ = lived(batches)
    expected: dict[int, Outcome] = {}
    for index in sorted(range(len(last)), key=lambda index: waits(last[index])):
        expected[index] = happens(alone, [last[index]])[0]
    assert outcomes == [expected[index] for index in range(len(last))]
    assert counters(state) == counters(alone)


@given(HISTORIES)
def test_what_is_to_be_written_is_all_that_changed(batches):
    """A database that only ever saw the changes answers as the state in memory does, batch after batch."""
    state, stored = fresh(), fresh()
    for batch in batches:
        _, outcomes = decide(state, batch)
        changes, answered = decide(msgspec.convert(msgspec.to_builtins(stored, str_keys=False), State), batch)
        assert answered == outcomes
        write(changes, stored)
        assert stored.reservations == state.reservations
        state.now = stored.now = state.now + MICROS_PER_DAY // 2


def write(changes: Changes, stored: State) -> None:
    """What a store does with `changes`, in memory."""
    stored.wallets |= changes.wallets
    stored.keys |= changes.keys
    for rows in (changes.reserved, changes.closed):
        stored.reservations |= {id_: reservation for id_, (reservation, _) in rows.items()}
    stored.reservations |= changes.refunded
    stored.transactions |= {
        (row.wallet_id, row.idempotency_key): row for row in changes.transactions if row.idempotency_key is not None
    }
