"""An `HttpClient` of our own: HTTP/1.1 over asyncio's transports, as little as upstream calls need.

A call goes through these states; `_Pool` counts the slots, `_Connection` holds the socket, `_Answer` the reader's side:

    waiting      for a slot, first come first served
    connecting   TCP, then TLS; or not at all, when an idle connection to the same origin is fit for use
    sent         the request was handed to the transport; from here on nobody can tell what the provider has read
    answering    the head has come, the body is coming
    over         the body has come to its end, or the call has failed or been given up

A slot is taken on leaving `waiting` and given back, once, on reaching `over`: by `_Connection.finish` when the answer
is complete, which also makes the connection idle if it can be used again, or by `_Connection.stop`, which closes it.
Both do their work without waiting for anything, so that no cancellation can come between. What fails before `sent` is
`UpstreamUnreachable`, what fails after it is `UpstreamTimeout` or `UpstreamBroken`; an idle connection that turns out
to be closed before anything was written is replaced by another one.

The connection is free as soon as its answer is complete, even if the reader has not come to the end of it. A reader
that falls behind stops the socket: no more than `BUFFER_BYTES` and what one read of the loop brings are ever held.
"""

import asyncio
import ipaddress
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import zip_longest
from typing import NoReturn, Self, cast

from proxy.errors import UpstreamBroken, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from proxy.outbox import outbox_of
from proxy.upstream import Headers, UpstreamResponse
from proxy.upstream.client import (
    ALL_IN_USE,
    BROKE,
    CONNECTIONS_MAX,
    KEEPALIVE_MAX,
    KEEPALIVE_S,
    NO_ADDRESS,
    NOT_CONNECTED,
    NOT_CONNECTED_IN_TIME,
    NOT_HTTP,
    NOT_SENDABLE,
    SILENT,
    SPENT,
    Timeouts,
)
from proxy.upstream.http1 import Address, AnswerParser, address, request_head

BUFFER_BYTES = 65_536
"""Of a body, above which the socket is no longer read; asyncio's own default for the other direction."""

WRITE_BYTES = 262_144
"""Of a request's body, that are handed to the transport at a time."""

_HAPPY_EYEBALLS_S = 0.25
"""How long one address of a host may take before the next one is tried beside it (RFC 8305, section 5)."""

_LAST_READS_MAX = 4
"""An answer that is longer than this many reads is no refusal."""

_CLOSING_S = 1.0
"""How long closing the client waits for the loop to be done with the sockets."""

_Origin = tuple[bool, str, int]


class LeanClient:
    """See `HttpClient`. `tls` replaces the default trust in the system's authorities."""

    def __init__(
        self,
        *,
        connections_max: int = CONNECTIONS_MAX,
        keepalive_max: int = KEEPALIVE_MAX,
        keepalive_s: float = KEEPALIVE_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls or ssl.create_default_context()
        self._pool = _Pool(connections_max=connections_max, keepalive_max=keepalive_max, keepalive_s=keepalive_s)

    async def send(  # noqa: PLR0913 - a request has this many parts
        self, *, provider: str, method: str, url: str, headers: Headers, body: bytes, timeouts: Timeouts
    ) -> UpstreamResponse:
        """Send one request; see `HttpClient.send`."""
        deadline = time.monotonic() + timeouts.first_byte_s
        try:
            place = address(url)
        except ValueError as exc:
            raise UpstreamUnreachable(NO_ADDRESS, provider=provider) from exc
        try:
            head = request_head(method, place, headers, len(body))
        except ValueError as exc:
            raise UpstreamUnreachable(NOT_SENDABLE, provider=provider) from exc
        connection = self._pool.take(place.origin)
        if connection is None:
            connection = await self._connected(place, provider, timeouts.connect_s, deadline)
        # From here to the first wait for the answer nothing is awaited: a slot always has an answer that gives it back.
        answer = _Answer(connection, provider=provider, idle_s=timeouts.idle_s)
        connection.start(answer, head, body, is_bodiless=method == "HEAD")
        await answer.wait_for_head(deadline)
        return answer

    async def aclose(self) -> None:
        """Close all connections; see `HttpClient.aclose`."""
        await self._pool.aclose()

    async def _connected(self, place: Address, provider: str, connect_s: float, deadline: float) -> "_Connection":
        """An open connection that holds a slot.

        Raises `UpstreamUnreachable`.
        """
        if not await self._pool.acquire(min(connect_s, deadline - time.monotonic())):
            raise UpstreamUnreachable(ALL_IN_USE, provider=provider)
        try:
            return self._pool.take_idle(place.origin) or await self._connect(place, connect_s, deadline)
        except BaseException as exc:
            self._pool.release()
            if isinstance(exc, TimeoutError):
                raise UpstreamUnreachable(NOT_CONNECTED_IN_TIME, provider=provider) from exc
            # Names that cannot be looked up are `ValueError`s, all else is of the network or of TLS.
            if isinstance(exc, OSError | ValueError):
                raise UpstreamUnreachable(NOT_CONNECTED, provider=provider) from exc
            raise

    async def _connect(self, place: Address, connect_s: float, deadline: float) -> "_Connection":
        loop = asyncio.get_running_loop()
        self._pool.make_room()
        async with asyncio.timeout(min(connect_s, deadline - loop.time())):
            connection = await _dial(self._pool, place)
        try:
            if place.is_tls:
                async with asyncio.timeout(min(connect_s, deadline - loop.time())):
                    await connection.start_tls(self._tls, place.host)
        except BaseException:
            connection.abandon()
            raise
        if not self._pool.keeps(connection):
            connection.abandon()
            raise ConnectionAbortedError
        return connection


async def _dial(pool: "_Pool", place: Address) -> "_Connection":
    """A TCP connection to the first address of the host that answers ("happy eyeballs", RFC 8305).

    uvloop does not have this, and asyncio's own leaves sockets open when it is cancelled.

    Raises `OSError` or `ValueError` when there is no address, or none answers.
    """
    tried: list[_Connection] = []
    attempts: set[asyncio.Task[_Connection]] = set()
    hosts = deque(await _addresses(place))
    failure: BaseException | None = None
    winner: _Connection | None = None
    try:
        while hosts or attempts:
            if hosts:
                tried.append(_Connection(pool, place.origin))
                attempts.add(asyncio.create_task(tried[-1].connect(hosts.popleft(), place.port)))
            done, attempts = await asyncio.wait(
                attempts, timeout=_HAPPY_EYEBALLS_S if hosts else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                failure = attempt.exception()
                if failure is None:
                    winner = attempt.result()
            if winner is not None:
                return winner
        raise failure or OSError
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(lambda done: done.cancelled() or done.exception())
        for connection in tried:
            if connection is not winner:
                connection.abandon()


async def _addresses(place: Address) -> list[str]:
    """The IP addresses of a host, the two families in turn."""
    try:
        return [str(ipaddress.ip_address(place.host))]
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    hosts = [(family, str(address[0])) for family, _, _, _, address in found]
    preferred = [host for family, host in hosts if family == hosts[0][0]]
    others = [host for family, host in hosts if family != hosts[0][0]]
    return [host for pair in zip_longest(preferred, others) for host in pair if host is not None]


class _Pool:
    """Slots for calls, and the connections that wait for one.

    No more than `connections_max` connections are open, idle ones included. `in_use` counts the slots that are taken.
    """

    def __init__(self, *, connections_max: int, keepalive_max: int, keepalive_s: float) -> None:
        self.in_use = 0
        self._connections_max = connections_max
        self._keepalive_max = keepalive_max
        self._keepalive_s = keepalive_s
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._idle: dict[_Origin, deque[_Connection]] = {}
        """By origin, the longest idle first."""
        self._idle_count = 0
        self._open: set[_Connection] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._emptied: asyncio.Future[None] | None = None

    async def acquire(self, wait_s: float) -> bool:
        """Take a slot, or return False when none became free in time or the client was closed."""
        if self._is_closed:
            return False
        if self.in_use < self._connections_max:
            self.in_use += 1
            return True
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(wait_s):
                return await waiter
        except BaseException as exc:
            if not waiter.cancelled() and waiter.done() and waiter.result():
                # It was given a slot in the very moment in which it was cancelled.
                self.release()
            with suppress(ValueError):
                self._waiting.remove(waiter)
            if isinstance(exc, TimeoutError):
                return False
            raise

    def take(self, origin: _Origin) -> "_Connection | None":
        """A slot and an idle connection to `origin`, if there are both: the common case, in which nothing waits."""
        if self._is_closed or self.in_use >= self._connections_max:
            return None
        connection = self.take_idle(origin)
        if connection is not None:
            self.in_use += 1
        return connection

    def release(self) -> None:
        """Give a slot back: to whoever has waited longest, or to the pool."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(True)
                return
        self.in_use -= 1

    def take_idle(self, origin: _Origin) -> "_Connection | None":
        """The most recently used connection to `origin` that is fit for another request; unfit ones are closed."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if connection.is_fit(idle_s_max=self._keepalive_s):
                return connection
            connection.close()
        return None

    def put_idle(self, connection: "_Connection") -> None:
        """Keep `connection` for another request, for a while, or close it when there are enough."""
        if self._is_closed or self._idle_count >= self._keepalive_max:
            connection.close()
            return
        self._idle.setdefault(connection.origin, deque()).append(connection)
        self._idle_count += 1
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(self._keepalive_s, self._sweep)

    def make_room(self) -> None:
        """Close the longest idle connection if another one would be one too many."""
        if self.in_use + self._idle_count <= self._connections_max:
            return
        oldest = min((idle[0] for idle in self._idle.values() if idle), key=lambda connection: connection.idle_since)
        oldest.close()

    def opened(self, connection: "_Connection") -> None:
        """Know of a connection whose socket is open."""
        self._open.add(connection)

    def keeps(self, connection: "_Connection") -> bool:
        """Whether `connection` is still open, and wanted."""
        return connection in self._open and not self._is_closed

    def forget(self, connection: "_Connection") -> None:
        """Take a connection that is closed or closing out of the idle ones."""
        idle = self._idle.get(connection.origin)
        if idle and connection in idle:
            idle.remove(connection)
            self._idle_count -= 1

    def lost(self, connection: "_Connection") -> None:
        """Know that the socket of `connection` is closed."""
        self._open.discard(connection)
        if self._emptied and not self._open and not self._emptied.done():
            self._emptied.set_result(None)

    async def aclose(self) -> None:
        """Refuse those who wait, break all calls, close all connections."""
        self._is_closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(False)
        for connection in tuple(self._open):
            connection.stop(UpstreamBroken, SPENT)
        if self._open:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._emptied], timeout=_CLOSING_S)

    def _sweep(self) -> None:
        """Close what has been idle for too long, and come back for the rest."""
        loop = asyncio.get_running_loop()
        self._sweeping = None
        expired_at = loop.time() - self._keepalive_s
        for origin, idle in tuple(self._idle.items()):
            while idle and idle[0].idle_since <= expired_at:
                idle[0].close()
            if not idle:
                del self._idle[origin]
        if self._idle_count:
            oldest = min(idle[0].idle_since for idle in self._idle.values())
            self._sweeping = loop.call_at(oldest + self._keepalive_s, self._sweep)


class _Connection(asyncio.Protocol):
    """One socket, and the answer that is expected on it, if any."""

    def __init__(self, pool: _Pool, origin: _Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self._pool = pool
        self.loop = asyncio.get_running_loop()
        self._parser = AnswerParser()
        self._poll = select.poll()
        self._transport: asyncio.Transport | None = None
        self._answer: _Answer | None = None
        self._outbox = outbox_of(self.loop)
        self._unsent = memoryview(b"")
        self._is_writing_paused = False
        self._is_reading_paused = False
        self._is_closed = False
        self._due_at: float | None = None
        """When the provider has been silent for too long; None while nobody waits for it."""
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = 0.0

    async def connect(self, host: str, port: int) -> Self:
        """Connect to the IP address `host`.

        Raises `OSError`.
        """
        await self.loop.create_connection(lambda: self, host, port)
        return self

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Make the handshake; `host` is what the certificate must be for."""
        assert self._transport is not None, "connected"  # noqa: S101 - by the caller
        transport = await self.loop.start_tls(self._transport, self, context, server_hostname=host)
        if transport is None:
            raise ConnectionResetError
        self._transport = transport

    def is_fit(self, *, idle_s_max: float) -> bool:
        """Whether another request may be sent: open, not idle for too long, and nothing has come.

        The kernel is asked too, since a close may have arrived that the loop has not come to yet.
        """
        if self._is_closed or self.loop.time() - self.idle_since > idle_s_max:
            return False
        return not self._poll.poll(0)

    def start(self, answer: "_Answer", head: bytes, body: bytes, *, is_bodiless: bool) -> None:
        """Send a request whose answer goes to `answer`."""
        assert self._transport is not None, "connected"  # noqa: S101 - by the caller
        self._answer = answer
        self._parser.start(answer.pieces, is_bodiless=is_bodiless)
        if len(body) <= WRITE_BYTES:
            self._unsent = memoryview(head + body)
            self._outbox.add(self._send_whole)
            return
        self._transport.write(head)
        self._unsent = memoryview(body)
        self._send_more()

    def _send_whole(self) -> None:
        """Hand the request to the transport, unless the call has ended in the meantime."""
        request, self._unsent = self._unsent, memoryview(b"")
        if request and self._transport is not None and not self._transport.is_closing():
            self._transport.write(request)

    def expect_by(self, due_at: float) -> None:
        """End the call in `UpstreamTimeout` at `due_at`, unless something else is expected by then, or nothing.

        One timer serves all waits of all calls: it looks, when it is due, what is expected now, and goes on if need be.
        """
        self._due_at = due_at
        if self._timer is not None and self._looks_at > due_at:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._look_at(due_at)

    def expect_nothing(self) -> None:
        """Nobody waits for the provider just now."""
        self._due_at = None

    def _look_at(self, at: float) -> None:
        self._looks_at = at  # what uvloop gives for an instant that has come does not know it
        self._timer = self.loop.call_at(at, self._on_due)

    def _on_due(self) -> None:
        self._timer = None
        if self._due_at is None:
            return
        if self.loop.time() < self._due_at:
            self._look_at(self._due_at)
        else:
            self.stop(UpstreamTimeout, SILENT)

    def read_on(self) -> None:
        """The reader has emptied the buffer."""
        if self._is_reading_paused:
            self._is_reading_paused = False
            self._set_reading(is_wanted=True)

    def stop(self, failure: type[UpstreamFailed], message: str, cause: BaseException | None = None) -> None:
        """Close the connection, and end the call on it, if there is one, with an error."""
        self.close()
        if (answer := self._release()) is not None:
            answer.fail(failure, message, cause)

    def finish(self) -> None:
        """The answer is complete: give up the slot, and be of use again if possible."""
        is_reusable = (
            self._parser.is_reusable
            and not self._unsent
            and self._transport is not None
            and not self._transport.is_closing()
            and not self._transport.get_write_buffer_size()
        )
        if is_reusable:
            self.read_on()
            self.idle_since = self.loop.time()
            self._pool.put_idle(self)
        else:
            self.close()
        if (answer := self._release()) is not None:
            answer.complete()

    def close(self) -> None:
        """Close the socket, whatever is under way on it."""
        if self._is_closed:
            return
        self._is_closed = True
        self._unsent = memoryview(b"")
        if self._timer is not None:
            self._timer.cancel()
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def abandon(self) -> None:
        """Close a connection that was never used.

        The loops do not call `connection_lost` when the attempt to connect (uvloop) or the handshake (asyncio) ends in
        a cancellation.
        """
        self.close()
        self._parser.close()
        self._pool.lost(self)

    def _release(self) -> "_Answer | None":
        """End the call, once: only the first of those who ask gets its answer."""
        answer, self._answer = self._answer, None
        self._due_at = None
        if answer is not None:
            self._pool.release()
        return answer

    def _set_reading(self, *, is_wanted: bool) -> None:
        transport = cast("asyncio.Transport", self._transport)
        # uvloop raises on a transport that is closing.
        if transport.is_closing():
            return
        if is_wanted:
            transport.resume_reading()
        else:
            transport.pause_reading()

    def _send_more(self) -> None:
        """Write as much of the request's body as the transport wants, but hear the provider out first.

        Once it has refused the body and closed, the next write fails, and the loop then drops what it has not read.
        """
        transport = cast("asyncio.Transport", self._transport)
        while self._unsent and not self._is_writing_paused and not transport.is_closing():
            if not self._is_reading_paused and self._poll.poll(0):
                self.loop.call_soon(self._send_more)
                return
            piece, self._unsent = self._unsent[:WRITE_BYTES], self._unsent[WRITE_BYTES:]
            transport.write(piece)

    def _read_last_words(self) -> None:
        """Read what came before a write failed, past the loop that does not: the socket is still open here.

        Over TLS this cannot be done.
        """
        transport = cast("asyncio.Transport", self._transport)
        if transport.get_extra_info("ssl_object") is not None:
            return
        with suppress(OSError):
            socket_number = transport.get_extra_info("socket").fileno()
            for _ in range(_LAST_READS_MAX):
                if not (received := os.read(socket_number, WRITE_BYTES)):
                    return
                self._parser.feed(received)

    def _is_cut_off(self) -> bool:
        """Whether the end is one of TCP only: over TLS anybody on the way can make that, and asyncio does not tell."""
        tls: ssl.SSLObject | None = cast("asyncio.Transport", self._transport).get_extra_info("ssl_object")
        if tls is None:
            return False
        try:
            return bool(tls.read(1))
        except ssl.SSLError:
            return True

    def _advance(self, received_bytes: int) -> None:
        """Tell the reader what the parser has found out."""
        parser, answer = self._parser, self._answer
        if answer is None:
            return
        if parser.has_head and not answer.has_head:
            answer.take_head(parser.status, parser.headers)
        if parser.is_complete:
            self.finish()
        elif parser.is_broken:
            self.stop(UpstreamBroken, NOT_HTTP)
        else:
            answer.buffered_bytes += received_bytes
            if answer.buffered_bytes > BUFFER_BYTES and answer.pieces and not self._is_reading_paused:
                self._is_reading_paused = True
                self._set_reading(is_wanted=False)
            answer.wake()

    # ---- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP stands."""
        self._transport = cast("asyncio.Transport", transport)
        if self._is_closed:
            self._transport.abort()
            return
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer; or of what nobody asked for, which ends the connection."""
        if self._answer is None:
            self.close()
            return
        self._parser.feed(data)
        self._advance(len(data))

    def eof_received(self) -> None:
        """The provider sends no more."""
        if self._answer is None:
            self.close()
        elif self._is_cut_off():
            self.stop(UpstreamBroken, BROKE)
        else:
            self._parser.end()
            self._advance(0)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is about to be closed."""
        if exc is not None and self._answer is not None:
            self._read_last_words()
            self._advance(0)
        self.stop(UpstreamBroken, BROKE, exc)
        self._parser.close()
        self._pool.lost(self)

    def pause_writing(self) -> None:
        """The provider reads more slowly than we write."""
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._is_writing_paused = False
        self._send_more()


class _Answer:
    """An `UpstreamResponse`, from the moment in which its request is sent. One task at a time may wait for it."""

    def __init__(self, connection: _Connection, *, provider: str, idle_s: float) -> None:
        self.status = 0
        self.headers: Headers = []
        self.has_head = False
        self.pieces: list[bytes] = []
        """What has come and has not been read; the parser fills it."""
        self.buffered_bytes = 0
        """At least the length of `pieces`."""
        self._connection: _Connection | None = connection
        self._provider = provider
        self._idle_s = idle_s
        self._loop = connection.loop
        self._failure: tuple[type[UpstreamFailed], str, BaseException | None] | None = None
        self._is_taken = False
        self._waiter: asyncio.Future[None] | None = None

    async def wait_for_head(self, deadline: float) -> None:
        """Return when `status` and `headers` are there.

        Raises `UpstreamTimeout` when they are not by `deadline`, and `UpstreamBroken`.
        """
        while not self.has_head:
            if self._failure is not None:
                self._raise(*self._failure)
            waiter = self._expected(deadline)
            try:
                await waiter
            except BaseException:
                self._stop(UpstreamBroken, SPENT)
                raise
            finally:
                self._expect_nothing()

    def chunks(self) -> AsyncIterator[bytes]:
        if self._is_taken:
            raise UpstreamBroken(SPENT, provider=self._provider)
        self._is_taken = True
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self.pieces:
            if self._failure is not None:
                self._raise(*self._failure)
            if self._connection is None:
                raise StopAsyncIteration
            waiter = self._expected(self._loop.time() + self._idle_s)
            try:  # as above: a coroutine for both would be one more to step through with each chunk
                await waiter
            except BaseException:
                self._stop(UpstreamBroken, SPENT)
                raise
            finally:
                self._expect_nothing()
        chunk = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.buffered_bytes = 0
        if self._connection is not None:
            self._connection.read_on()
        return chunk

    async def aclose(self) -> None:
        # Nothing in here waits, so nothing can be cancelled.
        self.pieces.clear()
        self._stop(UpstreamBroken, SPENT)
        if self._failure is None:
            self._failure = (UpstreamBroken, SPENT, None)

    # ---- the connection's side

    def take_head(self, status: int, headers: Headers) -> None:
        """The head has come."""
        self.status = status
        self.headers = headers
        self.has_head = True

    def complete(self) -> None:
        """The body has come to its end."""
        self._let_go()

    def fail(self, failure: type[UpstreamFailed], message: str, cause: BaseException | None) -> None:
        """No more will come; what has come can still be read."""
        self._failure = (failure, message, cause)
        self._let_go()

    def wake(self) -> None:
        """Let the reader look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- waiting

    def _raise(self, failure: type[UpstreamFailed], message: str, cause: BaseException | None) -> NoReturn:
        raise failure(message, provider=self._provider) from cause

    def _let_go(self) -> None:
        self._connection = None
        self.wake()

    def _stop(self, failure: type[UpstreamFailed], message: str) -> None:
        """Break the connection, if the answer still has one: the provider sees that we stopped."""
        if self._connection is not None:
            self._connection.stop(failure, message)

    def _expected(self, due_at: float) -> "asyncio.Future[None]":
        """What `wake()` ends, until `due_at`. Whoever is cancelled while waiting for it gives the answer up."""
        if self._waiter is not None:
            raise RuntimeError("another task is reading this answer")
        self._waiter = waiter = self._loop.create_future()
        if self._connection is not None:
            self._connection.expect_by(due_at)
        return waiter

    def _expect_nothing(self) -> None:
        self._waiter = None
        if self._connection is not None:
            self._connection.expect_nothing()
