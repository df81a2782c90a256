"""Moving a provider's stream to the client: events as they come, byte for byte, and the end held back.

The end is whatever tells the client that its answer is complete, with the usage before it. It is let go when the
charge is durable, and not before.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from proxy.deadline import within
from proxy.errors import BadRequest, UpstreamBroken, UpstreamFailed
from proxy.metering import EventKind, StreamMeter
from proxy.units import Nanos, Usage, format_credits
from proxy.upstream import Headers
from proxy.wire.objects import UNREADABLE, decode_fields, patch
from proxy.wire.sse import EventSplitter, EventTooLong, event_data, with_data

_KEEP_ALIVE = b": keep-alive\n\n"


class Answer(Protocol):
    """Where the answer goes: its head, then its body in pieces, then its end."""

    @property
    def is_started(self) -> bool:
        """Whether the head has been sent."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Whether the client does not take what was sent last."""
        ...

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head."""
        ...

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the body; returns when there is room for more."""
        ...

    async def end(self, chunk: bytes = b"") -> None:
        """Send the last piece: the client now knows that the answer is complete."""
        ...


class Head(msgspec.Struct, frozen=True):
    """The head of an answer."""

    status: int
    headers: Headers


class _First(msgspec.Struct):
    """What the chunks of one stream have in common."""

    id: Any = None
    object: Any = None
    created: Any = None
    model: Any = None


class Tail:
    """What is held back at the end of a stream: the usage that was asked for, and the end marker."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._usage_at: int | None = None
        self.size_bytes = 0
        """Of what is held."""

    @property
    def has_usage(self) -> bool:
        """Whether the provider sent the usage that is held."""
        return self._usage_at is not None

    @property
    def holds(self) -> bool:
        """Whether anything is held."""
        return bool(self._held)

    def hold(self, event: bytes) -> None:
        """Hold an event."""
        self._held.append(event)
        self.size_bytes += len(event)

    def hold_usage(self, event: bytes) -> None:
        """Hold an event with usage, which the client will see."""
        self._usage_at = len(self._held)
        self.hold(event)

    def let_go(self) -> list[bytes]:
        """What was held turns out not to be the end: content comes after it."""
        held, self._held, self._usage_at, self.size_bytes = self._held, [], None, 0
        return held

    def price(self, charged: Nanos) -> None:
        """Put what was charged into the usage, as `usage.cost` in credits; what cannot be patched stays as it is."""
        if self._usage_at is None:
            return
        event = self._held[self._usage_at]
        # Outside of strings, where JSON has no raw line feeds, a space does as well.
        data = (event_data(event) or b"").replace(b"\n", b" ")
        try:
            usage = bytes(decode_fields(data)["usage"])
            priced = patch(usage, {"cost": msgspec.json.encode(format_credits(charged))})
            self._held[self._usage_at] = with_data(event, patch(data, {"usage": priced}))
        except (*UNREADABLE, BadRequest):
            return

    def bytes(self) -> bytes:
        """All that is held."""
        return b"".join(self._held)


class StreamRelay:
    """Relays one stream.

    `raises_early` turns an error event that nothing came before into the error to raise for it; `on_first` is called
    when the first other event has come. A stream that says nothing for `keep_alive_s` seconds gets a comment, so that
    nobody in between takes it for dead.
    """

    def __init__(  # noqa: PLR0913 - the parts of one loop
        self,
        answer: Answer,
        meter: StreamMeter,
        head: Head,
        *,
        provider: str,
        shows_usage: bool,
        event_bytes_max: int,
        keep_alive_s: float,
        raises_early: Callable[[bytes], Exception],
        on_first: Callable[[], None],
    ) -> None:
        self._answer = answer
        self._meter = meter
        self._head = head
        self._provider = provider
        self._shows_usage = shows_usage
        self._splitter = EventSplitter(event_bytes_max)
        self._tail_bytes_max = 2 * event_bytes_max
        self._keep_alive_s = keep_alive_s
        self._raises_early = raises_early
        self._on_first = on_first
        self._has_begun = False
        self._has_data = False
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._may_comment = True
        self._commenting: asyncio.Task[None] | None = None
        self._first = b""
        self.tail = Tail()
        self.has_failed = False
        """Whether the provider has said that the call failed."""

    async def forward(self, chunks: AsyncIterator[bytes]) -> None:
        """Relay until the provider's end marker, or the end of its stream.

        Raises `UpstreamBroken` for a stream without any data, for an event over the limit, for as much as two of these
        where the end must follow, and what `chunks` and `raises_early` give.
        """
        self._timer = self._loop.call_later(self._keep_alive_s, self._on_idle)
        try:
            async for chunk in chunks:
                forwarded, is_done = self._take(self._splitter.feed(chunk))
                if forwarded:
                    if not self._answer.is_started:
                        await self._start()
                    await self._answer.write(forwarded)
                    self._written_at = self._loop.time()
                if is_done:
                    self.tail.hold(self._splitter.rest)
                    return
                if self.tail.size_bytes > self._tail_bytes_max:
                    raise UpstreamBroken("The provider sent too much after its usage.", provider=self._provider)
            rest = self._splitter.rest
        except EventTooLong as exc:
            raise UpstreamBroken("The provider sent an event over the limit.", provider=self._provider) from exc
        finally:
            self._timer.cancel()
            if self._commenting is not None:
                await self._commenting
        self._take_rest(rest)

    def _take_rest(self, rest: bytes) -> None:
        """Hold what the provider sent last: an event that lacks its end, which clients read all the same."""
        kind = self._meter.feed(rest)
        if kind is EventKind.ERROR:
            self._note_failure(rest)
        if kind is EventKind.OTHER and not self._has_data:
            raise UpstreamBroken("The provider sent nothing but comments.", provider=self._provider)
        self._begin()
        match kind:
            case EventKind.USAGE_ONLY | EventKind.USAGE if self._shows_usage:
                self.tail.hold_usage(rest)
            case EventKind.USAGE_ONLY:
                return
            case _:
                self.tail.hold(rest)

    def _take(self, events: list[bytes]) -> tuple[bytes, bool]:
        """Hold each event, or give it back to be forwarded; true once the end marker was among them."""
        forwarded: list[bytes] = []
        is_done = False
        for event in events:
            if is_done:
                self.tail.hold(event)
                continue
            kind = self._meter.feed(event)
            # The openai SDK takes a comment after an id for an event without data.
            if self._may_comment and b"id:" in event:
                self._may_comment = False
            if kind is EventKind.CONTENT and self._first and not self.tail.holds:  # by far the most
                forwarded.append(event)
            elif kind is EventKind.DONE:
                self._begin()
                self._has_data = True
                self.tail.hold(event)
                is_done = True
            else:
                forwarded += self._sorted_out(event, kind)
        return b"".join(forwarded), is_done

    def _sorted_out(self, event: bytes, kind: EventKind) -> list[bytes]:
        """What to forward now that this `event` has come: with it, or nothing where it has to be held."""
        if kind is EventKind.ERROR:
            self._note_failure(event)
        self._begin()
        self._has_data = self._has_data or kind is not EventKind.OTHER
        match kind:
            case EventKind.USAGE_ONLY | EventKind.USAGE if self._shows_usage:
                self.tail.hold_usage(event)
            case EventKind.USAGE_ONLY:
                pass
            case EventKind.OTHER if self.tail.has_usage:
                self.tail.hold(event)
            case _:
                self._first = self._first or (b"" if kind is EventKind.OTHER else event)
                return [*self.tail.let_go(), event]
        return []

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._on_first()

    def add_usage(self, usage: Usage) -> None:
        """Hold a usage event of our own before the end, for a client that asked for one when the provider sent none."""
        if self.tail.has_usage or not self._shows_usage:
            return
        try:
            first = msgspec.json.decode(event_data(self._first) or b"{}", type=_First)
        except UNREADABLE:
            first = _First()
        inputs, outputs = usage.input_tokens, usage.output_tokens
        reported = {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}
        chunk = {**msgspec.structs.asdict(first), "choices": [], "usage": reported}
        held = self.tail.let_go()
        self.tail.hold_usage(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
        for event in held:
            self.tail.hold(event)

    async def end(self, chunks: AsyncIterator[bytes], last: bytes, *, rest_s_max: float) -> None:
        """Send `last`, then whatever the provider sends after its end within `rest_s_max` seconds, and end the answer.

        Reading to the end of the provider's answer lets its connection be used again.
        """
        await self._write(last)
        with suppress(TimeoutError, UpstreamFailed), within(rest_s_max):
            async for chunk in chunks:
                await self._answer.write(chunk)
        await self._answer.end()

    async def end_early(self, last: bytes) -> None:
        """Send `last` and end the answer."""
        await self._start()
        await self._answer.end(last)

    async def _write(self, chunk: bytes) -> None:
        if not self._answer.is_started:
            await self._start()
        await self._answer.write(chunk)
        self._written_at = self._loop.time()

    async def _start(self) -> None:
        if not self._answer.is_started:
            await self._answer.start(self._head.status, self._head.headers)

    def _note_failure(self, event: bytes) -> None:
        self.has_failed = True
        if not self._has_begun and not self._answer.is_started:
            raise self._raises_early(event_data(event) or b"")

    def _on_idle(self) -> None:
        due_at = self._written_at + self._keep_alive_s
        now = self._loop.time()
        if now >= due_at and self._may_comment and (self._commenting is None or self._commenting.done()):
            self._commenting = self._loop.create_task(self._write(_KEEP_ALIVE))
        self._timer = self._loop.call_at(max(due_at, now + self._keep_alive_s / 2), self._on_idle)
