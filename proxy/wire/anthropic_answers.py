"""From the answers of Anthropic's Messages API to those of chat completions: whole, streamed, and errors.

Its events are those of https://platform.claude.com/docs/en/build-with-claude/streaming; kinds that are not known here
are passed over, as that page asks for.

Two things are told beside what OpenAI's API has words for: thinking, as `reasoning_content` for people and as
`thinking_blocks` for the next turn (see `proxy.wire.anthropic_requests`), which in a stream come whole, each with its
end; and `x_tollgate`, the usage as the stream's beginning reports it, which counts should its end never come, or not
say what came out.
"""

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.wire.objects import NULL, UNREADABLE, error_body, reader
from proxy.wire.sse import event_data

_FINISH_REASONS: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
}

_ACCOUNT_MESSAGES: Final = ("Your credit balance is too low", "You have reached your specified ")
"""How messages begin that are about the operator's account. Further on they may quote what a client wrote."""

_ACCOUNT_CODES: Final = ("spend_limit", "organization_on_hold", "cmek_key_disabled", "cmek_key_network_blocked")
"""What is in codes of errors that are about it, though their status says something else."""


class NotAMessage(ValueError):
    """The bytes are no answer of the Messages API."""


class _CacheCreation(msgspec.Struct, frozen=True):
    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class _OutputDetails(msgspec.Struct, frozen=True):
    thinking_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Usage as the Messages API reports it: the three classes of input are counted beside each other.

    In a stream every number is the total up to there, and None where an event does not say.
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation: _CacheCreation | None = None
    output_tokens_details: _OutputDetails | None = None
    service_tier: str | None = None

    def updated(self, later: "Usage") -> "Usage":
        """This usage with what a later event says."""
        said = {name: value for name, value in msgspec.structs.asdict(later).items() if value is not None}
        return msgspec.structs.replace(self, **said)

    def openai(self, *, caches_for_an_hour: bool) -> dict[str, Any] | None:
        """OpenAI's usage object, whose `prompt_tokens` hold those of the caches; None where input is not reported.

        What was written to a cache, and nobody says to which, counts as dear as the request may have made it.
        """
        if self.input_tokens is None:
            return None
        parts, cached = self.cache_creation or _CacheCreation(), self.cache_read_input_tokens or 0
        briefly, for_an_hour = parts.ephemeral_5m_input_tokens or 0, parts.ephemeral_1h_input_tokens or 0
        written = self.cache_creation_input_tokens
        if written is None:
            written = briefly + for_an_hour
        for_an_hour = min(for_an_hour, written)
        if caches_for_an_hour:
            for_an_hour = max(for_an_hour, written - briefly)
        prompt, completion = self.input_tokens + written + cached, self.output_tokens or 0
        thought = None if self.output_tokens_details is None else self.output_tokens_details.thinking_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": written,
                "cache_creation_token_details": {
                    "ephemeral_5m_input_tokens": written - for_an_hour,
                    "ephemeral_1h_input_tokens": for_an_hour,
                },
            },
            "completion_tokens_details": {"reasoning_tokens": min(thought or 0, completion)},
        }


class _StopDetails(msgspec.Struct, frozen=True):
    explanation: str | None = None


class _Block(msgspec.Struct, frozen=True):
    """A block of content, or the start of one; what it holds depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: Raw = NULL


class _Message(msgspec.Struct, frozen=True):
    id: str
    model: str
    content: list[Raw]
    usage: Raw = NULL
    stop_reason: str | None = None
    stop_details: _StopDetails | None = None


class _Delta(msgspec.Struct, frozen=True):
    type: str | None = None
    text: str | None = None
    partial_json: str | None = None
    thinking: str | None = None
    signature: str | None = None
    stop_reason: str | None = None
    stop_details: _StopDetails | None = None


class _Error(msgspec.Struct, frozen=True):
    type: str
    message: str
    details: Any = None

    @property
    def is_about_account(self) -> bool:
        """Whether it is the operator's business, and no client's."""
        code = self.details.get("error_code") if isinstance(self.details, dict) else None
        is_coded = any(words in str(code) for words in _ACCOUNT_CODES)
        return self.type == "billing_error" or is_coded or self.message.startswith(_ACCOUNT_MESSAGES)


class _Kind(msgspec.Struct, frozen=True):
    type: str | None = None


class _EventKind(msgspec.Struct, frozen=True):
    """Of what kind an event is, and what it holds."""

    type: str
    content_block: Any = None
    delta: Any = None

    @property
    def is_known(self) -> bool:
        """Whether it is all of a kind that is known, so that it should have been readable."""
        kinds = [held.get("type") for held in (self.content_block, self.delta) if isinstance(held, dict)]
        return self.type in _KNOWN and all(kind in _KNOWN_PARTS for kind in kinds if isinstance(kind, str))


class _Event(msgspec.Struct, frozen=True):
    """What the events that are known have; others may mean anything by the same names."""

    type: str
    message: _Message | None = None
    index: int = 0
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: Raw = NULL
    error: _Error | None = None


_NOTHING: Final = _Event(type="ping")
_KNOWN: Final = frozenset(
    {
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    }
)
_KNOWN_BLOCKS: Final = frozenset({"text", "tool_use", "thinking", "redacted_thinking"})
_KNOWN_PARTS: Final = _KNOWN_BLOCKS | {"text_delta", "input_json_delta", "thinking_delta", "signature_delta"}


class _Failure(msgspec.Struct, frozen=True):
    error: _Error


_decode_message = reader(_Message)
_decode_block = reader(_Block)
_decode_kind = reader(_Kind)
_decode_event_kind = reader(_EventKind)
_decode_event = reader(_Event)
_decode_failure = reader(_Failure)
_decode_usage = msgspec.json.Decoder(Usage | None, strict=False).decode
"""Takes whole numbers however they are written."""


def _read_event(data: bytes) -> _Event:
    """An event; nothing, where it or what it holds is of a kind that is not known. Raises `NotAMessage`."""
    try:
        return _decode_event(data)
    except UNREADABLE as exc:
        try:
            is_known = _decode_event_kind(data).is_known
        except UNREADABLE:
            is_known = True
        if is_known:
            raise NotAMessage(str(exc)) from exc
    return _NOTHING


def _read_blocks(content: list[Raw]) -> Iterator[_Block]:
    """The blocks that are of a kind that is known. Raises `NotAMessage`."""
    for raw in content:
        try:
            if _decode_kind(raw).type in _KNOWN_BLOCKS:
                yield _decode_block(raw)
        except UNREADABLE as exc:
            raise NotAMessage(str(exc)) from exc


def _read_usage(reported: Raw) -> Usage:
    """What is reported; nothing, where it cannot be read, since an answer is none the worse for it."""
    try:
        return _decode_usage(reported) or Usage()
    except UNREADABLE:
        return Usage()


# ---- errors


def failure(status: int, body: bytes) -> tuple[int, bytes]:
    """An error in OpenAI's shape, and its status: 402 for what is about the operator's account."""
    error = _read_error(body)
    if error is None:
        return status, error_body("The provider answered with an error.", "api_error", None, "provider_error")
    return 402 if error.is_about_account else status, _openai_error(error)


def _read_error(body: bytes) -> _Error | None:
    try:
        return _decode_failure(body).error
    except UNREADABLE:
        return None


def _openai_error(error: _Error) -> bytes:
    """The error with a code that tells its status, wherever it comes from."""
    return error_body(error.message, error.type, None, "billing_error" if error.is_about_account else error.type)


# ---- whole answers


def completion(body: bytes, created: int, *, caches_for_an_hour: bool = False) -> bytes:
    """A whole message as a chat completion of the second `created`, or the error that came in its place.

    `caches_for_an_hour` says that the request asked for caches that last so long. Raises `NotAMessage` for all else.
    """
    try:
        message = _decode_message(body)
    except UNREADABLE as exc:
        if (error := _read_error(body)) is not None:
            return _openai_error(error)
        raise NotAMessage(str(exc)) from exc
    written = _Written()
    text: list[str] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[dict[str, Any]] = []
    for block in _read_blocks(message.content):
        if block.type == "text":
            text.append(block.text or "")
            written.note_text(block.text or "")
        elif block.type == "tool_use":
            calls.append(_call(block))
            written.calls += 1
        else:
            thoughts.append(written.thought(block, block.thinking or "", block.signature or ""))
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(text) if text or not calls else None,
        "refusal": _refusal(message.stop_reason, message.stop_details),
    }
    if thoughts:
        answer["reasoning_content"] = "".join(thought.get("thinking", "") for thought in thoughts) or None
        answer["thinking_blocks"] = thoughts
    if calls:
        answer["tool_calls"] = calls
    choice = {"index": 0, "message": answer, "logprobs": None, "finish_reason": _finish_reason(message.stop_reason)}
    head = _head("chat.completion", message, created)
    reported = _reported(_read_usage(message.usage), caches_for_an_hour=caches_for_an_hour)
    return msgspec.json.encode({**head, "choices": [choice], **reported})


def _head(kind: str, message: _Message, created: int) -> dict[str, Any]:
    return {"id": message.id, "object": kind, "created": created, "model": message.model}


def _reported(usage: Usage, *, caches_for_an_hour: bool) -> dict[str, Any]:
    """The usage of a whole call, with the tier that served it."""
    reported = usage.openai(caches_for_an_hour=caches_for_an_hour)
    tier = {} if usage.service_tier is None else {"service_tier": _tier(usage.service_tier)}
    return tier if reported is None else {"usage": reported, **tier}


def _tier(service_tier: str) -> str:
    return "default" if service_tier == "standard" else service_tier


def _call(block: _Block) -> dict[str, Any]:
    arguments = "{}" if block.input is NULL else bytes(block.input).decode(errors="replace")
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _finish_reason(stop_reason: str | None) -> str:
    return _FINISH_REASONS.get(stop_reason or "", "stop")


def _refusal(stop_reason: str | None, details: _StopDetails | None) -> str | None:
    if stop_reason != "refusal":
        return None
    return details.explanation if details is not None else None


class _Written:
    """What an answer has held up to now, as far as it says where in it a block of thinking stood."""

    def __init__(self) -> None:
        self.calls = 0
        self._has_text = False
        self._thoughts = 0

    def note_text(self, text: str) -> None:
        self._has_text = self._has_text or bool(text)

    def thought(self, block: _Block, thinking: str, signature: str) -> dict[str, Any]:
        """The next block of thinking, as it must come back.

        A message has its texts as one, so `position` counts them once.
        """
        place = {"index": self._thoughts, "type": block.type}
        position = self._has_text + self.calls + self._thoughts
        self._thoughts += 1
        if block.type == "redacted_thinking":
            return {**place, "data": block.data or "", "position": position}
        return {**place, "thinking": thinking, "signature": signature, "position": position}


# ---- streams


class _Open:
    """A block of content that has begun and not ended."""

    def __init__(self, block: _Block, number: int) -> None:
        self.block = block
        self.number = number
        self.thinking: list[str] = []
        self.signature: list[str] = []
        self.has_arguments = False


class Chunks:
    """Turns the events of one message, pushed one by one, into those of a streamed chat completion.

    Nothing comes out before the first of the content: an error that comes instead of it is then the first thing.
    """

    def __init__(self, created: int, *, caches_for_an_hour: bool = False) -> None:
        self._created = created
        self._caches_for_an_hour = caches_for_an_hour
        self._message = _Message(id="", model="", content=[])
        self._usage = Usage()
        self._written = _Written()
        self._open: dict[int, _Open] = {}
        self._has_begun = False
        self._has_finished = False
        self._is_output_reported = False
        self.is_over = False
        """Whether the message has come to its end, or to an error."""

    def feed(self, event: bytes) -> bytes:
        """What a raw event becomes: none, one or more events. Raises `NotAMessage`."""
        data = event_data(event)
        if data is None or self.is_over:
            return b""
        return b"".join(b"data: " + chunk + b"\n\n" for chunk in self._chunks(_read_event(data)))

    def _chunks(self, event: _Event) -> list[bytes]:
        match event:
            case _Event(type="message_start", message=_Message() as message):
                self._message, self._usage = message, _read_usage(message.usage)
            case _Event(type="content_block_start", content_block=_Block() as block):
                return self._start(event.index, block)
            case _Event(type="content_block_delta", delta=_Delta() as delta):
                return self._continue(event.index, delta)
            case _Event(type="content_block_stop"):
                return self._stop(event.index)
            case _Event(type="message_delta", delta=_Delta() as delta):
                self._note_usage(_read_usage(event.usage))
                is_end = delta.stop_reason is not None and not self._has_finished
                return self._finish(delta.stop_reason, delta.stop_details) if is_end else []
            case _Event(type="message_stop"):
                return self._end()
            case _Event(type="error", error=_Error() as error):
                self.is_over = True
                return [_openai_error(error)]
        return []

    def _start(self, index: int, block: _Block) -> list[bytes]:
        opened = self._open[index] = _Open(block, self._written.calls)
        if block.type == "tool_use":
            self._written.calls += 1
            function = {"name": block.name, "arguments": ""}
            return self._delta(
                {"tool_calls": [{"index": opened.number, "id": block.id, "type": "function", "function": function}]}
            )
        first = _Delta(text=block.text, thinking=block.thinking, signature=block.signature)
        return self._continue(index, first)

    def _continue(self, index: int, delta: _Delta) -> list[bytes]:
        opened = self._open.get(index)
        if opened is None:
            return []
        match opened.block.type:
            case "text" if delta.text:
                self._written.note_text(delta.text)
                return self._delta({"content": delta.text})
            case "tool_use" if delta.partial_json:
                return self._arguments(opened, delta.partial_json)
            case "thinking":
                return self._think(opened, delta)
        return []

    def _think(self, opened: _Open, delta: _Delta) -> list[bytes]:
        opened.signature.append(delta.signature or "")
        opened.thinking.append(delta.thinking or "")
        return self._delta({"reasoning_content": delta.thinking}) if delta.thinking else []

    def _arguments(self, opened: _Open, arguments: str) -> list[bytes]:
        opened.has_arguments = True
        return self._delta({"tool_calls": [{"index": opened.number, "function": {"arguments": arguments}}]})

    def _stop(self, index: int) -> list[bytes]:
        opened = self._open.pop(index, None)
        if opened is None:
            return []
        block = opened.block
        if block.type == "tool_use" and not opened.has_arguments:
            # A call without arguments, or one whose arguments came at once.
            return self._arguments(opened, _call(block)["function"]["arguments"])
        if block.type in {"thinking", "redacted_thinking"}:
            thought = self._written.thought(block, "".join(opened.thinking), "".join(opened.signature))
            return self._delta({"thinking_blocks": [thought]})
        return []

    def _finish(self, stop_reason: str | None, details: _StopDetails | None) -> list[bytes]:
        self._has_finished = True
        unended = [chunk for index in sorted(self._open) for chunk in self._stop(index)]
        refusal = _refusal(stop_reason, details)
        return [*unended, *self._delta({} if refusal is None else {"refusal": refusal}, _finish_reason(stop_reason))]

    def _note_usage(self, usage: Usage) -> None:
        self._usage = self._usage.updated(usage)
        self._is_output_reported = self._is_output_reported or usage.output_tokens is not None

    def _end(self) -> list[bytes]:
        chunks = [] if self._has_finished else self._finish(None, None)
        self.is_over = True
        reported = _reported(self._usage, caches_for_an_hour=self._caches_for_an_hour)
        # What a message begins with says nothing of the output: that is counted, where no later event tells it.
        if "usage" in reported and self._is_output_reported:
            chunks.append(self._chunk([], reported))
        return [*chunks, b"[DONE]"]

    def _delta(self, delta: dict[str, Any], finish_reason: str | None = None) -> list[bytes]:
        chunks = [] if self._has_begun else [self._beginning()]
        self._has_begun = True
        return [*chunks, self._chunk([_choice(delta, finish_reason)])]

    def _beginning(self) -> bytes:
        usage = self._usage.openai(caches_for_an_hour=self._caches_for_an_hour)
        beside = {} if usage is None else {"x_tollgate": {"usage": usage}}
        return self._chunk([_choice({"role": "assistant", "content": ""}, None)], beside)

    def _chunk(self, choices: list[dict[str, Any]], beside: dict[str, Any] | None = None) -> bytes:
        head = _head("chat.completion.chunk", self._message, self._created)
        return msgspec.json.encode({**head, "choices": choices, **(beside or {})})


def _choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
