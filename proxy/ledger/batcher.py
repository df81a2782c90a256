"""Many callers, one transaction: whatever waits while a batch is written becomes the next batch.

There is no timer: a lone caller's batch of one starts at once, and under load batches grow by themselves. The
contract, for every operation given to it:

* A lost connection leaves the outcome unknown: the same operations are sent again until the database answers,
  and nobody is told of a failure before that.
* An operation that the database refuses fails alone: its batch is split in halves until it is found.
* The same operation twice in one batch is decided once. Two credits alike are two, unless an idempotency key says
  otherwise: one without gets a key of its own here, so that sending it again does not book it again.
* A caller that has gone while its reserve waited holds nothing: what was granted is released.
* Settles are never refused for load; reserves are, when too many wait.
* Closing waits for the database, but not for ever, and not at all for reserves whose callers have left: what cannot be
  written by then is given up with an error in the log, and is freed when the process's lease has run out.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import structlog

from proxy.errors import LedgerFault, TollgateError, Unavailable
from proxy.ledger.decide import Credit, Faulted, Operation, Outcome, Receipt, Release, Reserve, Reserved
from proxy.ledger.store import Store, StoreLostError
from proxy.metrics import Metrics
from proxy.units import new_id

log = structlog.get_logger(__name__)

BATCH_MAX = 512
"""Operations in one transaction: the gain is flat from here, and the wait of the last in line is not."""

RESERVES_WAITING_MAX = 4096
"""Beyond this a new call is refused: it would wait longer than its client does."""

_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Pauses between attempts while the database is out of reach; the last one repeats."""

CLOSE_WAIT_S_MAX = 30.0
"""How long closing waits for a database that is out of reach."""

Waiting = tuple[Operation, "asyncio.Future[Outcome]"]


class Batcher:
    """The queue before one `Store`, and the task that empties it.

    `owner_id` names the instance on whose lease reservations are held; it is asked at each batch. `on_ended` is called
    with the id of each call whose end is booked, or never will be, whether anybody still waits for it or not.
    """

    def __init__(
        self,
        store: Store,
        owner_id: Callable[[], str | None],
        metrics: Metrics | None = None,
        *,
        on_ended: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._store = store
        self._owner_id = owner_id
        self._on_ended = on_ended
        self._queue: deque[Waiting] = deque()
        self._reserves_waiting = 0
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._is_closing = False
        self._close_by = 0.0
        self._is_lost = False
        self._busy_since: float | None = None

    @property
    def waiting(self) -> int:
        """How many operations are queued."""
        return len(self._queue)

    @property
    def busy_s(self) -> float:
        """For how long the transaction under way has been, in seconds; 0 without one."""
        return 0.0 if self._busy_since is None else self._loop.time() - self._busy_since

    @property
    def is_lost(self) -> bool:
        """Whether the last attempt did not reach the database."""
        return self._is_lost

    def start(self) -> None:
        """Begin to empty the queue, in a task of its own on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="ledger-batcher")

    async def aclose(self, wait_s: float = CLOSE_WAIT_S_MAX) -> None:
        """Write what is queued, then stop. Waits for a database that is out of reach for at most about `wait_s`."""
        self._is_closing = True
        self._close_by = asyncio.get_running_loop().time() + wait_s
        self._work.set()
        if self._task is not None:
            await self._task
        await self._store.aclose()

    def submit(self, operation: Operation) -> "asyncio.Future[Outcome]":
        """Queue `operation` and return at once; from here on it no longer depends on the caller.

        The future fails with `LedgerFault` when the operation cannot be booked. Raises `Unavailable` for a reserve
        when too many wait, and once the ledger is closing.
        """
        if type(operation) is Reserve:
            if self._is_closing or self._reserves_waiting >= RESERVES_WAITING_MAX:
                raise Unavailable("Too many calls are waiting. Try again shortly.")
            self._reserves_waiting += 1
        elif type(operation) is Credit and operation.idempotency_key is None:
            operation = msgspec.structs.replace(operation, idempotency_key=new_id("idem"))
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if not self._queue:
            self._work.set()
        self._queue.append((operation, future))
        return future

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._is_closing:
                    return
                self._work.clear()
                await self._work.wait()
                continue
            await self._write(self._next_batch())

    def _next_batch(self) -> list[Waiting]:
        """What waits, as far as it fits into one; reserves whose callers have left are dropped, and nothing else is."""
        batch: list[Waiting] = []
        for _ in range(min(BATCH_MAX, len(self._queue))):
            operation, future = waiting = self._queue.popleft()
            if type(operation) is Reserve:
                self._reserves_waiting -= 1
                if future.done():
                    continue
            batch.append(waiting)
        return batch

    async def _write(self, batch: list[Waiting]) -> None:
        if not batch:
            return
        operations, answered_by = _coalesced([operation for operation, _ in batch])
        try:
            outcomes = await self._until_answered(operations, batch)
        except Exception as exc:
            if len(operations) > 1:
                middle = len(batch) // 2
                await self._write(batch[:middle])
                await self._write(batch[middle:])
                return
            log.exception("ledger_refused", operation=repr(operations[0]))
            fault = LedgerFault("The ledger could not book this operation.")
            fault.__cause__ = exc
            for operation, future in batch:
                self._fail(operation, future, fault)
            return
        if outcomes is None:
            log.error("ledger_given_up", operations=[repr(operation) for operation in operations])
            for operation, future in batch:
                self._fail(operation, future, Unavailable("The ledger is out of reach just now."))
            return
        for (operation, future), position in zip(batch, answered_by, strict=True):
            self._answer(operation, future, outcomes[position])

    async def _until_answered(self, operations: Sequence[Operation], batch: list[Waiting]) -> list[Outcome] | None:
        """What the database answers in the end; None when it is not waited for any longer."""
        attempt = 0
        while True:
            begun = self._busy_since = self._loop.time()
            try:
                outcomes = await self._store.transact(operations, owner_id=self._owner_id())
            except StoreLostError as exc:
                if not self._is_lost:
                    log.warning("ledger_lost", reason=str(exc), operations=len(operations))
                self._is_lost = True
                if self._is_closing and not self._is_worth_waiting_for(batch):
                    return None
                await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
                attempt += 1
            else:
                self._is_lost = False
                self._metrics.batch(len(operations), self._loop.time() - begun)
                return outcomes
            finally:
                self._busy_since = None

    def _is_worth_waiting_for(self, batch: list[Waiting]) -> bool:
        if asyncio.get_running_loop().time() >= self._close_by:
            return False
        return not all(isinstance(operation, Reserve) and future.done() for operation, future in batch)

    def _answer(self, operation: Operation, future: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
        if type(outcome) is Faulted and type(operation) is not Credit:
            log.error("ledger_fault", request_id=operation.id, operation=type(operation).__name__, fault=outcome.fault)
        is_waited_for = not future.done()
        if is_waited_for:
            future.set_result(outcome)
        if type(operation) is Reserve:
            if not is_waited_for and isinstance(outcome, Reserved):
                receipt = Receipt(outcome="caller_gone")
                self.submit(Release(id=operation.id, wallet_id=operation.wallet_id, receipt=receipt))
        elif type(operation) is not Credit:
            self._on_ended(operation.id)

    def _fail(self, operation: Operation, future: "asyncio.Future[Outcome]", error: TollgateError) -> None:
        if not future.done():
            future.set_exception(error)
        if not isinstance(operation, Reserve | Credit):
            self._on_ended(operation.id)


def _coalesced(operations: list[Operation]) -> tuple[list[Operation], Sequence[int]]:
    """The operations without those that are there already, and by which of them each is answered.

    Where all ids differ nothing more is compared.
    """
    if len({operation.id for operation in operations if type(operation) is not Credit}) == len(operations):
        return operations, range(len(operations))
    positions: dict[Operation, int] = {}
    answered_by = [positions.setdefault(operation, len(positions)) for operation in operations]
    return list(positions), answered_by
