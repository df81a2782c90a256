"""What the ledger answers to each operation: one pure function for both databases.

`decide` takes what one transaction has read under its locks, decides the operations in order, each seeing those
before it, and says what to write. It has no clock, no SQL and no randomness of its own. Settles are decided
before reserves: they only ever free credits.

The guard is on the reserve, never on the settle: a settle always records.

The structs here hold values that cannot lead back to them, so the garbage collector need not look through them (`gc`):
a batch makes some thousands.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import assert_never, final

import msgspec

from proxy.ledger.rollup import PERHAPS_BILLED, DayKey, UsageDay, bounded, day_of
from proxy.units import MICROS_PER_SECOND, NANOS_MAX, Micros, Nanos, format_credits

WINDOW = 60 * MICROS_PER_SECOND
"""Rate limits are counted by the clock minute."""


class ReservationState(StrEnum):
    """Where a reservation is; it leaves `open` once, and only a late settle moves it again."""

    OPEN = "open"
    SETTLED = "settled"
    RELEASED = "released"
    EXPIRED = "expired"


class CreditType(StrEnum):
    """The four kinds of credit transaction."""

    TOPUP = "topup"
    DEDUCTION = "deduction"
    REFUND = "refund"
    ADJUSTMENT = "adjustment"


_OPEN, _SETTLED = ReservationState.OPEN, ReservationState.SETTLED
_RELEASED, _EXPIRED = ReservationState.RELEASED, ReservationState.EXPIRED
_DEDUCTION = CreditType.DEDUCTION
"""To find a member by its name takes longer than to compare with it."""

# ---- what is read


class Limits(msgspec.Struct, kw_only=True, gc=False):
    """Limits a minute and at once; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls_max: int | None = None


class User(Limits, kw_only=True, gc=False):
    """The columns of `users` that a decision needs."""

    id: str
    is_active: bool
    token_version: int
    allowed_models: list[str] | None = None


class Wallet(msgspec.Struct, kw_only=True, gc=False):
    """A row of `wallets`. Its window counts against the limits of its user."""

    id: str
    owner_id: str
    balance: Nanos = 0
    reserved: Nanos = 0
    owed: Nanos = 0
    seq: int = 0
    window_start: Micros = 0
    window_requests: int = 0
    window_tokens: int = 0
    open_calls: int = 0

    @property
    def available(self) -> Nanos:
        """What a new call may use; negative while more is owed than is left."""
        return self.balance - self.reserved - self.owed


class Key(Limits, kw_only=True, gc=False):
    """The columns of `api_keys` that a decision needs."""

    id: str
    user_id: str
    wallet_id: str
    is_active: bool
    expires_at: Micros | None = None
    allowed_models: list[str] | None = None
    limit_amount: Nanos | None = None
    limit_period: str | None = None
    spent: Nanos = 0
    reserved: Nanos = 0
    period_start: Micros = 0
    period_spent: Nanos = 0
    window_start: Micros = 0
    window_requests: int = 0
    window_tokens: int = 0
    open_calls: int = 0

    @property
    def available(self) -> Nanos | None:
        """What its limit leaves, its open reservations counted; None without a limit."""
        if self.limit_amount is None:
            return None
        return self.limit_amount - self.reserved - (self.period_spent if self.limit_period else self.spent)


class Receipt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is put on record about a finished call, beside the money. `usage` and `price` are JSON."""

    outcome: str
    provider: str | None = None
    request_model: str | None = None
    response_model: str | None = None
    usage: str | None = None
    usage_source: str | None = None
    price: str | None = None
    markup_bps: int | None = None
    provider_cost: Nanos | None = None
    ttft_ms: int | None = None
    duration_ms: int | None = None


class Reservation(msgspec.Struct, kw_only=True, gc=False):
    """The columns of `reservations` that a decision needs."""

    id: str
    wallet_id: str
    user_id: str
    key_id: str | None
    amount: Nanos
    state: str
    window_tokens: int
    original_model: str
    created_at: Micros
    cost: Nanos | None = None
    charged: Nanos = 0
    shortfall: Nanos = 0
    refunded: Nanos = 0
    is_late: bool | None = None
    settled_at: Micros | None = None
    provider: str | None = None


class Transaction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row of `credit_transactions`; whoever writes it gives it its id."""

    wallet_id: str
    user_id: str
    seq: int
    type: str
    amount: Nanos
    description: str
    balance_before: Nanos
    balance_after: Nanos
    reservation_id: str | None
    idempotency_key: str | None
    created_at: Micros


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row of `admin_events`: what `actor` did; `before` and `after` are JSON."""

    actor: str
    action: str
    subject: str
    before: str
    after: str
    created_at: Micros


class State(msgspec.Struct, kw_only=True):
    """What one transaction has read, by id. `decide` uses it up: afterwards it is what the database will hold.

    `now` is the database's clock. `transactions` are those whose idempotency keys the operations name, by
    wallet and key.
    """

    now: Micros
    is_fenced: bool
    wallets: dict[str, Wallet]
    users: dict[str, User]
    keys: dict[str, Key]
    reservations: dict[str, Reservation]
    transactions: dict[tuple[str, str], Transaction]


# ---- what is asked


@final
class Reserve(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Hold credits for the call `id`: at least `at_least`, at most `at_most`, else nothing.

    `window_tokens` is what it counts against tokens a minute until it is settled, `models` everything that may
    serve it (`provider/model`), `token_version` that of the JWT that came with it, None with an API key. `offers` is
    kept for the record: JSON, a list of `routing.Terms`.
    """

    id: str
    wallet_id: str
    user_id: str
    key_id: str | None
    at_least: Nanos
    at_most: Nanos
    window_tokens: int
    models: tuple[str, ...]
    original_model: str
    is_stream: bool
    token_version: int | None = None
    client_request_id: str | None = None
    offers: str | None = None


@final
class Settle(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Charge `cost` for the call `id`, free the rest of what it holds, and count `tokens` in the rate window."""

    id: str
    wallet_id: str
    cost: Nanos
    tokens: int
    receipt: Receipt


@final
class Release(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Free all that the call `id` holds: nothing was delivered.

    `is_undelivered` says that a settle was sent before and its answer never reached the client: if it turns out
    to have been booked, it is refunded.
    """

    id: str
    wallet_id: str
    receipt: Receipt
    is_undelivered: bool = False


@final
class Expire(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The sweeper's release of the reservation `id`, whose owner is gone."""

    id: str
    wallet_id: str


@final
class Credit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Book `amount` into a wallet by hand: a top-up, a refund of the charge of `reservation_id`, an adjustment.

    A refund without an amount gives back all that is left of the charge. `idempotency_key` makes it happen once however
    often it is sent. `actor` is the operator who does it, and is put on record; None for what Tollgate does by itself.
    """

    wallet_id: str
    type: CreditType
    amount: Nanos | None
    description: str
    idempotency_key: str | None = None
    reservation_id: str | None = None
    actor: str | None = None


Operation = Reserve | Settle | Release | Expire | Credit


# ---- what is answered


class Refusal(StrEnum):
    """Why a reserve was refused."""

    FENCED = "fenced"
    UNKNOWN_CALLER = "unknown_caller"
    INACTIVE_USER = "inactive_user"
    INVALID_KEY = "invalid_key"
    STALE_TOKEN = "stale_token"  # noqa: S105 - a word, not a secret
    MODEL_NOT_ALLOWED = "model_not_allowed"
    REQUEST_RATE = "request_rate"
    TOKEN_RATE = "token_rate"  # noqa: S105 - a word, not a secret
    CONCURRENCY = "concurrency"
    KEY_LIMIT = "key_limit"
    INSUFFICIENT_CREDITS = "insufficient_credits"


class Reserved(msgspec.Struct, frozen=True, gc=False):
    """`amount` is held. `is_replay`: it was already, by this same operation."""

    amount: Nanos
    is_replay: bool = False


class Refused(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Nothing is held. Amounts are those of the wallet, or of the key for `KEY_LIMIT`; `retry_after_s` for rates.

    `allowed` are those of the operation's models that the caller may use, for `MODEL_NOT_ALLOWED`.
    """

    reason: Refusal
    required: Nanos = 0
    available: Nanos = 0
    reserved: Nanos = 0
    is_temporary: bool = False
    retry_after_s: int = 0
    allowed: tuple[str, ...] = ()


class Settled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """`charged` was taken; `shortfall` is what the wallet or key could not bear. `balance` is the wallet's after it."""

    charged: Nanos
    shortfall: Nanos
    balance: Nanos
    is_late: bool = False
    is_replay: bool = False


class Released(msgspec.Struct, frozen=True, gc=False):
    """Nothing is held any more; `refunded` is what a charge that had been booked gave back."""

    refunded: Nanos = 0
    is_replay: bool = False


class Credited(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The transaction is booked; `is_replay`: it was already."""

    transaction: Transaction
    is_replay: bool = False


class Fault(StrEnum):
    """Why an operation cannot be booked. Of the calls' operations only a bug brings any of these about."""

    UNKNOWN_WALLET = "unknown_wallet"
    UNKNOWN_RESERVATION = "unknown_reservation"
    OTHER_VALUES = "other_values"
    NOT_OPEN = "not_open"
    OUT_OF_RANGE = "out_of_range"
    BELOW_RESERVED = "below_reserved"
    ABOVE_CHARGE = "above_charge"


@final
class Faulted(msgspec.Struct, frozen=True, gc=False):
    """The operation changed nothing and never will."""

    fault: Fault


Outcome = Reserved | Refused | Settled | Released | Credited | Faulted


class Changes(msgspec.Struct):
    """What to write: whole rows, each at most once; but `days` holds what to add to each row."""

    wallets: dict[str, Wallet] = msgspec.field(default_factory=dict)
    keys: dict[str, Key] = msgspec.field(default_factory=dict)
    reserved: dict[str, tuple[Reservation, Reserve]] = msgspec.field(default_factory=dict)
    closed: dict[str, tuple[Reservation, Receipt]] = msgspec.field(default_factory=dict)
    refunded: dict[str, Reservation] = msgspec.field(default_factory=dict)
    transactions: list[Transaction] = msgspec.field(default_factory=list)
    days: dict[DayKey, UsageDay] = msgspec.field(default_factory=dict)
    events: list[Event] = msgspec.field(default_factory=list)


def decide(state: State, operations: Sequence[Operation]) -> tuple[Changes, list[Outcome]]:
    """Decide all `operations` against `state`; the outcomes come in the operations' own order.

    Greedy in arrival order, not by a running sum: with 100 available, reserves of 60, 50, 30 and 10 accept 60,
    30 and 10.
    """
    decider = _Decider(state)
    outcomes: dict[int, Outcome] = {}
    for index in _settles_first(operations):
        outcomes[index] = decider.one(operations[index])
    return decider.changes, [outcomes[index] for index in range(len(operations))]


def _settles_first(operations: Sequence[Operation]) -> Iterable[int]:
    """The operations' indices, reserves last; but never a release or settle before a reserve of its own id."""
    reserving = {operation.id for operation in operations if type(operation) is Reserve}
    if not reserving:
        return range(len(operations))
    first: list[int] = []
    late: list[int] = []
    for index, operation in enumerate(operations):
        is_late = type(operation) is not Credit and operation.id in reserving
        (late if is_late else first).append(index)
    return first + late


@lru_cache(maxsize=4)
def period_start(now: Micros, period: str | None) -> Micros:
    """When the UTC day or month that holds `now` began; 0 without a period."""
    if period is None:
        return 0
    instant = datetime.fromtimestamp(now // MICROS_PER_SECOND, UTC).replace(hour=0, minute=0, second=0)
    if period == "month":
        instant = instant.replace(day=1)
    return int(instant.timestamp()) * MICROS_PER_SECOND


class _Decider:
    """The state while it changes, and the record of what changed."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.changes = Changes()
        self.window = state.now - state.now % WINDOW

    def one(self, operation: Operation) -> Outcome:
        match operation:
            case Reserve():
                return self.reserve(operation)
            case Settle():
                return self.settle(operation)
            case Release():
                return self.release(operation)
            case Expire():
                return self.expire(operation)
            case Credit():
                return self.credit(operation)
            case _:
                assert_never(operation)

    # -- reserve

    def reserve(self, operation: Reserve) -> Outcome:
        state = self.state
        existing = state.reservations.get(operation.id)
        if existing is not None:
            return _replayed_reserve(existing, operation)
        if state.is_fenced:
            return Refused(reason=Refusal.FENCED)
        wallet = state.wallets.get(operation.wallet_id)
        user = state.users.get(operation.user_id)
        if wallet is None or user is None:
            return Refused(reason=Refusal.UNKNOWN_CALLER)
        key = self.key(operation.key_id)
        refused = self.refuse_caller(operation, user, key) or self.refuse_rate(operation, user, wallet)
        if refused is None and key is not None:
            refused = self.refuse_rate(operation, key, key)
        if refused is not None:
            return refused
        spendable = _spendable(wallet, key)
        if spendable < operation.at_least:
            return _refuse_amount(operation, wallet, key)
        amount = min(operation.at_most, spendable, max(operation.at_least, spendable // 4))
        self.hold(operation, amount, wallet, key)
        return Reserved(amount)

    def refuse_caller(self, operation: Reserve, user: User, key: Key | None) -> Refused | None:
        if not user.is_active:
            return Refused(reason=Refusal.INACTIVE_USER)
        if operation.token_version is not None and operation.token_version != user.token_version:
            return Refused(reason=Refusal.STALE_TOKEN)
        if operation.key_id is not None and not (
            key is not None
            and key.is_active
            and key.user_id == operation.user_id
            and key.wallet_id == operation.wallet_id
            and (key.expires_at is None or key.expires_at > self.state.now)
        ):
            return Refused(reason=Refusal.INVALID_KEY)
        of_key = None if key is None else key.allowed_models
        if user.allowed_models is not None or of_key is not None:
            allowed = [one for one in operation.models if allows(user.allowed_models, one) and allows(of_key, one)]
            if len(allowed) < len(operation.models):
                return Refused(reason=Refusal.MODEL_NOT_ALLOWED, allowed=tuple(allowed))
        return None

    def refuse_rate(self, operation: Reserve, limits: Limits, counters: Wallet | Key) -> Refused | None:
        if counters.window_start != self.window:
            self.turn_window(counters)
        calls_max, requests_max = limits.concurrent_calls_max, limits.requests_per_minute
        if calls_max is not None and counters.open_calls >= calls_max:
            return Refused(reason=Refusal.CONCURRENCY, retry_after_s=1)
        if requests_max is not None and counters.window_requests >= requests_max:
            return Refused(reason=Refusal.REQUEST_RATE, retry_after_s=self.window_s_left())
        tokens_max = limits.tokens_per_minute
        if tokens_max is not None and counters.window_tokens + operation.window_tokens > tokens_max:
            return Refused(reason=Refusal.TOKEN_RATE, retry_after_s=self.window_s_left())
        return None

    def window_s_left(self) -> int:
        return -(-(self.window + WINDOW - self.state.now) // MICROS_PER_SECOND)

    def hold(self, operation: Reserve, amount: Nanos, wallet: Wallet, key: Key | None) -> None:
        tokens = operation.window_tokens
        reservation = Reservation(
            id=operation.id,
            wallet_id=operation.wallet_id,
            user_id=operation.user_id,
            key_id=operation.key_id,
            amount=amount,
            state=_OPEN,
            window_tokens=tokens,
            original_model=operation.original_model,
            created_at=self.state.now,
        )
        self.state.reservations[operation.id] = reservation
        self.changes.reserved[operation.id] = (reservation, operation)
        for holder in self.touched(wallet, key):
            holder.reserved += amount
            holder.open_calls += 1
            holder.window_requests += 1
            holder.window_tokens += tokens

    # -- the ends of a call

    def settle(self, operation: Settle) -> Outcome:
        reservation = self.state.reservations.get(operation.id)
        wallet = self.state.wallets.get(operation.wallet_id)
        if reservation is None or wallet is None or reservation.wallet_id != wallet.id:
            return Faulted(Fault.UNKNOWN_RESERVATION)
        if reservation.state == _SETTLED:
            if reservation.cost != operation.cost:
                return Faulted(Fault.OTHER_VALUES)
            return self.settled(reservation, wallet, is_replay=True)
        if reservation.state == _RELEASED:
            return Faulted(Fault.NOT_OPEN)
        key = self.key(reservation.key_id)
        holders = self.touched(wallet, key)
        is_late = reservation.state == _EXPIRED
        held = 0 if is_late else reservation.amount
        charged = min(operation.cost, held + max(0, _spendable(wallet, key)))
        if is_late:
            self.count_released(reservation, -1, is_perhaps_billed=True)
        else:
            self.free(reservation, holders)
        self.charge(reservation, charged, wallet, key)
        self.count_tokens(reservation, operation.tokens, holders)
        reservation.cost = operation.cost
        reservation.charged = charged
        reservation.shortfall = operation.cost - charged
        reservation.is_late = is_late
        self.close(reservation, _SETTLED, operation.receipt)
        self.count_settled(reservation, operation.receipt)
        return self.settled(reservation, wallet, is_replay=False)

    def settled(self, reservation: Reservation, wallet: Wallet, *, is_replay: bool) -> Settled:
        return Settled(
            charged=reservation.charged,
            shortfall=reservation.shortfall,
            balance=wallet.balance,
            is_late=bool(reservation.is_late),
            is_replay=is_replay,
        )

    def charge(self, reservation: Reservation, charged: Nanos, wallet: Wallet, key: Key | None) -> None:
        self.book(
            wallet,
            user_id=reservation.user_id,
            type_=_DEDUCTION,
            amount=-charged,
            description=reservation.original_model,
            reservation_id=reservation.id,
        )
        if key is not None:
            key.spent += charged
            key.period_spent += charged

    def count_tokens(self, reservation: Reservation, tokens: int, holders: Iterable[Wallet | Key]) -> None:
        """Correct the window by what was used; a call that began in an earlier one adds only what it used beyond."""
        correction = tokens - reservation.window_tokens
        if reservation.created_at < self.window:
            correction = max(0, correction)
        for holder in holders:
            holder.window_tokens = max(0, holder.window_tokens + correction)

    def release(self, operation: Release) -> Outcome:
        reservation = self.state.reservations.get(operation.id)
        wallet = self.state.wallets.get(operation.wallet_id)
        if reservation is None or wallet is None or reservation.wallet_id != wallet.id:
            return Faulted(Fault.UNKNOWN_RESERVATION)
        match reservation.state:
            case ReservationState.OPEN:
                holders = self.touched(wallet, self.key(reservation.key_id))
                self.free(reservation, holders)
                self.count_tokens(reservation, 0, holders)
                receipt = operation.receipt
                self.close(reservation, ReservationState.RELEASED, receipt)
                self.count_released(reservation, 1, is_perhaps_billed=receipt.outcome in PERHAPS_BILLED)
                return Released()
            case ReservationState.SETTLED if operation.is_undelivered:
                return self.refund_undelivered(reservation, wallet)
            case ReservationState.SETTLED:
                return Faulted(Fault.NOT_OPEN)
            case _:
                return Released(is_replay=True)

    def refund_undelivered(self, reservation: Reservation, wallet: Wallet) -> Released:
        left = reservation.charged - reservation.refunded
        if reservation.refunded and not left:
            return Released(reservation.refunded, is_replay=True)
        if left:
            self.book(
                wallet,
                user_id=reservation.user_id,
                type_=CreditType.REFUND,
                amount=left,
                description="the answer was not delivered",
                reservation_id=reservation.id,
            )
            reservation.refunded = reservation.charged
            self.changes.refunded[reservation.id] = reservation
            self.day(reservation).refunded += left
        return Released(reservation.refunded)

    def expire(self, operation: Expire) -> Outcome:
        reservation = self.state.reservations.get(operation.id)
        wallet = self.state.wallets.get(operation.wallet_id)
        if reservation is None or wallet is None or reservation.wallet_id != wallet.id:
            return Faulted(Fault.UNKNOWN_RESERVATION)
        if reservation.state != _OPEN:
            return Released(is_replay=True)
        self.free(reservation, self.touched(wallet, self.key(reservation.key_id)))
        self.close(reservation, ReservationState.EXPIRED, Receipt(outcome="expired"))
        self.count_released(reservation, 1, is_perhaps_billed=True)
        return Released()

    def free(self, reservation: Reservation, holders: Iterable[Wallet | Key]) -> None:
        for holder in holders:
            holder.reserved -= reservation.amount
            holder.open_calls -= 1

    def close(self, reservation: Reservation, state: ReservationState, receipt: Receipt) -> None:
        reservation.state = state
        reservation.settled_at = self.state.now
        reservation.provider = receipt.provider
        self.changes.closed[reservation.id] = (reservation, receipt)

    # -- what ended calls add up to

    def day(self, reservation: Reservation) -> UsageDay:
        """The row in which an ended call is counted."""
        key = (
            reservation.wallet_id,
            day_of(reservation.settled_at or 0),
            reservation.user_id,
            reservation.key_id or "",
            reservation.original_model,
            reservation.provider or "",
        )
        row = self.changes.days.get(key)
        if row is None:
            row = self.changes.days[key] = UsageDay(*key)
        return row

    def count_settled(self, reservation: Reservation, receipt: Receipt) -> None:
        row = self.day(reservation)
        row.calls += 1
        row.add_tokens(receipt.usage)
        row.charged += reservation.charged
        row.provider_cost += bounded(receipt.provider_cost or 0)
        if reservation.shortfall:
            row.shortfall += bounded(reservation.shortfall)

    def count_released(self, reservation: Reservation, number: int, *, is_perhaps_billed: bool) -> None:
        """Count a call that was released, or with -1 count it no more."""
        row = self.day(reservation)
        row.released += number
        if is_perhaps_billed:
            row.perhaps_billed += number
            row.perhaps_billed_amount += number * reservation.amount

    # -- credits by hand

    def credit(self, operation: Credit) -> Outcome:
        wallet = self.state.wallets.get(operation.wallet_id)
        if wallet is None:
            return Faulted(Fault.UNKNOWN_WALLET)
        if operation.idempotency_key is not None:
            booked = self.state.transactions.get((wallet.id, operation.idempotency_key))
            if booked is not None:
                return _replayed_credit(booked, operation, self.left_of(operation, wallet))
        left = self.left_of(operation, wallet)
        amount = left if operation.amount is None else operation.amount
        fault = _refuse_credit(operation, amount, left, wallet)
        if fault is not None or amount is None:
            return Faulted(fault or Fault.OUT_OF_RANGE)
        transaction = self.book(
            wallet,
            user_id=wallet.owner_id,
            type_=operation.type,
            amount=amount,
            description=operation.description,
            reservation_id=operation.reservation_id,
            idempotency_key=operation.idempotency_key,
        )
        if operation.type == CreditType.REFUND and operation.reservation_id is not None:
            reservation = self.state.reservations[operation.reservation_id]
            reservation.refunded += amount
            self.changes.refunded[reservation.id] = reservation
            self.day(reservation).refunded += amount
        if operation.actor is not None:
            self.changes.events.append(_event(transaction, operation.actor))
        return Credited(transaction=transaction)

    def left_of(self, operation: Credit, wallet: Wallet) -> Nanos | None:
        """What a refund can give back of its charge; None where the wallet has no such charge."""
        reservation = self.state.reservations.get(operation.reservation_id or "")
        if reservation is None or reservation.wallet_id != wallet.id:
            return None
        return reservation.charged - reservation.refunded

    # -- shared

    def book(  # noqa: PLR0913 - the columns of a transaction
        self,
        wallet: Wallet,
        *,
        user_id: str,
        type_: CreditType,
        amount: Nanos,
        description: str,
        reservation_id: str | None,
        idempotency_key: str | None = None,
    ) -> Transaction:
        before = wallet.balance
        wallet.balance = before + amount
        wallet.seq += 1
        transaction = Transaction(
            wallet_id=wallet.id,
            user_id=user_id,
            seq=wallet.seq,
            type=type_,
            amount=amount,
            description=description,
            balance_before=before,
            balance_after=before + amount,
            reservation_id=reservation_id,
            idempotency_key=idempotency_key,
            created_at=self.state.now,
        )
        self.changes.wallets[wallet.id] = wallet
        self.changes.transactions.append(transaction)
        if idempotency_key is not None:
            self.state.transactions[wallet.id, idempotency_key] = transaction
        return transaction

    def touched(self, wallet: Wallet, key: Key | None) -> tuple[Wallet | Key, ...]:
        """The counters of a call, brought up to the current window and noted as changed."""
        if wallet.window_start != self.window:
            self.turn_window(wallet)
        self.changes.wallets[wallet.id] = wallet
        if key is None:
            return (wallet,)
        if key.window_start != self.window:
            self.turn_window(key)
        self.changes.keys[key.id] = key
        return wallet, key

    def turn_window(self, holder: Wallet | Key) -> None:
        holder.window_start = self.window
        holder.window_requests = 0
        holder.window_tokens = 0

    def key(self, key_id: str | None) -> Key | None:
        """The key with that id, if any, brought up to its current period."""
        key = None if key_id is None else self.state.keys.get(key_id)
        if key is not None:
            start = 0 if key.limit_period is None else period_start(self.state.now, key.limit_period)
            if key.period_start != start:
                key.period_start = start
                key.period_spent = 0
        return key


def allows(patterns: list[str] | None, model: str) -> bool:
    """Whether `model` (`provider/model`, or without its provider) matches one of the `patterns`; None allows all."""
    if patterns is None:
        return True
    bare = model.partition("/")[2]
    return any(fnmatchcase(model, pattern) or fnmatchcase(bare, pattern) for pattern in patterns)


def _spendable(wallet: Wallet, key: Key | None) -> Nanos:
    """What the wallet has available, and the key's limit leaves of it."""
    of_wallet = wallet.available
    of_key = None if key is None else key.available
    return of_wallet if of_key is None else min(of_wallet, of_key)


def _refuse_amount(operation: Reserve, wallet: Wallet, key: Key | None) -> Refused:
    """Says who of the two cannot cover the least that is asked."""
    required, available = operation.at_least, wallet.available
    if key is not None and key.available is not None and available >= required:
        return Refused(
            reason=Refusal.KEY_LIMIT, required=required, available=max(0, key.available), reserved=key.reserved
        )
    return Refused(
        reason=Refusal.INSUFFICIENT_CREDITS,
        required=required,
        available=max(0, available),
        reserved=wallet.reserved,
        is_temporary=available + wallet.reserved >= required,
    )


def _replayed_reserve(existing: Reservation, operation: Reserve) -> Outcome:
    if existing.state != _OPEN:
        return Faulted(Fault.NOT_OPEN)
    if (existing.wallet_id, existing.user_id, existing.key_id) != (
        operation.wallet_id,
        operation.user_id,
        operation.key_id,
    ) or not operation.at_least <= existing.amount <= operation.at_most:
        return Faulted(Fault.OTHER_VALUES)
    return Reserved(existing.amount, is_replay=True)


def _refuse_credit(operation: Credit, amount: Nanos | None, left: Nanos | None, wallet: Wallet) -> Fault | None:
    """Why a credit of `amount` cannot be booked; `left` is what a refund may give back."""
    if operation.type == CreditType.REFUND and left is None:
        return Fault.UNKNOWN_RESERVATION
    if amount is None or wallet.balance + amount > NANOS_MAX:
        return Fault.OUT_OF_RANGE
    match operation.type:
        case CreditType.TOPUP:
            return None if amount > 0 else Fault.OUT_OF_RANGE
        case CreditType.ADJUSTMENT:
            if not amount:
                return Fault.OUT_OF_RANGE
            return Fault.BELOW_RESERVED if wallet.balance + amount < wallet.reserved else None
        case CreditType.REFUND:
            if operation.amount is not None and amount <= 0:
                return Fault.OUT_OF_RANGE
            return None if 0 < amount <= (left or 0) else Fault.ABOVE_CHARGE
        case CreditType.DEDUCTION:
            return Fault.OUT_OF_RANGE
        case _:
            assert_never(operation.type)


def _replayed_credit(booked: Transaction, operation: Credit, left: Nanos | None) -> Outcome:
    """The transaction that was booked under this key. A refund of all was booked if nothing is `left` of the charge."""
    amount = booked.amount if operation.amount is None and not left else operation.amount
    if (booked.type, booked.amount, booked.reservation_id, booked.description) != (
        operation.type,
        amount,
        operation.reservation_id,
        operation.description,
    ):
        return Faulted(Fault.OTHER_VALUES)
    return Credited(transaction=booked, is_replay=True)


def _event(transaction: Transaction, actor: str) -> Event:
    after = {
        "balance": format_credits(transaction.balance_after),
        "amount": format_credits(transaction.amount),
        "description": transaction.description,
        "request_id": transaction.reservation_id,
        "idempotency_key": transaction.idempotency_key,
    }
    return Event(
        actor=actor,
        action=f"credits.{transaction.type}",
        subject=transaction.user_id,
        before=msgspec.json.encode({"balance": format_credits(transaction.balance_before)}).decode(),
        after=msgspec.json.encode(after).decode(),
        created_at=transaction.created_at,
    )
