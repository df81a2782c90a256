"""What is observed of a call at its end: it is counted, and logged in one line."""

from proxy.calls import OpenCall, milliseconds, now
from proxy.metrics import CallEnd, Charge, Metrics
from proxy.observability import log_event
from proxy.units import format_credits


def note_end(metrics: Metrics, opened: OpenCall, outcome: str, charge: Charge | None) -> None:
    """Count a call that has ended as `outcome`, and log it: who called what, and what came of it, never what was said.

    `charge` is None where it costs nothing. Amounts are logged in credits.
    """
    call, candidate, request = opened.call, opened.candidate, opened.request
    duration_s = now() - opened.started
    overhead_s = duration_s - opened.provider_s
    first_byte_s = None if opened.first_byte is None else opened.first_byte - opened.started
    provider, model = candidate.provider, candidate.model
    end = CallEnd(call.endpoint, provider, model, outcome, request.is_stream, duration_s, overhead_s, first_byte_s)
    metrics.ended(end, charge)
    paid = (
        {}
        if charge is None
        else {
            "usage_source": charge.source,
            "input_tokens": charge.usage.input_tokens,
            "output_tokens": charge.usage.output_tokens,
            "provider_cost": format_credits(charge.provider_cost),
            "charged": format_credits(charge.charged),
            "shortfall": format_credits(charge.shortfall),
        }
    )
    event = {
        "event": "call",
        "request_id": call.request_id,
        "client_request_id": call.client_request_id,
        "user_id": call.caller.user_id,
        "key_id": call.caller.key_id,
        "endpoint": call.endpoint,
        "stream": request.is_stream,
        "model": request.model,
        "provider": provider,
        "provider_model": model,
        "outcome": outcome,
        **paid,
        "first_byte_ms": None if first_byte_s is None else milliseconds(first_byte_s),
        "overhead_ms": round(overhead_s * 1000, 1),
        "duration_ms": milliseconds(duration_s),
    }
    log_event(event, told=f"{call.client_request_id} {request.model}")
