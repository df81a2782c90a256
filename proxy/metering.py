"""What a call consumed, from the bytes of its answer: as the provider reports it, else counted.

`Usage` has disjoint classes; providers report totals with details inside of them. The rules, in their order:

* OpenAI's `prompt_tokens` (`input_tokens` in Responses) hold audio tokens, tokens written to the cache and tokens
  read from it; `input` is the rest. Anthropic's `input_tokens` are that rest already.
* `total_tokens` above prompt and completion means output that was hidden. It is billed, so it counts as output.
* `reasoning_tokens` are output already; some providers leave them out of `completion_tokens`, and then the total
  above has them.

What is counted is never more than what was reserved for.
"""

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta, Raw

from proxy.units import Usage
from proxy.wire.objects import NULL, UNREADABLE
from proxy.wire.requests import Endpoint
from proxy.wire.sse import event_data

BYTES_PER_TOKEN = 4
"""Of English text, by OpenAI's own rule of thumb; a count by it is a guess."""

_INT64_MAX = 2**63 - 1
"""What both databases can hold in one column."""

_Tokens = Annotated[int, Meta(ge=0, le=_INT64_MAX)]


class UsageSource(StrEnum):
    """How sure a usage is."""

    REPORTED = "reported"
    COUNTED = "counted"
    ASSUMED = "assumed"


class EventKind(StrEnum):
    """What a relay has to know of an event.

    `USAGE` is content that brings the usage along, where it would be the last of the content. `DONE` is an end
    marker. `OTHER` has no data at all.
    """

    CONTENT = "content"
    USAGE = "usage"
    USAGE_ONLY = "usage_only"
    DONE = "done"
    ERROR = "error"
    OTHER = "other"


class Metered(msgspec.Struct, frozen=True):
    """A usage and where it comes from.

    `response_model` is the model that the provider says it used, `service_tier` the tier in which it says it did.
    `is_implausible` when the provider reported something that cannot be: worth an alarm, since prices or bounds may be
    wrong. `is_empty` when it reported nothing and there was nothing to count either: no answer at all.
    """

    usage: Usage
    source: UsageSource
    response_model: str | None = None
    is_implausible: bool = False
    is_empty: bool = False
    service_tier: str | None = None


class Counter(Protocol):
    """How tokens are counted where none are reported."""

    def prompt(self, body: bytes) -> int:
        """The tokens of the prompt in a request's body."""
        ...

    def texts(self, texts: Iterable[str]) -> int:
        """The tokens of all these texts."""
        ...


class ByteCounter:
    """Counts by the rule of thumb."""

    def prompt(self, body: bytes) -> int:
        """See `Counter`."""
        return _divided_up(len(body), BYTES_PER_TOKEN)

    def texts(self, texts: Iterable[str]) -> int:
        """See `Counter`."""
        return _divided_up(sum(map(_utf8_bytes, texts)), BYTES_PER_TOKEN)


BY_BYTES = ByteCounter()


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None
    cache_creation_tokens: _Tokens | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class _Reported(msgspec.Struct):
    """OpenAI's usage object in both of its shapes, and where others put the same.

    Moonshot, DeepSeek and LiteLLM report caches at the top; Anthropic's shape has `input_tokens` beside them.
    """

    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    total_tokens: _Tokens | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    input_tokens_details: _PromptDetails | None = None
    output_tokens_details: _CompletionDetails | None = None
    cached_tokens: _Tokens | None = None
    prompt_cache_hit_tokens: _Tokens | None = None
    cache_creation_input_tokens: _Tokens | None = None
    cache_read_input_tokens: _Tokens | None = None

    @property
    def written(self) -> int:
        """Tokens that were written to the cache."""
        inside = self.prompt_details
        return inside.cache_write_tokens or inside.cache_creation_tokens or self.cache_creation_input_tokens or 0

    @property
    def cached(self) -> int:
        """Tokens that were read from the cache."""
        inside = self.prompt_details.cached_tokens
        return inside or self.cached_tokens or self.prompt_cache_hit_tokens or self.cache_read_input_tokens or 0

    @property
    def prompt_details(self) -> _PromptDetails:
        """What is said of the prompt's tokens."""
        return self.prompt_tokens_details or self.input_tokens_details or _NO_PROMPT_DETAILS

    @property
    def completion_details(self) -> _CompletionDetails:
        """What is said of the output's tokens."""
        return self.completion_tokens_details or self.output_tokens_details or _NO_COMPLETION_DETAILS

    @property
    def prompt(self) -> int | None:
        """All tokens of the prompt, those of the caches included."""
        if self.prompt_tokens is not None or self.input_tokens is None:
            return self.prompt_tokens
        beside = (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)
        return self.input_tokens + beside

    @property
    def completion(self) -> int | None:
        """All tokens of the output."""
        return self.output_tokens if self.completion_tokens is None else self.completion_tokens


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
    index: int | None = None
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None


class _Written(msgspec.Struct):
    """An answer, or a chunk of one, as far as its text is concerned."""

    model: str | None = None
    choices: list[_Choice] | None = None


class _End(msgspec.Struct):
    finish_reason: Any = None


class _Chunk(msgspec.Struct):
    """An answer, or a chunk of one, as far as its usage is concerned."""

    model: str | None = None
    choices: list[_End] | None = None
    usage: Raw = NULL  # `Raw | None` would take nothing but null
    x_groq: Raw = NULL
    error: Any = None
    type: Any = None
    code: Any = None
    service_tier: Any = None

    @property
    def reported(self) -> Raw:
        """The usage, which Groq has in a field of its own as long as nobody asks for it."""
        if _is_object(self.usage) or not _is_object(self.x_groq):
            return self.usage
        try:
            return _decode_groq(self.x_groq).usage
        except UNREADABLE:
            return self.usage


class _Groq(msgspec.Struct):
    usage: Raw = NULL


class _Part(msgspec.Struct):
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct):
    """An item of a response's output."""

    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    content: list[_Part] | None = None
    summary: list[_Part] | None = None


class _Response(msgspec.Struct):
    """A response, as the body of an answer or inside of an event."""

    model: str | None = None
    usage: Raw = NULL
    error: Any = None
    output: list[_Item] | None = None
    service_tier: Any = None


class _Opened(msgspec.Struct):
    """An item whose text is still to come."""

    name: Any = None


class _ResponseEvent(msgspec.Struct):
    """An event of a streamed response."""

    type: str | None = None
    delta: Any = None
    item_id: str | None = None
    output_index: Any = None
    item: _Opened | None = None
    response: _Response | None = None
    error: Any = None
    message: str | None = None


_HALF = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""The escape of half a character."""

_Shape = TypeVar("_Shape")


def _reader(shape: type[_Shape]) -> Callable[[bytes], _Shape]:
    """A decoder of `shape` that takes halves of characters for U+FFFD.

    Providers send them where a token ends inside of a character, and msgspec refuses all of a text that holds one.
    """
    decode = msgspec.json.Decoder(shape).decode

    def read(data: bytes) -> _Shape:
        try:
            return decode(data)
        except UNREADABLE:
            mended = _HALF.sub(rb"\\ufffd", data)
            if mended == data:
                raise
            return decode(mended)

    return read


_decode_reported = msgspec.json.Decoder(_Reported).decode
_decode_groq = msgspec.json.Decoder(_Groq).decode
_decode_written = _reader(_Written)
_decode_chunk = _reader(_Chunk)
_decode_response = _reader(_Response)
_decode_response_event = _reader(_ResponseEvent)

_NO_PROMPT_DETAILS = _PromptDetails()
_NO_COMPLETION_DETAILS = _CompletionDetails()

_USAGE = b'"usage"'
_USAGE_OBJECT = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = b'"error"'
_ERROR_VALUE = re.compile(rb'"error"\s*:\s*[^\sn]')
"""Anything but null, which some providers send with every chunk."""

_DONE = b"[DONE]"

_RESPONSE_END = re.compile(rb'"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed|cancelled)|error)"')
_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.cancelled"})

_Texts = dict[object, str]
"""Pieces of text by what they are pieces of, such as the content of one choice."""


def read_usage(reported: bytes | Raw) -> Usage | None:
    """The usage in a usage object of OpenAI's or Anthropic's; None when it cannot be right.

    That is: a number that is negative, not whole or beyond 64 bits, a detail above its total, or neither prompt
    nor completion tokens.
    """
    try:
        usage = _decode_reported(reported)
    except UNREADABLE:
        return None
    prompt, completion, total = usage.prompt, usage.completion, usage.total_tokens or 0
    inside, outside = usage.prompt_details, usage.completion_details
    if prompt is None:
        if completion is None:
            return None
        prompt = max(0, total - completion)
    output = max(completion or 0, total - prompt)
    hidden = 0 if completion is None else output - completion
    if prompt + output > _INT64_MAX:
        return None

    audio = inside.audio_tokens or 0
    written = usage.written
    cached = usage.cached
    spoken = outside.audio_tokens or 0
    reasoning = outside.reasoning_tokens or 0
    if audio > prompt or written > prompt or cached > prompt or spoken > output or reasoning > output:
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

    Some providers put it into `error.code`, as a number or its digits, or into the `code` of an event of the type
    `error`; 502 where they do not.
    """
    if _ERROR not in body:
        return None
    try:
        answer = _decode_chunk(body)
    except UNREADABLE:
        return None
    is_event = answer.type == "error"
    if not (answer.error or is_event) or answer.choices:
        return None
    code = answer.error.get("code") if isinstance(answer.error, dict) else answer.code
    text = str(code)
    return int(text) if len(text) == 3 and text.isdecimal() and 400 <= int(text) <= 599 else 502


def meter_reported(endpoint: Endpoint, body: bytes, *, tokens_max: int | None = None) -> Metered | None:
    """The usage that a whole answer reports, as `meter_plain` has it; None where its text must be looked at."""
    answer = _decoded(endpoint, body)
    usage = _plausible(answer.usage, tokens_max)
    if usage is not None and (usage.output_tokens or endpoint is Endpoint.EMBEDDINGS):
        return Metered(usage, UsageSource.REPORTED, answer.model, service_tier=_tier(answer))
    return None


def _decoded(endpoint: Endpoint, body: bytes) -> "_Chunk | _Response":
    try:
        return _decode_response(body) if endpoint is Endpoint.RESPONSES else _decode_chunk(body)
    except UNREADABLE:
        return _Chunk()


def meter_plain(  # noqa: PLR0913 - what it depends on
    endpoint: Endpoint,
    body: bytes,
    *,
    prompt: bytes,
    bound: Usage,
    counter: Counter = BY_BYTES,
    tokens_max: int | None = None,
) -> Metered:
    """The usage of a whole answer, which is counted where it reports none that can be right.

    `prompt` is the request's body, of which the input is counted, `bound` the most that may be counted. Reported
    usage of more than `tokens_max`, where that is known, cannot be right. Blocks as long as `counter` does.
    """
    if (reported := meter_reported(endpoint, body, tokens_max=tokens_max)) is not None:
        return reported
    answer = _decoded(endpoint, body)
    usage = _plausible(answer.usage, tokens_max)
    model, texts = _response_texts(body) if endpoint is Endpoint.RESPONSES else _chat_texts(body)
    if usage is not None and not texts:
        return Metered(usage, UsageSource.REPORTED, answer.model, service_tier=_tier(answer))
    return Metered(
        _counted(None, counter.prompt(prompt), counter.texts(texts.values()), bound),
        UsageSource.COUNTED,
        answer.model or model,
        is_implausible=bytes(answer.usage) != b"null",
        is_empty=not texts and not (endpoint is Endpoint.EMBEDDINGS and b'"data"' in body),
        service_tier=_tier(answer),
    )


def _tier(answer: _Chunk | _Response) -> str | None:
    return answer.service_tier if isinstance(answer.service_tier, str) else None


class _Read(msgspec.Struct, frozen=True):
    """What a decoded event said."""

    kind: EventKind
    usage: Raw = NULL
    model: str | None = None
    has_text: bool = False
    service_tier: str | None = None


class StreamMeter:
    """Meters a stream of chunks, as chat completions and completions have it, while it is relayed.

    The price is two searches in each event: only events that may report usage, or an error, are decoded. The others
    are kept, up to `kept_bytes_max` bytes, to be counted if it comes to that; of those beyond it only the bytes are
    known, and their share of text is taken to be that of those that were kept.

    Usage that is followed by more text (some providers report at the start, or with every chunk, and may break in
    between) is charged with that text on top. So events are forgotten once there is usage for them.
    """

    def __init__(self, kept_bytes_max: int, *, tokens_max: int | None = None) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._tokens_max = tokens_max
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._dropped_bytes = 0
        self._usage: Usage | None = None
        self._model: str | None = None
        self._service_tier: str | None = None
        self._is_implausible = False

    @property
    def is_implausible(self) -> bool:
        """Whether the provider has reported usage that cannot be."""
        return self._is_implausible

    @property
    def is_reported(self) -> bool:
        """Whether the provider has reported usage, and nothing came after it: then nothing has to be counted."""
        return self._usage is not None and not self._kept_bytes and not self._dropped_bytes

    def holds(self, text: bytes) -> bool:
        """Whether an event for which no usage was reported has these bytes, or may have: not all of them are kept."""
        return bool(self._dropped_bytes) or any(text in data for data in self._kept)

    def feed(self, event: bytes) -> EventKind:
        """What kind of event this raw server-sent event is."""
        data = event_data(event)
        if data is None:
            return EventKind.OTHER
        if self._may_say(data):
            return self._take(data)
        if len(data) < 16 and data.strip() == _DONE:
            return EventKind.DONE
        self._keep(data)
        return EventKind.CONTENT

    def result(self, *, prompt: bytes, bound: Usage, counter: Counter = BY_BYTES) -> Metered:
        """The usage up to now: what was reported, plus a count of what it does not cover.

        `prompt` is the request's body, of which the input is counted, `bound` the most that may be counted. Blocks as
        long as `counter` does.
        """
        tokens = 0 if self.is_reported else self._unreported_tokens(counter)
        if self._usage is not None and not tokens:
            return Metered(
                self._usage,
                UsageSource.REPORTED,
                self._model,
                self._is_implausible,
                service_tier=self._service_tier,
            )
        is_empty = self._usage is None and not tokens
        prompt_tokens = 0 if self._usage is not None else counter.prompt(prompt)
        usage = _counted(self._usage, prompt_tokens, tokens, bound)
        return Metered(
            usage,
            UsageSource.COUNTED,
            self._model,
            self._is_implausible,
            is_empty=is_empty,
            service_tier=self._service_tier,
        )

    def _may_say(self, data: bytes) -> bool:
        """Whether an event may hold usage or an error."""
        # Escaped quotes keep these out of strings: inside of one they read \\"usage\\".
        usage_at = data.find(_USAGE)
        if usage_at >= 0 and _USAGE_OBJECT.search(data, usage_at) is not None:
            return True
        error_at = data.find(_ERROR)
        return error_at >= 0 and _ERROR_VALUE.search(data, error_at) is not None

    def _decode(self, data: bytes) -> _Read:
        """What an event says that `_may_say` something. Raises what msgspec raises for bytes that are no such event."""
        chunk = _decode_chunk(data)
        choices = chunk.choices or []
        if chunk.error:
            kind = EventKind.ERROR
        elif not _is_object(chunk.usage):
            kind = EventKind.CONTENT
        elif not choices:
            kind = EventKind.USAGE_ONLY
        else:
            kind = EventKind.USAGE if any(choice.finish_reason for choice in choices) else EventKind.CONTENT
        return _Read(kind, chunk.reported, chunk.model, has_text=bool(choices), service_tier=_tier(chunk))

    def _texts(self, data: bytes) -> tuple[str | None, _Texts]:
        return _chat_texts(data)

    def _take(self, data: bytes) -> EventKind:
        try:
            read = self._decode(data)
        except UNREADABLE:
            self._keep(data)
            return EventKind.CONTENT
        self._service_tier = read.service_tier or self._service_tier
        usage = _plausible(read.usage, self._tokens_max)
        if usage is not None and (usage.output_tokens or not self._has_text(data)):
            self._usage, self._model = usage, read.model or self._model
            self._kept.clear()
            self._kept_bytes = self._dropped_bytes = 0
            return read.kind
        self._is_implausible = self._is_implausible or _is_object(read.usage)
        if read.has_text:
            self._keep(data)
        return read.kind

    def _has_text(self, data: bytes) -> bool:
        """Whether there is any text for which no usage was reported, `data` included."""
        return bool(self._texts(data)[1]) or self._unreported_tokens(BY_BYTES) > 0

    def _keep(self, data: bytes) -> None:
        if self._kept_bytes + len(data) > self._kept_bytes_max:
            self._dropped_bytes += len(data)
            return
        self._kept.append(data)
        self._kept_bytes += len(data)

    def _unreported_tokens(self, counter: Counter) -> int:
        """The tokens of the text for which there is no usage."""
        pieces: dict[object, list[str]] = {}
        for data in self._kept:
            model, texts = self._texts(data)
            self._model = self._model or model
            for key, text in texts.items():
                pieces.setdefault(key, []).append(text)
        tokens = counter.texts("".join(piece) for piece in pieces.values())
        if not self._dropped_bytes:
            return tokens
        if not self._kept_bytes:
            return _divided_up(self._dropped_bytes, BYTES_PER_TOKEN)
        return tokens + _divided_up(self._dropped_bytes * tokens, self._kept_bytes)


class ResponseMeter(StreamMeter):
    """Meters a stream of events as Responses has it: usage comes with the event that ends it."""

    def _may_say(self, data: bytes) -> bool:
        return _RESPONSE_END.search(data) is not None

    def _decode(self, data: bytes) -> _Read:
        event = _decode_response_event(data)
        response = event.response or _Response()
        if event.type in {"response.failed", "error"}:
            kind = EventKind.ERROR
        else:
            kind = EventKind.DONE if event.type in _RESPONSE_ENDS else EventKind.CONTENT
        has_text = kind is EventKind.CONTENT
        return _Read(kind, response.usage, response.model, has_text=has_text, service_tier=_tier(response))

    def _texts(self, data: bytes) -> tuple[str | None, _Texts]:
        try:
            event = _decode_response_event(data)
        except UNREADABLE:
            return None, _unreadable(data)
        model = None if event.response is None else event.response.model
        # The name of a tool comes with its item, all else bit by bit.
        text = event.delta
        if event.type == "response.output_item.added" and event.item is not None:
            text = event.item.name
        is_text = isinstance(text, str) and text
        return model, {(event.type, event.item_id, str(event.output_index)): text} if is_text else {}


def stream_meter(endpoint: Endpoint, kept_bytes_max: int, *, tokens_max: int | None = None) -> StreamMeter:
    """A meter for the streams of `endpoint`."""
    kind = ResponseMeter if endpoint is Endpoint.RESPONSES else StreamMeter
    return kind(kept_bytes_max, tokens_max=tokens_max)


def _plausible(reported: Raw, tokens_max: int | None) -> Usage | None:
    usage = read_usage(reported)
    if usage is None:
        return None
    tokens = usage.input_tokens + usage.output_tokens
    return usage if tokens and (tokens_max is None or tokens <= tokens_max) else None


def _counted(reported: Usage | None, prompt_tokens: int, output_tokens: int, bound: Usage) -> Usage:
    """A count of so many tokens on top of what was `reported`, or of the whole call where nothing was."""
    if reported is None:
        return Usage(input=min(prompt_tokens, bound.input_tokens), output=min(output_tokens, bound.output_tokens))
    room = max(0, bound.output_tokens - reported.output_tokens)
    return msgspec.structs.replace(reported, output=reported.output + min(output_tokens, room))


def _chat_texts(data: bytes) -> tuple[str | None, _Texts]:
    """The model that an answer or a chunk names, and its texts; all of its bytes are text if it is unreadable."""
    try:
        written = _decode_written(data)
    except UNREADABLE:
        return None, _unreadable(data)
    texts: _Texts = {}
    for number, choice in enumerate(written.choices or ()):
        for place, text in enumerate(_choice_texts(choice)):
            if text:
                texts[number if choice.index is None else choice.index, place] = text
    return written.model, texts


def _choice_texts(choice: _Choice) -> list[str | None]:
    texts = [choice.text]
    for text in (choice.delta, choice.message):
        if text is not None:
            # A provider that sends both spellings of the reasoning sends the same text twice.
            texts += (text.content, text.refusal, text.reasoning_content or text.reasoning)
            calls = [text.function_call]
            for call in text.tool_calls or ():
                calls += (call.function, call.custom)
            for called in calls:
                texts += () if called is None else (called.name, called.arguments, called.input)
    return texts


def _response_texts(body: bytes) -> tuple[str | None, _Texts]:
    """As `_chat_texts`, of a whole response."""
    try:
        response = _decode_response(body)
    except UNREADABLE:
        return None, _unreadable(body)
    texts: _Texts = {}
    for item in response.output or ():
        parts = [*(item.content or ()), *(item.summary or ())]
        written = [item.name, item.arguments, item.input, *(part.text or part.refusal for part in parts)]
        texts |= {(len(texts), place): text for place, text in enumerate(written) if text}
    return response.model, texts


def _unreadable(data: bytes) -> _Texts:
    """All of what cannot be read is text."""
    return {None: data.decode(errors="replace")} if data else {}


def _utf8_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _is_object(raw: Raw) -> bool:
    return memoryview(raw)[0] == ord("{")


def _divided_up(number: int, divisor: int) -> int:
    return -(-number // divisor)
