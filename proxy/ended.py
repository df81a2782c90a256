"""What is observed of a call at its end: it is counted, and logged in one line."""

import msgspec
from msgspec import UNSET, UnsetType

from proxy.calls import OpenCall, milliseconds, now
from proxy.metrics import CallEnd, Charge, Metrics
from proxy.observability import log_event
from proxy.units import format_credits


class _CallLine(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag_field="event", tag="call"):
    """Who called what, and what came of it; never what was said. Amounts are in credits."""

    request_id: str
    client_request_id: str | None
    user_id: str
    key_id: str | None
    endpoint: str
    stream: bool
    model: str
    provider: str
    provider_model: str
    outcome: str
    usage_source: str | UnsetType = UNSET
    input_tokens: int | UnsetType = UNSET
    output_tokens: int | UnsetType = UNSET
    provider_cost: str | UnsetType = UNSET
    charged: str | UnsetType = UNSET
    shortfall: str | UnsetType = UNSET
    first_byte_ms: int | None
    overhead_ms: float
    duration_ms: int


def note_end(metrics: Metrics, opened: OpenCall, outcome: str, charge: Charge | None) -> None:
    """Count a call that has ended as `outcome`, and log it; `charge` is None where it costs nothing."""
    call, candidate, request = opened.call, opened.candidate, opened.request
    duration_s = now() - opened.started
    overhead_s = duration_s - opened.provider_s
    first_byte_s = None if opened.first_byte is None else opened.first_byte - opened.started
    provider, model = candidate.provider, candidate.model
    end = CallEnd(call.endpoint, provider, model, outcome, request.is_stream, duration_s, overhead_s, first_byte_s)
    metrics.ended(end, charge)
    log_event(
        _CallLine(
            request_id=call.request_id,
            client_request_id=call.client_request_id,
            user_id=call.caller.user_id,
            key_id=call.caller.key_id,
            endpoint=call.endpoint,
            stream=request.is_stream,
            model=request.model,
            provider=provider,
            provider_model=model,
            outcome=outcome,
            usage_source=UNSET if charge is None else charge.source,
            input_tokens=UNSET if charge is None else charge.usage.input_tokens,
            output_tokens=UNSET if charge is None else charge.usage.output_tokens,
            provider_cost=UNSET if charge is None else format_credits(charge.provider_cost),
            charged=UNSET if charge is None else format_credits(charge.charged),
            shortfall=UNSET if charge is None else format_credits(charge.shortfall),
            first_byte_ms=None if first_byte_s is None else milliseconds(first_byte_s),
            overhead_ms=round(overhead_s * 1000, 1),
            duration_ms=milliseconds(duration_s),
        ),
        told=f"{call.client_request_id} {request.model}",
    )
