"""What must hold when all is quiet again, whatever happened before: pure, from the evidence to the violations.

The books alone do not prove durability: a ledger that forgets whole transactions still adds up. So each promise is held
against what was written down outside of the database, by clients (calls and grants) and by the provider.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

import msgspec

from tests.chaos.journal import Call, End, Grant


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `reservations`; amounts in nano-credits."""

    id: str
    client_request_id: str | None
    wallet_id: str
    state: str
    charged: int = 0
    refunded: int = 0
    is_late: bool = False

    @property
    def taken(self) -> int:
        """What the call has cost its wallet."""
        return self.charged - self.refunded


class Transaction(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `credit_transactions`; a deduction's amount is negative."""

    wallet_id: str
    type: str
    amount: int
    reservation_id: str | None = None
    idempotency_key: str | None = None


class Kill(msgspec.Struct, frozen=True):
    """A proxy was killed without a word; `at` in Unix seconds."""

    base_url: str
    at: float


GIVE_BACK_S_MAX = 15.0
"""How long after a call's end its proxy may still be busy with giving the charge back: the database may be out."""


class Evidence(msgspec.Struct, kw_only=True):
    """All that is known at the end of a run."""

    calls: list[Call]
    grants: list[Grant]
    served: list[str]
    """The token of each call that reached the provider, once for each time."""
    reservations: list[Reservation]
    transactions: list[Transaction]
    kills: list[Kill] = msgspec.field(default_factory=list)
    overdrawn: list[str] = msgspec.field(default_factory=list)
    """What snapshots taken under load showed below zero."""
    audit: list[str] = msgspec.field(default_factory=list)
    """What audits found, under load and at the end."""
    mishaps: list[str] = msgspec.field(default_factory=list)
    """What proxies logged as their own fault, and how they exited when asked to."""


class Kind(StrEnum):
    """The kinds of violation, as the table names them."""

    LOST = "acknowledged operations lost"
    UNBOOKED = "complete but unbooked"
    DOUBLED = "double charges"
    FOR_NOTHING = "charged for nothing"
    OVERSPENT = "overspends"
    UNRESERVED = "provider calls without a reservation"
    OPEN = "reservations left open"
    AUDIT = "audit violations"
    SERVER_ERROR = "answers with status 500"
    MISHAP = "mishaps of the proxies"


class Violation(msgspec.Struct, frozen=True):
    """A promise that was broken, and where."""

    kind: Kind
    where: str


class _Books:
    """The ledger's rows by what they are looked up by."""

    def __init__(self, evidence: Evidence) -> None:
        self.by_id = {row.id: row for row in evidence.reservations}
        self.by_token: defaultdict[str | None, list[Reservation]] = defaultdict(list)
        for row in evidence.reservations:
            self.by_token[row.client_request_id].append(row)
        self.granted: defaultdict[tuple[str, str | None], list[int]] = defaultdict(list)
        for booked in evidence.transactions:
            if booked.type == "topup":
                self.granted[booked.wallet_id, booked.idempotency_key].append(booked.amount)


def judge(evidence: Evidence) -> list[Violation]:
    """Every violation of every promise; none is the only good answer."""
    books = _Books(evidence)
    return [Violation(kind, where) for kind, check in _CHECKS for where in check(evidence, books)]


def _lost(evidence: Evidence, books: _Books) -> Iterator[str]:
    """What a client was told is in the ledger, at that amount."""
    for call in evidence.calls:
        if call.acknowledged is None:
            continue
        row = books.by_id.get(call.request_id or "")
        if row is None or row.state != "settled" or row.taken != call.acknowledged:
            yield f"{call.token} was told {call.acknowledged}, booked is {row}"
    for grant in evidence.grants:
        booked = books.granted[grant.wallet_id, grant.idempotency_key]
        if grant.is_acknowledged and grant.amount not in booked:
            yield f"{grant} was acknowledged, booked is {booked}"


def _unbooked(evidence: Evidence, books: _Books) -> Iterator[str]:
    """Who has the end of an answer has paid for it; a plain answer says how much."""
    for call in evidence.calls:
        if not call.is_whole:
            continue
        row = books.by_id.get(call.request_id or "")
        if row is None or row.state != "settled" or row.refunded:
            yield f"{call.token} was complete, booked is {row}"
        elif not call.is_stream and call.credits_charged is None:
            yield f"{call.token} was complete without a price"


def _doubled(evidence: Evidence, books: _Books) -> Iterator[str]:
    """A call is charged at most once, and a grant booked at most once, however often it was sent."""
    deductions = Counter(booked.reservation_id for booked in evidence.transactions if booked.type == "deduction")
    yield from (f"{request_id} was deducted {times} times" for request_id, times in deductions.items() if times > 1)
    for token, rows in books.by_token.items():
        charged = [row.id for row in rows if row.taken]
        if token is not None and len(charged) > 1:
            yield f"{token} was charged as {charged}"
    yield from (f"grant {key} was booked {len(amounts)} times" for key, amounts in books.granted.items() if amounts[1:])


def paid_for_nothing(evidence: Evidence) -> list[Call]:
    """The calls that were charged though their clients got an error, or nothing, and did not leave."""
    charged = {row.client_request_id for row in evidence.reservations if row.taken}
    return [call for call in evidence.calls if call.end in {End.REFUSED, End.UNANSWERED} and call.token in charged]


def _for_nothing(evidence: Evidence, _books: _Books) -> Iterator[str]:
    """Who got an error instead of an answer pays nothing.

    Nobody can keep that promise who dies between the charge, which comes first, and the answer, or while the charge is
    still to be given back. Such a death must be on record.
    """
    for call in paid_for_nothing(evidence):
        if not any(
            kill.base_url == call.base_url and abs(kill.at - call.ended_at) <= GIVE_BACK_S_MAX
            for kill in evidence.kills
        ):
            yield f"{call.token} ({call.request_id}) paid, but was {call.end} with {call.status}"


def _overspent(evidence: Evidence, _books: _Books) -> Iterator[str]:
    """No snapshot shows a wallet below zero, and by the clients' journals nobody spent more than was granted."""
    yield from evidence.overdrawn
    granted: Counter[str] = Counter()
    for (wallet_id, _), amount in {
        (grant.wallet_id, grant.idempotency_key): grant.amount for grant in evidence.grants
    }.items():
        granted[wallet_id] += amount
    spent: Counter[str] = Counter()
    for call in evidence.calls:
        spent[call.wallet_id] += call.acknowledged or 0
    yield from (
        f"{wallet_id} spent {spent[wallet_id]} of {granted[wallet_id]}"
        for wallet_id in spent
        if spent[wallet_id] > granted[wallet_id]
    )


def _unreserved(evidence: Evidence, books: _Books) -> Iterator[str]:
    """The provider was asked no more often than there are reservations for it."""
    for token, times in Counter(evidence.served).items():
        if times > len(books.by_token[token]):
            yield f"{token} was served {times} times on {len(books.by_token[token])} reservations"


def _open(evidence: Evidence, _books: _Books) -> Iterable[str]:
    return (f"{row}" for row in evidence.reservations if row.state == "open")


def _server_errors(evidence: Evidence, _books: _Books) -> Iterable[str]:
    """Whatever breaks is refused in words that fit: 500 is a bug of ours."""
    return (f"{call.token} ({call.request_id}) got 500" for call in evidence.calls if call.status == 500)


_CHECKS: tuple[tuple[Kind, Callable[[Evidence, _Books], Iterable[str]]], ...] = (
    (Kind.LOST, _lost),
    (Kind.UNBOOKED, _unbooked),
    (Kind.DOUBLED, _doubled),
    (Kind.FOR_NOTHING, _for_nothing),
    (Kind.OVERSPENT, _overspent),
    (Kind.UNRESERVED, _unreserved),
    (Kind.OPEN, _open),
    (Kind.AUDIT, lambda evidence, _books: evidence.audit),
    (Kind.SERVER_ERROR, _server_errors),
    (Kind.MISHAP, lambda evidence, _books: evidence.mishaps),
)
