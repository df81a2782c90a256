"""What becomes of the calls of a process that died: leases, and the sweep of what nobody holds any more.

Every start is a new row in `instances`, renewed on the database's clock. An instance past its lease is fenced: it
cannot reserve any more, and what it holds open expires. If it comes back after all, its calls settle late, and it
registers anew. On SQLite one process serves at a time, held by the lock file, so everything open at its start
belongs to a dead one.

Nobody is taken for dead after an outage that was everyone's: whoever fences has seen the database for one full lease.
A server has then renewed its own lease throughout; the command `tollgate sweep`, which has none, watches for as long.

A living process can leak a reservation too, by a bug or when an end cannot be booked: each looks for its own.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.errors import LedgerFault, Unavailable, reason_of
from proxy.ledger.batcher import BATCH_MAX
from proxy.ledger.decide import Expire
from proxy.ledger.ledger import Ledger
from proxy.storage.database import database_now, reading, writing
from proxy.storage.tables import instances, reservations
from proxy.units import MICROS_PER_SECOND, Micros, new_id

log = structlog.get_logger(__name__)

LEASE_S = 20.0
"""How long a process without a sign of life keeps what its calls hold; it renews, and sweeps, four times as often."""

STRAY_S = 30
"""What is open for longer and belongs to no call in flight is nobody's. Long enough for what is just being booked."""

_FOREVER: Micros = 2**62
_SHOWN_MAX = 20


_me = instances.alias()
_FENCE_EXPIRED = (
    instances.update()
    .where(
        instances.c.lease_until < sa.bindparam("now"),
        sa.not_(instances.c.is_fenced),
        sa.exists().where(
            _me.c.id == sa.bindparam("me"), _me.c.lease_until >= sa.bindparam("now"), sa.not_(_me.c.is_fenced)
        ),
    )
    .values(is_fenced=True)
)
"""Made once: a new one every few seconds would be a cycle each time, for the garbage collector."""


class Lease:
    """This process's right to hold reservations, for `lease_s` seconds from each renewal.

    What it holds open for longer than `stray_s` seconds, and no call of it does, is taken for leaked.
    """

    def __init__(
        self, engine: AsyncEngine, *, is_embedded: bool, lease_s: float = LEASE_S, stray_s: float = STRAY_S
    ) -> None:
        self._engine = engine
        self._is_embedded = is_embedded
        self._lease_s = lease_s
        self._stray_s = stray_s
        self._steady_since = 0.0
        self._suspects: set[str] = set()
        self._held_until = 0.0
        self.id: str | None = None

    @property
    def is_held(self) -> bool:
        """Whether nobody may take this process for dead just now, as far as it knows."""
        return self._is_embedded or asyncio.get_running_loop().time() < self._held_until

    @asynccontextmanager
    async def held(self, ledger: Ledger) -> AsyncIterator[None]:
        """Register, clear up after the dead, and keep both up until the block ends.

        Raises `Unavailable` when the database is out of reach at the start.
        """
        await self.register()
        if self._is_embedded:
            await fence_all(self._engine, but=self.id)
            await self.sweep(ledger)
        tasks = [asyncio.create_task(self._keep_swept(ledger), name="sweeper")]
        if not self._is_embedded:
            tasks.append(asyncio.create_task(self._keep_renewed(), name="lease"))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def register(self) -> None:
        """Become a new instance."""
        begun = asyncio.get_running_loop().time()
        async with writing(self._engine) as connection:
            now = await database_now(connection)
            instance_id = new_id("ins")
            await connection.execute(
                instances.insert().values(
                    id=instance_id,
                    started_at=now,
                    lease_until=_FOREVER if self._is_embedded else now + _micros(self._lease_s),
                    is_fenced=False,
                )
            )
        self.id = instance_id
        self._held_until = begun + self._lease_s
        self._steady_since = asyncio.get_running_loop().time()

    async def renew(self) -> bool:
        """Extend the lease. False when this instance has been fenced meanwhile.

        A lease that had run out is extended all the same; but whatever held its owner up may have held up the others.
        """
        begun = asyncio.get_running_loop().time()
        async with writing(self._engine) as connection:
            held_until = await connection.scalar(
                sa.select(instances.c.lease_until)
                .where(instances.c.id == self.id, sa.not_(instances.c.is_fenced))
                .with_for_update()
            )
            if held_until is None:
                return False
            now = await database_now(connection)
            await connection.execute(
                instances.update().where(instances.c.id == self.id).values(lease_until=now + _micros(self._lease_s))
            )
        self._held_until = begun + self._lease_s
        if held_until < now:
            self._steady_since = asyncio.get_running_loop().time()
        return True

    async def fence_expired(self) -> None:
        """Fence every other instance whose lease has run out, unless this one's has too."""
        async with writing(self._engine) as connection:
            await connection.execute(_FENCE_EXPIRED, {"me": self.id, "now": await database_now(connection)})

    async def sweep(self, ledger: Ledger) -> int:
        """Expire what fenced instances hold open; returns how many reservations were found so."""
        return await expire_fenced(self._engine, ledger)

    async def expire_strays(self, ledger: Ledger) -> int:
        """Expire what this instance holds open for no call; returns how many reservations were found so.

        The database is read first and the ledger asked afterwards: whatever was open then had been in flight before,
        so what is not in flight now has ended, or never will. Seen once it may just be ending: it must be seen twice.
        """
        async with reading(self._engine) as connection:
            opened_before = await database_now(connection) - _micros(self._stray_s)
            rows = (
                await connection.execute(
                    sa.select(reservations.c.id, reservations.c.wallet_id).where(
                        reservations.c.state == "open",
                        reservations.c.owner_id == self.id,
                        reservations.c.created_at < opened_before,
                    )
                )
            ).all()
        wallet_of = {row.id: row.wallet_id for row in rows if not ledger.is_in_flight(row.id)}
        strays = self._suspects & wallet_of.keys()
        self._suspects = set(wallet_of)
        if strays:
            log.error("reservations_leaked", count=len(strays), request_ids=sorted(strays)[:_SHOWN_MAX])
            await _expire(ledger, [(stray, wallet_of[stray]) for stray in strays])
        return len(strays)

    async def _keep_renewed(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            try:
                if not await self.renew():
                    log.error("instance_fenced", instance_id=self.id)
                    await self.register()
            except Unavailable:
                self._steady_since = asyncio.get_running_loop().time()
            except Exception:
                self._steady_since = asyncio.get_running_loop().time()
                log.exception("renewal_failed")

    async def _keep_swept(self, ledger: Ledger) -> None:
        """Sweep now and then; but fence nobody until this process has itself renewed for one full lease.

        Otherwise the first to come back after an outage of the database would expire everyone's calls.
        """
        while True:
            await asyncio.sleep(self._lease_s / 4 * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
            try:
                if asyncio.get_running_loop().time() - self._steady_since > self._lease_s:
                    await self.fence_expired()
                await self.sweep(ledger)
                await self.expire_strays(ledger)
            except (Unavailable, LedgerFault) as exc:
                log.warning("sweep_failed", reason=reason_of(exc))
            except Exception:
                log.exception("sweep_failed")


def _micros(seconds: float) -> Micros:
    return round(seconds * MICROS_PER_SECOND)


class Swept(msgspec.Struct, frozen=True):
    """What a sweep by hand did: how many instances it fenced, and how many reservations it expired."""

    fenced: int
    expired: int


async def sweep_by_hand(engine: AsyncEngine, ledger: Ledger, *, is_sole: bool, lease_s: float = LEASE_S) -> Swept:
    """Expire what dead processes hold open, for a command that has no lease of its own.

    `is_sole` says that no other process serves, so that everything open is a dead one's. Otherwise an instance is
    dead when its lease has run out and it does not renew while it is watched for one full lease: that takes so long.

    Raises `Unavailable` when the database is out of reach, and then fences nobody.
    """
    fenced = await fence_all(engine) if is_sole else await fence_silent(engine, lease_s)
    return Swept(fenced=fenced, expired=await expire_fenced(engine, ledger))


async def fence_all(engine: AsyncEngine, *, but: str | None = None) -> int:
    """Fence every instance that is not yet, except for the instance `but`; returns how many."""
    async with writing(engine) as connection:
        result = await connection.execute(
            instances.update()
            .where(sa.not_(instances.c.is_fenced), instances.c.id != (but or ""))
            .values(is_fenced=True)
        )
    return result.rowcount


async def fence_silent(engine: AsyncEngine, lease_s: float) -> int:
    """Fence the instances that hold something open past their lease and let one more go by; returns how many."""
    silent = await _past_their_lease(engine)
    if silent:
        log.info("watching_for_a_lease", instances=len(silent), seconds=lease_s)
    for _ in range(4):
        if not silent:
            return 0
        await asyncio.sleep(lease_s / 4)
        silent &= await _past_their_lease(engine)
    fenced = 0
    async with writing(engine) as connection:
        for instance_id, lease_until in sorted(silent):
            result = await connection.execute(
                instances.update()
                .where(
                    instances.c.id == instance_id,
                    instances.c.lease_until == lease_until,
                    sa.not_(instances.c.is_fenced),
                )
                .values(is_fenced=True)
            )
            fenced += result.rowcount
    return fenced


async def _past_their_lease(engine: AsyncEngine) -> set[tuple[str, Micros]]:
    """The instances that hold something open and whose leases have run out, each with the end of its lease."""
    async with reading(engine) as connection:
        rows = await connection.execute(
            sa.select(instances.c.id, instances.c.lease_until)
            .join(reservations, reservations.c.owner_id == instances.c.id)
            .where(
                reservations.c.state == "open",
                sa.not_(instances.c.is_fenced),
                instances.c.lease_until < await database_now(connection),
            )
            .distinct()
        )
        return {(row.id, row.lease_until) for row in rows}


async def expire_fenced(engine: AsyncEngine, ledger: Ledger) -> int:
    """Expire what fenced instances hold open, a batch at a time; returns how many reservations were found so."""
    expired = 0
    while True:
        async with reading(engine) as connection:
            rows = (
                await connection.execute(
                    sa.select(reservations.c.id, reservations.c.wallet_id)
                    .join(instances, instances.c.id == reservations.c.owner_id)
                    .where(reservations.c.state == "open", instances.c.is_fenced)
                    .limit(BATCH_MAX)
                )
            ).all()
        if not rows:
            return expired
        await _expire(ledger, [(row.id, row.wallet_id) for row in rows])
        expired += len(rows)
        log.warning("reservations_expired", count=len(rows))


async def _expire(ledger: Ledger, found: list[tuple[str, str]]) -> None:
    await asyncio.gather(*(ledger.expire(Expire(id=id_, wallet_id=wallet_id)) for id_, wallet_id in found))
