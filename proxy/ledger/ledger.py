"""The ledger as the rest of Tollgate sees it: reserve, settle, release, credit."""

import asyncio
import math
from collections.abc import Callable
from typing import assert_never

from proxy.deadline import CommonLimit, within
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
    TollgateError,
    Unauthenticated,
    Unavailable,
)
from proxy.ledger.batcher import CLOSE_WAIT_S_MAX, Batcher
from proxy.ledger.decide import (
    Credit,
    Credited,
    Expire,
    Fault,
    Faulted,
    Outcome,
    Receipt,
    Refusal,
    Refused,
    Release,
    Released,
    Reserve,
    Reserved,
    Settle,
    Settled,
)
from proxy.ledger.store import Store
from proxy.metrics import Metrics

RESERVE_WAIT_S_MAX = 5.0
"""A call that cannot be reserved by then is refused with 503: no provider is asked for what may not be paid."""

HANGING_S = 3.0
"""A transaction takes milliseconds: one that takes so long is as good as lost."""

CREDIT_WAIT_S_MAX = 30.0


class Ledger:
    """Reservations and charges, durable when the awaited call returns.

    What is settled or released no longer depends on whoever asked for it: a cancelled caller cancels its wait and
    nothing else. A call is in flight from before its reserve is sent until its end is answered, however it ends and
    whoever still waits for that; what a reserve that was refused, failed or given up may yet hold is in nobody's hands.
    """

    def __init__(
        self,
        store: Store,
        owner_id: Callable[[], str | None] = lambda: None,
        metrics: Metrics | None = None,
        *,
        end_wait_s: float = math.inf,
    ) -> None:
        """`end_wait_s` is how many seconds a settle or a release is waited for, which is booked all the same later."""
        self._in_flight: set[str] = set()
        self._batcher = Batcher(store, owner_id, metrics, on_ended=self._in_flight.discard)
        self._reserve_limit = CommonLimit(RESERVE_WAIT_S_MAX)
        self._end_limit = CommonLimit(end_wait_s)

    @property
    def is_lost(self) -> bool:
        """Whether the last attempt did not reach the database, or the one under way hangs there."""
        return self._batcher.is_lost or self._batcher.busy_s > HANGING_S

    @property
    def waiting(self) -> int:
        """How many operations wait for their turn."""
        return self._batcher.waiting

    @property
    def in_flight(self) -> int:
        """How many reservations belong to calls of this process."""
        return len(self._in_flight)

    def is_in_flight(self, reservation_id: str) -> bool:
        """Whether the reservation belongs to a call of this process that has not ended, or whose end is not booked."""
        return reservation_id in self._in_flight

    def start(self) -> None:
        """Begin to work, on the running loop."""
        self._batcher.start()

    async def aclose(self, wait_s: float = CLOSE_WAIT_S_MAX) -> None:
        """Book what is queued, then stop; waits at most about `wait_s` for a database that is out of reach."""
        await self._batcher.aclose(wait_s)

    async def reserve(self, operation: Reserve) -> Reserved:
        """Hold credits for one call.

        Raises `InsufficientCredits`, `KeyLimitReached`, `RateLimited`, `Forbidden`, `Unauthenticated` when the ledger
        refuses, `Unavailable` when it cannot say within five seconds: then nothing stays held.
        """
        self._in_flight.add(operation.id)
        try:
            future = self._batcher.submit(operation)
            self._reserve_limit.begin(future)
            try:
                outcome = await future
            except asyncio.CancelledError:
                self._give_back(operation, future)
                raise
            except TimeoutError as exc:
                raise Unavailable("The ledger is out of reach just now; nothing was charged.", retry_after_s=2) from exc
            return _granted(operation, outcome)
        except BaseException:
            self._in_flight.discard(operation.id)
            raise

    def _give_back(self, operation: Reserve, future: "asyncio.Future[Outcome]") -> None:
        """Release what was granted in the very moment in which its caller was cancelled.

        A future that is itself cancelled is the batcher's to see to.
        """
        if not future.done() or future.cancelled() or future.exception() is not None:
            return
        if isinstance(future.result(), Reserved):
            self._batcher.submit(
                Release(id=operation.id, wallet_id=operation.wallet_id, receipt=Receipt(outcome="caller_gone"))
            )

    async def settle(self, operation: Settle) -> Settled:
        """Charge for one call. Done even when the wait for it is cancelled, or ends in `TimeoutError`.

        Raises `LedgerFault` when it cannot be booked.
        """
        outcome = await self._end(operation)
        if isinstance(outcome, Settled):
            return outcome
        raise LedgerFault(f"settle {operation.id}: {outcome}")

    async def release(self, operation: Release) -> Released:
        """Free what one call holds; waits and errors as with `settle`."""
        outcome = await self._end(operation)
        if isinstance(outcome, Released):
            return outcome
        raise LedgerFault(f"release {operation.id}: {outcome}")

    async def expire(self, operation: Expire) -> Released:
        """Free what a call of a dead process holds, however long that takes; errors as with `settle`."""
        outcome = await self._batcher.submit(operation)
        if isinstance(outcome, Released):
            return outcome
        raise LedgerFault(f"expire {operation.id}: {outcome}")

    def _end(self, operation: Settle | Release) -> "asyncio.Future[Outcome]":
        """The outcome of a call's end. The call is in flight until it is there, though nobody may wait for it."""
        future = self._batcher.submit(operation)
        self._end_limit.begin(future)
        return future

    async def credit(self, operation: Credit) -> Credited:
        """Book a top-up, refund or adjustment.

        Raises `Conflict` when its idempotency key was used with other values, `BadRequest` or `NotFound` when it
        cannot be, `Unavailable` when the outcome is not known within thirty seconds.
        """
        try:
            with within(CREDIT_WAIT_S_MAX):
                outcome = await self._batcher.submit(operation)
        except TimeoutError as exc:
            raise Unavailable("The ledger is out of reach just now.") from exc
        match outcome:
            case Credited():
                return outcome
            case Faulted(fault):
                raise _credit_fault(fault)
            case _:
                raise LedgerFault(f"credit: {outcome}")


def _granted(operation: Reserve, outcome: Outcome) -> Reserved:
    if isinstance(outcome, Reserved):
        return outcome
    if isinstance(outcome, Refused):
        raise _refusal(outcome)
    raise LedgerFault(f"reserve {operation.id}: {outcome}")


def _refusal(refused: Refused) -> TollgateError:
    match refused.reason:
        case Refusal.INSUFFICIENT_CREDITS:
            return InsufficientCredits(
                required=refused.required,
                available=refused.available,
                reserved=refused.reserved,
                is_temporary=refused.is_temporary,
            )
        case Refusal.KEY_LIMIT:
            return KeyLimitReached(required=refused.required, available=refused.available)
        case Refusal.REQUEST_RATE:
            return RateLimited("Too many requests this minute.", retry_after_s=refused.retry_after_s)
        case Refusal.TOKEN_RATE:
            return RateLimited("Too many tokens this minute.", retry_after_s=refused.retry_after_s)
        case Refusal.CONCURRENCY:
            return RateLimited("Too many calls at once.", retry_after_s=refused.retry_after_s)
        case Refusal.MODEL_NOT_ALLOWED:
            return ModelNotAllowed(refused.allowed)
        case Refusal.INACTIVE_USER:
            return Forbidden("This account is not active.", code="inactive_user")
        case Refusal.UNKNOWN_CALLER | Refusal.INVALID_KEY | Refusal.STALE_TOKEN:
            return Unauthenticated("The API key or token is not valid any more.")
        case Refusal.FENCED:
            return Unavailable("This server has to register again; nothing was charged.")
        case _:
            assert_never(refused.reason)


def _credit_fault(fault: Fault) -> TollgateError:
    match fault:
        case Fault.OTHER_VALUES:
            return Conflict("This idempotency key was used for another transaction.", code="idempotency_key_reused")
        case Fault.UNKNOWN_WALLET:
            return NotFound("There is no such wallet.")
        case Fault.UNKNOWN_RESERVATION:
            return NotFound("There is no such charge.")
        case Fault.BELOW_RESERVED:
            return BadRequest(
                "This would take the balance below what open calls hold.", param="amount", code="below_reserved"
            )
        case Fault.ABOVE_CHARGE:
            return BadRequest(
                "A refund gives back at most what is left of its charge.", param="amount", code="refund_above_charge"
            )
        case Fault.OUT_OF_RANGE:
            return BadRequest("The amount is out of range.", param="amount", code="invalid_value")
        case Fault.NOT_OPEN:
            return LedgerFault(f"credit: {fault}")
        case _:
            assert_never(fault)
