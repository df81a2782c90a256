"""Chat completions (https://platform.openai.com/docs/api-reference/chat/create): what we read of a request."""

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw

from proxy.wire.objects import (
    NULL,
    UNREADABLE,
    Fields,
    Spelling,
    bad_request,
    check_spelling,
    checked_objects,
    count_to,
    unique_fields,
)
from proxy.wire.requests import (
    HARMLESS,
    IMAGE_PARTS,
    OUTSIDE_OF_TOKENS,
    STATE,
    THINKING_TOKENS_MIN,
    Choices,
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


class Part(msgspec.Struct, frozen=True):
    """One part of a message's content."""

    type: str


class Message(msgspec.Struct, frozen=True):
    """One message of the conversation."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: Raw = NULL


class ChatRequest(Maxima, frozen=True, kw_only=True):
    """The fields of a chat completion request that decide what it may cost and how it is served."""

    model: ModelName
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    store: bool | None = None
    tools: list[Tool] | None = None
    prediction: Raw = NULL  # `Raw | None` would take nothing but null


_WEB_SEARCH = "web_search_options"

_REFUSED: Final = {
    **STATE,
    **OUTSIDE_OF_TOKENS,
    "chat_template": "the size of a prompt is that of its messages",
    "prompt": "state kept at the provider is not bounded",
}
del _REFUSED[_WEB_SEARCH]
_MODALITIES = frozenset({"text", "audio"})
_ESCAPE = b"\\u00"
_ESCAPED_LETTER = re.compile(rb"\\u00[567]")
_UNUSUAL = frozenset({"audio", "modalities", "prediction", "reasoning", "reasoning_effort", "thinking", _WEB_SEARCH})
"""Names of what may say more of a call than where it goes and how long its answer may be, without any object."""

_NO_EFFORT = frozenset({b"null", b'"none"'})
_TEXT_PARTS = frozenset({"text", "refusal"})

_decode_request = msgspec.json.Decoder(ChatRequest).decode

_TOP = Spelling((*ChatRequest.__struct_fields__, _WEB_SEARCH), HARMLESS, _REFUSED)
_MESSAGE = Spelling((*Message.__struct_fields__, "audio"), ("name", "refusal", "tool_call_id"))
_PART = Spelling(Part.__struct_fields__, ("cache_control", "file", "image_url", "input_audio", "text"))
_FILE = Spelling(("file_id",), (*_PART.right, "file_data", "filename", "url", "detail", "data", "format"))
_TOOL = Spelling(Tool.__struct_fields__, ("custom", "function"))


def decode_chat(body: bytes) -> PaidRequest:
    """The facts of a chat completion request, of which the cost has a bound.

    Raises `BadRequest` for everything else: JSON that is malformed or nested too deeply, wrong types and values,
    names that another parser may read otherwise, and what would be billed outside of tokens or hangs on state at
    the provider. `param` is the top-level field.
    """
    try:
        request = _decode_request(body)
        fields = check_fields(request, body, _TOP)
        # What remains to be looked at are the objects inside of messages, and tools. When there are no more braces than
        # those of the body, of its messages and of the stream options, then there is no such object, whatever names
        # and strings there may be: the common case, at the price of a memchr.
        outer_objects = 1 + len(request.messages) + (request.stream_options is not None)
        is_plain = count_to(outer_objects + 1, b"{", body) == outer_objects
        content = [] if is_plain else _content_parts(request)
        parts = _check(request, content, fields, is_plain=is_plain)
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    usual = PaidRequest(
        endpoint=Endpoint.CHAT,
        model=request.model,
        is_stream=request.stream is True,
        wants_usage=request.stream_options is not None and request.stream_options.include_usage is True,
        maxima=request.named(fields),
        choices=request.n or 1,
        service_tier=request.service_tier,
        must_unstore=request.store is True,
    )
    if is_plain and _UNUSUAL.isdisjoint(fields):
        return usual
    media = [part.type for part in content if part.type not in _TEXT_PARTS]
    images = sum(kind in IMAGE_PARTS for kind in media) if media else 0
    tools = {"web_search": _WEB_SEARCH} if is_switched_on(fields.get(_WEB_SEARCH)) else {}
    return msgspec.structs.replace(
        usual,
        thinking_tokens=_thinking_tokens(fields),
        # https://platform.openai.com/docs/guides/predicted-outputs: what does not come true is billed as output.
        prediction_tokens=len(request.prediction) if is_set(request.prediction) else 0,
        # What a tool finds becomes prompt.
        is_unsized=bool(media or tools),
        # vLLM lets a request say how finely an image is cut, whatever the model does by default.
        has_only_images=bool(images)
        and images == len(media)
        and not (tools or is_set(fields.get("mm_processor_kwargs"))),
        has_instructions=not is_plain and _has_instructions(request, fields),
        asks_for_caches=not is_plain and _may_name_cache_control(body),
        images=images,
        image_bytes=image_bytes(parts) if images else 0,
        tools=tools,
        wants_audio="audio" in (request.modalities or ()) or is_set(fields.get("audio")),
    )


def _has_instructions(request: ChatRequest, fields: Fields) -> bool:
    # Tools that were called before are explained as well.
    has_calls = any(is_set(message.tool_calls) for message in request.messages)
    return bool(request.tools) or has_calls or is_set(fields.get("response_format"))


def _may_name_cache_control(body: bytes) -> bool:
    """Whether something in the body may be named `cache_control`, in letters or with some of them as escapes."""
    return b"cache_control" in body or (_ESCAPE in body and _ESCAPED_LETTER.search(body) is not None)


def _thinking_tokens(fields: Fields) -> int:
    """The budget for reasoning; for an effort the least that one can become."""
    budget = thinking_tokens(fields.get("thinking"), fields.get("reasoning"))
    has_effort = bytes(fields.get("reasoning_effort", NULL)) not in _NO_EFFORT
    return max(budget, THINKING_TOKENS_MIN) if has_effort else budget


def _check(request: ChatRequest, content: list[Part], fields: Fields, *, is_plain: bool) -> list[Fields]:
    """The checks of everything; returns the parts of all messages, unless there are none in need of a closer look."""
    if request.best_of is not None and request.best_of > 1:
        raise unsupported("best_of", "'best_of' is not supported: the choices that are not shown would be billed.")
    if request.modalities and not _MODALITIES.issuperset(request.modalities):
        raise unsupported("modalities", "Only the output modalities 'text' and 'audio' can be priced here.")
    if request.tools:
        check_tools(request.tools)
    check_number(len(request.messages) + len(content), "messages")
    if is_plain:
        return []
    parts = _check_messages(request, content, fields["messages"])
    if request.tools:
        checked_objects([fields["tools"]], _TOOL, "tools")
    return parts


def _content_parts(request: ChatRequest) -> list[Part]:
    return [part for message in request.messages if isinstance(message.content, list) for part in message.content]


def _check_messages(request: ChatRequest, content: list[Part], raw: Raw) -> list[Fields]:
    """The checks of names, and for state at the provider, in each message and each part of its content: the parts."""
    messages = checked_objects([raw], _MESSAGE, "messages")
    if any("audio" in fields and is_set(fields["audio"]) for fields in messages):
        raise unsupported("messages", "Audio kept at the provider is not supported: its size is not known.")
    contents = [
        fields["content"]
        for message, fields in zip(request.messages, messages, strict=True)
        if isinstance(message.content, list)
    ]
    parts = checked_objects(contents, _PART, "messages")
    if any(part.type not in _TEXT_PARTS for part in content):
        for part in parts:
            check_files(part, "messages")
    return parts


def check_files(part: Fields, param: str) -> None:
    """Raises `BadRequest` for ids of files, in a part and in what it holds."""
    inner = [value for value in part.values() if memoryview(value)[0] == ord("{")]
    for fields in (part, *(unique_fields(value, param) for value in inner)):
        check_spelling(fields, _FILE, param)
        if is_set(fields.get("file_id")):
            raise unsupported(param, "Files kept at the provider are not supported: send 'file_data' instead.")
