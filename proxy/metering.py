"""What a call consumed, from the bytes of its answer: as the provider reports it, else counted.

How a usage object is read is in `wire.usage`. Uses of tools that the provider runs are the items of a response, and of
a chat what the usage says of them; where nothing does, they are as many as the call may make. What is counted is never
more than what was reserved for.
"""

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from proxy.pricing import TOOL_CLASSES
from proxy.units import Usage
from proxy.wire.objects import NULL, UNREADABLE, reader
from proxy.wire.requests import Endpoint
from proxy.wire.sse import event_data
from proxy.wire.usage import read_usage, searches

BYTES_PER_TOKEN = 4
"""Of English text, by OpenAI's own rule of thumb; a count by it is a guess."""


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

    model: Any = None
    choices: list[_End] | None = None
    usage: Raw = NULL  # `Raw | None` would take nothing but null
    x_groq: Raw = NULL
    x_tollgate: Raw = NULL
    error: Any = None
    type: Any = None
    code: Any = None
    output: Raw = NULL
    service_tier: Any = None

    @property
    def reported(self) -> Raw:
        """The usage, which Groq has in a field of its own as long as nobody asks, and we where a stream begins."""
        beside = self.x_groq if _is_object(self.x_groq) else self.x_tollgate
        if _is_object(self.usage) or not _is_object(beside):
            return self.usage
        try:
            return _decode_groq(beside).usage
        except UNREADABLE:
            return self.usage


class _Groq(msgspec.Struct):
    usage: Raw = NULL


class _Part(msgspec.Struct):
    text: str | None = None
    refusal: str | None = None


class _Use(msgspec.Struct):
    """An item of a response's output, as far as it is a use of a tool that the provider runs."""

    type: Any = None
    action: Any = None
    container_id: Any = None


class _Item(_Use):
    """An item of a response's output."""

    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    content: list[_Part] | None = None
    summary: list[_Part] | None = None


class _Ended(msgspec.Struct):
    """A response, as far as its usage is concerned: whatever shape its output has."""

    model: Any = None
    usage: Raw = NULL
    service_tier: Any = None
    output: Raw = NULL


class _Response(msgspec.Struct):
    """A response, as far as its text is concerned."""

    output: list[Raw] | None = None


class _WholeEvent(msgspec.Struct):
    """An event with all of a response in it."""

    response: _Response


class _EndEvent(msgspec.Struct):
    """An event that ends a streamed response."""

    type: Any = None
    response: _Ended | None = None


class _Opened(_Use):
    """An item whose text is still to come."""

    name: Any = None


class _ResponseEvent(msgspec.Struct):
    """An event of a streamed response, as far as its text is concerned."""

    type: str | None = None
    delta: Any = None
    item_id: str | None = None
    output_index: Any = None
    item: _Opened | None = None
    response: _Ended | None = None


_decode_uses = msgspec.json.Decoder(list[_Use] | None).decode
_decode_groq = msgspec.json.Decoder(_Groq).decode
_decode_written = reader(_Written)
_decode_chunk = reader(_Chunk)
_decode_response = reader(_Response)
_decode_item = reader(_Item)
_decode_ended = reader(_Ended)
_decode_end_event = reader(_EndEvent)
_decode_whole_event = reader(_WholeEvent)
_decode_response_event = reader(_ResponseEvent)


_USAGE = b'"usage"'
_NO_USAGE = b'"usage":null}'
"""How OpenAI ends every chunk but the last, where usage was asked for."""

_USAGE_OBJECT = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = b'"error"'
_ERROR_VALUE = re.compile(rb'"error"\s*:\s*[^\sn]')
"""Anything but null, which some providers send with every chunk."""

_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "overloaded_error": 529,
}
"""What Anthropic means by its words for errors (https://platform.claude.com/docs/en/api/errors)."""

_DONE = b"[DONE]"
_NOTHING = frozenset({b"null", b"[]"})
_ITEM = b"response.output_item."

_RESPONSE_END = re.compile(rb'"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed|cancelled)|error)"')
_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.cancelled"})

_Texts = dict[object, str]
"""Pieces of text by what they are pieces of, such as the content of one choice."""

_Pieces = dict[object, list[str]]

FOLDED_BYTES = 65_536
"""After so many bytes of events only their text is kept on."""


def failure_status(body: bytes) -> int | None:
    """The HTTP status that an error in a body or event stands for, though it came with status 200; None without one.

    Some providers put it into `error.code`, as a number or its digits, or into the `code` of an event of the type
    `error`, others a word; 502 where they do not.
    """
    if body.find(_ERROR) < 0:
        return None
    try:
        answer = _decode_chunk(body)
    except UNREADABLE:
        return None
    is_event = answer.type == "error"
    if not (answer.error or is_event) or answer.choices or bytes(answer.output) not in _NOTHING:
        return None
    code = answer.error.get("code") if isinstance(answer.error, dict) else answer.code
    text = str(code)
    if len(text) == 3 and text.isdecimal() and 400 <= int(text) <= 599:
        return int(text)
    return _STATUSES.get(text, 502)


_TOOL_ITEMS = {
    "web_search_call": "web_search",
    "file_search_call": "file_search",
    "code_interpreter_call": "code_interpreter",
}
"""Items that are uses of tools that the provider runs, and what those are priced as."""


def _uses(items: Iterable[_Use]) -> dict[str, int]:
    """How often each tool was used in a response, by what it is priced as.

    Of a web search only the search itself is billed, not the opening of a page that it found; of a code interpreter
    each container, however often it is used.
    """
    uses: dict[str, int] = {}
    containers: set[str] = set()
    for item in items:
        name = _TOOL_ITEMS.get(item.type) if isinstance(item.type, str) else None
        if name is None or (isinstance(item.action, dict) and item.action.get("type", "search") != "search"):
            continue
        if name == "code_interpreter" and isinstance(item.container_id, str):
            if item.container_id in containers:
                continue
            containers.add(item.container_id)
        uses[name] = uses.get(name, 0) + 1
    return uses


def _most(told: dict[str, int] | None, seen: dict[str, int] | None) -> dict[str, int] | None:
    """The uses that are `told` at the end of a response, or of which more were `seen` before; None if none are told."""
    if told is None or seen is None:
        return told
    return {name: max(told.get(name, 0), seen.get(name, 0)) for name in (*told, *seen)}


def _is_beyond(uses: dict[str, int] | None, bound: Usage) -> bool:
    """Whether more `uses` of tools are told than the call may have had."""
    return bound.tool_uses > 0 and uses is not None and sum(uses.values()) > bound.tool_uses


def _with_uses(usage: Usage, uses: dict[str, int] | None, bound: Usage) -> Usage:
    """`usage` with the `uses` of tools: with those of `bound` where nobody knows, and never with more."""
    if not bound.tool_uses:
        return usage
    if uses is None or _is_beyond(uses, bound):
        uses = {name: getattr(bound, name) for name in TOOL_CLASSES}
    return msgspec.structs.replace(usage, **uses)


def meter_reported(endpoint: Endpoint, body: bytes, *, tokens_max: int | None = None) -> Metered | None:
    """The usage that a whole answer reports, as `meter_plain` has it; None where its text must be looked at.

    For calls that may not use tools of the provider's.
    """
    answer = _decoded(endpoint, body)
    has_output = endpoint is not Endpoint.EMBEDDINGS
    usage = _plausible(answer.usage, tokens_max, has_output=has_output)
    if usage is not None and (usage.output_tokens or not has_output):
        return Metered(usage, UsageSource.REPORTED, _model(answer), service_tier=_tier(answer))
    return None


def _decoded(endpoint: Endpoint, body: bytes) -> "_Chunk | _Ended":
    """The answer as far as it says what was used; nothing, where it cannot be read."""
    try:
        return _decode_ended(body) if endpoint is Endpoint.RESPONSES else _decode_chunk(body)
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
    is_response = endpoint is Endpoint.RESPONSES
    answer = _decoded(endpoint, body)
    usage = _plausible(answer.usage, tokens_max, has_output=endpoint is not Endpoint.EMBEDDINGS)
    uses = _answer_uses(answer) if bound.tool_uses else None
    is_beyond = _is_beyond(uses, bound)
    reported = None if usage is None else _with_uses(usage, uses, bound)
    if reported is not None and (reported.output_tokens or endpoint is Endpoint.EMBEDDINGS):
        return Metered(reported, UsageSource.REPORTED, _model(answer), is_beyond, service_tier=_tier(answer))
    texts = _whole_texts(body) if is_response else _chat_texts(body)[1]
    if reported is not None and not texts:
        return Metered(reported, UsageSource.REPORTED, _model(answer), is_beyond, service_tier=_tier(answer))
    # Text beside a usage without output was not reported; the prompt was.
    prompt_tokens = 0 if usage is not None else counter.prompt(prompt)
    counted = _counted(usage, prompt_tokens, counter.texts(texts.values()), bound, uses)
    if counted == reported:
        return Metered(counted, UsageSource.REPORTED, _model(answer), is_beyond, service_tier=_tier(answer))
    return Metered(
        counted,
        UsageSource.COUNTED,
        _model(answer),
        is_implausible=is_beyond or bytes(answer.usage) != b"null",
        is_empty=not texts and not (endpoint is Endpoint.EMBEDDINGS and b'"data"' in body),
        service_tier=_tier(answer),
    )


def _answer_uses(answer: _Chunk | _Ended) -> dict[str, int] | None:
    """The uses of tools that a whole answer, or the end of a stream, reports; None where it does not."""
    if isinstance(answer, _Chunk):
        return searches(answer.reported)
    try:
        items = _decode_uses(answer.output)
    except UNREADABLE:
        return None
    return None if items is None else _uses(items)


def _tier(answer: _Chunk | _Ended) -> str | None:
    return answer.service_tier if isinstance(answer.service_tier, str) else None


def _model(answer: _Chunk | _Ended) -> str | None:
    return answer.model if isinstance(answer.model, str) else None


class _Read(msgspec.Struct, frozen=True):
    """What a decoded event said."""

    kind: EventKind
    usage: Raw = NULL
    model: str | None = None
    has_text: bool = False
    service_tier: str | None = None
    uses: dict[str, int] | None = None


class StreamMeter:
    """Meters a stream of chunks, as chat completions and completions have it, while it is relayed.

    The price is two searches in each event: at once only events that may report usage, or an error, are decoded. The
    others are kept, up to `kept_bytes_max` bytes, to be counted if it comes to that; of those beyond it only the bytes
    are known, and their share of text is taken to be that of those that were kept. Those of a stream of more than
    `FOLDED_BYTES` are decoded after all, so that only their text is kept, unless `keeps_events`.

    Usage that is followed by more text (some providers report at the start, or with every chunk, and may break in
    between) is charged with that text on top. So events are forgotten once there is usage for them.

    With `counts_tools` the uses of tools that the provider runs are told as well.
    """

    def __init__(
        self,
        kept_bytes_max: int,
        *,
        tokens_max: int | None = None,
        counts_tools: bool = False,
        keeps_events: bool = False,
    ) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._is_folded = not (counts_tools or keeps_events)
        self._folded: _Pieces = {}
        self._unfolded_bytes = 0
        self._tokens_max = tokens_max
        self._counts_tools = counts_tools
        self._uses: dict[str, int] | None = None
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
        """Whether an event for which no usage was reported has these bytes, or may have: not all of them are kept.

        For meters with `keeps_events`.
        """
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
                _with_uses(self._usage, self._uses, bound),
                UsageSource.REPORTED,
                self._model,
                self._is_implausible or _is_beyond(self._uses, bound),
                service_tier=self._service_tier,
            )
        is_empty = self._usage is None and not tokens
        prompt_tokens = 0 if self._usage is not None else counter.prompt(prompt)
        uses = self._uses if self._usage is not None else self._unreported_uses()
        usage = _counted(self._usage, prompt_tokens, tokens, bound, uses)
        return Metered(
            usage,
            UsageSource.COUNTED
            if self._usage is None or usage != _with_uses(self._usage, uses, bound)
            else UsageSource.REPORTED,
            self._model,
            self._is_implausible or _is_beyond(uses, bound),
            is_empty=is_empty,
            service_tier=self._service_tier,
        )

    def _may_say(self, data: bytes) -> bool:
        """Whether an event may hold usage or an error."""
        # Escaped quotes keep these out of strings: inside of one they read \\"usage\\".
        usage_at = data.find(_USAGE)
        is_null = usage_at >= 0 and data[usage_at:] == _NO_USAGE
        if usage_at >= 0 and not is_null and _USAGE_OBJECT.search(data, usage_at) is not None:
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
        uses = _answer_uses(chunk) if self._counts_tools else None
        return _Read(kind, chunk.reported, _model(chunk), bool(choices), _tier(chunk), uses)

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
            self._uses = read.uses
            self._kept.clear()
            self._folded.clear()
            self._kept_bytes = self._dropped_bytes = self._unfolded_bytes = 0
            return read.kind
        if usage is not None and (self._usage is None or not self._usage.output_tokens):
            # The prompt is known, and what tools did; what was written is counted on top.
            self._usage, self._uses = usage, read.uses
        self._is_implausible = self._is_implausible or _is_object(read.usage)
        if read.has_text:
            self._keep(data)
        return read.kind

    def _has_text(self, data: bytes) -> bool:
        """Whether there is any text for which no usage was reported, `data` included."""
        has_more = bool(self._dropped_bytes or self._folded)
        return has_more or any(self._texts(each)[1] for each in (data, *self._kept))

    def _keep(self, data: bytes) -> None:
        if self._kept_bytes + len(data) > self._kept_bytes_max:
            self._dropped_bytes += len(data)
            return
        self._kept.append(data)
        self._kept_bytes += len(data)
        self._unfolded_bytes += len(data)
        if self._unfolded_bytes > FOLDED_BYTES and self._is_folded:
            self._fold()

    def _fold(self) -> None:
        """Keep the text of the events instead of them: a fraction of their size."""
        pieces: _Pieces = {}
        self._read_into(pieces)
        for key, texts in pieces.items():
            self._folded.setdefault(key, []).append("".join(texts))
        self._kept.clear()
        self._unfolded_bytes = 0

    def _read_into(self, pieces: _Pieces) -> None:
        """Add the texts of the events that are kept as such."""
        for data in self._kept:
            model, texts = self._texts(data)
            self._model = self._model or model
            for key, text in texts.items():
                pieces.setdefault(key, []).append(text)

    def _unreported_uses(self) -> dict[str, int] | None:
        """The uses of tools in a stream that reported no usage; None where nobody knows."""
        return None

    def _unreported_tokens(self, counter: Counter) -> int:
        """The tokens of the text for which there is no usage."""
        pieces = {key: list(texts) for key, texts in self._folded.items()}
        self._read_into(pieces)
        tokens = counter.texts("".join(piece) for piece in pieces.values())
        if not self._dropped_bytes:
            return tokens
        if not self._kept_bytes:
            return _divided_up(self._dropped_bytes, BYTES_PER_TOKEN)
        return tokens + _divided_up(self._dropped_bytes * tokens, self._kept_bytes)


class ResponseMeter(StreamMeter):
    """Meters a stream of events as Responses has it: usage comes with the event that ends it.

    That event has all of the text once more: it is counted where none came before it.
    """

    _end: bytes | None = None

    def _may_say(self, data: bytes) -> bool:
        return _RESPONSE_END.search(data) is not None

    def _decode(self, data: bytes) -> _Read:
        event = _decode_end_event(data)
        response = event.response or _Ended()
        if event.type in {"response.failed", "error"}:
            kind = EventKind.ERROR
        else:
            kind = EventKind.DONE if event.type in _RESPONSE_ENDS else EventKind.CONTENT
        uses = _most(_answer_uses(response), self._unreported_uses()) if self._counts_tools else None
        return _Read(kind, response.usage, _model(response), kind is EventKind.CONTENT, _tier(response), uses)

    def _take(self, data: bytes) -> EventKind:
        kind = super()._take(data)
        if kind is not EventKind.CONTENT:
            self._end = data
        return kind

    def _unreported_tokens(self, counter: Counter) -> int:
        tokens = super()._unreported_tokens(counter)
        if tokens or self._end is None:
            return tokens
        try:
            return counter.texts(_response_texts(_decode_whole_event(self._end).response).values())
        except UNREADABLE:
            return 0  # it has no response, as an error has none

    def _unreported_uses(self) -> dict[str, int] | None:
        if self._dropped_bytes:
            return None
        items: dict[str, _Use] = {}
        for data in self._kept if self._counts_tools else ():
            if _ITEM not in data:
                continue
            try:
                event = _decode_response_event(data)
            except UNREADABLE:
                return None
            if event.item is not None:
                # The same item comes once more when it is done, with what was done.
                items[str(event.output_index)] = event.item
        return _uses(items.values())

    def _texts(self, data: bytes) -> tuple[str | None, _Texts]:
        try:
            event = _decode_response_event(data)
        except UNREADABLE:
            return None, _unreadable(data)
        model = None if event.response is None else _model(event.response)
        # The name of a tool comes with its item, all else bit by bit.
        text = event.delta
        if event.type == "response.output_item.added" and event.item is not None:
            text = event.item.name
        is_text = isinstance(text, str) and text
        return model, {(event.type, event.item_id, str(event.output_index)): text} if is_text else {}


def stream_meter(
    endpoint: Endpoint,
    kept_bytes_max: int,
    *,
    tokens_max: int | None = None,
    counts_tools: bool = False,
    keeps_events: bool = False,
) -> StreamMeter:
    """A meter for the streams of `endpoint`."""
    kind = ResponseMeter if endpoint is Endpoint.RESPONSES else StreamMeter
    return kind(kept_bytes_max, tokens_max=tokens_max, counts_tools=counts_tools, keeps_events=keeps_events)


def _plausible(reported: Raw, tokens_max: int | None, *, has_output: bool = True) -> Usage | None:
    usage = read_usage(reported, has_output=has_output)
    if usage is None:
        return None
    tokens = usage.input_tokens + usage.output_tokens
    return usage if tokens and (tokens_max is None or tokens <= tokens_max) else None


def _counted(
    reported: Usage | None, prompt_tokens: int, output_tokens: int, bound: Usage, uses: dict[str, int] | None
) -> Usage:
    """A count of so many tokens on top of what was `reported`, or of the whole call where nothing was."""
    if reported is None:
        usage = Usage(input=min(prompt_tokens, bound.input_tokens), output=min(output_tokens, bound.output_tokens))
    else:
        room = max(0, bound.output_tokens - reported.output_tokens)
        usage = msgspec.structs.replace(reported, output=reported.output + min(output_tokens, room))
    return _with_uses(usage, uses, bound)


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


def _whole_texts(body: bytes) -> _Texts:
    """The texts of a whole response; all of its bytes are text if it is unreadable."""
    try:
        return _response_texts(_decode_response(body))
    except UNREADABLE:
        return _unreadable(body)


def _response_texts(response: _Response) -> _Texts:
    """The texts of a response; what cannot be read of its items is text."""
    written: list[str | None] = []
    for raw in response.output or ():
        try:
            item = _decode_item(raw)
        except UNREADABLE:
            written += _unreadable(bytes(raw)).values()
            continue
        parts = [*(item.content or ()), *(item.summary or ())]
        written += (item.name, item.arguments, item.input, *(part.text or part.refusal for part in parts))
    return {place: text for place, text in enumerate(written) if text}


def _unreadable(data: bytes) -> _Texts:
    """All of what cannot be read is text."""
    return {None: data.decode(errors="replace")} if data else {}


def _utf8_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _is_object(raw: Raw) -> bool:
    return memoryview(raw)[0] == ord("{")


def _divided_up(number: int, divisor: int) -> int:
    return -(-number // divisor)
