"""The older endpoints whose prompts are plain texts or tokens: completions and embeddings.

https://platform.openai.com/docs/api-reference/completions/create and
https://platform.openai.com/docs/api-reference/embeddings/create
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from proxy.errors import BadRequest
from proxy.wire.objects import UNREADABLE, Spelling, bad_request
from proxy.wire.requests import (
    HARMLESS,
    OUTSIDE_OF_TOKENS,
    STATE,
    TOKENS_MAX,
    Choices,
    Endpoint,
    Maxima,
    ModelName,
    PaidRequest,
    StreamOptions,
    check_fields,
)

_Text = Annotated[str, Meta(min_length=1)]
_Token = Annotated[int, Meta(ge=0)]
_Prompts = _Text | Annotated[list[str | int | list[_Token]], Meta(min_length=1)]

_REFUSED_PROMPTS: Final = {"prompt_embeds": "the size of a prompt is that of its text or tokens"}


class _CompletionRequest(Maxima, frozen=True, kw_only=True):
    model: ModelName
    prompt: _Prompts
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=TOKENS_MAX)] | None = None
    """Zero for the prompt's own log probabilities."""
    service_tier: str | None = None
    store: bool | None = None


class _EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelName
    input: _Prompts
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None


_COMPLETION_REFUSED: Final = {**STATE, **OUTSIDE_OF_TOKENS, **_REFUSED_PROMPTS}
_COMPLETION = Spelling(
    _CompletionRequest.__struct_fields__, (*HARMLESS, "echo", "logit_bias", "suffix"), _COMPLETION_REFUSED
)
_EMBEDDING_REFUSED: Final = {
    **_REFUSED_PROMPTS,
    "input_audio": "only texts and tokens are priced here",
    "input_image": "only texts and tokens are priced here",
}
_EMBEDDING = Spelling(
    _EmbeddingRequest.__struct_fields__, ("dimensions", "encoding_format", "user"), _EMBEDDING_REFUSED
)

_decode_completion = msgspec.json.Decoder(_CompletionRequest).decode
_decode_embedding = msgspec.json.Decoder(_EmbeddingRequest).decode


def decode_completion(body: bytes) -> PaidRequest:
    """The facts of a completion request; errors as with `decode_chat`."""
    try:
        request = _decode_completion(body)
        fields = check_fields(request, body, _COMPLETION)
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    if request.stream and (request.best_of or 1) > (request.n or 1):
        # As at OpenAI; who leaves such a stream would not pay for what it does not show.
        raise BadRequest("The best of several answers cannot be streamed.", param="best_of", code="invalid_value")
    prompts = _count(request.prompt)
    return PaidRequest(
        endpoint=Endpoint.COMPLETIONS,
        model=request.model,
        is_stream=bool(request.stream),
        wants_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
        maxima=request.named(fields),
        choices=max(request.n or 1, request.best_of or 1) * prompts,
        prompts=prompts,
        service_tier=request.service_tier,
        must_unstore=bool(request.store),
    )


def decode_embedding(body: bytes) -> PaidRequest:
    """The facts of a request for embeddings, which have no output; errors as with `decode_chat`."""
    try:
        request = _decode_embedding(body)
        check_fields(request, body, _EMBEDDING)
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    return PaidRequest(
        endpoint=Endpoint.EMBEDDINGS,
        model=request.model,
        prompts=_count(request.input),
        service_tier=request.service_tier,
        has_output=False,
    )


def _count(prompts: str | list[str | int | list[int]]) -> int:
    """How many prompts there are at most: a text and a list of tokens are one."""
    return 1 if isinstance(prompts, str) or set(map(type, prompts)) == {int} else len(prompts)
