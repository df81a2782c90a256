"""A judge that cannot find anything proves nothing: each kind of violation is put before it, alone."""

import msgspec
import pytest

from tests.chaos.journal import Call, End, Grant
from tests.chaos.judge import GIVE_BACK_S_MAX, Evidence, Kill, Kind, Reservation, Transaction, judge

PROXY = "http://127.0.0.1:1/v1"
TOLD = "0.000000100"
CHARGE = 100
ENDED_AT = 1000.0


def call(name: str, end: End = End.COMPLETE, **seen) -> Call:
    """What a client put down; the token is the name, our own request id is made of it."""
    usual = {"is_stream": False, "ended_at": ENDED_AT, "status": 200, "request_id": f"req_{name}"}
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
    "cut": call("cut", End.CUT_OFF, is_stream=True),
    "left": call("left", End.HUNG_UP, is_stream=True),
    "refused": call("refused", End.REFUSED, status=504),
    "poor": call("poor", End.REFUSED, status=402),
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
    """A run with every ending that is allowed, and replayed, unanswered and unacknowledged grants."""
    return Evidence(
        calls=list(CALLS.values()),
        grants=[
            grant("first"),
            grant("first", is_replay=True),
            grant("unknown", is_acknowledged=False),
            grant("booked", is_acknowledged=False),
        ],
        served=list(ROWS),
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
    found.served = without(found.served, name)
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
    found.served.append("poor")
    assert kinds(found) == {Kind.UNRESERVED}


def test_a_second_provider_call_on_one_reservation_is_found():
    """The operator pays for both."""
    found = evidence()
    found.served.append("plain")
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
    assert kinds(found) == {Kind.SERVER_ERROR}


def test_what_an_audit_found_and_what_proxies_logged_is_found():
    """They speak for themselves."""
    found = evidence()
    found.audit, found.mishaps = ["I1"], ["ledger_fault"]
    assert kinds(found) == {Kind.AUDIT, Kind.MISHAP}
