"""The simple API's request and answer, as chat completions: one question in, one text out."""

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from proxy.errors import BadRequest
from proxy.wire.objects import (
    NULL,
    UNREADABLE,
    Fields,
    Spelling,
    bad_request,
    check_spelling,
    patch,
    reader,
    unique_fields,
)
from proxy.wire.requests import ModelName, is_set, unsupported


class InvokeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a simple request that chat completions do not have, or that need not be there."""

    prompt: str | None = None
    messages: Raw = NULL  # `Raw | None` would take nothing but null
    model: ModelName | None = None
    provider: ModelName | None = None
    stream: bool | None = None


class Invocation(msgspec.Struct, frozen=True):
    """A simple request; `body` is it as it came."""

    body: bytes
    prompt: str | None
    model: str | None
    provider: str | None
    is_stream: bool

    def as_chat(self, model: str) -> bytes:
        """The body of the chat completion request to `model` that says the same: what is not ours stays as it is."""
        changes = {"prompt": None, "provider": None, "model": msgspec.json.encode(model)}
        if self.prompt is not None:
            changes["messages"] = msgspec.json.encode([{"role": "user", "content": self.prompt}])
        return patch(self.body, changes)


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What a model said, or a piece of it; what it did not say is left out.

    `reasoning` is what it thought, where the provider shows it; `annotations` (such as the sources of a web search) and
    `tool_calls` are as OpenAI has them, the latter in pieces in a stream.
    """

    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    annotations: list[Any] | UnsetType = UNSET
    tool_calls: list[Any] | UnsetType = UNSET

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return all(getattr(self, field) is UNSET for field in self.__struct_fields__)


class Read(msgspec.Struct, frozen=True):
    """What stands in an answer, or in one chunk of it. `error` is None where it is none."""

    said: Said
    finish_reason: str | None = None
    error: Any = None


class _Message(msgspec.Struct, frozen=True):
    content: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    annotations: Any = None
    tool_calls: Any = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: Any = None


class _Chat(msgspec.Struct, frozen=True):
    """A chat completion, a chunk of one, or an error: in a field of its own, or as an event of the type `error`."""

    choices: list[_Choice] | None = None
    error: Any = None
    type: Any = None
    message: Any = None
    code: Any = None


_decode_request = msgspec.json.Decoder(InvokeRequest).decode
_decode_chat = reader(_Chat)

_TOP = Spelling(InvokeRequest.__struct_fields__)

_ONE_TEXT: Final = {
    "audio": frozenset({b"null"}),
    "modalities": frozenset({b"null", b"[]", b'["text"]'}),
    "n": frozenset({b"null", b"1"}),
}
"""What asks for more than one text, with the values that do not."""


def decode_invoke(body: bytes) -> Invocation:
    """The simple request in `body`; what it shares with chat completions is checked where those are.

    Raises `BadRequest` for JSON that is malformed, wrong types, names that are there twice or in another spelling, and
    for what asks for more than one text.
    """
    try:
        request = _decode_request(body)
        fields = unique_fields(body)
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    check_spelling(fields, _TOP)
    has_messages = is_set(fields.get("messages"))
    if request.prompt is not None and has_messages:
        raise BadRequest("Send 'prompt' or 'messages', not both.", param="prompt", code="invalid_value")
    if request.prompt is None and not has_messages:
        message = "Missing required parameter: 'prompt', or 'messages' in its place."
        raise BadRequest(message, param="prompt", code="missing_required_parameter")
    _check_one_text(fields)
    return Invocation(
        body=body,
        prompt=request.prompt,
        model=request.model,
        provider=request.provider,
        is_stream=bool(request.stream),
    )


def _check_one_text(fields: Fields) -> None:
    for field, harmless in _ONE_TEXT.items():
        if field in fields and bytes(fields[field]) not in harmless:
            raise unsupported(field, f"The answer is one text here, so '{field}' is not supported.")


def read_chat(data: bytes) -> Read | None:
    """What a chat completion, or a chunk of a streamed one, says; None when `data` is neither."""
    try:
        chat = _decode_chat(data)
    except UNREADABLE:
        return None
    if not chat.choices:
        return _without_choices(chat)
    choice = chat.choices[0]
    reason = choice.finish_reason
    return Read(_said(choice.message or choice.delta or _Message()), reason if isinstance(reason, str) else None)


def _without_choices(chat: _Chat) -> Read | None:
    if chat.error:
        return Read(Said(), error=chat.error)
    if chat.type == "error":
        return Read(Said(), error={"message": chat.message, "type": "error", "param": None, "code": chat.code})
    return None if chat.choices is None else Read(Said())


def _said(message: _Message) -> Said:
    return Said(
        content=_text(message.content) or UNSET,
        reasoning=_text(message.reasoning_content) or _text(message.reasoning) or UNSET,
        refusal=_text(message.refusal) or UNSET,
        annotations=_list(message.annotations),
        tool_calls=_list(message.tool_calls),
    )


def _list(value: Any) -> list[Any] | UnsetType:
    return value if isinstance(value, list) and value else UNSET


def _text(content: Any) -> str:
    """A text, or those of all parts one after the other: some providers answer in parts."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""
