"""Responses (https://platform.openai.com/docs/api-reference/responses/create): what we read of a request.

Nothing is kept at the provider: what hangs on earlier answers is refused, and every request is sent with
`store: false`.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw

from proxy.wire.chat import check_files
from proxy.wire.objects import (
    NULL,
    UNREADABLE,
    Fields,
    Spelling,
    bad_request,
    check_spelling,
    checked_objects,
    unique_fields,
)
from proxy.wire.requests import (
    HARMLESS,
    IMAGE_PARTS,
    OUTSIDE_OF_TOKENS,
    STATE,
    TOOL_CALLS_MAX,
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
    image_bytes,
    is_set,
    is_switched_on,
    thinking_tokens,
    unsupported,
)


class _Part(msgspec.Struct, frozen=True):
    type: str | None = None


class _Item(msgspec.Struct, frozen=True):
    type: str | None = None
    role: str | None = None
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
    max_tool_calls: Annotated[int, Meta(ge=1, le=TOOL_CALLS_MAX)] | None = None


_REFUSED: Final = {
    **STATE,
    **OUTSIDE_OF_TOKENS,
    "context_management": "state kept at the provider is not bounded",
    "n": "there is one response",
    "prompt": "state kept at the provider is not bounded",
}
_TOP = Spelling(
    _ResponseRequest.__struct_fields__,
    (*HARMLESS, "include", "instructions", "prompt_cache_key", "reasoning", "safety_identifier", "text", "truncation"),
    _REFUSED,
)
_ITEM = Spelling(
    _Item.__struct_fields__,
    ("arguments", "call_id", "encrypted_content", "id", "name", "phase", "status", "summary"),
)
_PART = Spelling(_Part.__struct_fields__, ("annotations", "detail", "file_data", "filename", "image_url", "text"))
_TOOL = Spelling((*Tool.__struct_fields__, "container"), ("description", "name", "parameters", "strict", "format"))

_CONTAINER = Spelling(("type", "memory_limit", "file_ids"), ())

_HOSTED_TOOLS: Final = {
    "web_search": "web_search",
    "web_search_2025_08_26": "web_search",
    "web_search_preview": "web_search",
    "web_search_preview_2025_03_11": "web_search",
    "file_search": "file_search",
    "code_interpreter": "code_interpreter",
}
"""Types of tools that the provider runs and that can have a price, and what they are priced as."""

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
        fields = check_fields(request, body, _TOP)
        tools = check_tools(request.tools or (), _HOSTED_TOOLS)
        if request.tools:
            for tool, members in zip(request.tools, checked_objects([fields["tools"]], _TOOL, "tools"), strict=True):
                if tool.type == "code_interpreter":
                    _check_container(members.get("container"))
        _check_instructions(fields.get("instructions"))
        items = request.input if isinstance(request.input, list) else []
        parts = _check_items(items, fields["input"]) if items else []
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    media = [kind for item in items for kind in _media(item)]
    images = sum(kind in IMAGE_PARTS for kind in media)
    return PaidRequest(
        endpoint=Endpoint.RESPONSES,
        model=request.model,
        is_stream=bool(request.stream),
        maxima=request.named(fields),
        thinking_tokens=thinking_tokens(fields.get("reasoning")),
        service_tier=request.service_tier,
        # What a tool finds becomes prompt.
        is_unsized=bool(media or tools),
        has_only_images=bool(images) and images == len(media) and not tools,
        images=images,
        image_bytes=image_bytes(parts) if images else 0,
        tools=tools,
        tool_calls_max=request.max_tool_calls,
        # OpenAI keeps a response unless it is told not to.
        must_unstore=request.store is not False,
    )


def _check_instructions(instructions: Raw | None) -> None:
    if instructions is not None and memoryview(instructions)[0] not in b'"n':
        raise unsupported("instructions", "Instructions are a text here: the items of a list may be of any size.")


def _check_items(items: list[_Item], raw: Raw) -> list[Fields]:
    """The checks of names, and for state at the provider, in each item and each part of its content: the parts."""
    parts = [part for item in items for part in (item.content, item.output) if isinstance(part, list)]
    check_number(len(items) + sum(map(len, parts)), "input")
    for item in items:
        # Without a type it is a message, or, if it is not that, a reference by its id.
        if item.type == "item_reference" or (item.type is None and item.role is None):
            raise unsupported("input", "Items kept at the provider are not supported: send them whole.")
    members: list[Fields] = checked_objects([raw], _ITEM, "input")
    contents = [
        fields[name]
        for item, fields in zip(items, members, strict=True)
        for name in ("content", "output")
        if isinstance(getattr(item, name), list)
    ]
    checked = checked_objects(contents, _PART, "input")
    for part in checked:
        check_files(part, "input")
    for fields in members:
        if is_set(fields.get("file_id")):
            raise unsupported("input", "Files kept at the provider are not supported.")
        if is_set(fields.get("container_id")):
            raise unsupported("input", "Containers kept at the provider are not supported: leave their items out.")
    return checked


def _check_container(container: Raw | None) -> None:
    """Raises `BadRequest` unless a code interpreter gets a new container, with no files in it, of the smallest kind.

    One that exists, and files, are kept at the provider under a key that all callers share; larger ones cost more.
    """
    fields = _object(container)
    check_spelling(fields, _CONTAINER, "tools")
    is_new = bytes(fields.get("type", NULL)) == b'"auto"' and not is_switched_on(fields.get("file_ids"))
    is_smallest = bytes(fields.get("memory_limit", NULL)) in {b"null", b'"1g"'}
    if not (is_new and is_smallest):
        raise unsupported(
            "tools", 'A code interpreter needs "container": {"type": "auto"}, without files, of 1g at most.'
        )


def _object(value: Raw | None) -> Fields:
    """The fields of `value`; none where it is no object."""
    is_object = value is not None and memoryview(value)[0] == ord("{")
    return unique_fields(value, "tools") if value is not None and is_object else {}


def _media(item: _Item) -> list[str | None]:
    """The types of what an item holds whose size is not that of the body: its own, if it is no known text itself."""
    if item.type not in _SIZED_ITEMS:
        return ["item"]
    parts = [part for parts in (item.content, item.output) if isinstance(parts, list) for part in parts]
    return [part.type for part in parts if part.type not in _SIZED_PARTS]
