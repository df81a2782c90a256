"""`/v1/*`: what OpenAI's SDKs call.

The paid paths have two ways: raw ASGI inside of the app, and past the framework (see `protocol`), through the same
authentication to the same exchange. A routed handler would cost more than all the rest of a call.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec
import structlog
from litestar import Request, asgi, get, route
from litestar.di import NamedDependency
from litestar.exceptions import MethodNotAllowedException
from litestar.handlers import ASGIRouteHandler
from litestar.params import FromPath
from litestar.types import HTTPScope, Receive, Scope, Send
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.calls import Answer, Call
from proxy.catalog import Catalog
from proxy.edge.answer import AsgiAnswer, BodyLimits, read_body
from proxy.edge.authentication import CHECKED_BY_LEDGER, Authentication, needs
from proxy.edge.errors import answer_to, documented
from proxy.edge.protocol import CONNECTION, DirectAnswer, DirectCycle, LimitedProtocol, Way
from proxy.errors import BadRequest, ModelNotFound, forget_frames
from proxy.exchange import Exchange
from proxy.identity.keys import Caller, allowed_models
from proxy.identity.keys import Scope as KeyScope
from proxy.ledger.decide import allows
from proxy.metrics import REFUSED, Metrics
from proxy.pricing import dearest_price
from proxy.routing import Candidate, candidates
from proxy.shown.prices import shown_price
from proxy.storage.database import reading
from proxy.units import new_id
from proxy.wire.requests import Endpoint

log = structlog.get_logger(__name__)

_CLIENT_IDS = (b"x-client-request-id", b"x-request-id")
_CLIENT_ID_CHARACTERS_MAX = 200


class Model(msgspec.Struct):
    """One entry of OpenAI's list of models, with what it costs this caller beside OpenAI's own fields.

    `pricing` is in credits per million tokens, markup included; where several may serve the name it is the dearest that
    each class can cost, and the limits are those that all of them keep.
    """

    id: str
    owned_by: str
    pricing: dict[str, Any]
    service_tiers: dict[str, dict[str, Any]]
    context_length: int | None
    max_output_tokens: int | None
    providers: list[str]
    object: str = "model"
    created: int = 0


class ModelList(msgspec.Struct):
    """OpenAI's list of models."""

    data: list[Model]
    object: str = "list"


CallerRequest = Request[Caller, Any, Any]


@get("/v1/models", opt=needs(KeyScope.INFERENCE), summary="The models on offer", responses=documented())
async def models(
    request: CallerRequest, catalog: NamedDependency[Catalog], engine: NamedDependency[AsyncEngine]
) -> ModelList:
    """Every model that is priced and enabled, and that this caller may use."""
    allowances = await _allowances(engine, request.user)
    return ModelList(
        [
            _model(name, allowed, catalog.user_markups.get(request.user.user_id))
            for name, found in sorted(catalog.models.items())
            if (allowed := _allowed(found, allowances))
        ]
    )


@get(
    "/v1/models/{model_id:path}",
    opt=needs(KeyScope.INFERENCE),
    summary="One model",
    responses=documented(400, 404),
)
async def model(
    request: CallerRequest,
    catalog: NamedDependency[Catalog],
    engine: NamedDependency[AsyncEngine],
    model_id: FromPath[str],
) -> Model:
    """One model by its name, which may hold a slash."""
    name = model_id.removeprefix("/")
    allowed = _allowed(candidates(catalog.models, name), await _allowances(engine, request.user))
    if not allowed:
        raise ModelNotFound(name)
    return _model(name, allowed, catalog.user_markups.get(request.user.user_id))


def _model(name: str, found: Sequence[Candidate], markup_bps: int | None) -> Model:
    tiers = {tier for candidate in found for tier in candidate.service_prices}
    marked_up = [(each, each.markup_bps if markup_bps is None else markup_bps) for each in found]

    def shown(tier: str | None) -> dict[str, Any]:
        prices = [(each.price if tier is None else each.service_prices.get(tier), bps) for each, bps in marked_up]
        return shown_price(dearest_price([price.marked_up(bps) for price, bps in prices if price is not None]))

    return Model(
        id=name,
        owned_by=found[0].provider,
        pricing=shown(None),
        service_tiers={tier: shown(tier) for tier in sorted(tiers)},
        context_length=min((each.context_tokens for each in found if each.context_tokens), default=None),
        max_output_tokens=min((each.output_tokens_max for each in found if each.output_tokens_max), default=None),
        providers=list(dict.fromkeys(candidate.provider for candidate in found)),
    )


async def _allowances(engine: AsyncEngine, caller: Caller) -> list[list[str] | None]:
    """The patterns of models that the caller's user and key are restricted to."""
    async with reading(engine) as connection:
        return await allowed_models(connection, caller)


def _allowed(found: Sequence[Candidate], allowances: Sequence[list[str] | None]) -> list[Candidate]:
    """Those of `found` that the ledger lets the caller use."""
    return [candidate for candidate in found if all(allows(patterns, candidate.target) for patterns in allowances)]


def paid_handlers(
    exchange: Exchange, body_limits: BodyLimits, *, stall_s: float, metrics: Metrics
) -> list[ASGIRouteHandler]:
    """The handlers of the paid paths, `POST` all."""
    return [_paid_handler(endpoint, exchange, body_limits, stall_s=stall_s, metrics=metrics) for endpoint in Endpoint]


def _paid_handler(
    endpoint: Endpoint, exchange: Exchange, body_limits: BodyLimits, *, stall_s: float, metrics: Metrics
) -> ASGIRouteHandler:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["state"]["request_id"]
        answer = AsgiAnswer(request_id, send, scope["state"][CONNECTION], stall_s=stall_s)
        try:
            await exchange.serve(await _call(endpoint, cast("HTTPScope", scope), receive, body_limits), answer)
        except Exception as exc:
            if not await is_told(exc, answer, request_id, metrics):
                raise
        finally:
            answer.close()

    options = {**needs(KeyScope.INFERENCE), CHECKED_BY_LEDGER: True}
    return asgi(f"/v1/{endpoint}", opt=options, copy_scope=False)(serve)


async def is_told(error: Exception, answer: AsgiAnswer | DirectAnswer, request_id: str, metrics: Metrics) -> bool:
    """Let `error` be the answer, counted and logged; false where that has begun, so that its connection is cut off."""
    if answer.is_started:
        log.error("answer_cut_off", request_id=request_id, exc_info=error)
        return False
    await _refuse(error, answer, request_id, metrics)
    forget_frames(error)
    return True


async def _refuse(error: Exception, answer: Answer, request_id: str, metrics: Metrics) -> None:
    said = answer_to(error, request_id)
    metrics.add(REFUSED, (str(said.status), said.code or ""))
    log.info("call_refused", request_id=request_id, status=said.status, code=said.code)
    await answer.start(said.status, [*said.headers, (b"content-length", str(len(said.body)).encode())])
    await answer.end(said.body)


def paid_ways(
    exchange: Exchange, authentication: Authentication, body_limits: BodyLimits, *, stall_s: float, metrics: Metrics
) -> dict[bytes, Way]:
    """The direct ways to the paid paths."""
    return {
        f"/v1/{endpoint}".encode(): _paid_way(
            endpoint, exchange, authentication, body_limits, stall_s=stall_s, metrics=metrics
        )
        for endpoint in Endpoint
    }


def _paid_way(  # noqa: PLR0913 - what a way is made of
    endpoint: Endpoint,
    exchange: Exchange,
    authentication: Authentication,
    body_limits: BodyLimits,
    *,
    stall_s: float,
    metrics: Metrics,
) -> Way:
    async def serve(connection: LimitedProtocol, cycle: DirectCycle) -> None:
        request_id = new_id("req")
        answer = DirectAnswer(request_id, connection, cycle, stall_s=stall_s)
        headers = cycle.headers
        try:
            caller = await authentication.payer(headers)
            body = await cycle.body(connection, body_limits)
            await exchange.serve(Call(endpoint, request_id, client_request_id(headers), caller, headers, body), answer)
        except Exception as exc:
            if not await is_told(exc, answer, request_id, metrics):
                raise
        finally:
            answer.close()

    return serve


@route(
    ["/v1/responses/{response_path:path}"],
    http_method=["GET", "POST", "DELETE"],
    opt=needs(KeyScope.INFERENCE),
    sync_to_thread=False,
    include_in_schema=False,
)
def kept_responses(response_path: FromPath[str]) -> None:
    """Refuse what is done with responses that a provider has kept: it keeps none."""
    raise BadRequest(
        f"There is no response{response_path}: responses are not kept. Send the whole conversation as 'input'.",
        code="unsupported_operation",
    )


async def _call(endpoint: Endpoint, scope: HTTPScope, receive: Receive, body_limits: BodyLimits) -> Call:
    if scope["method"] != "POST":
        raise MethodNotAllowedException(headers={"Allow": "POST"})
    return Call(
        endpoint=endpoint,
        request_id=scope["state"]["request_id"],
        client_request_id=client_request_id(scope["headers"]),
        caller=scope["user"],
        headers=list(scope["headers"]),
        body=await read_body(scope, receive, scope["state"][CONNECTION], body_limits),
    )


def client_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The id by which the client knows its call: stored beside ours, never used instead of it."""
    for name, value in headers:
        if name in _CLIENT_IDS:
            return value.decode("ascii", "replace")[:_CLIENT_ID_CHARACTERS_MAX]
    return None
