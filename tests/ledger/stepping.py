"""The ledger's store on PostgreSQL with a hand on every statement: to stop where a test says, or leave out the lock."""

import asyncio
from typing import Any

from proxy.ledger import statements as sql
from proxy.ledger.store import PostgresStore

LOCK = 1
"""The place of the lock among the statements of a transaction, counted from its BEGIN."""

FENCE = 2
"""The place of the statement that reads the clock and the fence."""


class SteppedStore(PostgresStore):
    """A store whose next transaction waits before its statement number `stop` until `go`.

    What the store sends as one message goes statement by statement here. A `stop` at the number of its statements is
    after its commit, before anyone knows of it. `is_unlocked` leaves the lock out.
    """

    def __init__(self, engine, *, stop: int | None = None, is_unlocked: bool = False) -> None:
        super().__init__(engine)
        self.stop = stop
        self.is_unlocked = is_unlocked
        self.statements: list[str] = []
        self.is_there = asyncio.Event()
        self.go = asyncio.Event()

    async def _connect(self) -> None:
        await super()._connect()
        await self._driver.execute("SET idle_in_transaction_session_timeout = 0")  # a test takes its time
        self._driver = _SteppedDriver(self._driver, self)

    async def _send(self, *statements: str) -> None:
        for statement in statements:
            await self.step()
            self.statements.append(statement)
            if not (self.is_unlocked and statement.startswith(sql.LOCK_POSTGRESQL)):
                await super()._send(statement)
            if statement == "COMMIT":
                await self.step()

    async def _read(self, *values: str | None) -> Any:
        await self.step()
        self.statements.append(sql.READ_POSTGRESQL)
        return await super()._read(*values)

    async def step(self) -> None:
        """Wait if this is the place."""
        if len(self.statements) == self.stop:
            self.is_there.set()
            await self.go.wait()


class _SteppedDriver:
    """The part of asyncpg's connection that a store uses."""

    def __init__(self, driver: Any, store: SteppedStore) -> None:
        self._driver = driver
        self._store = store
        self.execute = driver.execute

    async def fetch(self, statement: str, *values: object) -> Any:
        await self._store.step()
        self._store.statements.append(statement)
        return await self._driver.fetch(statement, *values)

    def is_closed(self) -> bool:
        return self._driver.is_closed()

    def terminate(self) -> None:
        self._driver.terminate()
