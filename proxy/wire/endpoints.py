"""From a paid path and a body to the facts of the request."""

from typing import assert_never

from proxy.wire.chat import decode_chat
from proxy.wire.completions import decode_completion, decode_embedding
from proxy.wire.objects import bad_request
from proxy.wire.requests import Endpoint, PaidRequest
from proxy.wire.responses import decode_response


def _check_utf8(body: bytes) -> None:
    """Raises `BadRequest` where the decoders would not look: providers differ in what they make of such bytes."""
    try:
        body.decode()
    except UnicodeDecodeError as exc:
        raise bad_request(exc) from exc


def decode(endpoint: Endpoint, body: bytes) -> PaidRequest:
    """The facts of a request to `endpoint`. Raises `BadRequest`: see `decode_chat`."""
    if not body.isascii():
        _check_utf8(body)
    match endpoint:
        case Endpoint.CHAT:
            return decode_chat(body)
        case Endpoint.COMPLETIONS:
            return decode_completion(body)
        case Endpoint.EMBEDDINGS:
            return decode_embedding(body)
        case Endpoint.RESPONSES:
            return decode_response(body)
        case _:
            assert_never(endpoint)
