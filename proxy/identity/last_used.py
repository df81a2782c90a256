"""When each key was used last: coarsely, in the background, never as a write of the call itself."""

import asyncio

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.errors import Unavailable
from proxy.storage.database import writing
from proxy.storage.tables import api_keys
from proxy.units import MICROS_PER_SECOND, Micros

WRITE_S = 5.0
"""How long a use waits to be written."""

COARSE_S = 60
"""A key that was written is not written again for so long, however often it is used."""

_KEYS_MAX = 10_000

_FREE = (
    sa.select(api_keys.c.id)
    .where(api_keys.c.id.in_(sa.bindparam("ids", expanding=True)))
    .with_for_update(key_share=True, skip_locked=True)
)
"""Those that no call is just booked on: whoever takes locks without a wallet's must never wait for one."""

_WRITE = api_keys.update().where(api_keys.c.id == sa.bindparam("key_id")).values(last_used_at=sa.bindparam("used_at"))


class LastUsed:
    """Notes uses at the cost of a look into a dictionary, and writes them from time to time."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._noted: dict[str, Micros] = {}
        self._waiting: dict[str, Micros] = {}

    def note(self, key_id: str, now: Micros) -> None:
        """The key was used at `now`."""
        if now - self._noted.get(key_id, 0) < COARSE_S * MICROS_PER_SECOND:
            return
        if len(self._noted) >= _KEYS_MAX:
            del self._noted[next(iter(self._noted))]
        self._noted[key_id] = self._waiting[key_id] = now

    async def write(self) -> None:
        """Write what waits. What cannot be written now is tried again with the next."""
        waiting = self._waiting
        if not waiting:
            return
        self._waiting = {}
        try:
            async with writing(self._engine) as connection:
                written = list(await connection.scalars(_FREE, {"ids": list(waiting)}))
                if written:
                    await connection.execute(
                        _WRITE, [{"key_id": key_id, "used_at": waiting[key_id]} for key_id in written]
                    )
        except Unavailable:
            written = []
        for key_id in waiting.keys() - set(written):
            self._waiting.setdefault(key_id, waiting[key_id])

    async def keep_writing(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(WRITE_S)
            await self.write()
