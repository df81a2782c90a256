"""What a process measures of itself now and then, rather than counting it as it happens."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from proxy import __version__
from proxy.exchange import Exchange
from proxy.ledger.ledger import Ledger
from proxy.ledger.recovery import Lease
from proxy.metrics import (
    BUILD,
    CONNECTIONS,
    COOLING,
    DATABASE_LOST,
    FILES,
    LAG,
    LEASES,
    LEDGER_LOST,
    LEDGER_WAITING,
    MEMORY,
    MICROS,
    OPEN,
    PROVIDER_CALLS,
    Labels,
    Metrics,
)

REFRESH_S = 1.0
"""How old what other processes of the server say of themselves may be."""

_PROCESS = Path("/proc/self")


class Gauges(msgspec.Struct, frozen=True):
    """The parts of a process that are looked at."""

    metrics: Metrics
    ledger: Ledger
    lease: Lease
    exchange: Exchange
    engine: AsyncEngine
    is_database_lost: Callable[[], bool]

    def refresh(self) -> None:
        """Measure everything anew."""
        metrics, worker = self.metrics, (self.metrics.worker,)
        metrics.set(BUILD, {(__version__,): 1})
        metrics.set(OPEN, {(): self.ledger.in_flight})
        metrics.set(LEDGER_WAITING, {(): self.ledger.waiting})
        metrics.set(LEDGER_LOST, {(): int(self.ledger.is_lost)})
        metrics.set(DATABASE_LOST, {(): int(self.is_database_lost())})
        metrics.set(LEASES, {(): int(self.lease.is_held)})
        metrics.set(PROVIDER_CALLS, {(name,): count for name, count in self.exchange.calls_by_provider().items()})
        metrics.set(COOLING, {_place(target): 1 for target in self.exchange.cooling()})
        pool = self.engine.pool
        if isinstance(pool, QueuePool):
            metrics.set(CONNECTIONS, {("in_use",): pool.checkedout(), ("idle",): pool.checkedin()})
        metrics.set(MEMORY, {worker: _memory_bytes()})
        metrics.set(FILES, {worker: _open_files()})

    def lag(self, seconds: float) -> None:
        """Note how late the event loop was."""
        self.metrics.set(LAG, {(self.metrics.worker,): int(max(seconds, 0.0) * MICROS)})


def _place(target: str) -> Labels:
    provider, _, model = target.partition("/")
    return provider, model


def _memory_bytes() -> int:
    """Resident now, or where the system does not tell, at most until now."""
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def _open_files() -> int:
    try:
        return len(os.listdir(_PROCESS / "fd"))  # noqa: PTH208 - with a thousand streams, a thousand paths less
    except OSError:
        return 0
