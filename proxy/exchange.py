"""The way of one paid call, from its body to its charge.

    decode → route → estimate → reserve → send → relay and meter → settle → the end of the answer

Each stage is a function of its own elsewhere and none knows another. What holds them together is here, and so is
the one promise that they cannot make alone: a reservation that was granted is settled or released, however the
call ends.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec
import structlog

from proxy import tokens
from proxy.calls import Answer, AtProvider, Call, OpenCall, now
from proxy.catalog import Catalog
from proxy.charging import assumed, releasing, settlement, tokens_plausible_max, usage_bound
from proxy.ended import note_end
from proxy.errors import (
    BadRequest,
    InsufficientCredits,
    LedgerFault,
    ModelNotAllowed,
    NotCovered,
    TollgateError,
    Unavailable,
    UpstreamBroken,
    UpstreamFailed,
    UpstreamRefusedUs,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
    forget_frames,
)
from proxy.estimate import Estimate, estimate, maximum_affordable
from proxy.ledger.decide import Release, Reserve, Settled
from proxy.ledger.ledger import Ledger
from proxy.metering import (
    BY_BYTES,
    Metered,
    StreamMeter,
    UsageSource,
    failure_status,
    meter_plain,
    meter_reported,
    stream_meter,
)
from proxy.metrics import (
    COOL_DOWNS,
    DEFERRED,
    IMPLAUSIBLE,
    PROVIDER_ERRORS,
    REFUSED_OPERATOR,
    Charge,
    Metrics,
)
from proxy.outgoing import answer_headers, error_event, provider_call, stream_headers
from proxy.relay import Head, StreamRelay
from proxy.routing import Candidate, Health, Offer, Offers, candidates, offers, retry_after_s
from proxy.units import format_credits
from proxy.upstream import Provider, UpstreamResponse, content_type, is_event_stream
from proxy.upstream.encodings import decoded, decoded_whole
from proxy.upstream.media import check_media
from proxy.upstream.openai import relayed_headers
from proxy.wire.endpoints import decode
from proxy.wire.objects import check_nesting, error_code
from proxy.wire.requests import PaidRequest

log = structlog.get_logger(__name__)

DRAIN_S_MAX = 0.5
"""How long to wait for a provider to end its stream after its end marker, for the sake of its connection."""

METERED_BYTES_MAX = 4_000_000
"""How much of a stream is kept for counting, should the provider report no usage."""

COUNTED_BYTES_MAX = 8_000_000
"""Prompts above it are not counted before a call, whatever a counted one could save: it would take seconds."""

COUNTS_AT_ONCE_MAX = 2

FITTING_BYTES_PER_TOKEN = 16
"""Nobody writes texts of longer tokens: where not even a token for so many bytes fits, nothing needs to be counted."""

_REASONS: dict[type[UpstreamFailed], str] = {
    UpstreamUnreachable: "unreachable",
    UpstreamTimeout: "timeout",
    UpstreamBroken: "broken",
    UpstreamRejected: "rejected",
    UpstreamRefusedUs: "refused_operator",
}
"""What failures are called in metrics."""

_PASSING_STATUSES = frozenset({408, 429})
_OPERATOR_STATUSES = frozenset({401, 402, 403})
_UNBILLED = (UpstreamUnreachable, UpstreamRefusedUs, UpstreamRejected)
"""The failures of a provider that bills nothing for them."""

_AUDIO = b'"audio"'


class ExchangeLimits(msgspec.Struct, frozen=True):
    """What bounds a call; see `settings.ServerSettings` and `settings.RoutingSettings`."""

    nesting_max: int
    answer_bytes_max: int
    event_bytes_max: int
    call_s: float
    keep_alive_s: float
    may_pay_twice: bool = False


class Exchange:
    """Serves paid calls."""

    def __init__(
        self,
        ledger: Ledger,
        providers: Mapping[str, Provider],
        catalog: Callable[[], Catalog],
        limits: ExchangeLimits,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._ledger = ledger
        self._providers = providers
        self._catalog = catalog
        self._limits = limits
        self._background: set[asyncio.Task[object]] = set()
        self._calls: dict[str, OpenCall] = {}
        """Those in flight, by their ids."""
        self._counting = asyncio.Semaphore(COUNTS_AT_ONCE_MAX)
        self._health = Health()
        self._draw = random.Random().random  # noqa: S311 - it spreads calls, and guards nothing
        self._offers_of: Catalog | None = None
        self._offers: dict[tuple[str, str | None, str | None, int | None, bool], Offers] = {}
        """Those of the catalogue `_offers_of`, by what they depend on."""

    async def serve(self, call: Call, answer: Answer) -> None:
        """Serve one call, streamed or not.

        Raises what `proxy.errors` names when nothing was charged and nothing sent; once the answer has begun, what
        goes wrong is said in the answer.
        """
        check_nesting(call.body, self._limits.nesting_max)
        request = decode(call.endpoint, call.body)
        opened = await self._preflight(call, request)
        self._calls[call.request_id] = opened
        answer.on_gone(opened.leave)
        try:
            await self._try_each(opened, answer)
        except UpstreamTimeout:
            if opened.is_client_gone and not opened.is_closed and not opened.is_ended:
                await self._settle(opened, assumed(opened), "client_left")
            raise
        finally:
            try:
                if not opened.is_closed:
                    await self._release(opened)
            finally:
                del self._calls[call.request_id]

    def calls_by_provider(self) -> dict[str, int]:
        """How many calls are in flight, by who serves them."""
        return dict(Counter(opened.candidate.provider for opened in self._calls.values()))

    def cooling(self) -> list[str]:
        """The targets that are left alone just now."""
        return self._health.cooling(now())

    async def end_calls(self, wait_s: float) -> None:
        """End every call that is at its provider, since the server stops: each as it would at its own time limit.

        Returns when they have ended, after `wait_s` seconds at the latest. What waits for its charge, and nothing else,
        is left alone.
        """
        limits = [opened.provider_time for opened in self._calls.values()]
        ending = [limit.task for limit in limits if limit is not None and limit.task is not None]
        for opened in self._calls.values():
            opened.end()
        if ending:
            await asyncio.wait(ending, timeout=wait_s)

    # ---- before the provider is called

    async def _preflight(self, call: Call, request: PaidRequest) -> OpenCall:
        """The hook before the provider is called: route, price, estimate, reserve."""
        started = now()
        offered = self._offered(call, request)
        try:
            return await self._hold(call, request, offered, started)
        except ModelNotAllowed as exc:
            allowed = Offers(offer for offer in offered if offer.candidate.target in exc.allowed)
            if not allowed:
                raise
            return await self._hold(call, request, allowed, started)

    async def _hold(self, call: Call, request: PaidRequest, offered: Offers, started: float) -> OpenCall:
        """Estimate and reserve, for whoever of `offered` will serve. Raises what `Ledger.reserve` does."""
        local = [offer.candidate for offer in offered if offer.candidate.is_local] if request.is_unsized else ()
        if local:
            await check_media(call.body, resolves=all(candidate.resolves_media for candidate in local))
        estimated = estimate(request, len(call.body), offered)
        try:
            reserved = await self._ledger.reserve(_reserve(call, request, estimated, offered))
        except NotCovered as exc:
            counted = await self._counted(call, request, offered, exc)
            if counted is None:
                raise _with_affordable(exc, estimated, offered) from None
            estimated = counted
            try:
                reserved = await self._ledger.reserve(_reserve(call, request, estimated, offered))
            except NotCovered as again:
                raise _with_affordable(again, estimated, offered) from None
        first, deadline = offered[0], started + self._limits.call_s
        return OpenCall(call, request, estimated, offered, reserved.amount, started, deadline, first, first.candidate)

    def _offered(self, call: Call, request: PaidRequest) -> Offers:
        """Who may serve the call, and at what price. Raises what `candidates` and `offers` do."""
        catalog = self._catalog()
        if catalog is not self._offers_of:
            self._offers_of = catalog
            self._offers = {}
        markup_bps = catalog.user_markups.get(call.caller.user_id)
        key = (request.model, call.provider, request.service_tier, markup_bps, request.wants_audio)
        offered = None if request.tools else self._offers.get(key)
        if offered is None:
            offered = offers(
                candidates(catalog.models, request.model, call.provider),
                request.service_tier,
                markup_bps,
                wants_audio=request.wants_audio,
                tools=request.tools,
                tool_calls_max=request.tool_calls_max,
            )
            if not request.tools:
                self._offers[key] = offered
        return offered

    async def _counted(self, call: Call, request: PaidRequest, offered: Offers, refused: NotCovered) -> Estimate | None:
        """An estimate by counted tokens where bytes are too coarse; None where counting cannot help."""
        tokenizers = {offer.candidate.tokenizer for offer in offered}
        if request.is_unsized or len(call.body) > COUNTED_BYTES_MAX or not all(map(tokens.is_known, tokenizers)):
            return None
        hoped_for = estimate(request, len(call.body) // FITTING_BYTES_PER_TOKEN, offered)
        if hoped_for.at_least > refused.available:
            return None
        async with self._counting:
            counts = [
                await asyncio.to_thread(tokens.count_bound, tokenizer, call.body)
                for tokenizer in tokenizers
                if tokenizer is not None
            ]
        return estimate(request, min(max(counts), len(call.body)), offered)

    # ---- one candidate after the other

    async def _try_each(self, opened: OpenCall, answer: Answer) -> None:
        """Let the first candidate that takes the call serve it.

        Raises the failure of the last one that was sent it, or, where none was, what the last one has no words for.
        """
        ordered: Sequence[Offer] = opened.offered
        if len(ordered) > 1:
            ordered = self._health.ordered(ordered, now(), self._draw)
        failure: UpstreamFailed | None = None
        for offer in ordered:
            opened.offer = offer
            opened.candidate = offer.candidate
            was_perhaps_billed, opened.is_perhaps_billed = opened.is_perhaps_billed, True
            is_probe = self._health.trying(offer.candidate.target, now())
            try:
                await self._attempt(opened, answer)
            except BadRequest:  # this candidate has no words for the call, so nothing was sent
                opened.is_perhaps_billed = was_perhaps_billed
                if is_probe:
                    self._health.not_tried(offer.candidate.target)
                if offer is ordered[-1]:
                    if failure is None:
                        raise
                    raise failure from None
            except UpstreamFailed as exc:
                failure = exc
                opened.is_perhaps_billed = was_perhaps_billed or not isinstance(exc, _UNBILLED)
                self._judge(opened, exc)
                if offer is ordered[-1] or answer.is_started or not self._may_fall_back(opened, exc):
                    raise
                forget_frames(exc)
            else:
                return

    async def _attempt(self, opened: OpenCall, answer: Answer) -> None:
        provider = opened.candidate.provider
        response: UpstreamResponse | None = None
        body: bytes | None = None
        try:
            with AtProvider(opened):
                response = await self._providers[provider].send(provider_call(opened))
                if response.status < 300:
                    kind = content_type(response.headers)
                    if kind.startswith(b"text/html"):
                        raise UpstreamBroken("The provider answered with a web page.", provider=provider)
                    if not is_event_stream(kind, is_asked=opened.request.is_stream):
                        body = await _read_all(response, self._limits.answer_bytes_max, provider)
            if response.status >= 300:
                raise await self._rejection(opened, response)
            if body is None:
                await self._relay_stream(opened, response, answer)
            else:
                await self._relay_plain(opened, response, body, answer)
        finally:
            if response is not None:
                await response.aclose()

    def _may_fall_back(self, opened: OpenCall, failure: UpstreamFailed) -> bool:
        """Whether another candidate may get the call: not if this one may have billed it, and somebody still waits."""
        if opened.is_closed or opened.is_client_gone or now() >= opened.deadline:
            return False
        match failure:
            case UpstreamUnreachable() | UpstreamRefusedUs():
                return True
            case UpstreamRejected():
                return _is_passing(failure.status)
            case _:
                return self._limits.may_pay_twice

    def _judge(self, opened: OpenCall, failure: UpstreamFailed) -> None:
        """What a failure says of its candidate. A client that left, or whose request was refused, says nothing bad."""
        candidate = opened.candidate
        if isinstance(failure, UpstreamRejected) and not _is_passing(failure.status):
            self._health.succeeded(candidate.target)
            return
        if opened.is_client_gone or opened.is_ended:
            return
        wish = failure.retry_after if isinstance(failure, UpstreamRejected) else None
        place = (candidate.provider, candidate.model)
        self._metrics.add(PROVIDER_ERRORS, (*place, _REASONS.get(type(failure), "other")))
        if isinstance(failure, UpstreamRefusedUs):
            self._metrics.add(REFUSED_OPERATOR, (candidate.provider,))
        if self._health.failed(candidate.target, now(), retry_after_s(wish, time.time())):
            self._metrics.add(COOL_DOWNS, place)
        log.warning("candidate_failed", provider=candidate.provider, model=candidate.model, reason=str(failure))

    def _begin(self, opened: OpenCall) -> None:
        """The candidate has begun to answer."""
        opened.begin()
        self._health.succeeded(opened.candidate.target)

    async def _rejection(self, opened: OpenCall, response: UpstreamResponse) -> UpstreamFailed:
        try:
            with AtProvider(opened):
                body = await _read_all(response, self._limits.answer_bytes_max, opened.candidate.provider)
        except UpstreamFailed:
            body = b""  # the status has said that the call failed, whatever the rest of it would have said
        return _refused(opened.candidate, response, response.status, self._content(response, body))

    # ---- plain answers

    async def _relay_plain(self, opened: OpenCall, response: UpstreamResponse, body: bytes, answer: Answer) -> None:
        content = self._content(response, body)
        failed = failure_status(content)
        if failed is not None:
            raise _refused(opened.candidate, response, failed, content)
        self._begin(opened)
        headers = [*answer_headers(opened, response), (b"content-length", b"%d" % len(body))]
        metered = _reported_plain(opened, content) or await self._counted_plain(opened, content)
        if metered.is_empty and not opened.is_client_gone:
            await self._release(opened)
            headers.append((b"x-credits-charged", b"0"))
        else:
            try:
                settled = await self._settle(opened, metered, _outcome(opened))
            except (Unavailable, asyncio.CancelledError):
                self._take_back(opened)  # what is not charged in time is never sent
                raise
            headers.append((b"x-credits-charged", format_credits(settled.charged).encode()))
            headers.append((b"x-credits-balance", format_credits(settled.balance).encode()))
        await answer.start(response.status, headers)
        await answer.end(body)

    def _content(self, response: UpstreamResponse, body: bytes) -> bytes:
        """What `body` says, should it be encoded in spite of our request."""
        return decoded_whole(body, response.headers, self._limits.answer_bytes_max)

    async def _counted_plain(self, opened: OpenCall, content: bytes) -> Metered:
        """What an answer consumed that does not simply report it."""
        tokens_max = tokens_plausible_max(opened)

        def metered(counter: tokens.TokenCounter | None = None) -> Metered:
            return meter_plain(
                opened.call.endpoint,
                content,
                prompt=opened.call.body,
                bound=usage_bound(opened),
                counter=counter or BY_BYTES,
                tokens_max=tokens_max,
            )

        by_bytes = metered()
        if by_bytes.is_implausible:
            self._note_implausible(opened)
        if by_bytes.source is UsageSource.REPORTED:
            return by_bytes
        if opened.request.wants_audio and _AUDIO in content:
            return assumed(opened)  # nobody can count what was spoken
        counter = _token_counter(opened)
        if counter is None:
            return by_bytes
        async with self._counting:
            return await asyncio.to_thread(metered, counter)

    def _note_implausible(self, opened: OpenCall) -> None:
        self._metrics.add(IMPLAUSIBLE, (opened.candidate.provider,))
        log.error("usage_implausible", request_id=opened.call.request_id, provider=opened.candidate.provider)

    def _take_back(self, opened: OpenCall) -> None:
        """An answer that is not delivered costs nothing, whether its settle is booked in the end or not."""
        release = releasing(opened, "undelivered", is_undelivered=True)
        self._background.add(task := asyncio.get_running_loop().create_task(self._released(release)))
        task.add_done_callback(self._background.discard)

    # ---- streams

    async def _relay_stream(self, opened: OpenCall, response: UpstreamResponse, answer: Answer) -> None:
        """Forward events as they come; hold back the end until the charge is durable."""
        meter = stream_meter(
            opened.call.endpoint,
            METERED_BYTES_MAX,
            tokens_max=tokens_plausible_max(opened),
            counts_tools=bool(opened.request.tools),
            keeps_events=opened.request.wants_audio,
        )
        relayed = self._stream_relay(opened, response, answer, meter)
        chunks = decoded(response.chunks(), response.headers, opened.candidate.provider)
        failure: TollgateError | None = None
        try:
            with AtProvider(opened):
                await relayed.forward(chunks)
        except UpstreamFailed as exc:
            if not answer.is_started and not opened.is_stopped:
                raise
            failure = exc
            forget_frames(exc)
            if isinstance(exc, UpstreamTimeout) and answer.is_waiting:
                opened.is_client_gone = True  # it is the client that has taken all the time there was
        except BaseException:
            if opened.first_byte is not None:
                metered = meter.result(prompt=opened.call.body, bound=usage_bound(opened))
                await self._settle(opened, metered, "cut_off")
            raise
        metered = await self._metered_stream(opened, meter, failure)
        await self._end_stream(opened, relayed, chunks, metered, failure)

    async def _end_stream(
        self,
        opened: OpenCall,
        relayed: StreamRelay,
        chunks: AsyncIterator[bytes],
        metered: Metered,
        failure: TollgateError | None,
    ) -> None:
        """Charge, and send the end that was held back: or an error in its place."""
        try:
            settled = await self._settle_stream(opened, metered, is_whole=failure is None and not relayed.has_failed)
        except Unavailable as exc:
            failure = exc
            forget_frames(exc)
        else:
            if settled is not None:
                relayed.add_usage(metered.usage)
                relayed.tail.price(settled.charged)
        if failure is not None:
            await relayed.end_early(error_event(failure, opened.call.endpoint))
        else:
            await relayed.end(chunks, relayed.tail.bytes(), rest_s_max=DRAIN_S_MAX)

    def _stream_relay(
        self, opened: OpenCall, response: UpstreamResponse, answer: Answer, meter: StreamMeter
    ) -> StreamRelay:
        candidate = opened.candidate
        return StreamRelay(
            answer,
            meter,
            Head(response.status, stream_headers(opened, response)),
            provider=candidate.provider,
            shows_usage=opened.request.wants_usage,
            event_bytes_max=self._limits.event_bytes_max,
            keep_alive_s=self._limits.keep_alive_s,
            raises_early=lambda data: _refused(candidate, response, failure_status(data) or 502, data),
            on_first=lambda: self._begin(opened),
        )

    async def _metered_stream(self, opened: OpenCall, meter: StreamMeter, failure: TollgateError | None) -> Metered:
        metered = await self._metered_events(opened, meter, failure)
        if meter.is_implausible or metered.is_implausible:
            self._note_implausible(opened)
        return metered

    async def _metered_events(self, opened: OpenCall, meter: StreamMeter, failure: TollgateError | None) -> Metered:
        is_over = isinstance(failure, UpstreamTimeout) and not opened.is_stopped and not opened.is_ended
        is_silent = is_over and opened.is_client_gone
        is_spoken = opened.request.wants_audio and meter.holds(_AUDIO)
        if (is_silent or is_spoken) and not meter.is_reported:
            return assumed(opened)  # nobody can count what was not shown, or spoken
        counter = _token_counter(opened)
        if meter.is_reported or counter is None:
            return meter.result(prompt=opened.call.body, bound=usage_bound(opened))
        async with self._counting:
            return await asyncio.to_thread(
                meter.result, prompt=opened.call.body, bound=usage_bound(opened), counter=counter
            )

    async def _settle_stream(self, opened: OpenCall, metered: Metered, *, is_whole: bool) -> Settled | None:
        """Charge for what was relayed; None when that was a failure and nothing before it, which costs nothing."""
        if opened.is_client_gone or (is_whole and not metered.is_empty):
            return await self._settle(opened, metered, _outcome(opened))
        if metered.usage.output_tokens:
            return await self._settle(opened, metered, "server_stopped" if opened.is_ended else "provider_broke")
        await self._release(opened)
        return None

    # ---- the end of the reservation

    async def _settle(self, opened: OpenCall, metered: Metered, outcome: str) -> Settled:
        """Charge for the call. Raises `Unavailable` when the charge is not durable in time; it is booked later."""
        operation, usage = settlement(opened, metered, outcome)
        opened.is_closed = True
        try:
            settled = await self._ledger.settle(operation)
        except TimeoutError as exc:
            self._metrics.add(DEFERRED)
            log.warning("settle_deferred", request_id=opened.call.request_id)
            raise Unavailable("The ledger is out of reach just now.", retry_after_s=5) from exc
        except LedgerFault:
            opened.is_closed = False  # what cannot be settled is released
            raise
        if opened.call.on_settled is not None:
            opened.call.on_settled(operation.receipt, settled)
        paid = operation.receipt.provider_cost or 0
        charge = Charge(usage, metered.source, settled.charged, paid, settled.shortfall)
        note_end(self._metrics, opened, outcome, charge)
        return settled

    async def _release(self, opened: OpenCall) -> None:
        opened.is_closed = True
        outcome = "perhaps_billed" if opened.is_perhaps_billed else "nothing_delivered"
        await self._released(releasing(opened, outcome))
        note_end(self._metrics, opened, outcome, None)

    async def _released(self, operation: Release) -> None:
        """Free what a call holds; what is not booked in time is booked later."""
        try:
            await self._ledger.release(operation)
        except TimeoutError as exc:
            forget_frames(exc)
            self._metrics.add(DEFERRED)
            log.warning("release_deferred", request_id=operation.id)


def _reserve(call: Call, request: PaidRequest, estimated: Estimate, offered: Offers) -> Reserve:
    """What holds for the call what `estimated` says."""
    caller = call.caller
    return Reserve(
        id=call.request_id,
        wallet_id=caller.wallet_id,
        user_id=caller.user_id,
        key_id=caller.key_id,
        at_least=estimated.at_least,
        at_most=estimated.at_most,
        window_tokens=estimated.window_tokens,
        models=offered.targets,
        original_model=request.model,
        is_stream=request.is_stream,
        token_version=caller.token_version,
        client_request_id=call.client_request_id,
        offers=offered.terms,
    )


def _with_affordable(refused: NotCovered, estimated: Estimate, offered: Offers) -> NotCovered:
    """The refusal with the maximum that would have been covered."""
    if isinstance(refused, InsufficientCredits):
        refused.tokens_affordable = maximum_affordable(estimated, offered, refused.available)
    return refused


def _refused(candidate: Candidate, response: UpstreamResponse, status: int, body: bytes) -> UpstreamFailed:
    """The provider's error, which came with `status` or as one in its body."""
    if status in _OPERATOR_STATUSES or (status == 429 and error_code(body) == "insufficient_quota"):
        log.error("provider_refused_operator", provider=candidate.provider, status=status)
        return UpstreamRefusedUs(
            "The provider does not accept this server's account. The operator has been told.",
            provider=candidate.provider,
            status=status,
        )
    headers = [(name, value) for name, value in relayed_headers(response.headers) if not name.startswith(b"content-")]
    return UpstreamRejected(provider=candidate.provider, status=status, body=body, headers=headers)


def _reported_plain(opened: OpenCall, content: bytes) -> Metered | None:
    """What an answer reports, if that is all there is to it: uses of tools must be looked for."""
    if opened.request.tools:
        return None
    return meter_reported(opened.call.endpoint, content, tokens_max=tokens_plausible_max(opened))


def _token_counter(opened: OpenCall) -> tokens.TokenCounter | None:
    tokenizer = opened.candidate.tokenizer
    return tokens.TokenCounter(tokenizer) if tokenizer is not None and tokens.is_known(tokenizer) else None


def _outcome(opened: OpenCall) -> str:
    return "client_left" if opened.is_client_gone else "completed"


async def _read_all(response: UpstreamResponse, bytes_max: int, provider: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in response.chunks():
        size += len(chunk)
        if size > bytes_max:
            raise UpstreamBroken("The provider's answer is over the limit.", provider=provider)
        parts.append(chunk)
    return b"".join(parts)


def _is_passing(status: int) -> bool:
    return status in _PASSING_STATUSES or status >= 500
