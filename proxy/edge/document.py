"""The OpenAPI document at `/schema/openapi.json`, and the page at `/schema` that shows it and tries it.

The framework knows the routes that it serves. What is served past it (the paid calls, and the document itself) is
described in `proxy/data/openapi.json`; and what holds for many routes alike is added here: who may call them, the
headers of their answers, their errors, and an example of each body.
"""

import re
from base64 import b64encode
from copy import deepcopy
from hashlib import sha256
from importlib import resources
from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin

from proxy import errors
from proxy.edge.authentication import PUBLIC
from proxy.edge.errors import answer_to
from proxy.edge.examples import REQUEST_ID, example
from proxy.edge.invoke import INVOKE_PATH, TEST_PATH, Delta, Done, Failed, Invoked, Tested, TestRequest
from proxy.wire.requests import Endpoint

Json = dict[str, Any]
Page = Request[Any, Any, Any]

_DATA = resources.files("proxy") / "data"
_DOCUMENT_TYPE = "application/vnd.oai.openapi+json"
_METHODS = frozenset({"get", "post", "put", "patch", "delete"})

PAID = frozenset({*(f"/v1/{endpoint}" for endpoint in Endpoint), INVOKE_PATH, TEST_PATH})
"""The paths of calls that cost something."""

_NOT_KEPT = "/v1/responses/{response_path}"

TAGS: Final = (
    ("/v1/", "OpenAI's API"),
    ("/api/v1/llm/", "Simple API"),
    ("/api/v1/credits/", "Credits"),
    ("/api/v1/admin/", "Administration"),
    ("/api/v1/keys", "Accounts and keys"),
    ("/register", "Accounts and keys"),
    ("/login", "Accounts and keys"),
    ("/me", "Accounts and keys"),
    ("/", "Operations"),
)
"""Under which heading a path is listed: by the first of these beginnings that it has."""

_SECURITY: Final = {
    "api_key": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "sk-tg-…",
        "description": "An API key of Tollgate. What it may do is its scope: inference, manage or admin.",
    },
    "token": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A token of POST /login, or of an issuer that the operator trusts: all rights of its user.",
    },
}


def _header(description: str, *, is_sure: bool = False) -> Json:
    return {"description": description, "required": is_sure, "schema": {"type": "string"}}


_ALWAYS: Final = {"x-request-id": _header("Our id of this request; a charge is found by it.", is_sure=True)}
_PAID_HEADERS: Final = {
    "x-tollgate-provider": _header("Who served."),
    "x-credits-reserved": _header("What was held for the call, in credits."),
    "x-credits-charged": _header("What it cost, in credits; not with a stream, whose head comes before its charge."),
    "x-credits-balance": _header("What the wallet holds after it; as above."),
    "x-credits-max-tokens": _header("To what a small wallet has shortened the answer."),
}
_ERROR_HEADERS: Final = {
    401: {"www-authenticate": _header("Bearer.")},
    402: {"retry-after": _header("In seconds; when only other open calls stand in the way.")},
    429: {"retry-after": _header("In seconds.")},
    502: {"x-should-retry": _header("false where the provider may have billed it already, or will not get better.")},
    503: {"retry-after": _header("In seconds.")},
    504: {"x-should-retry": _header("false: the provider may have done the work.")},
}

_ERRORS: Final[dict[int, errors.TollgateError]] = {
    400: errors.BadRequest("Missing required parameter: 'model'.", param="model", code="missing_required_parameter"),
    401: errors.Unauthenticated("The API key or token is unknown, revoked or expired."),
    402: errors.InsufficientCredits(
        required=2_300_000, available=1_000_000, reserved=500_000, tokens_affordable=300, is_temporary=True
    ),
    403: errors.Forbidden("This needs a key of the scope admin, or a login.", code="insufficient_scope"),
    404: errors.NotFound("There is no such thing."),
    409: errors.Conflict("There is one already.", code="exists"),
    413: errors.BodyTooLarge(20_000_000),
    415: errors.UnsupportedEncoding("gzip"),
    429: errors.RateLimited("Too many requests in this minute.", retry_after_s=12),
    502: errors.UpstreamUnreachable("No connection to the provider could be made.", provider="openai"),
    503: errors.Unavailable("The ledger is out of reach just now.", retry_after_s=5),
    504: errors.UpstreamTimeout("The provider did not answer in time.", provider="openai"),
}
"""One error of each status, as it is answered."""

_PAID_ERRORS: Final = {
    400: "What was asked cannot be served, priced or bounded.",
    401: "No valid key or token.",
    402: "Not covered by the wallet, or by the key's own limit: no provider has seen it.",
    403: "A caller who may not.",
    404: "Nothing that is priced and enabled serves this model.",
    413: "The body is over the operator's limit.",
    415: "The body is encoded.",
    429: "A rate limit: the caller's, or the provider's.",
    502: "The provider failed; nothing was charged.",
    503: "Out of reach just now; nothing was charged.",
    504: "The provider did not answer in time; nothing was charged.",
}
_PASSED = "The provider's own refusal; nothing was charged."


class DocumentPlugin(JsonRenderPlugin):
    """The completed document, made when it is first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._rendered: bytes | None = None

    def render(self, request: Page, openapi_schema: Json) -> bytes:
        """See `OpenAPIRenderPlugin`."""
        if self._rendered is None:
            plain = msgspec.json.decode(self.render_json(request, openapi_schema))
            self._rendered = msgspec.json.encode(completed(plain))
        return self._rendered


class PagePlugin(OpenAPIRenderPlugin):
    """The page, which brings all it needs and loads nothing from anywhere but the document."""

    def __init__(self, document: DocumentPlugin) -> None:
        super().__init__(path="/")
        self._document = document
        self._page = (_DATA / "schema.html").read_bytes()
        hashes = {
            name: b64encode(sha256(re.findall(rb"(?s)<%s>(.*?)</%s>" % (name, name), self._page)[0]).digest()).decode()
            for name in (b"script", b"style")
        }
        self._headers = {
            "content-security-policy": (
                f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'sha256-{hashes[b'script']}'; "
                f"style-src 'sha256-{hashes[b'style']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "vary": "Accept",
            "x-content-type-options": "nosniff",
        }

    def render(self, request: Page, openapi_schema: Json) -> Any:
        """See `OpenAPIRenderPlugin`; a response instead of bytes, since there are two types of it."""
        accepted = request.headers.get("accept", "")
        if "json" in accepted and "html" not in accepted:
            document = self._document.render(request, openapi_schema)
            return Response(document, media_type=_DOCUMENT_TYPE, headers=self._headers)
        return Response(self._page, media_type="text/html", headers=self._headers)


def completed(document: Json) -> Json:
    """The framework's `document` with what it does not know of."""
    said = msgspec.json.decode((_DATA / "openapi.json").read_bytes())
    whole = deepcopy(document)
    _, own_schemas = msgspec.json.schema_components(
        (Invoked, Delta, Done, Failed, TestRequest, Tested), ref_template="#/components/schemas/{name}"
    )
    schemas = {**whole["components"]["schemas"], **own_schemas, **said["schemas"]}
    whole["components"] = {"schemas": _mended(schemas), "securitySchemes": _SECURITY}
    whole["paths"] = {**_mended(whole["paths"]), **said["paths"]}
    whole["security"] = [{name: []} for name in _SECURITY]
    whole["tags"] = [{"name": name} for name in dict.fromkeys(tag for _, tag in TAGS)]
    for path, item in whole["paths"].items():
        for method in _METHODS.intersection(item):
            _complete(path, item[method], f"{method} {path}", schemas)
    return whole


def _mended(said: Any) -> Any:
    """A schema that is one of several may be more than one of them: a whole number is a number, too."""
    if isinstance(said, dict):
        return {"anyOf" if name == "oneOf" else name: _mended(value) for name, value in said.items()}
    return [_mended(each) for each in said] if isinstance(said, list) else said


def _complete(path: str, operation: Json, name: str, schemas: Json) -> None:
    operation.setdefault("operationId", re.sub(r"\W+", "_", name).strip("_"))
    operation["tags"] = [next(tag for beginning, tag in TAGS if path.startswith(beginning))]
    if path in PUBLIC:
        operation["security"] = []
    responses = operation["responses"]
    if path in PAID or path == _NOT_KEPT:
        statuses = _PAID_ERRORS if path in PAID else (400, 401, 403, 503)
        responses.update({str(status): _passed(_PAID_ERRORS[status]) for status in statuses})
    if path in PAID:
        responses["4XX"] = _passed(_PASSED)
        responses["200"].setdefault("headers", {}).update(_PAID_HEADERS)
    for status, response in responses.items():
        number = int(status) if status.isdecimal() else 0
        response["headers"] = {**response.get("headers", {}), **_ERROR_HEADERS.get(number, {}), **_ALWAYS}
        for media in response.get("content", {}).values():
            if number in _ERRORS:
                media["example"] = msgspec.json.decode(answer_to(_ERRORS[number], REQUEST_ID).body)
            _exemplify(media, schemas)
    for media in operation.get("requestBody", {}).get("content", {}).values():
        _exemplify(media, schemas)


def _passed(description: str) -> Json:
    schema = {"$ref": "#/components/schemas/PassedError"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _exemplify(media: Json, schemas: Json) -> None:
    if media.get("examples"):
        media.pop("example", None)  # one or the other
    elif media.get("example") is None and "schema" in media:
        media["example"] = example(media["schema"], schemas)
