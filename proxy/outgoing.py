"""What a provider is sent for a call, and what the client is told around the provider's answer."""

import msgspec

from proxy.calls import CHUNKED, OpenCall
from proxy.errors import TollgateError
from proxy.estimate import maximum_bought, maximum_taken, output_tokens_max, tool_uses_max
from proxy.routing import Candidate
from proxy.units import format_credits
from proxy.upstream import Headers, ProviderCall, UpstreamResponse
from proxy.upstream.openai import relayed_headers
from proxy.wire.objects import error_body, patch
from proxy.wire.requests import Endpoint, asking_for_usage

_MAXIMUM_FIELDS = frozenset({"max_tokens", "max_completion_tokens"})


def provider_call(opened: OpenCall) -> ProviderCall:
    """The client's own bytes, with only what must change patched."""
    candidate, request, body = opened.candidate, opened.request, opened.call.body
    changes: dict[str, bytes | None] = {}
    if candidate.model != request.model:
        changes["model"] = msgspec.json.encode(candidate.model)
    if request.is_stream and request.endpoint in CHUNKED:
        if not candidate.knows_stream_options:
            changes["stream_options"] = None
        elif not request.wants_usage:
            changes["stream_options"] = asking_for_usage(body)
    if request.must_unstore:
        changes["store"] = b"false"
    if request.endpoint is Endpoint.RESPONSES and request.tools and request.tool_calls_max is None:
        changes["max_tool_calls"] = str(tool_uses_max(request, candidate)).encode()
    changes |= _maximum_changes(opened)
    return ProviderCall(
        path=request.endpoint,
        model=candidate.model,
        body=patch(body, changes) if changes else body,
        headers=opened.call.headers,
        stream=request.is_stream,
        output_tokens_max=candidate.output_tokens_max,
    )


def _maximum_changes(opened: OpenCall) -> dict[str, bytes | None]:
    """What puts the maximum into the field that this model takes, where no maximum of the client's is there.

    A provider ignores fields that it does not know, and would answer without any maximum.
    """
    request = opened.request
    fields = _maximum_fields(opened.candidate, request.endpoint)
    maximum = clamped_maximum(opened)
    if maximum is None and request.maxima.keys().isdisjoint(fields):
        maximum = request.maximum
    if maximum is None:
        return {}
    # OpenAI refuses a request with both of its own fields.
    others: dict[str, bytes | None] = dict.fromkeys(_MAXIMUM_FIELDS.intersection(request.maxima))
    return {**others, fields[0]: str(maximum).encode()}


def _maximum_fields(candidate: Candidate, endpoint: Endpoint) -> tuple[str, ...]:
    """The fields of which any one tells the model its maximum, the one to use first."""
    match endpoint:
        case Endpoint.CHAT if candidate.maximum_field == "either":
            return ("max_completion_tokens", "max_tokens")
        case Endpoint.CHAT:
            return (candidate.maximum_field,)
        case Endpoint.RESPONSES:
            return ("max_output_tokens",)
        case _:
            return ("max_tokens",)


def clamped_maximum(opened: OpenCall) -> int | None:
    """The maximum that the reservation buys, where that is less than what the call could have had."""
    estimated, candidate = opened.estimated, opened.candidate
    if estimated.is_maximum_named or opened.reserved >= estimated.at_most:
        return None
    bought = maximum_bought(estimated, opened.offer, opened.reserved)
    if bought is None or bought >= output_tokens_max(opened.request, candidate):
        return None
    return maximum_taken(estimated, candidate, bought)


def answer_headers(opened: OpenCall, response: UpstreamResponse) -> Headers:
    """The provider's header fields that the client gets, and ours: who answers, and what is held for it."""
    headers = relayed_headers(response.headers)
    headers.append((b"x-tollgate-provider", opened.candidate.provider.encode()))
    headers.append((b"x-credits-reserved", format_credits(opened.reserved).encode()))
    maximum = clamped_maximum(opened)
    if maximum is not None:
        headers.append((b"x-credits-max-tokens", str(maximum).encode()))
    return headers


def stream_headers(opened: OpenCall, response: UpstreamResponse) -> Headers:
    """As `_headers`; a stream is sent without an encoding, and with its type even if the provider forgot it."""
    headers = [(name, value) for name, value in answer_headers(opened, response) if name != b"content-encoding"]
    if not any(name == b"content-type" for name, _ in headers):
        headers.append((b"content-type", b"text/event-stream"))
    return headers


def error_event(failure: TollgateError, endpoint: Endpoint) -> bytes:
    """An error in the middle of a stream, as OpenAI sends it; no end marker follows."""
    body = error_body(str(failure), "upstream_error", None, "stream_broken")
    if endpoint is not Endpoint.RESPONSES:
        return b"data: " + body + b"\n\n"
    # Its clients know an error by the type of the event, those of the other endpoints by the field.
    said = {"type": "error", "code": "stream_broken", "message": str(failure), "param": None}
    fields = {name: msgspec.json.encode(value) for name, value in said.items()}
    return b"event: error\ndata: " + patch(body, fields) + b"\n\n"
