"""What a call consumed, from the bytes of its answer: as the provider reports it, else counted.

`Usage` has disjoint classes; OpenAI's usage object (https://platform.openai.com/docs/api-reference/chat/object) has
totals with details inside of them. The rules, in their order:

* `prompt_tokens` holds audio tokens, tokens written to the cache and tokens read from it; `input` is the rest.
* `total_tokens` above prompt and completion means output that was hidden. It is billed, so it counts as output.
* `reasoning_tokens` are output already; some providers leave them out of `completion_tokens`, and then the total
  above has them.

What is counted is never more than what was reserved for.
"""

import re
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from proxy.units import Usage
from proxy.wire.sse import event_data

BYTES_PER_TOKEN = 4
"""Of English text, by OpenAI's own rule of thumb; a count by it is a guess."""

_INT64_MAX = 2**63 - 1
"""What both databases can hold in one column."""

_NULL = Raw(b"null")

_Tokens = Annotated[int, Meta(ge=0, le=_INT64_MAX)]


class UsageSource(StrEnum):
    """How sure a usage is."""

    REPORTED = "reported"
    COUNTED = "counted"
    ASSUMED = "assumed"


class EventKind(StrEnum):
    """What a relay has to know of an event."""

    CONTENT = "content"
    USAGE_ONLY = "usage_only"
    DONE = "done"
    ERROR = "error"
    OTHER = "other"


class Metered(msgspec.Struct, frozen=True):
    """A usage and where it comes from.

    `response_model` is the model that the provider says it used. `is_implausible` when the provider reported
    something that cannot be: worth an alarm, since prices or bounds may be wrong.
    """

    usage: Usage
    source: UsageSource
    response_model: str | None = None
    is_implausible: bool = False


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None
    cache_creation_tokens: _Tokens | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class _Reported(msgspec.Struct):
    """OpenAI's usage object, and where other providers put the same: Moonshot, DeepSeek and LiteLLM at its top."""

    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    total_tokens: _Tokens | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    cached_tokens: _Tokens | None = None
    prompt_cache_hit_tokens: _Tokens | None = None
    cache_creation_input_tokens: _Tokens | None = None


class _Called(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None
    input: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Called | None = None
    custom: _Called | None = None


class _Text(msgspec.Struct):
    """What a model writes, of a message or of a delta; `reasoning` and `reasoning_content` are one thing."""

    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Called | None = None


class _Choice(msgspec.Struct):
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None


class _Written(msgspec.Struct):
    """An answer, or a chunk of one, as far as its text is concerned."""

    model: str | None = None
    choices: list[_Choice] | None = None


class _Chunk(msgspec.Struct):
    """An answer, or a chunk of one, as far as its usage is concerned."""

    model: str | None = None
    choices: list[Raw] | None = None
    usage: Raw = _NULL  # `Raw | None` would take nothing but null
    error: Any = None


_decode_reported = msgspec.json.Decoder(_Reported).decode
_decode_written = msgspec.json.Decoder(_Written).decode
_decode_chunk = msgspec.json.Decoder(_Chunk).decode

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was expected."""

_NO_PROMPT_DETAILS = _PromptDetails()
_NO_COMPLETION_DETAILS = _CompletionDetails()

_USAGE = b'"usage"'
_USAGE_OBJECT = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = b'"error"'
_ERROR_VALUE = re.compile(rb'"error"\s*:\s*[^\sn]')
"""Anything but null, which some providers send with every chunk."""

_DONE = b"[DONE]"


def read_usage(reported: bytes | Raw) -> Usage | None:
    """The usage in OpenAI's usage object; None when it cannot be right.

    That is: a number that is negative, not whole or beyond 64 bits, a detail above its total, or neither prompt
    nor completion tokens.
    """
    try:
        usage = _decode_reported(reported)
    except _UNREADABLE:
        return None
    prompt, completion, total = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens or 0
    if prompt is None:
        if completion is None:
            return None
        prompt = max(0, total - completion)
    output = max(completion or 0, total - prompt)
    hidden = 0 if completion is None else output - completion
    if prompt + output > _INT64_MAX:
        return None

    inside = usage.prompt_tokens_details or _NO_PROMPT_DETAILS
    audio = inside.audio_tokens or 0
    written = inside.cache_write_tokens or inside.cache_creation_tokens or usage.cache_creation_input_tokens or 0
    cached = inside.cached_tokens or usage.cached_tokens or usage.prompt_cache_hit_tokens or 0
    shown = usage.completion_tokens_details or _NO_COMPLETION_DETAILS
    spoken = shown.audio_tokens or 0
    reasoning = shown.reasoning_tokens or 0
    if max(audio, written, cached) > prompt or max(spoken, reasoning) > output:
        return None
    # A token may be in two details, such as audio that was cached: it counts once, where it is dearer.
    written = min(written, prompt - audio)
    cached = min(cached, prompt - audio - written)
    return Usage(
        input=prompt - audio - written - cached,
        cached_input=cached,
        cache_write=written,
        audio_input=audio,
        output=output - spoken,
        audio_output=spoken,
        reasoning=max(reasoning, hidden),
    )


def failure_status(body: bytes) -> int | None:
    """The HTTP status that an error in a body or event stands for, though it came with status 200; None without one.

    Some providers put it into `error.code`, as a number or its digits; 502 where they do not.
    """
    if _ERROR not in body:
        return None
    try:
        answer = _decode_chunk(body)
    except _UNREADABLE:
        return None
    if not answer.error or answer.choices:
        return None
    code = answer.error.get("code") if isinstance(answer.error, dict) else None
    text = str(code)
    return int(text) if len(text) == 3 and text.isdecimal() and 400 <= int(text) <= 599 else 502


def meter_plain(
    body: bytes,
    *,
    prompt_bytes: int,
    bound: Usage,
    input_tokens_max: int | None = None,
    output_tokens_max: int | None = None,
) -> Metered:
    """The usage of a whole answer, which is counted where it reports none that can be right.

    `prompt_bytes` is what the input is counted by, `bound` the most that may be counted. Reported usage above the
    maxima, where they are known, cannot be right.
    """
    try:
        answer = _decode_chunk(body)
    except _UNREADABLE:
        answer = _Chunk()
    usage = _plausible(answer.usage, input_tokens_max, output_tokens_max)
    if usage is not None:
        return Metered(usage, UsageSource.REPORTED, answer.model)
    model, text_bytes = _written(body)
    return Metered(
        _counted(None, prompt_bytes, text_bytes, bound),
        UsageSource.COUNTED,
        model,
        is_implausible=bytes(answer.usage) != b"null",
    )


class StreamMeter:
    """Meters a stream while it is relayed, at the price of two searches in each event.

    Only events that may report usage, or an error, are decoded. The others are kept, up to `kept_bytes_max` bytes,
    to be counted if it comes to that; of those beyond it only the bytes are known, and their share of text is
    taken to be that of those that were kept.

    Usage that is followed by more text (some providers report at the start, or with every chunk, and may break in
    between) is charged with that text on top. So events are forgotten once there is usage for them.
    """

    def __init__(
        self, kept_bytes_max: int, *, input_tokens_max: int | None = None, output_tokens_max: int | None = None
    ) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._input_tokens_max = input_tokens_max
        self._output_tokens_max = output_tokens_max
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._dropped_bytes = 0
        self._usage: Usage | None = None
        self._model: str | None = None
        self._is_implausible = False

    @property
    def is_implausible(self) -> bool:
        """Whether the provider has reported usage that cannot be."""
        return self._is_implausible

    def feed(self, event: bytes) -> EventKind:
        """What kind of event this raw server-sent event is."""
        data = event_data(event)
        if data is None:
            return EventKind.OTHER
        # Escaped quotes keep these out of strings: inside of one they read \"usage\".
        usage_at = data.find(_USAGE)
        may_report = usage_at >= 0 and _USAGE_OBJECT.search(data, usage_at) is not None
        error_at = data.find(_ERROR)
        may_fail = error_at >= 0 and _ERROR_VALUE.search(data, error_at) is not None
        if may_report or may_fail:
            kind = self._read(data)
        elif len(data) < 16 and data.strip() == _DONE:
            kind = EventKind.DONE
        else:
            self._keep(data)
            kind = EventKind.CONTENT
        return kind

    def result(self, *, prompt_bytes: int, bound: Usage) -> Metered:
        """The usage up to now: what was reported, plus a count of what it does not cover.

        `prompt_bytes` is what the input is counted by, `bound` the most that may be counted.
        """
        text_bytes = self._unreported_bytes()
        if self._usage is not None and not text_bytes:
            return Metered(self._usage, UsageSource.REPORTED, self._model, self._is_implausible)
        usage = _counted(self._usage, prompt_bytes, text_bytes, bound)
        return Metered(usage, UsageSource.COUNTED, self._model, self._is_implausible)

    def _read(self, data: bytes) -> EventKind:
        """Decode a chunk that may hold usage or an error."""
        try:
            chunk = _decode_chunk(data)
        except _UNREADABLE:
            self._keep(data)
            return EventKind.CONTENT
        reports = _is_object(chunk.usage)
        usage = _plausible(chunk.usage, self._input_tokens_max, self._output_tokens_max)
        if usage is not None:
            self._usage, self._model = usage, chunk.model or self._model
            self._kept.clear()
            self._kept_bytes = self._dropped_bytes = 0
        else:
            self._is_implausible = self._is_implausible or reports
            if chunk.choices:
                self._keep(data)
        if chunk.error:
            return EventKind.ERROR
        return EventKind.USAGE_ONLY if reports and not chunk.choices else EventKind.CONTENT

    def _keep(self, data: bytes) -> None:
        if self._kept_bytes + len(data) > self._kept_bytes_max:
            self._dropped_bytes += len(data)
            return
        self._kept.append(data)
        self._kept_bytes += len(data)

    def _unreported_bytes(self) -> int:
        """The bytes of text for which there is no usage."""
        text_bytes = 0
        for data in self._kept:
            model, written_bytes = _written(data)
            text_bytes += written_bytes
            self._model = self._model or model
        if not self._dropped_bytes:
            return text_bytes
        if not self._kept_bytes:
            return self._dropped_bytes
        return text_bytes + _divided_up(self._dropped_bytes * text_bytes, self._kept_bytes)


def _plausible(reported: Raw, input_tokens_max: int | None, output_tokens_max: int | None) -> Usage | None:
    usage = read_usage(reported)
    if usage is None:
        return None
    if input_tokens_max is not None and usage.input_tokens > input_tokens_max:
        return None
    if output_tokens_max is not None and usage.output_tokens > output_tokens_max:
        return None
    return usage


def _counted(reported: Usage | None, prompt_bytes: int, text_bytes: int, bound: Usage) -> Usage:
    """A count of `text_bytes` on top of what was `reported`, or of the whole call where nothing was."""
    output = _divided_up(text_bytes, BYTES_PER_TOKEN)
    if reported is None:
        prompt = _divided_up(prompt_bytes, BYTES_PER_TOKEN)
        return Usage(input=min(prompt, bound.input_tokens), output=min(output, bound.output_tokens))
    room = max(0, bound.output_tokens - reported.output_tokens)
    return msgspec.structs.replace(reported, output=reported.output + min(output, room))


def _written(data: bytes) -> tuple[str | None, int]:
    """The model that an answer or a chunk names, and the bytes of its text; all of its bytes if it is unreadable."""
    try:
        written = _decode_written(data)
    except _UNREADABLE:
        return None, len(data)
    return written.model, sum(map(_choice_bytes, written.choices or ()))


def _choice_bytes(choice: _Choice) -> int:
    texts = [choice.text]
    for text in (choice.delta, choice.message):
        if text is not None:
            # A provider that sends both spellings of the reasoning sends the same text twice.
            texts += (text.content, text.refusal, text.reasoning_content or text.reasoning)
            calls = [text.function_call]
            for call in text.tool_calls or ():
                calls += (call.function, call.custom)
            for called in calls:
                if called is not None:
                    texts += (called.name, called.arguments, called.input)
    return sum(len(text.encode()) for text in texts if text)


def _is_object(raw: Raw) -> bool:
    return memoryview(raw)[0] == ord("{")


def _divided_up(number: int, divisor: int) -> int:
    return -(-number // divisor)
