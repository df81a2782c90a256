"""Which answer a request gets, before faults strike it."""

from types import ModuleType

from tests.fakes.provider import chat, completions, embeddings, messages, responses
from tests.fakes.provider.answer import CREATED_AT, MODELS, Answer, Piece, error, plain, wished_error
from tests.fakes.provider.journal import Served

_ENDPOINTS = {
    "/chat/completions": chat,
    "/completions": completions,
    "/embeddings": embeddings,
    "/responses": responses,
}
"""By the end of their path. Each module has `fault`, `behaviour`, `prompt_tokens` and `answer`."""


def decide(served: Served) -> Answer:
    """The answer to a request that was read; fills in the journal's counts and behaviour."""
    if served.method == "POST" and served.path.endswith("/messages"):
        return messages.decide(served)
    endpoint = _endpoint(served) if served.method == "POST" else None
    is_models = served.method == "GET" and served.path.partition("?")[0].endswith("/models")
    if endpoint is None and not is_models:
        return error(404, f"Unknown request URL: {served.method} {served.path}.")
    if not _is_authorized(served):
        return error(401)
    if endpoint is None:
        return _models()
    if served.header("transfer-encoding"):
        return error(411)
    return _answer(endpoint, served)


def _endpoint(served: Served) -> ModuleType | None:
    return next((endpoint for end, endpoint in _ENDPOINTS.items() if served.path.partition("?")[0].endswith(end)), None)


def _is_authorized(served: Served) -> bool:
    scheme, _, key = served.header("authorization").partition(" ")
    return (scheme.lower() == "bearer" and bool(key.strip())) or bool(served.header("api-key"))


def _models() -> Answer:
    models = [{"id": model, "object": "model", "created": CREATED_AT, "owned_by": "fake-org"} for model in MODELS]
    return plain({"object": "list", "data": models})


def _answer(endpoint: ModuleType, served: Served) -> Answer:
    request = served.parsed
    if (fault := endpoint.fault(request)) is not None:
        return error(400, fault)
    try:
        served.behaviour = behaviour = endpoint.behaviour(request)
    except (ValueError, TypeError) as problem:
        return error(400, f"The provider cannot behave like that: {problem}.")
    served.prompt_tokens = endpoint.prompt_tokens(request)
    is_stream = bool(request.get("stream"))
    if (verbatim := behaviour.verbatim) is not None:
        usual_type = "text/event-stream" if is_stream else "application/json"
        return Answer(status=behaviour.status or 200, content_type=usual_type, pieces=[Piece(verbatim)])
    if behaviour.error_event and not is_stream:
        return wished_error(behaviour, 200)
    if behaviour.status is not None and not behaviour.error_event:
        return wished_error(behaviour, behaviour.status)
    return endpoint.answer(served, request)
