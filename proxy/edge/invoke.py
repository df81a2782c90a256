"""`POST /api/v1/llm/invoke` and `/test`: the simple API's calls.

They are chat completions like any other: the same exchange serves them, by the same rules. What it writes is said
here in other words, on its way to the client.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import msgspec
from litestar import asgi
from litestar.exceptions import MethodNotAllowedException
from litestar.handlers import ASGIRouteHandler
from litestar.types import HTTPScope, Receive, Scope, Send
from msgspec import UNSET, UnsetType
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.calls import Call
from proxy.catalog import Catalog
from proxy.edge.answer import AsgiAnswer, BodyLimits, Headers, read_body
from proxy.edge.authentication import CHECKED_BY_LEDGER, needs
from proxy.edge.errors import answer_to
from proxy.edge.inference import client_request_id, is_told
from proxy.edge.protocol import CONNECTION
from proxy.errors import (
    BadRequest,
    BodyTooLarge,
    ProviderNotFound,
    Unavailable,
    UpstreamBroken,
    UpstreamFailed,
    forget_frames,
)
from proxy.exchange import Exchange
from proxy.identity.keys import Scope as KeyScope
from proxy.ledger.decide import Receipt, Settled
from proxy.metrics import Metrics
from proxy.shown.credits import read_balance
from proxy.storage.database import reading
from proxy.units import Usage, format_credits
from proxy.upstream.encodings import decoded_whole
from proxy.wire.invoke import Invocation, Said, decode_invoke, read_chat
from proxy.wire.objects import UNREADABLE, bad_request, unique_fields
from proxy.wire.requests import Endpoint, ModelName
from proxy.wire.sse import EventSplitter, event_data

INVOKE_PATH = "/api/v1/llm/invoke"
TEST_PATH = "/api/v1/llm/test"

EVENT_BYTES_MAX = 2**62
"""No limit of its own: the exchange has cut what it writes into events within the operator's."""

_TEST_BYTES_MAX = 65_536
_TEST_PROMPT = "Answer with the one word: ok"
_TEST_TOKENS_MAX = 256
"""A word, and a little room to think; only what is used is paid."""

_NO_CHAT = "The provider's answer is no chat completion."

_DONE = b"[DONE]"
_SAID_OF_A_BODY = frozenset({b"content-type", b"content-length", b"content-encoding"})


class TokenCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one call; `cached_input_tokens` are among the input."""

    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    total_tokens: int


class Charged(msgspec.Struct, frozen=True, kw_only=True):
    """What a call came to. Amounts are decimal strings of credits.

    `cost` is the provider's, `credits_charged` that with the markup, as it is booked. `model` is what `provider` knows
    it by. `credits_balance` is null where nothing was charged and the balance could not be read.
    """

    request_id: str
    model: str
    provider: str
    usage: TokenCounts
    cost: str
    credits_charged: str
    credits_balance: str | None


class Invoked(Charged, frozen=True, kw_only=True):
    """A whole answer; what is said in it as in `Said`."""

    content: str | None
    reasoning: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    annotations: list[Any] | UnsetType = UNSET
    tool_calls: list[Any] | UnsetType = UNSET
    finish_reason: str | None


class Delta(Said, frozen=True, kw_only=True, tag_field="type", tag="delta"):
    """An event of a stream: a piece of the answer."""


class Done(Charged, frozen=True, kw_only=True, tag_field="type", tag="done"):
    """The last event of a stream: the answer is whole, and its charge durable."""

    finish_reason: str | None


class Failed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="error"):
    """The last event of a stream that broke. What was delivered is charged; where that is known, it says how much."""

    request_id: str
    error: Any
    credits_charged: str | None = None
    credits_balance: str | None = None


class TestRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which provider is to be tried, and by which of its models, if not by its default one."""

    provider: ModelName
    model: ModelName | None = None


class Tested(msgspec.Struct, frozen=True, kw_only=True):
    """How a provider answered a tiny call, which the caller paid.

    `latency_ms` is the whole call's. `error` is what the provider, or we in its stead, had to say; then nothing was
    charged, unless it was found too late.
    """

    ok: bool
    request_id: str
    provider: str
    model: str
    latency_ms: int
    usage: TokenCounts
    cost: str
    credits_charged: str
    credits_balance: str | None
    error: Any


class Bill:
    """What one call was charged, once it is; until then it is one that costs nothing."""

    def __init__(self, request_id: str, provider: str | None, model: str, engine: AsyncEngine, wallet_id: str) -> None:
        self.request_id = request_id
        self._provider = provider
        self._model = model
        self._engine = engine
        self._wallet_id = wallet_id
        self._receipt: Receipt | None = None
        self._settled: Settled | None = None

    def note(self, receipt: Receipt, settled: Settled) -> None:
        """The charge is durable."""
        self._receipt, self._settled = receipt, settled

    @property
    def is_charged(self) -> bool:
        """Whether there is a charge."""
        return self._settled is not None

    @property
    def amounts(self) -> dict[str, str]:
        """The charge and the balance after it, where there is one."""
        if self._settled is None:
            return {}
        return {
            "credits_charged": format_credits(self._settled.charged),
            "credits_balance": format_credits(self._settled.balance),
        }

    async def charged(self, provider: str | None = None) -> dict[str, Any]:
        """The fields of `Charged`; `provider` is who served where nothing was charged."""
        receipt = self._receipt or Receipt(outcome="")
        usage = msgspec.json.decode(receipt.usage, type=Usage) if receipt.usage else Usage()
        return {
            "request_id": self.request_id,
            "model": receipt.request_model or self._model,
            "provider": receipt.provider or provider or self._provider or "",
            "usage": TokenCounts(
                input_tokens=usage.input_tokens,
                cached_input_tokens=usage.cached_input,
                output_tokens=usage.output_tokens,
                total_tokens=usage.input_tokens + usage.output_tokens,
            ),
            "cost": format_credits(receipt.provider_cost or 0),
            "credits_charged": "0",
            **(self.amounts or {"credits_balance": await self._balance()}),
        }

    async def _balance(self) -> str | None:
        with suppress(Unavailable):
            async with reading(self._engine) as connection:
                return (await read_balance(connection, self._wallet_id)).balance
        return None


class SimpleAnswer:
    """`exchange.Answer` in the words of the simple API, over the client's own `answer`.

    A plain answer becomes an `Invoked`, or with `is_stream` a stream of one piece; a stream becomes `Delta` events and
    a `Done` or a `Failed`. What the exchange holds back until the charge is durable is held back here as well, since
    each event is said when its own comes.
    """

    def __init__(self, answer: AsgiAnswer, bill: Bill, *, is_stream: bool, answer_bytes_max: int) -> None:
        self._answer = answer
        self._bill = bill
        self._is_stream = is_stream
        self._answer_bytes_max = answer_bytes_max
        self._status = 0
        self._headers: Headers = []
        self._splitter = EventSplitter(EVENT_BYTES_MAX)
        self._finish_reason: str | None = None
        self._error: Any = None
        self._is_finished = False
        self.on_gone = answer.on_gone

    @property
    def is_started(self) -> bool:
        """Whether the exchange has sent its head."""
        return bool(self._status)

    @property
    def is_waiting(self) -> bool:
        """Whether the client does not take what was sent last."""
        return self._answer.is_waiting

    async def start(self, status: int, headers: Headers) -> None:
        """Take the head; that of a stream is sent on at once."""
        self._status, self._headers = status, headers
        if not _is_plain(headers):
            await self._start(b"text/event-stream")

    async def write(self, chunk: bytes) -> None:
        """Send on what the events in `chunk` say."""
        if self._is_finished:
            return
        said: list[bytes] = []
        for event in self._splitter.feed(chunk):
            said += await self._translated(event)
        if said:
            await self._answer.write(b"".join(said))

    async def end(self, chunk: bytes = b"") -> None:
        """Send on the last of it. Raises `UpstreamBroken` for a plain answer that says nothing and costs nothing."""
        if _is_plain(self._headers):
            await self._end_plain(decoded_whole(chunk, self._headers, self._answer_bytes_max))
            return
        await self.write(chunk)
        last = [] if self._is_finished else [*await self._translated(self._splitter.rest), *await self._finish()]
        await self._answer.end(b"".join(last))

    async def _end_plain(self, body: bytes) -> None:
        read = read_chat(body)
        if read is None and not self._bill.is_charged:
            raise UpstreamBroken(_NO_CHAT, provider=self._provider or "")
        # What is none was counted as the text that it is.
        said = Said(content=body.decode(errors="replace")) if read is None else read.said
        self._finish_reason = None if read is None else read.finish_reason
        if self._is_stream:
            await self._start(b"text/event-stream")
            await self._answer.end(b"".join([*_pieces(said), *await self._finish()]))
            return
        fields = msgspec.structs.asdict(said)
        fields["content"] = said.content or ("" if said.tool_calls is UNSET else None)
        invoked = Invoked(**fields, **await self._bill.charged(self._provider), finish_reason=self._finish_reason)
        answer = msgspec.json.encode(invoked)
        await self._start(b"application/json", (b"content-length", str(len(answer)).encode()))
        await self._answer.end(answer)

    async def _start(self, content_type: bytes, *more: tuple[bytes, bytes]) -> None:
        kept = [(name, value) for name, value in self._headers if name not in _SAID_OF_A_BODY]
        await self._answer.start(self._status, [*kept, (b"content-type", content_type), *more])

    async def _translated(self, event: bytes) -> list[bytes]:
        """What to send for an event of the exchange's: nothing for one that says nothing to our client."""
        data = event_data(event)
        if data is None:
            return [event] if event.startswith(b":") else []
        if data.strip() == _DONE:
            return await self._finish()
        read = read_chat(data)
        if read is None:
            return []
        self._finish_reason = read.finish_reason or self._finish_reason
        self._error = read.error or self._error
        return _pieces(read.said)

    async def _finish(self) -> list[bytes]:
        """The last event."""
        if self._is_finished:
            return []
        self._is_finished = True
        if self._error is not None:
            failed = Failed(request_id=self._bill.request_id, error=self._error, **self._bill.amounts)
            return [_event("error", failed)]
        charged = await self._bill.charged(self._provider)
        return [_event("done", Done(**charged, finish_reason=self._finish_reason))]

    @property
    def _provider(self) -> str | None:
        """Who served, as the exchange says in its head."""
        return next((value.decode() for name, value in self._headers if name == b"x-tollgate-provider"), None)


class _Kept:
    """`exchange.Answer` of a call that is nobody's but ours, for as long as the client of `answer` is there."""

    def __init__(self, answer: AsgiAnswer) -> None:
        self.on_gone = answer.on_gone
        self.is_started = False
        self.is_waiting = False
        self.headers: Headers = []
        self.last = b""

    async def start(self, _status: int, headers: Headers) -> None:
        self.is_started = True
        self.headers = headers

    async def write(self, chunk: bytes) -> None:
        self.last = chunk

    async def end(self, chunk: bytes = b"") -> None:
        self.last = chunk or self.last


def _is_plain(headers: Headers) -> bool:
    """Whether an answer comes in one piece: only then the exchange knows its length."""
    return any(name == b"content-length" for name, _ in headers)


def _pieces(said: Said) -> list[bytes]:
    return [] if said.is_empty else [_event("delta", Delta(**msgspec.structs.asdict(said)))]


def _event(name: str, data: msgspec.Struct) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


class Simple:
    """The simple API's two paid calls, through `exchange`."""

    def __init__(  # noqa: PLR0913 - the parts that it needs
        self,
        exchange: Exchange,
        catalog: Callable[[], Catalog],
        engine: AsyncEngine,
        body_limits: BodyLimits,
        *,
        answer_bytes_max: int,
        metrics: Metrics,
    ) -> None:
        self._exchange = exchange
        self._metrics = metrics
        self._catalog = catalog
        self._engine = engine
        self._body_limits = body_limits
        self._answer_bytes_max = answer_bytes_max

    async def invoke(self, scope: HTTPScope, body: bytes, answer: AsgiAnswer) -> None:
        """Serve a simple request, streamed or not."""
        invocation = decode_invoke(body)
        model = self._model(invocation.provider, invocation.model)
        bill = self._bill(scope, invocation.provider, model)
        simple = SimpleAnswer(answer, bill, is_stream=invocation.is_stream, answer_bytes_max=self._answer_bytes_max)
        await self._exchange.serve(_call(scope, invocation, model, bill), simple)

    async def test(self, scope: HTTPScope, body: bytes, answer: AsgiAnswer) -> None:
        """Try one provider by a tiny call."""
        if len(body) > _TEST_BYTES_MAX:
            raise BodyTooLarge(_TEST_BYTES_MAX)
        try:
            request = msgspec.json.decode(body, type=TestRequest)
            unique_fields(body)
        except UNREADABLE as exc:
            raise bad_request(exc) from exc
        model = self._model(request.provider, request.model)
        bill = self._bill(scope, request.provider, model)
        question = msgspec.json.encode({"max_tokens": _TEST_TOKENS_MAX})
        invocation = Invocation(question, _TEST_PROMPT, model, request.provider, is_stream=False)
        begun = asyncio.get_running_loop().time()
        kept = _Kept(answer)
        failure: UpstreamFailed | None = None
        try:
            await self._exchange.serve(_call(scope, invocation, model, bill), kept)
            failure = self._fault(kept, request.provider)
        except UpstreamFailed as exc:
            failure = exc
            forget_frames(exc)
        latency_ms = round((asyncio.get_running_loop().time() - begun) * 1000)
        error = None if failure is None else msgspec.json.decode(answer_to(failure, bill.request_id).body)["error"]
        tested = Tested(**await bill.charged(), ok=failure is None, latency_ms=latency_ms, error=error)
        said = msgspec.json.encode(tested)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(said)).encode())]
        await answer.start(200, headers)
        await answer.end(said)

    def _fault(self, kept: _Kept, provider: str) -> UpstreamBroken | None:
        """What is wrong with an answer that came."""
        if (
            _is_plain(kept.headers)
            and read_chat(decoded_whole(kept.last, kept.headers, self._answer_bytes_max)) is None
        ):
            return UpstreamBroken(_NO_CHAT, provider=provider)
        return None

    def _bill(self, scope: HTTPScope, provider: str | None, model: str) -> Bill:
        return Bill(scope["state"]["request_id"], provider, model, self._engine, scope["user"].wallet_id)

    def _model(self, provider: str | None, model: str | None) -> str:
        """The name to ask the exchange for.

        Raises `ProviderNotFound` when `provider` serves nothing, `BadRequest` when there is no default for a call that
        names no model.
        """
        catalog = self._catalog()
        state = None if provider is None else catalog.providers.get(provider)
        if provider is not None and (state is None or not state.is_enabled):
            raise ProviderNotFound(provider)
        if model is None:
            default = catalog.default_models.get(provider)
            if default is None:
                raise BadRequest(
                    "Say which 'model': there is no default one here.",
                    param="model",
                    code="missing_required_parameter",
                )
            return default
        # A bare name may be another provider's, or an alias that leaves this one out.
        is_served = any(candidate.provider == provider for candidate in catalog.models.get(model, ()))
        full_name = f"{provider}/{model}"
        return full_name if not is_served and full_name in catalog.models else model

    def handlers(self, *, stall_s: float) -> list[ASGIRouteHandler]:
        """What serves both paths, `POST` both."""
        return [
            self._handler(INVOKE_PATH, self.invoke, stall_s=stall_s),
            self._handler(TEST_PATH, self.test, stall_s=stall_s),
        ]

    def _handler(
        self, path: str, serve: Callable[[HTTPScope, bytes, AsgiAnswer], Awaitable[None]], *, stall_s: float
    ) -> ASGIRouteHandler:
        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            request_id = scope["state"]["request_id"]
            http_scope = cast("HTTPScope", scope)
            answer = AsgiAnswer(request_id, send, scope["state"][CONNECTION], stall_s=stall_s)

            try:
                await serve(http_scope, await self._body(http_scope, receive), answer)
            except Exception as exc:
                if not await is_told(exc, answer, request_id, self._metrics):
                    raise
            finally:
                answer.close()

        return asgi(path, opt={**needs(KeyScope.INFERENCE), CHECKED_BY_LEDGER: True}, copy_scope=False)(served)

    async def _body(self, scope: HTTPScope, receive: Receive) -> bytes:
        if scope["method"] != "POST":
            raise MethodNotAllowedException(headers={"Allow": "POST"})
        return await read_body(scope, receive, scope["state"][CONNECTION], self._body_limits)


def _call(scope: HTTPScope, invocation: Invocation, model: str, bill: Bill) -> Call:
    return Call(
        endpoint=Endpoint.CHAT,
        request_id=scope["state"]["request_id"],
        client_request_id=client_request_id(scope["headers"]),
        caller=scope["user"],
        headers=list(scope["headers"]),
        body=invocation.as_chat(model),
        provider=invocation.provider,
        on_settled=bill.note,
    )
