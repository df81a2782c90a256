"""Errors as answers: the one table from what went wrong to a status and OpenAI's error object."""

import re
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException, ValidationException
from litestar.openapi import ResponseSpec

from proxy import errors
from proxy.units import format_credits
from proxy.wire.objects import UNREADABLE

log = structlog.get_logger(__name__)

_NAMED_FIELD = re.compile(r"(unknown|missing required) field `([^`]{1,100})`")

Headers = list[tuple[bytes, bytes]]

TABLE: dict[type[errors.TollgateError], tuple[int, str, str | None]] = {
    errors.BadRequest: (400, "invalid_request_error", None),
    errors.BodyTooLarge: (413, "invalid_request_error", None),
    errors.UnsupportedEncoding: (415, "invalid_request_error", None),
    errors.Unauthenticated: (401, "invalid_request_error", "invalid_api_key"),
    errors.WrongPassword: (401, "invalid_request_error", "invalid_credentials"),
    errors.InsufficientCredits: (402, "insufficient_quota", "insufficient_credits"),
    errors.KeyLimitReached: (402, "insufficient_quota", "key_limit_reached"),
    errors.Forbidden: (403, "permission_error", None),
    errors.ModelNotAllowed: (403, "permission_error", None),
    errors.NotFound: (404, "invalid_request_error", None),
    errors.ModelNotFound: (404, "invalid_request_error", None),
    errors.ProviderNotFound: (404, "invalid_request_error", None),
    errors.Conflict: (409, "invalid_request_error", None),
    errors.RateLimited: (429, "rate_limit_error", "rate_limit_exceeded"),
    errors.UpstreamUnreachable: (502, "upstream_error", "provider_unreachable"),
    errors.UpstreamBroken: (502, "upstream_error", "provider_broke_off"),
    errors.UpstreamRefusedUs: (502, "upstream_error", "provider_refused_operator"),
    errors.UpstreamRejected: (502, "upstream_error", "provider_error"),
    errors.UpstreamTimeout: (504, "upstream_error", "provider_timeout"),
    errors.Unavailable: (503, "service_unavailable", "unavailable"),
    errors.NotReady: (503, "service_unavailable", "not_ready"),
    errors.LedgerFault: (500, "server_error", "ledger_fault"),
}
"""Status, `type` and `code`; where the code is None the error carries its own."""


class ErrorObject(msgspec.Struct):
    """What went wrong; some errors have further fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """An error, as OpenAI's API words it."""

    error: ErrorObject


def documented(*statuses: int, is_public: bool = False) -> dict[int, ResponseSpec]:
    """The errors of a route, for the OpenAPI document: these, and those of every route that is not for anybody."""
    shared = () if is_public else (401, 403, 503)
    return {
        status: ResponseSpec(ErrorBody, generate_examples=False, description=HTTPStatus(status).phrase)
        for status in sorted({*shared, *statuses})
    }


class Answer(msgspec.Struct, frozen=True):
    """An error, ready to be sent."""

    status: int
    headers: Headers
    body: bytes
    code: str | None
    """That of the error object; of an error that is passed on as it came, `provider_error`."""


def answer_to(error: BaseException, request_id: str) -> Answer:
    """The answer to whatever was raised. What is not ours to show is logged, and answered with the request id alone."""
    if isinstance(error, errors.UpstreamRejected) and _is_openai_error(error):
        headers = [(b"content-type", b"application/json"), *error.headers]
        return Answer(_passed_status(error.status), headers, error.body, "provider_error")
    for kind in type(error).__mro__:
        row = TABLE.get(kind)
        if row is not None:
            return _from_table(error, *row)
    if isinstance(error, HTTPException):
        return _from_framework(error)
    log.error("unexpected_error", request_id=request_id, exc_info=error)
    message = f"Something went wrong here. The request id is {request_id}."
    return _answer(500, message, "server_error", "internal_error")


def respond(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    if isinstance(error, UnicodeDecodeError):  # only a body is decoded outside of what handlers check themselves
        error = errors.BadRequest("The body is not UTF-8.", code="invalid_json")
    answer = answer_to(error, request.scope["state"]["request_id"])
    return Response(
        answer.body,
        status_code=answer.status,
        media_type="application/json",
        headers={name.decode(): value.decode() for name, value in answer.headers},
    )


def _from_table(error: BaseException, status: int, type_: str, code: str | None) -> Answer:
    if isinstance(error, errors.UpstreamRejected):
        status = _passed_status(error.status)
        if status == 429:
            type_, code = "rate_limit_error", "provider_rate_limited"
    message = str(error)
    if isinstance(error, errors.LedgerFault):
        log.error("ledger_fault", exc_info=error)
        message = "The ledger could not book this call."
    return _answer(
        status,
        message,
        type_,
        code or getattr(error, "code", None),
        param=getattr(error, "param", None),
        headers=_headers(error),
        **_details(error),
    )


def _from_framework(error: HTTPException) -> Answer:
    if isinstance(error, NotFoundException):
        return _answer(404, "There is nothing at this path.", "invalid_request_error", "unknown_path")
    if isinstance(error, MethodNotAllowedException):
        # The framework spells it in two ways.
        headers = [
            (b"allow", value.encode()) for name, value in (error.headers or {}).items() if name.lower() == "allow"
        ]
        return _answer(
            405,
            "This path does not take this method.",
            "invalid_request_error",
            "method_not_allowed",
            headers=headers,
        )
    if isinstance(error, ValidationException):
        return _invalid(error)
    status = error.status_code
    type_ = "invalid_request_error" if status < 500 else "server_error"
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    return _answer(status, error.detail, type_, code)


def _invalid(error: ValidationException) -> Answer:
    """What is wrong with a body or a parameter, and where. Litestar's own text would repeat the whole address."""
    faults = error.extra if isinstance(error.extra, list) else []
    fault = faults[0] if faults and isinstance(faults[0], dict) else {}
    message = str(fault.get("message", ""))
    named = _NAMED_FIELD.search(message)
    if named:
        code = "unknown_parameter" if named[1] == "unknown" else "missing_required_parameter"
        return _answer(400, f"{message}.", "invalid_request_error", code, param=named[2])
    param = fault.get("key", "data")
    if param == "data":
        message = f"The body: {message}." if "Expected" in message else "A JSON body is needed."
        return _answer(400, message, "invalid_request_error", "invalid_type")
    return _answer(400, f"{param}: {message}.", "invalid_request_error", "invalid_type", param=param)


def _answer(status: int, message: str, type_: str, code: str | None, **more: Any) -> Answer:
    """OpenAI's error object, `more` being `param`, `headers` and whatever else belongs in it."""
    headers = more.pop("headers", [])
    error = {"message": message, "type": type_, "param": more.pop("param", None), "code": code, **more}
    headers = [(b"content-type", b"application/json"), *headers]
    return Answer(status, headers, msgspec.json.encode({"error": error}), code)


def _details(error: BaseException) -> dict[str, object]:
    """What a program may want to know beside the message."""
    match error:
        case errors.InsufficientCredits():
            details: dict[str, object] = {
                "required": format_credits(error.required),
                "available": format_credits(error.available),
                "reserved": format_credits(error.reserved),
            }
            if error.tokens_affordable is not None:
                details["max_affordable_tokens"] = error.tokens_affordable
            return details
        case errors.NotReady():
            return {"checks": error.checks}
        case errors.KeyLimitReached():
            return {"required": format_credits(error.required), "available": format_credits(error.available)}
        case _:
            return {}


def _headers(error: BaseException) -> Headers:
    match error:
        case errors.RateLimited() | errors.Unavailable():
            return [(b"retry-after", str(error.retry_after_s).encode())]
        case errors.InsufficientCredits(is_temporary=True):
            return [(b"retry-after", b"1")]
        case errors.NotCovered():
            return [(b"x-should-retry", b"false")]
        case errors.Unauthenticated():
            return [(b"www-authenticate", b"Bearer")]
        case errors.UpstreamTimeout() | errors.UpstreamBroken() | errors.UpstreamRefusedUs():
            # The first two may have been billed already, and the third will not get better.
            return [(b"x-should-retry", b"false")]
        case errors.UpstreamRejected():
            return error.headers
        case _:
            return []


def _passed_status(status: int) -> int:
    """The provider's own status where it speaks to the client; its failures are a gateway's, not a server's."""
    if status in {503, 529}:
        return 503
    return status if 400 <= status < 500 else 502


def _is_openai_error(error: errors.UpstreamRejected) -> bool:
    try:
        return isinstance(msgspec.json.decode(error.body)["error"], dict)
    except (*UNREADABLE, KeyError, TypeError):
        return False
