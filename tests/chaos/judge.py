"""What must hold when all is quiet again, whatever happened before: pure, from the evidence to the violations.

The books alone do not prove durability: a ledger that forgets whole transactions still adds up. So each promise is held
against what was written down outside of the database, by clients (calls and grants) and by the provider.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from statistics import median

import msgspec

from tests.chaos.journal import AdminError, Call, End, Grant, Markup, Said, Switch


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `reservations`; amounts in nano-credits."""

    id: str
    client_request_id: str | None
    wallet_id: str
    state: str
    charged: int = 0
    refunded: int = 0
    is_late: bool = False
    provider: str | None = None
    markup_bps: int | None = None
    created_at: float = 0.0
    """Unix seconds."""
    owner_until: float | None = None
    """Until when the process that it belonged to had its lease, in Unix seconds."""

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


class Span(msgspec.Struct, frozen=True):
    """A time in which something was not as usual, in Unix seconds."""

    since: float
    until: float


class Serve(msgspec.Struct, frozen=True):
    """A call that reached a provider; `is_refused` when the answer was an error by its status, which bills nothing."""

    token: str
    is_refused: bool = False


class Sample(msgspec.Struct, frozen=True):
    """What a worker had of memory (resident) at a moment, in Unix seconds."""

    at: float
    megabytes: float


GIVE_BACK_S_MAX = 15.0
"""How long after a call's end its proxy may still be busy with giving the charge back: the database may be out."""

STALE_S_MAX = 4.0
"""How old a process's snapshot of the markup may be: it looks every second, on a machine that is busy."""

LOSS_S_MAX = 3.0
"""How long after a death its clients may still find out that their connections are gone."""

LEASE_SLACK_S = 1.0

MEMORY_S_MIN = 60.0
"""Of a worker that lived for less nothing can be said."""

MEMORY_GROWTH_MAX = 0.06
MEMORY_NOISE_MB = 4.0
"""How much larger the median of its last quarter may be than that of its second: that, and this more."""

DOCUMENTED: dict[tuple[int | None, str | None], str] = {
    (402, "insufficient_credits"): "APIStatusError",
    (404, "model_not_found"): "NotFoundError",
    (429, "rate_limit_exceeded"): "RateLimitError",
    (502, "provider_unreachable"): "InternalServerError",
    (502, "provider_broke_off"): "InternalServerError",
    (502, None): "InternalServerError",
    (503, "unavailable"): "InternalServerError",
    (504, "provider_timeout"): "InternalServerError",
    (None, "stream_broken"): "APIError",
}
"""Every error that clients may meet here, by status (none in mid-stream) and code, and what the SDK makes of it.

429 and the one without a code are the provider's own errors, passed on.
"""

LOST = "APIConnectionError"
"""What the SDK raises when a connection is gone."""


class Evidence(msgspec.Struct, kw_only=True):
    """All that is known at the end of a run."""

    calls: list[Call]
    grants: list[Grant]
    served: list[Serve]
    reservations: list[Reservation]
    transactions: list[Transaction]
    balancer: str | None = None
    """The address to which calls went that any proxy may have served."""
    kills: list[Kill] = msgspec.field(default_factory=list)
    absences: list[Span] = msgspec.field(default_factory=list)
    """When connections may be lost, or refused: from each death until the next start, where nobody else steps in."""
    disturbances: list[Span] = msgspec.field(default_factory=list)
    """When a process could not learn of changes: paused, or without its database."""
    said: list[Said] = msgspec.field(default_factory=list)
    markups: list[Markup] = msgspec.field(default_factory=list)
    """In the order in which they were set; the first one was there from the start."""
    switches: list[Switch] = msgspec.field(default_factory=list)
    admin_errors: list[AdminError] = msgspec.field(default_factory=list)
    memory: dict[str, list[Sample]] = msgspec.field(default_factory=dict)
    """Of each worker process that there was."""
    lease_s: float | None = None
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
    MARKUP = "charges at the markup of another time"
    UNDOCUMENTED = "errors that are not documented"
    DROPPED = "connections lost though nobody died"
    MEMORY = "workers whose memory grew"
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


def _for_nothing(evidence: Evidence, books: _Books) -> Iterator[str]:
    """Who got an error instead of an answer pays nothing.

    Nobody can keep that promise who dies between the charge, which comes first, and the answer, or while the charge is
    still to be given back. Such a death must be on record.
    """
    for call in paid_for_nothing(evidence):
        rows = [row for row in books.by_token[call.token] if row.taken]
        if not any(_was_served_by_the_dead(evidence, call, rows, kill) for kill in evidence.kills):
            yield f"{call.token} ({call.request_id}) paid, but was {call.end} with {call.status}"


def _was_served_by_the_dead(evidence: Evidence, call: Call, rows: Sequence[Reservation], kill: Kill) -> bool:
    """Whether `kill` struck who served `call`.

    Behind a balancer nobody sees who that was, but the lease of its process tells: it was never renewed afterwards.
    """
    if abs(kill.at - call.ended_at) > GIVE_BACK_S_MAX:
        return False
    if kill.base_url == call.base_url:
        return True
    if call.base_url != evidence.balancer or evidence.lease_s is None:
        return False
    last = kill.at + evidence.lease_s + LEASE_SLACK_S
    return all(row.owner_until is not None and row.owner_until <= last for row in rows)


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
    """No provider took a call on that had no reservation of its own, or was asked at all without one."""
    times = Counter(serve.token for serve in evidence.served if not serve.is_refused)
    for token in {serve.token for serve in evidence.served}:
        if times[token] > len(books.by_token[token]) or not books.by_token[token]:
            yield f"{token} was served {times[token]} times on {len(books.by_token[token])} reservations"


def _open(evidence: Evidence, _books: _Books) -> Iterable[str]:
    return (f"{row}" for row in evidence.reservations if row.state == "open")


def timely_markups(evidence: Evidence, call: Call, row: Reservation) -> list[Markup]:
    """Those that may have been in force when `call` began: what counts is no later than its reservation.

    A process may not know of the newest one for a moment, and while it is paused or without its database of none.
    """
    since = call.started_at - STALE_S_MAX
    for disturbance in sorted(evidence.disturbances, key=lambda span: span.since, reverse=True):
        if disturbance.since <= call.started_at and disturbance.until + STALE_S_MAX >= since:
            since = min(since, disturbance.since - STALE_S_MAX)
    found = []
    for place, markup in enumerate(evidence.markups):
        ends = (later.acknowledged_at for later in evidence.markups[place + 1 :])
        until = next((end for end in ends if end is not None), None)
        is_over = until is not None and until < since and not markup.is_unsure
        if markup.sent_at <= row.created_at and not is_over:
            found.append(markup)
    return found


def _markups(evidence: Evidence, books: _Books) -> Iterator[str]:
    """Each charge is at the markup of its call's start, whatever admins did until its end."""
    if not evidence.markups:
        return
    for call in evidence.calls:
        for row in books.by_token[call.token]:
            if row.markup_bps is None:
                continue
            timely = [markup.bps for markup in timely_markups(evidence, call, row)]
            if row.markup_bps not in timely:
                yield f"{row.id} was charged at {row.markup_bps} bps; in force at its start was one of {timely}"


def _undocumented(evidence: Evidence, _books: _Books) -> Iterator[str]:
    """Whatever goes wrong is said in words that programs know."""
    for call in evidence.calls:
        if call.end is End.REFUSED and (call.status, call.code) not in DOCUMENTED:
            yield f"{call.token} ({call.request_id}) got {call.status} {call.code}"
    for error in evidence.admin_errors:
        if error.status is not None and (error.status, error.code) not in DOCUMENTED:
            yield f"an admin got {error.status} {error.code} at {error.path}"
    for said in evidence.said:
        if said.raised in {None, LOST}:
            continue
        if DOCUMENTED.get((said.status, said.code)) != said.raised:
            yield f"the SDK raised {said.raised} ({said.status} {said.code}) after {said.attempts} attempts"


def _dropped(evidence: Evidence, _books: _Books) -> Iterator[str]:
    """Connections break where somebody was killed, and nowhere else."""
    for call in evidence.calls:
        is_lost = call.end is End.UNANSWERED or (call.end is End.CUT_OFF and call.code is None)
        if is_lost and not _is_excused(evidence, call.ended_at):
            yield f"{call.token} ({call.request_id}) was {call.end}"
    for said in evidence.said:
        if said.raised == LOST and not _is_excused(evidence, said.ended_at):
            yield f"the SDK raised {said.raised} after {said.attempts} attempts"


def _is_excused(evidence: Evidence, moment: float) -> bool:
    return any(span.since - LOSS_S_MAX <= moment <= span.until + LOSS_S_MAX for span in evidence.absences)


def growth(samples: Sequence[Sample]) -> tuple[float, float] | None:
    """A worker's memory in its second and in its last quarter, in megabytes; None when it did not live long enough."""
    if not samples or samples[-1].at - samples[0].at < MEMORY_S_MIN:
        return None
    begin, quarter = samples[0].at, (samples[-1].at - samples[0].at) / 4
    second = [each.megabytes for each in samples if begin + quarter <= each.at < begin + 2 * quarter]
    last = [each.megabytes for each in samples if each.at >= begin + 3 * quarter]
    return (median(second), median(last)) if second and last else None


def _memory(evidence: Evidence, _books: _Books) -> Iterator[str]:
    """After its warm-up a worker needs no more, however long it works."""
    for worker, samples in evidence.memory.items():
        found = growth(samples)
        if found is not None and found[1] > found[0] * (1 + MEMORY_GROWTH_MAX) + MEMORY_NOISE_MB:
            yield f"{worker} went from {found[0]:.1f} to {found[1]:.1f} MB"


def _server_errors(evidence: Evidence, _books: _Books) -> Iterator[str]:
    """Whatever breaks is refused in words that fit: 500 is a bug of ours."""
    yield from (f"{call.token} ({call.request_id}) got 500" for call in evidence.calls if call.status == 500)
    yield from (f"an admin got 500 at {error.path}" for error in evidence.admin_errors if error.status == 500)


_CHECKS: tuple[tuple[Kind, Callable[[Evidence, _Books], Iterable[str]]], ...] = (
    (Kind.LOST, _lost),
    (Kind.UNBOOKED, _unbooked),
    (Kind.DOUBLED, _doubled),
    (Kind.FOR_NOTHING, _for_nothing),
    (Kind.OVERSPENT, _overspent),
    (Kind.UNRESERVED, _unreserved),
    (Kind.OPEN, _open),
    (Kind.AUDIT, lambda evidence, _books: evidence.audit),
    (Kind.MARKUP, _markups),
    (Kind.UNDOCUMENTED, _undocumented),
    (Kind.DROPPED, _dropped),
    (Kind.MEMORY, _memory),
    (Kind.SERVER_ERROR, _server_errors),
    (Kind.MISHAP, lambda evidence, _books: evidence.mishaps),
)
