"""The way of one paid call, from its body to its charge.

    decode → route → estimate → reserve → send → relay and meter → settle → the end of the answer

Each stage is a function of its own elsewhere and none knows another. What holds them together is here, and so is
the one promise that they cannot make alone: a reservation that was granted is settled or released, however the
call ends.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import msgspec
import structlog

from proxy.catalog import Catalog
from proxy.errors import (
    InsufficientCredits,
    TollgateError,
    Unavailable,
    UpstreamBroken,
    UpstreamFailed,
    UpstreamRefusedUs,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.estimate import Estimate, estimate, maximum_affordable, maximum_bought
from proxy.identity.keys import Caller
from proxy.ledger.decide import Receipt, Release, Reserve, Settle, Settled
from proxy.ledger.ledger import Ledger
from proxy.metering import EventKind, Metered, StreamMeter, failure_status, meter_plain
from proxy.pricing import cost, provider_cost
from proxy.routing import Candidate, candidates
from proxy.units import Usage, format_credits
from proxy.upstream import Headers, Provider, ProviderCall, UpstreamResponse
from proxy.upstream.openai import relayed_headers
from proxy.wire.openai import ChatRequest, asking_for_usage, decode_chat, error_body, patch
from proxy.wire.sse import EventSplitter, EventTooLong, event_data, with_data

log = structlog.get_logger(__name__)

DRAIN_S_MAX = 0.5
"""How long to wait for a provider to end its stream after its end marker, for the sake of its connection."""

METERED_BYTES_MAX = 4_000_000
"""How much of a stream is kept for counting, should the provider report no usage."""

_PASSING_STATUSES = frozenset({408, 429})
_OPERATOR_STATUSES = frozenset({401, 402, 403})


class Call(msgspec.Struct, frozen=True):
    """One paid call as it came in."""

    request_id: str
    client_request_id: str | None
    caller: Caller
    headers: Headers
    body: bytes


class Answer(Protocol):
    """Where the answer goes: its head, then its body in pieces, then its end."""

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head."""
        ...

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the body; returns when there is room for more."""
        ...

    async def end(self, chunk: bytes = b"") -> None:
        """Send the last piece: the client now knows that the answer is complete."""
        ...


class ExchangeLimits(msgspec.Struct, frozen=True):
    """What bounds a call; see `settings.ServerSettings`."""

    answer_bytes_max: int
    event_bytes_max: int
    call_s: float
    settle_wait_s: float


class _Open(msgspec.Struct):
    """A call with its reservation, from the reserve to its settle or release."""

    call: Call
    request: ChatRequest
    estimated: Estimate
    markup_bps: int
    reserved: int
    started: float
    deadline: float
    candidate: Candidate
    first_byte: float | None = None
    has_failed: bool = False
    """Whether the provider has said in its stream that the call failed."""
    is_closed: bool = False


class _Tail:
    """The end of a stream, held back until its charge is durable: the usage that was asked for, and the end marker."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._usage_at: int | None = None

    def hold(self, event: bytes) -> None:
        self._held.append(event)

    def hold_usage(self, event: bytes) -> None:
        self._usage_at = len(self._held)
        self._held.append(event)

    def let_go(self) -> list[bytes]:
        """What was held turns out not to be the end: content comes after it."""
        held, self._held, self._usage_at = self._held, [], None
        return held

    def price(self, settled: Settled) -> None:
        """Put what was charged into the usage that the client asked for, as `usage.cost` in credits."""
        if self._usage_at is None:
            return
        event = self._held[self._usage_at]
        # Outside of strings, where JSON has no raw line feeds, a space does as well.
        data = (event_data(event) or b"").replace(b"\n", b" ")
        usage = bytes(msgspec.json.decode(data, type=dict[str, msgspec.Raw])["usage"])
        priced = patch(usage, {"cost": msgspec.json.encode(format_credits(settled.charged))})
        self._held[self._usage_at] = with_data(event, patch(data, {"usage": priced}))

    def bytes(self) -> bytes:
        return b"".join(self._held)


class Exchange:
    """Serves paid calls."""

    def __init__(
        self,
        ledger: Ledger,
        providers: Mapping[str, Provider],
        catalog: Callable[[], Catalog],
        limits: ExchangeLimits,
    ) -> None:
        self._ledger = ledger
        self._providers = providers
        self._catalog = catalog
        self._limits = limits
        self._background: set[asyncio.Task[object]] = set()

    async def chat(self, call: Call, answer: Answer) -> None:
        """Serve one chat completion, streamed or not.

        Raises what `proxy.errors` names when nothing was charged and nothing sent; once the answer has begun, what
        goes wrong is said in the answer.
        """
        request = decode_chat(call.body)
        opened, offered = await self._preflight(call, request)
        try:
            response = await self._send(opened, offered)
            try:
                if request.stream and _is_event_stream(response.headers):
                    await self._relay_stream(opened, response, answer)
                else:
                    await self._relay_plain(opened, response, answer)
            finally:
                await response.aclose()
        finally:
            if not opened.is_closed:
                await self._release(opened)

    async def _preflight(self, call: Call, request: ChatRequest) -> tuple[_Open, tuple[Candidate, ...]]:
        """The hook before the provider is called: route, price, estimate, reserve."""
        started = _now()
        catalog = self._catalog()
        offered = candidates(catalog.models, request.model)
        estimated = estimate(request, len(call.body), offered, catalog.markup_bps)
        try:
            reserved = await self._ledger.reserve(
                Reserve(
                    id=call.request_id,
                    wallet_id=call.caller.wallet_id,
                    user_id=call.caller.user_id,
                    key_id=call.caller.key_id,
                    at_least=estimated.at_least,
                    at_most=estimated.at_most,
                    window_tokens=estimated.window_tokens,
                    models=tuple(candidate.target for candidate in offered),
                    original_model=request.model,
                    is_stream=bool(request.stream),
                    token_version=call.caller.token_version,
                    client_request_id=call.client_request_id,
                )
            )
        except InsufficientCredits as exc:
            exc.tokens_affordable = maximum_affordable(estimated, offered, exc.available, catalog.markup_bps)
            raise
        opened = _Open(
            call=call,
            request=request,
            estimated=estimated,
            markup_bps=catalog.markup_bps,
            reserved=reserved.amount,
            started=started,
            deadline=started + self._limits.call_s,
            candidate=offered[0],
        )
        return opened, offered

    async def _send(self, opened: _Open, offered: tuple[Candidate, ...]) -> UpstreamResponse:
        """The response of the first candidate that takes the call; the last one's failure when none does."""
        failure: UpstreamFailed | None = None
        for candidate in offered:
            opened.candidate = candidate
            try:
                async with _within(opened):
                    response = await self._providers[candidate.provider].send(_provider_call(opened))
                if response.status < 300:
                    return response
                failure = await self._rejection(candidate, response)
            except UpstreamUnreachable as exc:
                failure = exc
            if isinstance(failure, UpstreamRejected) and not _is_passing(failure.status):
                break
            log.warning("candidate_failed", provider=candidate.provider, model=candidate.model, reason=str(failure))
        assert failure is not None, "there is at least one candidate"  # noqa: S101 - routing refuses an empty list
        raise failure

    async def _rejection(self, candidate: Candidate, response: UpstreamResponse) -> UpstreamFailed:
        try:
            body = await _read_all(response, self._limits.answer_bytes_max, candidate.provider)
        finally:
            await asyncio.shield(response.aclose())
        return _refused(candidate, response, response.status, body)

    # ---- plain answers

    async def _relay_plain(self, opened: _Open, response: UpstreamResponse, answer: Answer) -> None:
        async with _within(opened):
            body = await _read_all(response, self._limits.answer_bytes_max, opened.candidate.provider)
        failed = failure_status(body)
        if failed is not None:
            raise _refused(opened.candidate, response, failed, body)
        opened.first_byte = _now()
        metered = meter_plain(body, prompt_bytes=len(opened.call.body), bound=_bound(opened))
        try:
            settled = await self._settle(opened, metered, "completed")
        except Unavailable:
            self._take_back(opened)
            raise
        headers = [
            *_headers(opened, response),
            (b"x-credits-charged", format_credits(settled.charged).encode()),
            (b"x-credits-balance", format_credits(settled.balance).encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await answer.start(response.status, headers)
        await answer.end(body)

    def _take_back(self, opened: _Open) -> None:
        """An answer that is not delivered costs nothing, whether its settle is booked in the end or not."""
        release = self._ledger.release(_release(opened, "undelivered", is_undelivered=True))
        self._background.add(task := asyncio.get_running_loop().create_task(release))
        task.add_done_callback(self._background.discard)

    # ---- streams

    async def _relay_stream(self, opened: _Open, response: UpstreamResponse, answer: Answer) -> None:
        """Forward events as they come; hold back the end until the charge is durable."""
        meter = StreamMeter(METERED_BYTES_MAX)
        chunks = response.chunks()
        tail = _Tail()
        failure: TollgateError | None = None
        try:
            async with _within(opened):
                await self._forward(opened, response, chunks, answer, meter, tail)
        except UpstreamFailed as exc:
            if opened.first_byte is None:
                raise
            failure = exc
        except BaseException:
            if opened.first_byte is not None:
                await self._settle(opened, _metered(opened, meter), "cut_off")
            raise
        try:
            settled = await self._settle_stream(opened, _metered(opened, meter), is_whole=failure is None)
        except Unavailable as exc:
            failure = exc
        else:
            if settled is not None:
                tail.price(settled)
        await answer.end(tail.bytes() if failure is None else _error_event(failure))
        await _drain(chunks)

    async def _settle_stream(self, opened: _Open, metered: Metered, *, is_whole: bool) -> Settled | None:
        """Charge for what was relayed; None when that was a failure and nothing before it, which costs nothing."""
        if is_whole and not opened.has_failed:
            return await self._settle(opened, metered, "completed")
        if metered.usage.output_tokens:
            return await self._settle(opened, metered, "provider_broke")
        await self._release(opened)
        return None

    async def _forward(  # noqa: PLR0913, PLR0917 - the parts of one loop, kept apart to be read
        self,
        opened: _Open,
        response: UpstreamResponse,
        chunks: AsyncIterator[bytes],
        answer: Answer,
        meter: StreamMeter,
        tail: _Tail,
    ) -> None:
        """Relay until the provider's end marker, or the end of its stream."""
        splitter = EventSplitter(self._limits.event_bytes_max)
        shows_usage = _wants_usage(opened.request)
        try:
            async for chunk in chunks:
                forwarded: list[bytes] = []
                for event in splitter.feed(chunk):
                    kind = meter.feed(event)
                    if kind is EventKind.ERROR:
                        self._note_failure(opened, response, event)
                    if opened.first_byte is None:
                        opened.first_byte = _now()
                        await answer.start(response.status, _headers(opened, response))
                    match kind:
                        case EventKind.DONE:
                            tail.hold(event)
                            await _write(answer, forwarded)
                            return
                        case EventKind.USAGE_ONLY:
                            if shows_usage:
                                tail.hold_usage(event)
                        case _:
                            forwarded += tail.let_go()
                            forwarded.append(event)
                await _write(answer, forwarded)
        except EventTooLong as exc:
            raise UpstreamBroken(
                "The provider sent an event over the limit.", provider=opened.candidate.provider
            ) from exc
        if opened.first_byte is None:
            raise UpstreamBroken("The provider sent an empty stream.", provider=opened.candidate.provider)
        meter.feed(splitter.rest)
        tail.hold(splitter.rest)

    @staticmethod
    def _note_failure(opened: _Open, response: UpstreamResponse, event: bytes) -> None:
        """Raises the provider's error when nothing was relayed before it: it can still be an answer of its own."""
        opened.has_failed = True
        data = event_data(event) or b""
        if opened.first_byte is None:
            raise _refused(opened.candidate, response, failure_status(data) or 502, data)

    # ---- the end of the reservation

    async def _settle(self, opened: _Open, metered: Metered, outcome: str) -> Settled:
        """Charge for the call. Raises `Unavailable` when the charge is not durable in time; it is booked later."""
        candidate = opened.candidate
        opened.is_closed = True
        charge = cost(metered.usage, candidate.price, opened.markup_bps)
        receipt = Receipt(
            outcome=outcome,
            provider=candidate.provider,
            request_model=candidate.model,
            response_model=metered.response_model,
            usage=msgspec.json.encode(metered.usage).decode(),
            usage_source=metered.source,
            price=msgspec.json.encode(candidate.price).decode(),
            markup_bps=opened.markup_bps,
            provider_cost=provider_cost(metered.usage, candidate.price),
            ttft_ms=None if opened.first_byte is None else _milliseconds(opened.first_byte - opened.started),
            duration_ms=_milliseconds(_now() - opened.started),
        )
        operation = Settle(
            id=opened.call.request_id,
            wallet_id=opened.call.caller.wallet_id,
            cost=charge,
            tokens=metered.usage.input_tokens + metered.usage.output_tokens,
            receipt=receipt,
        )
        try:
            async with asyncio.timeout(self._limits.settle_wait_s):
                settled = await self._ledger.settle(operation)
        except TimeoutError as exc:
            raise Unavailable("The ledger is out of reach just now.", retry_after_s=5) from exc
        log.info(
            "call",
            request_id=opened.call.request_id,
            user_id=opened.call.caller.user_id,
            model=opened.request.model,
            provider=candidate.provider,
            outcome=outcome,
            usage_source=metered.source,
            charged=format_credits(settled.charged),
            shortfall=format_credits(settled.shortfall),
            duration_ms=receipt.duration_ms,
        )
        return settled

    async def _release(self, opened: _Open) -> None:
        opened.is_closed = True
        try:
            async with asyncio.timeout(self._limits.settle_wait_s):
                await self._ledger.release(_release(opened, "nothing_delivered"))
        except TimeoutError:
            log.warning("release_deferred", request_id=opened.call.request_id)


def _refused(candidate: Candidate, response: UpstreamResponse, status: int, body: bytes) -> UpstreamFailed:
    """The provider's error, which came with `status` or as one in its body."""
    if status in _OPERATOR_STATUSES:
        log.error("provider_refused_operator", provider=candidate.provider, status=status)
        return UpstreamRefusedUs(
            "The provider does not accept this server's account. The operator has been told.",
            provider=candidate.provider,
            status=status,
        )
    headers = dict(response.headers)
    return UpstreamRejected(
        provider=candidate.provider,
        status=status,
        body=body,
        content_type=headers.get(b"content-type", b"").decode("latin-1"),
        retry_after=headers.get(b"retry-after", b"").decode("latin-1") or None,
    )


def _provider_call(opened: _Open) -> ProviderCall:
    """The client's own bytes, with only what must change patched."""
    candidate, request = opened.candidate, opened.request
    changes: dict[str, bytes] = {}
    if candidate.model != request.model:
        changes["model"] = msgspec.json.encode(candidate.model)
    if request.stream and candidate.knows_stream_options and not _wants_usage(request):
        changes["stream_options"] = asking_for_usage(opened.call.body)
    if request.store:
        changes["store"] = b"false"
    maximum = _clamped_maximum(opened)
    if maximum is not None:
        changes[candidate.maximum_field] = str(maximum).encode()
    return ProviderCall(
        path="chat/completions",
        model=candidate.model,
        body=patch(opened.call.body, changes) if changes else opened.call.body,
        headers=opened.call.headers,
        stream=bool(request.stream),
    )


def _clamped_maximum(opened: _Open) -> int | None:
    """The maximum that the reservation buys, where that is less than what the call could have had."""
    estimated = opened.estimated
    if estimated.is_maximum_named or opened.reserved >= estimated.at_most:
        return None
    return maximum_bought(estimated, opened.candidate, opened.reserved, opened.markup_bps)


def _headers(opened: _Open, response: UpstreamResponse) -> Headers:
    headers = relayed_headers(response.headers)
    headers.append((b"x-tollgate-provider", opened.candidate.provider.encode()))
    headers.append((b"x-credits-reserved", format_credits(opened.reserved).encode()))
    maximum = _clamped_maximum(opened)
    if maximum is not None:
        headers.append((b"x-credits-max-tokens", str(maximum).encode()))
    return headers


def _metered(opened: _Open, meter: StreamMeter) -> Metered:
    return meter.result(prompt_bytes=len(opened.call.body), bound=_bound(opened))


def _bound(opened: _Open) -> Usage:
    """The most that may be counted where the provider reports nothing: what was reserved for."""
    estimated = opened.estimated
    maximum = _clamped_maximum(opened)
    if maximum is None:
        return Usage(input=estimated.input_tokens, output=estimated.output_tokens)
    output = (maximum + estimated.prediction_tokens) * estimated.choices
    return Usage(input=estimated.input_tokens, output=output)


def _release(opened: _Open, outcome: str, *, is_undelivered: bool = False) -> Release:
    return Release(
        id=opened.call.request_id,
        wallet_id=opened.call.caller.wallet_id,
        receipt=Receipt(
            outcome=outcome,
            provider=opened.candidate.provider,
            request_model=opened.candidate.model,
            duration_ms=_milliseconds(_now() - opened.started),
        ),
        is_undelivered=is_undelivered,
    )


@asynccontextmanager
async def _within(opened: _Open) -> AsyncIterator[None]:
    """The time that one call may take. Raises `UpstreamTimeout` beyond it."""
    try:
        async with asyncio.timeout_at(opened.deadline):
            yield
    except TimeoutError as exc:
        raise UpstreamTimeout("The call took longer than it may.", provider=opened.candidate.provider) from exc


async def _read_all(response: UpstreamResponse, bytes_max: int, provider: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in response.chunks():
        size += len(chunk)
        if size > bytes_max:
            raise UpstreamBroken("The provider's answer is over the limit.", provider=provider)
        parts.append(chunk)
    return b"".join(parts)


async def _write(answer: Answer, events: list[bytes]) -> None:
    if events:
        await answer.write(b"".join(events))


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read what follows the end marker, so that the connection can be used again; but do not wait for it for long."""
    with suppress(TimeoutError, UpstreamFailed):
        async with asyncio.timeout(DRAIN_S_MAX):
            async for _ in chunks:
                pass


def _error_event(failure: TollgateError) -> bytes:
    """An error in the middle of a stream, as OpenAI sends it; no end marker follows."""
    return b"data: " + error_body(str(failure), "upstream_error", None, "stream_broken") + b"\n\n"


def _wants_usage(request: ChatRequest) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _is_event_stream(headers: Headers) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def _is_passing(status: int) -> bool:
    return status in _PASSING_STATUSES or status >= 500


def _now() -> float:
    return asyncio.get_running_loop().time()


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
