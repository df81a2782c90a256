"""The server of one process: takes connections, alone or with siblings on one port, and ends without losing a call.

What SIGTERM does, in this order:

1. Readiness turns red, and every answer that begins from now on closes its connection. Calls are taken for `notice_s`
   seconds more, so that whoever stands in front takes note.
2. Everybody who has connected by then is let in, and the port is closed: new connections are refused, which tells a
   load balancer to try elsewhere, before anything was sent.
3. Calls in flight go on for `drain_s` seconds; then `end_calls` ends those at their provider, by an error each.
4. What is left is cancelled.
"""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from types import FrameType
from typing import cast

import msgspec
import structlog
import uvicorn

from proxy.edge.protocol import LimitedProtocol, ServerConfig

log = structlog.get_logger(__name__)

SIBLINGS_S = 0.1
"""How long a connection waits on the socket of a sibling that does not take it, before somebody else does."""

FRESH_S = 1.0
"""For so long the first request of a connection is waited for that came just before the port was closed."""

_POLL_S = 0.05


class Stopping(msgspec.Struct, frozen=True):
    """How a server ends; times in seconds, as in `settings.ServerSettings`."""

    notice_s: float
    drain_s: float
    on_stopping: Callable[[], None]
    """Called at once when it is told to stop."""
    end_calls: Callable[[], Awaitable[None]]
    """Ends what is still in flight after `drain_s`; returns when that is done."""


class Server(uvicorn.Server):
    """Serves on the first of its sockets, and takes what waits on the others', its siblings', when they do not.

    `on_ready` is called when calls are taken. Once `lifeline_fd` can be read, there is no supervisor any more.
    """

    def __init__(
        self,
        config: ServerConfig,
        stopping: Stopping,
        on_ready: Callable[[], None],
        *,
        lifeline_fd: int | None = None,
    ) -> None:
        super().__init__(config)
        self._stopping = stopping
        self._on_ready = on_ready
        self._lifeline_fd = lifeline_fd
        self._rescuing: asyncio.Task[None] | None = None
        self._is_port_closing = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections, and say so."""
        own, *siblings = sockets or []
        await super().startup([own])
        for sibling in siblings:
            sibling.listen(self.config.backlog)
            sibling.settimeout(0)
        if siblings:
            self._rescuing = asyncio.create_task(self._rescue(siblings), name="siblings")
        if self._lifeline_fd is not None:
            asyncio.get_running_loop().add_reader(self._lifeline_fd, self._lose_supervisor, self._lifeline_fd)
        self._on_ready()

    def _lose_supervisor(self, lifeline_fd: int) -> None:
        """Nobody is left who would end this process or replace it: end as by SIGTERM."""
        asyncio.get_running_loop().remove_reader(lifeline_fd)
        log.error("supervisor_lost")
        self.handle_exit(signal.SIGTERM, None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Turn readiness red at once; the rest follows in the loop."""
        cast("ServerConfig", self.config).is_stopping = True
        self._stopping.on_stopping()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in order; see above."""
        log.info("stopping", connections=len(self.server_state.connections))
        notice_s = self._stopping.notice_s
        self._finish_connections()
        await self._until(lambda: False, notice_s)
        await self._close_port(sockets or [])
        self._finish_connections()
        if not await self._until(self._is_idle, self._stopping.drain_s) and not self.force_exit:
            log.warning("ending_calls", calls=len(self.server_state.tasks))
            await self._stopping.end_calls()
        for task in list(self.server_state.tasks):
            task.cancel(msg="The server has stopped.")
        for server in self.servers:
            server.close()

    def _finish_connections(self) -> None:
        for connection in list(self.server_state.connections):
            cast("LimitedProtocol", connection).finish(idle_s=self._stopping.notice_s, fresh_s=FRESH_S)

    async def _close_port(self, sockets: Iterable[socket.socket]) -> None:
        """Let in whoever waits on any of the sockets, then close them."""
        self._is_port_closing = True
        if self._rescuing is not None:
            await self._rescuing  # it is letting in whom it has accepted
        waiting: list[socket.socket] = []
        for each in sockets:
            waiting += _accepted(each)
            for server in self.servers:  # which has the first of them
                server.close()
            each.close()
        await self._let_in(waiting)

    def _is_idle(self) -> bool:
        return not self.server_state.connections and not self.server_state.tasks

    async def _until(self, is_so: Callable[[], bool], wait_s: float) -> bool:
        """Whether `is_so` within `wait_s`; a second Ctrl-C ends the wait."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + wait_s
        while not is_so():
            if self.force_exit or loop.time() >= give_up_at:
                return False
            await asyncio.sleep(min(_POLL_S, max(0.0, give_up_at - loop.time())))
        return True

    async def _rescue(self, siblings: Sequence[socket.socket]) -> None:
        while not self._is_port_closing:
            await asyncio.sleep(SIBLINGS_S)
            for sibling in siblings:
                await self._let_in(_accepted(sibling))

    async def _let_in(self, connections: Iterable[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        for connection in connections:
            with suppress(OSError):  # it may have left meanwhile
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        return LimitedProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _accepted(listening: socket.socket) -> list[socket.socket]:
    """All connections that wait on `listening`, which does not block."""
    found: list[socket.socket] = []
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:  # nobody waits, or there are no files left to open
            return found
        connection.settimeout(0)
        found.append(connection)
