"""What becomes of the calls of a process that died: leases, and the sweep of what nobody holds any more.

Every start is a new row in `instances`, renewed on the database's clock. An instance past its lease is fenced: it
cannot reserve any more, and what it holds open expires. If it comes back after all, its calls settle late, and it
registers anew. On SQLite one process serves at a time, held by the lock file, so everything open at its start
belongs to a dead one.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.errors import LedgerFault, Unavailable
from proxy.ledger.batcher import BATCH_MAX
from proxy.ledger.decide import Expire
from proxy.ledger.ledger import Ledger
from proxy.storage.database import database_now, reading, writing
from proxy.storage.tables import instances, reservations
from proxy.units import MICROS_PER_SECOND, Micros, new_id

log = structlog.get_logger(__name__)

LEASE_S = 20.0
"""How long a process without a sign of life keeps what its calls hold; it renews, and sweeps, four times as often."""

_FOREVER: Micros = 2**62


class Lease:
    """This process's right to hold reservations, for `lease_s` seconds from each renewal."""

    def __init__(self, engine: AsyncEngine, *, is_embedded: bool, lease_s: float = LEASE_S) -> None:
        self._engine = engine
        self._is_embedded = is_embedded
        self._lease_s = lease_s
        self._steady_since = 0.0
        self.id: str | None = None

    @asynccontextmanager
    async def held(self, ledger: Ledger) -> AsyncIterator[None]:
        """Register, clear up after the dead, and keep both up until the block ends.

        Raises `Unavailable` when the database is out of reach at the start.
        """
        await self.register()
        if self._is_embedded:
            await self._fence_all_others()
            await self.sweep(ledger)
            yield
            return
        tasks = [
            asyncio.create_task(self._keep_renewed(), name="lease"),
            asyncio.create_task(self._keep_swept(ledger), name="sweeper"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _lease(self) -> Micros:
        return round(self._lease_s * MICROS_PER_SECOND)

    async def register(self) -> None:
        """Become a new instance."""
        async with writing(self._engine) as connection:
            now = await database_now(connection)
            instance_id = new_id("ins")
            await connection.execute(
                instances.insert().values(
                    id=instance_id,
                    started_at=now,
                    lease_until=_FOREVER if self._is_embedded else now + self._lease,
                    is_fenced=False,
                )
            )
        self.id = instance_id
        self._steady_since = asyncio.get_running_loop().time()

    async def renew(self) -> bool:
        """Extend the lease. False when this instance has been fenced meanwhile."""
        async with writing(self._engine) as connection:
            result = await connection.execute(
                instances.update()
                .where(instances.c.id == self.id, sa.not_(instances.c.is_fenced))
                .values(lease_until=await database_now(connection) + self._lease)
            )
        return result.rowcount > 0

    async def fence_expired(self) -> None:
        """Fence every other instance whose lease has run out."""
        async with writing(self._engine) as connection:
            await connection.execute(
                instances.update()
                .where(
                    instances.c.lease_until < await database_now(connection),
                    sa.not_(instances.c.is_fenced),
                    instances.c.id != self.id,
                )
                .values(is_fenced=True)
            )

    async def sweep(self, ledger: Ledger) -> int:
        """Expire what fenced instances hold open; returns how many reservations were found so."""
        swept = 0
        while True:
            async with reading(self._engine) as connection:
                rows = (
                    await connection.execute(
                        sa.select(reservations.c.id, reservations.c.wallet_id)
                        .join(instances, instances.c.id == reservations.c.owner_id)
                        .where(reservations.c.state == "open", instances.c.is_fenced)
                        .limit(BATCH_MAX)
                    )
                ).all()
            if not rows:
                return swept
            await asyncio.gather(*(ledger.expire(Expire(id=row.id, wallet_id=row.wallet_id)) for row in rows))
            swept += len(rows)
            log.warning("reservations_expired", count=len(rows))

    async def _fence_all_others(self) -> None:
        async with writing(self._engine) as connection:
            await connection.execute(instances.update().where(instances.c.id != self.id).values(is_fenced=True))

    async def _keep_renewed(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            try:
                if not await self.renew():
                    log.error("instance_fenced", instance_id=self.id)
                    await self.register()
            except Unavailable:
                self._steady_since = asyncio.get_running_loop().time()

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
            except (Unavailable, LedgerFault) as exc:
                log.warning("sweep_failed", reason=str(exc))
