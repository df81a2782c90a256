"""A judge that cannot find anything proves nothing: each kind of violation is put before it, alone."""

import msgspec
import pytest

from tests.chaos.journal import AdminError, Call, End, Grant, Markup, Said
from tests.chaos.judge import (
    GIVE_BACK_S_MAX,
    LOSS_S_MAX,
    MEMORY_S_MIN,
    STALE_S_MAX,
    Evidence,
    Kill,
    Kind,
    Reservation,
    Sample,
    Serve,
    Span,
    Transaction,
    judge,
)

PROXY = "http://127.0.0.1:1/v1"
BALANCER = "http://127.0.0.1:3/v1"
TOLD = "0.000000100"
CHARGE = 100
STARTED_AT = 998.0
RESERVED_AT = 999.0
ENDED_AT = 1000.0
LEASE_S = 4.0


def call(name: str, end: End = End.COMPLETE, **seen) -> Call:
    """What a client put down; the token is the name, our own request id is made of it."""
    usual = {"is_stream": False, "started_at": STARTED_AT, "ended_at": ENDED_AT, "status": 200}
    usual["request_id"] = f"req_{name}"
    return Call(token=name, wallet_id="wallet", base_url=PROXY, end=end, **(usual | seen))


def reservation(name: str, state: str = "settled", **more) -> Reservation:
    usual = {"charged": CHARGE if state == "settled" else 0}
    return Reservation(id=f"req_{name}", client_request_id=name, wallet_id="wallet", state=state, **(usual | more))


def deduction(name: str) -> Transaction:
    return Transaction(wallet_id="wallet", type="deduction", amount=-CHARGE, reservation_id=f"req_{name}")


def topup(key: str, amount: int = 1000) -> Transaction:
    return Transaction(wallet_id="wallet", type="topup", amount=amount, idempotency_key=key)


def grant(key: str, *, is_acknowledged: bool = True, is_replay: bool = False) -> Grant:
    return Grant(
        wallet_id="wallet",
        idempotency_key=key,
        amount=1000,
        is_acknowledged=is_acknowledged,
        is_replay=is_replay,
    )


CALLS = {
    "plain": call("plain", credits_charged=TOLD),
    "priced": call("priced", is_stream=True, has_end_marker=True, usage_cost=TOLD),
    "unpriced": call("unpriced", is_stream=True, has_end_marker=True),
    "cut": call("cut", End.CUT_OFF, is_stream=True, code="stream_broken"),
    "left": call("left", End.HUNG_UP, is_stream=True),
    "refused": call("refused", End.REFUSED, status=504, code="provider_timeout"),
    "poor": call("poor", End.REFUSED, status=402, code="insufficient_credits"),
    "lonely": call("lonely", End.UNANSWERED, status=None, request_id=None),
    "killed": call("killed", End.UNANSWERED, status=None, request_id=None),
    "late": call("late", credits_charged=TOLD),
}
CHARGED = ("plain", "priced", "unpriced", "cut", "left", "late")
ROWS = {name: reservation(name, is_late=name == "late") for name in CHARGED} | {
    "refused": reservation("refused", "released"),
    "killed": reservation("killed", "expired"),
}


def evidence() -> Evidence:
    """A run with every ending that is allowed, and replayed, unanswered and unacknowledged grants.

    Those whose connections were lost lost them when somebody died.
    """
    return Evidence(
        calls=list(CALLS.values()),
        grants=[
            grant("first"),
            grant("first", is_replay=True),
            grant("unknown", is_acknowledged=False),
            grant("booked", is_acknowledged=False),
        ],
        served=[Serve(name) for name in ROWS],
        absences=[Span(ENDED_AT, ENDED_AT)],
        reservations=list(ROWS.values()),
        transactions=[topup("first"), topup("booked"), *map(deduction, CHARGED)],
    )


def without(rows, unwanted) -> list:
    left = [row for row in rows if row != unwanted]
    assert len(left) < len(rows)
    return left


def changed(rows: list, name: str, **changes) -> list:
    """`rows` with the call or reservation of that name changed."""
    token = "token" if isinstance(rows[0], Call) else "client_request_id"
    return [msgspec.structs.replace(row, **changes) if getattr(row, token) == name else row for row in rows]


def kinds(found: Evidence) -> set[Kind]:
    return {violation.kind for violation in judge(found)}


def test_every_allowed_ending_passes():
    """Nothing is found where nothing is wrong."""
    assert judge(evidence()) == []


@pytest.mark.parametrize("name", ["plain", "priced", "late"])
def test_a_charge_that_was_told_and_is_gone_is_found(name):
    """The whole transaction was forgotten: reservation, deduction and all."""
    found = evidence()
    found.reservations = without(found.reservations, ROWS[name])
    found.transactions = without(found.transactions, deduction(name))
    found.served = without(found.served, Serve(name))
    assert kinds(found) == {Kind.LOST, Kind.UNBOOKED}


@pytest.mark.parametrize("told", ["0.000000099", "0.000000101", "0"])
def test_a_charge_at_another_amount_is_found(told):
    """To the nano, in either direction."""
    found = evidence()
    found.calls = changed(found.calls, "plain", credits_charged=told)
    assert kinds(found) == {Kind.LOST}


def test_a_charge_that_was_taken_back_after_it_was_told_is_found():
    """A refund is for answers that were not delivered."""
    found = evidence()
    found.reservations = changed(found.reservations, "plain", refunded=CHARGE)
    assert kinds(found) == {Kind.LOST, Kind.UNBOOKED}


@pytest.mark.parametrize("booked", [[], [topup("first", 999)]])
def test_a_grant_that_was_told_and_is_gone_is_found(booked):
    """Or is there at another amount."""
    found = evidence()
    found.transactions = [*without(found.transactions, topup("first")), *booked]
    assert kinds(found) == {Kind.LOST}


@pytest.mark.parametrize("state", ["released", "expired"])
def test_a_whole_answer_without_a_charge_is_found(state):
    """A stream without usage tells no amount, but its end."""
    found = evidence()
    found.reservations = changed(found.reservations, "unpriced", state=state, charged=0)
    assert kinds(found) == {Kind.UNBOOKED}


def test_an_end_marker_counts_even_if_the_connection_then_broke():
    """Who has seen the marker has the whole answer."""
    found = evidence()
    found.calls = changed(found.calls, "cut", has_end_marker=True)
    assert kinds(found) == set()
    found.reservations = changed(found.reservations, "cut", state="expired", charged=0)
    assert kinds(found) == {Kind.UNBOOKED}


def test_a_plain_answer_without_its_price_is_found():
    """Every plain answer says what it cost."""
    found = evidence()
    found.calls = changed(found.calls, "plain", credits_charged=None)
    assert kinds(found) == {Kind.UNBOOKED}


def test_two_deductions_of_one_reservation_are_found():
    """Whatever their amounts are."""
    found = evidence()
    found.transactions.append(deduction("plain"))
    assert kinds(found) == {Kind.DOUBLED}


def test_two_charged_reservations_of_one_call_are_found():
    """A call that was sent once is charged once, under whatever ids."""
    found = evidence()
    found.reservations.append(msgspec.structs.replace(ROWS["cut"], id="req_again"))
    assert kinds(found) == {Kind.DOUBLED}


def test_a_grant_that_was_booked_twice_is_found():
    """An idempotency key is booked once."""
    found = evidence()
    found.transactions.append(topup("first"))
    assert kinds(found) == {Kind.DOUBLED}


def test_a_charge_for_an_error_is_found():
    """What delivered nothing costs nothing, unless it was given back."""
    found = evidence()
    found.reservations = changed(found.reservations, "refused", state="settled", charged=CHARGE)
    assert kinds(found) == {Kind.FOR_NOTHING}
    found.reservations = changed(found.reservations, "refused", refunded=CHARGE)
    assert kinds(found) == set()


def test_a_charge_without_an_answer_is_found():
    """A connection that broke before an answer began."""
    found = evidence()
    found.calls = changed(found.calls, "left", end=End.UNANSWERED)
    assert kinds(found) == {Kind.FOR_NOTHING}


@pytest.mark.parametrize(
    ("kill", "excused"),
    [
        (Kill(PROXY, ENDED_AT), True),
        (Kill(PROXY, ENDED_AT + GIVE_BACK_S_MAX), True),
        (Kill(PROXY, ENDED_AT + GIVE_BACK_S_MAX + 1), False),
        (Kill(PROXY, ENDED_AT - GIVE_BACK_S_MAX - 1), False),
        (Kill("http://127.0.0.1:2/v1", ENDED_AT), False),
    ],
)
def test_only_the_death_of_its_proxy_excuses_a_charge_without_an_answer(kill, excused):
    """At that time, and of that proxy."""
    found = evidence()
    found.calls = changed(found.calls, "left", end=End.UNANSWERED)
    found.kills = [kill]
    assert kinds(found) == (set() if excused else {Kind.FOR_NOTHING})


@pytest.mark.parametrize(
    ("lease_ends_after_s", "excused"), [(0, True), (LEASE_S, True), (LEASE_S + 2, False), (None, False)]
)
def test_behind_a_balancer_the_lease_tells_who_died(lease_ends_after_s, excused):
    """Who renewed it after the kill was somebody else, and has no excuse."""
    found = evidence()
    until = None if lease_ends_after_s is None else ENDED_AT + lease_ends_after_s
    found.balancer, found.lease_s = BALANCER, LEASE_S
    found.calls = changed(found.calls, "left", end=End.UNANSWERED, base_url=BALANCER)
    found.reservations = changed(found.reservations, "left", owner_until=until)
    found.kills = [Kill(PROXY, ENDED_AT)]
    assert kinds(found) == (set() if excused else {Kind.FOR_NOTHING})


def test_a_wallet_below_zero_is_found():
    """In any snapshot."""
    found = evidence()
    found.overdrawn = ["wallet"]
    assert kinds(found) == {Kind.OVERSPENT}


def test_more_spent_than_granted_is_found():
    """By what clients and teller put down alone; grants whose fate nobody was told count as booked."""
    found = evidence()
    found.grants = [msgspec.structs.replace(each, amount=CHARGE) for each in found.grants]
    found.transactions = [row for row in found.transactions if row.type != "topup"]
    found.transactions += [topup("first", CHARGE), topup("booked", CHARGE)]
    assert kinds(found) == set()  # told: three charges; granted under three keys: three times as much
    found.grants = found.grants[:2]
    assert kinds(found) == {Kind.OVERSPENT}


def test_a_provider_call_without_a_reservation_is_found():
    """Such as one for a call that was refused with 402."""
    found = evidence()
    found.served.append(Serve("poor"))
    assert kinds(found) == {Kind.UNRESERVED}


def test_a_provider_call_that_was_refused_needs_a_reservation_too():
    """Another provider may take it on; but nobody is asked for who cannot pay."""
    found = evidence()
    found.served.append(Serve("plain", is_refused=True))
    assert kinds(found) == set()
    found.served.append(Serve("poor", is_refused=True))
    assert kinds(found) == {Kind.UNRESERVED}


def test_a_second_provider_call_on_one_reservation_is_found():
    """The operator pays for both."""
    found = evidence()
    found.served.append(Serve("plain"))
    assert kinds(found) == {Kind.UNRESERVED}


def test_what_is_left_open_is_found():
    """Credits that nobody will ever free."""
    found = evidence()
    found.reservations = changed(found.reservations, "killed", state="open")
    assert kinds(found) == {Kind.OPEN}


def test_status_500_is_found():
    """Nothing that happens here is unexpected."""
    found = evidence()
    found.calls = changed(found.calls, "refused", status=500)
    assert kinds(found) == {Kind.SERVER_ERROR, Kind.UNDOCUMENTED}


# ---- markups

BEFORE = Markup(bps=1500, sent_at=0, acknowledged_at=0)


def charged_at(bps: int, *markups: Markup, **more) -> Evidence:
    """A run in which the plain call was charged at `bps`."""
    found = evidence()
    found.markups = [BEFORE, *markups]
    found.reservations = changed(found.reservations, "plain", markup_bps=bps, created_at=RESERVED_AT, **more)
    return found


@pytest.mark.parametrize(
    ("sent_at", "acknowledged_at", "timely"),
    [
        (STARTED_AT - 100, STARTED_AT - 99, {2001}),
        (STARTED_AT - 1, STARTED_AT - 0.5, {1500, 2001}),
        (STARTED_AT, RESERVED_AT + 1, {1500, 2001}),
        (RESERVED_AT + 0.1, RESERVED_AT + 0.2, {1500}),
        (STARTED_AT - 100, None, {1500, 2001}),
    ],
)
def test_only_the_markup_at_the_start_of_a_call_may_be_charged(sent_at, acknowledged_at, timely):
    """One that was replaced long before is wrong, and so is one that was set after the call had begun."""
    markup = Markup(bps=2001, sent_at=sent_at, acknowledged_at=acknowledged_at)
    for bps in (1500, 2001, 2002):
        assert kinds(charged_at(bps, markup)) == (set() if bps in timely else {Kind.MARKUP})


def test_a_process_that_could_not_look_may_not_know():
    """While it was paused, or its database away."""
    found = charged_at(1500, Markup(bps=2001, sent_at=STARTED_AT - 9, acknowledged_at=STARTED_AT - 8))
    assert kinds(found) == {Kind.MARKUP}
    found.disturbances = [Span(STARTED_AT - 60, STARTED_AT - 30)]
    assert kinds(found) == {Kind.MARKUP}
    found.disturbances = [Span(STARTED_AT - 10, STARTED_AT - STALE_S_MAX)]
    assert kinds(found) == set()


def test_a_markup_without_a_clear_answer_may_come_late():
    """Nobody knows when a request is carried out that was given up."""
    unsure = Markup(bps=2001, sent_at=STARTED_AT - 90, acknowledged_at=STARTED_AT - 80, is_unsure=True)
    later = Markup(bps=2002, sent_at=STARTED_AT - 70, acknowledged_at=STARTED_AT - 69)
    assert kinds(charged_at(2001, unsure, later)) == set()
    assert kinds(charged_at(2001, msgspec.structs.replace(unsure, is_unsure=False), later)) == {Kind.MARKUP}


# ---- what clients are told


@pytest.mark.parametrize(("status", "code"), [(503, "unavailable"), (402, "insufficient_credits")])
def test_documented_errors_pass(status, code):
    """For calls and admins, and as the SDK's exceptions."""
    found = evidence()
    found.calls = changed(found.calls, "refused", status=status, code=code)
    found.admin_errors = [AdminError(path="/", status=status, code=code), AdminError(path="/", status=None, code=None)]
    raised = "APIStatusError" if status == 402 else "InternalServerError"
    found.said = [Said(ended_at=ENDED_AT, attempts=1, raised=raised, status=status, code=code)]
    assert kinds(found) == set()


def test_other_errors_are_found():
    """A status with another code, an SDK's exception of another class, and one that is none of the SDK's."""
    for change in (
        {"calls": changed(evidence().calls, "refused", status=502, code="unavailable")},
        {"admin_errors": [AdminError(path="/", status=409, code="unavailable")]},
        {"said": [Said(ended_at=ENDED_AT, attempts=1, raised="APIStatusError", status=503, code="unavailable")]},
        {"said": [Said(ended_at=ENDED_AT, attempts=1, raised="JSONDecodeError")]},
        {"said": [Said(ended_at=ENDED_AT, attempts=3, raised="APITimeoutError")]},
    ):
        assert kinds(msgspec.structs.replace(evidence(), **change)) == {Kind.UNDOCUMENTED}


@pytest.mark.parametrize(("late_s", "excused"), [(0, True), (LOSS_S_MAX, True), (LOSS_S_MAX + 1, False)])
def test_connections_that_break_without_a_death_are_found(late_s, excused):
    """Whoever called, and whether an answer had begun."""
    found = evidence()
    found.absences = [Span(ENDED_AT - late_s - 1, ENDED_AT - late_s)]
    assert kinds(found) == (set() if excused else {Kind.DROPPED})
    found.calls = [each for each in found.calls if each.end is not End.UNANSWERED]
    assert kinds(found) == set()
    found.calls = changed(found.calls, "cut", code=None)
    assert kinds(found) == (set() if excused else {Kind.DROPPED})
    found = evidence()
    found.said = [Said(ended_at=ENDED_AT + LOSS_S_MAX + late_s, attempts=3, raised="APIConnectionError")]
    assert kinds(found) == ({Kind.DROPPED} if late_s else set())


# ---- memory


def weighed(*quarters: float, seconds: float = 2 * MEMORY_S_MIN) -> Evidence:
    """A run with a worker that needed so many megabytes in the quarters of its life."""
    found = evidence()
    each_s = seconds / len(quarters)
    found.memory = {
        "worker": [
            Sample(place * each_s + second, megabytes)
            for place, megabytes in enumerate(quarters)
            for second in range(int(each_s) + 1)
        ]
    }
    return found


def test_a_worker_that_grows_is_found():
    """After its warm-up; one that lived for a short time says nothing."""
    assert kinds(weighed(60, 100, 100, 104)) == set()
    assert kinds(weighed(60, 100, 105, 115)) == {Kind.MEMORY}
    assert kinds(weighed(60, 100, 105, 115, seconds=MEMORY_S_MIN / 2)) == set()


def test_what_an_audit_found_and_what_proxies_logged_is_found():
    """They speak for themselves."""
    found = evidence()
    found.audit, found.mishaps = ["I1"], ["ledger_fault"]
    assert kinds(found) == {Kind.AUDIT, Kind.MISHAP}
