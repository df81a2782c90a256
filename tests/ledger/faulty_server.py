"""A server that fails at one named point, otherwise put together as `tollgate serve` does it.

`python -m tests.ledger.faulty_server POINT` serves the configuration of its environment and prints one JSON object when
it is ready. At the point it kills itself with SIGKILL, as the kernel or a power cut would; at `during_settle` it loses
the answer to a commit and lives on. What is wrapped are the seams that production code has: the store, the providers
and the ASGI `send`.
"""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Sequence
from enum import StrEnum
from typing import Any

import uvicorn
import uvloop

from proxy.app import Tollgate, build
from proxy.edge.protocol import server_config
from proxy.ledger.decide import Operation, Outcome, Reserve, Settle
from proxy.ledger.store import PostgresStore, SqliteStore, Store, StoreLostError
from proxy.observability import configure_logs
from proxy.settings import load
from proxy.upstream import Headers, Provider, ProviderCall, UpstreamResponse


class Point(StrEnum):
    """Where a call's server fails, in the order of a call."""

    BEFORE_RESERVE_COMMIT = "before_reserve_commit"
    AFTER_RESERVE_COMMIT = "after_reserve_commit"
    AFTER_PROVIDER_ANSWERED = "after_provider_answered"
    MID_STREAM = "mid_stream"
    BEFORE_SETTLE = "before_settle"
    DURING_SETTLE = "during_settle"
    AFTER_SETTLE_COMMIT = "after_settle_commit"
    AFTER_SETTLE_BEFORE_LAST_BYTE = "after_settle_before_last_byte"


def die() -> None:
    """End this process at once: nothing is flushed, nobody is told."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


# ---- the store


class FaultyStore:
    """Fails before or after the commit of the batch that holds a reserve or a settle."""

    def __init__(self, store: Store, point: Point) -> None:
        self._store = store
        self._point = point
        self._is_lost = False

    async def transact(self, operations: Sequence[Operation], *, owner_id: str | None) -> list[Outcome]:
        kinds = {type(operation) for operation in operations}
        dies_at_commit = {Point.BEFORE_RESERVE_COMMIT: Reserve, Point.BEFORE_SETTLE: Settle}
        self._store.dies_at_commit = dies_at_commit.get(self._point) in kinds
        outcomes = await self._store.transact(operations, owner_id=owner_id)
        dies_after = {Point.AFTER_RESERVE_COMMIT: Reserve, Point.AFTER_SETTLE_COMMIT: Settle}
        if dies_after.get(self._point) in kinds:
            die()
        if self._point == Point.DURING_SETTLE and Settle in kinds and not self._is_lost:
            self._is_lost = True
            if isinstance(self._store, PostgresStore):
                self._store._driver.terminate()
            raise StoreLostError("the connection was cut with the answer to the commit on its way")
        return outcomes

    async def check(self) -> None:
        await self._store.check()

    async def aclose(self) -> None:
        await self._store.aclose()


class DyingPostgresStore(PostgresStore):
    """Dies when it would send COMMIT, if it is told to."""

    dies_at_commit = False

    async def _send(self, *statements: str) -> None:
        if statements[-1] == "COMMIT" and self.dies_at_commit:
            await super()._send(*statements[:-1])
            die()
        await super()._send(*statements)


class DyingSqliteStore(SqliteStore):
    """Dies when SQLite would begin with COMMIT, if it is told to."""

    dies_at_commit = False

    def _connect(self) -> sqlite3.Connection:
        connection = super()._connect()
        connection.set_trace_callback(self._trace)
        return connection

    def _trace(self, statement: str) -> None:
        if statement == "COMMIT" and self.dies_at_commit:
            die()


# ---- the provider


class FaultyProvider:
    """Dies while its answer comes, or when all of it is there."""

    def __init__(self, provider: Provider, point: Point) -> None:
        self.name = provider.name
        self._provider = provider
        self._point = point

    async def send(self, call: ProviderCall) -> UpstreamResponse:
        return FaultyResponse(await self._provider.send(call), self._point)

    async def aclose(self) -> None:
        await self._provider.aclose()


class FaultyResponse:
    """An answer during which the server dies."""

    def __init__(self, response: UpstreamResponse, point: Point) -> None:
        self.status: int = response.status
        self.headers: Headers = response.headers
        self._response = response
        self._point = point

    async def chunks(self) -> AsyncIterator[bytes]:
        number = 0
        async for chunk in self._response.chunks():
            yield chunk
            number += 1
            if self._point == Point.MID_STREAM and number == 2:
                for _ in range(5):  # turns of the loop in which what was relayed leaves this process
                    await asyncio.sleep(0)
                die()
        if self._point == Point.AFTER_PROVIDER_ANSWERED:
            die()

    async def aclose(self) -> None:
        await self._response.aclose()


# ---- the whole


class FaultyTollgate(Tollgate):
    """A Tollgate with those parts."""

    def __init__(self, configuration: Any, point: Point) -> None:
        super().__init__(configuration)
        self._point = point

    def _store(self) -> Store:
        if self.configuration.is_embedded:
            return FaultyStore(DyingSqliteStore(self.configuration.sqlite_file, checkpoints=True), self._point)
        return FaultyStore(DyingPostgresStore(self.engine), self._point)

    def _providers(self) -> dict[str, Provider]:
        return {name: FaultyProvider(provider, self._point) for name, provider in super()._providers().items()}


def dying_at_the_last_byte(app: Any) -> Any:
    """`app`, on a server that dies instead of sending the last piece of a paid answer."""

    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        async def send_all_but_the_last(message: Any) -> None:
            if b"[DONE]" in message.get("body", b"") or not message.get("more_body", True):
                die()
            await send(message)

        await app(scope, receive, send_all_but_the_last if scope["path"].startswith("/v1/chat") else send)

    return middleware


async def serve(point: Point) -> None:
    """Serve on a free port until the point, or SIGTERM."""
    configuration = load(os.environ)
    configure_logs()
    listening = socket.create_server(("127.0.0.1", 0))
    tollgate = FaultyTollgate(configuration, point)
    async with tollgate.open():
        app = build(tollgate)
        if point == Point.AFTER_SETTLE_BEFORE_LAST_BYTE:
            app = dying_at_the_last_byte(app)
        config = server_config(app, drain_s=1)
        port = listening.getsockname()[1]
        sys.stdout.write(json.dumps({"base_url": f"http://127.0.0.1:{port}/v1", "key": None}) + "\n")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, lambda _number, _frame: None)  # uvicorn raises it once more when it is done
        await uvicorn.Server(config).serve(sockets=[listening])


if __name__ == "__main__":
    uvloop.run(serve(Point(sys.argv[1])))
