"""Answers before faults strike them: JSON bodies, streams of events, errors."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tests.fakes.provider.behaviour import Behaviour

MODELS = ("fake-large", "fake-small")
CREATED_AT = 1_700_000_000  # a fixed time stamp keeps answers the same from run to run

_ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", None, "The request is invalid."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    402: ("insufficient_quota", "insufficient_quota", "You exceeded your current quota."),
    403: ("permission_error", "permission_denied", "You are not allowed to use this model."),
    404: ("invalid_request_error", "unknown_url", "Unknown request URL."),
    408: ("timeout_error", None, "The request took too long."),
    411: ("invalid_request_error", None, "The request has no content-length."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}
_SERVER_ERROR = ("server_error", None, "The server had an error while processing your request.")
_HTML = b"<html>\r\n<head><title>%d</title></head>\r\n<body><center><h1>nginx</h1></center></body>\r\n</html>\r\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that are sent at one go, and the tokens of the reply in them."""

    octets: bytes
    tokens: int = 0
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A body of one piece, or the events of a stream."""

    status: int = 200
    content_type: str = "application/json"
    is_stream: bool = False
    pieces: list[Piece]


def as_json(shape: Any) -> bytes:
    """`shape` as the provider writes JSON: compact, in UTF-8."""
    return json.dumps(shape, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def plain(shape: dict[str, Any], *, tokens: int = 0, usage: dict[str, Any] | None = None) -> Answer:
    """A JSON body that carries so many tokens of a reply."""
    return Answer(pieces=[Piece(as_json(shape), tokens=tokens, usage=usage)])


def stream(pieces: Iterable[Piece], behaviour: Behaviour) -> Answer:
    """A stream of events, each behind the prefix that was asked for."""
    prefix = behaviour.event_prefix.encode(errors="surrogatepass")
    return Answer(
        content_type="text/event-stream; charset=utf-8",
        is_stream=True,
        pieces=[replace(piece, octets=prefix + piece.octets) for piece in pieces],
    )


def error(status: int, message: str | None = None) -> Answer:
    """An error of the provider's own accord."""
    return Answer(status=status, pieces=[Piece(as_json({"error": _error_object(status, message)}))])


def wished_error(behaviour: Behaviour, status: int) -> Answer:
    """An answer with `status` that is the error which was asked for."""
    if behaviour.error_body == "empty":
        return Answer(status=status, pieces=[Piece(b"")])
    if behaviour.error_body == "html":
        return Answer(status=status, content_type="text/html", pieces=[Piece(_HTML % status)])
    return Answer(status=status, pieces=[Piece(as_json({"error": wished_error_object(behaviour)}))])


def wished_error_object(behaviour: Behaviour) -> dict[str, Any]:
    """The error that was asked for, as OpenAI's object."""
    shape = _error_object(behaviour.status or 500)
    return shape if behaviour.error_code is None else shape | {"code": behaviour.error_code}


def _error_object(status: int, message: str | None = None) -> dict[str, Any]:
    kind, code, usual_message = _ERRORS.get(status, _SERVER_ERROR)
    return {"message": message or usual_message, "type": kind, "param": None, "code": code}
