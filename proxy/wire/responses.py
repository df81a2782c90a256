"""Responses (https://platform.openai.com/docs/api-reference/responses/create): what we read of a request.

Nothing is kept at the provider: what hangs on earlier answers is refused, and every request is sent with
`store: false`.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw

from proxy.wire.chat import check_files
from proxy.wire.objects import UNREADABLE, Fields, Spelling, bad_request, checked_objects
from proxy.wire.requests import (
    HARMLESS,
    OUTSIDE_OF_TOKENS,
    STATE,
    Endpoint,
    Maxima,
    ModelName,
    PaidRequest,
    StreamOptions,
    Tokens,
    Tool,
    check_fields,
    check_number,
    check_tools,
    is_set,
    thinking_tokens,
    unsupported,
)


class _Part(msgspec.Struct, frozen=True):
    type: str | None = None


class _Item(msgspec.Struct, frozen=True):
    type: str | None = None
    content: str | list[_Part] | None = None
    output: str | list[_Part] | dict[str, Raw] | None = None


class _ResponseRequest(Maxima, frozen=True, kw_only=True):
    model: ModelName
    input: Annotated[str, Meta(min_length=1)] | Annotated[list[_Item], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    service_tier: str | None = None
    store: bool | None = None
    tools: list[Tool] | None = None


_REFUSED: Final = {
    **STATE,
    **OUTSIDE_OF_TOKENS,
    "context_management": "state kept at the provider is not bounded",
    "max_tool_calls": "tools that the provider runs are billed outside of tokens",
    "n": "there is one response",
    "prompt": "state kept at the provider is not bounded",
}
_TOP = Spelling(
    (*_ResponseRequest.__struct_fields__, *_REFUSED),
    (*HARMLESS, "include", "instructions", "prompt_cache_key", "reasoning", "safety_identifier", "text", "truncation"),
)
_ITEM = Spelling(
    _Item.__struct_fields__,
    ("arguments", "call_id", "encrypted_content", "id", "name", "phase", "role", "status", "summary"),
)
_PART = Spelling(_Part.__struct_fields__, ("annotations", "detail", "file_data", "filename", "image_url", "text"))
_TOOL = Spelling(Tool.__struct_fields__, ("description", "name", "parameters", "strict", "format"))

_SIZED_ITEMS = frozenset(
    {
        None,
        "custom_tool_call",
        "custom_tool_call_output",
        "function_call",
        "function_call_output",
        "message",
        "reasoning",
    }
)
"""Items that are wholly in the body."""

_SIZED_PARTS = frozenset({"input_text", "output_text", "reasoning_text", "refusal", "summary_text", "text"})

_decode_request = msgspec.json.Decoder(_ResponseRequest).decode


def decode_response(body: bytes) -> PaidRequest:
    """The facts of a request for a response, of which the cost has a bound; errors as with `decode_chat`."""
    try:
        request = _decode_request(body)
        fields = check_fields(request, body, _TOP, _REFUSED)
        check_tools(request.tools or ())
        if request.tools:
            checked_objects([fields["tools"]], _TOOL, "tools")
        items = request.input if isinstance(request.input, list) else []
        if items:
            _check_items(items, fields["input"])
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    return PaidRequest(
        endpoint=Endpoint.RESPONSES,
        model=request.model,
        is_stream=bool(request.stream),
        maxima=request.named,
        thinking_tokens=thinking_tokens(fields.get("reasoning")),
        is_unsized=any(_is_unsized(item) for item in items),
        # OpenAI keeps a response unless it is told not to.
        must_unstore=request.store is not False,
    )


def _check_items(items: list[_Item], raw: Raw) -> None:
    """The checks of names, and for state at the provider, in each item and each part of its content."""
    parts = [part for item in items for part in (item.content, item.output) if isinstance(part, list)]
    check_number(len(items) + sum(map(len, parts)), "input")
    for item in items:
        if item.type == "item_reference":
            raise unsupported("input", "Items kept at the provider are not supported: send them whole.")
    members: list[Fields] = checked_objects([raw], _ITEM, "input")
    contents = [
        fields[name]
        for item, fields in zip(items, members, strict=True)
        for name in ("content", "output")
        if isinstance(getattr(item, name), list)
    ]
    for part in checked_objects(contents, _PART, "input"):
        check_files(part, "input")
    for fields in members:
        if is_set(fields.get("file_id")):
            raise unsupported("input", "Files kept at the provider are not supported.")


def _is_unsized(item: _Item) -> bool:
    """Whether an item holds anything whose size is not that of the body."""
    if item.type not in _SIZED_ITEMS:
        return True
    parts = [part for parts in (item.content, item.output) if isinstance(parts, list) for part in parts]
    return any(part.type not in _SIZED_PARTS for part in parts)
