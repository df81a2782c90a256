"""OpenAI's chat completions on the wire: the few fields that we read, and patches that leave every other byte alone.

Another parser may read the same bytes otherwise. Where JSON leaves room (RFC 8259, section 4: the behaviour with
names that are not unique is unpredictable), a request that we read as small could be large to the provider:

* of `{"max_tokens": 1, "max_tokens": 100000}` most parsers take the last value, some the first;
* Go's `encoding/json` and .NET ignore case, Go by Unicode's simple folding, in which `ſ` is an s and `K` a k;
* parsers of protobuf's JSON take `maxTokens` for `max_tokens`;
* any character of a name can be written as an escape.

So an object that we read must not name a field twice, nor hold a name that becomes the name of a field we read
once letter case, `_` and `-` are ignored. Names are compared as they are after unescaping.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw

from proxy.errors import BadRequest

CHOICES_MAX = 128
"""OpenAI's own limit of `n`."""

TOKENS_MAX = 2**53 - 1
"""The largest integer that JSON carries safely between parsers (RFC 8259, section 6)."""

_Tokens = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
_Choices = Annotated[int, Meta(ge=1, le=CHOICES_MAX)]


class Part(msgspec.Struct, frozen=True):
    """One part of a message's content."""

    type: str


class Message(msgspec.Struct, frozen=True):
    """One message of the conversation."""

    role: str
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    """What a streaming client asks for beside the stream."""

    include_usage: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may call."""

    type: str


_NULL = Raw(b"null")


class ChatRequest(msgspec.Struct, frozen=True):
    """The fields of a chat completion request that decide what it may cost and how it is served."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    n: _Choices | None = None
    best_of: _Choices | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    store: bool | None = None
    tools: list[Tool] | None = None
    prediction: Raw = _NULL  # `Raw | None` would take nothing but null


_REFUSED: Final[Mapping[str, str]] = {
    "audio": "audio output is not priced here",
    "background": "answers in the background cannot be metered",
    "conversation": "state kept at the provider is not bounded",
    "enable_search": "web search is billed outside of tokens",
    "fallbacks": "only the model that was priced may answer",
    "models": "only the model that was priced may answer",
    "plugins": "plugins are billed outside of tokens",
    "preset": "state kept at the provider is not bounded",
    "previous_response_id": "state kept at the provider is not bounded",
    "prompt": "state kept at the provider is not bounded",
    "search_parameters": "web search is billed outside of tokens",
    "web_search_options": "web search is billed outside of tokens",
}
"""Top-level fields that make a call's cost unbounded, at OpenAI and at those who took over its API, and why."""

_SWITCHED_OFF = frozenset({b"null", b"false", b"[]"})
_PRICED_TIERS = frozenset({None, "auto", "default"})
_PRICED_TOOLS = frozenset({"function", "custom"})
_TEXT_PARTS = frozenset({"text", "refusal"})


class _Name:
    """The name of one member of an object, equal only to itself: a dict keeps members of the same name apart."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_Fields = dict[str, Raw]
_Members = dict[_Name, Raw]


def _named(_type: type, text: str) -> _Name:
    return _Name(text)


_decode_request = msgspec.json.Decoder(ChatRequest).decode
_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_fields_list = msgspec.json.Decoder(list[_Fields]).decode
_decode_members = msgspec.json.Decoder(_Members, dec_hook=_named).decode
_decode_members_list = msgspec.json.Decoder(list[_Members], dec_hook=_named).decode

_MEMBER_START = re.compile(rb'[\s{,]*"[^"\\]*(?:\\.[^"\\]*)*"\s*:\s*', re.DOTALL)
"""What stands between the values of an object that is known to be well-formed: punctuation and the next name."""

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what was expected."""

_WHERE = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`")


def _folded(name: str) -> str:
    # Upper case first: it also unites what casefold keeps apart, such as the dotless i.
    return name.upper().casefold().replace("_", "").replace("-", "")


class _Spelling:
    """How the fields of one kind of object may be spelled: those we read, and some that are known to be others."""

    def __init__(self, read: Collection[str], others: Collection[str] = ()) -> None:
        self.right = frozenset(read).union(others)
        self._read = {_folded(name): name for name in read}

    def meant(self, name: str) -> str | None:
        """The field that we read under another spelling than `name`, if another parser may take it for that."""
        return None if name in self.right else self._read.get(_folded(name))


_TOP = _Spelling(
    (*ChatRequest.__struct_fields__, *_REFUSED),
    (
        "frequency_penalty",
        "logprobs",
        "metadata",
        "parallel_tool_calls",
        "presence_penalty",
        "reasoning_effort",
        "response_format",
        "seed",
        "stop",
        "temperature",
        "tool_choice",
        "top_logprobs",
        "top_p",
        "user",
    ),
)
_STREAM_OPTIONS = _Spelling(StreamOptions.__struct_fields__, ("include_obfuscation",))
_MESSAGE = _Spelling((*Message.__struct_fields__, "audio"), ("name", "refusal", "tool_call_id", "tool_calls"))
_PART = _Spelling(Part.__struct_fields__, ("cache_control", "file", "image_url", "input_audio", "text"))
_FILE = _Spelling(("file_id",), ("file_data", "filename", "url", "detail", "data", "format"))
_TOOL = _Spelling(Tool.__struct_fields__, ("custom", "function"))


def decode_chat(body: bytes) -> ChatRequest:
    """The fields we read of a chat completion request, of which the cost has a bound.

    Raises `BadRequest` for everything else: JSON that is malformed or nested too deeply, wrong types and values,
    names that another parser may read otherwise (see above), and what would be billed outside of tokens or hangs
    on state at the provider. `param` is the top-level field.
    """
    try:
        return _checked(_decode_request(body), body)
    except _UNREADABLE as exc:
        raise _bad_request(exc) from exc


def has_media(request: ChatRequest) -> bool:
    """Whether any content is something else than text, so that its size is not that of the body."""
    return any(
        part.type not in _TEXT_PARTS
        for message in request.messages
        if isinstance(message.content, list)
        for part in message.content
    )


def output_tokens_asked(request: ChatRequest) -> int | None:
    """The client's maximum for each choice, the largest where it names several; None where it names none."""
    named = [tokens for tokens in (request.max_tokens, request.max_completion_tokens) if tokens is not None]
    return max(named, default=None)


def prediction_bytes(request: ChatRequest) -> int:
    """The size of the predicted output: of it, what does not come true is billed as output beside the maximum.

    https://platform.openai.com/docs/guides/predicted-outputs
    """
    return 0 if bytes(request.prediction) == b"null" else len(request.prediction)


def asking_for_usage(body: bytes) -> bytes:
    """The `stream_options` of the request `body`, changed to ask for usage and otherwise as they were."""
    options = _decode_fields(body).get("stream_options", _NULL)
    return patch(b"{}" if bytes(options) == b"null" else bytes(options), {"include_usage": b"true"})


def patch(body: bytes, changes: Mapping[str, bytes]) -> bytes:
    """`body`, a JSON object, with its top-level fields set to the raw JSON values in `changes`.

    The value of a field that is there is replaced (everywhere, should it be there twice); other fields are put
    right after the opening brace. All other bytes stay as they are. Raises `BadRequest` when `body` is no object.
    """
    try:
        members = _members(body)
    except _UNREADABLE as exc:
        raise _bad_request(exc) from exc
    present = changes.keys() & {name for name, _ in members}
    inserted = [msgspec.json.encode(field) + b":" + changes[field] for field in changes if field not in present]
    kept = position = body.index(b"{") + 1
    pieces = [body[:kept], b",".join(inserted)]
    if inserted and members:
        pieces.append(b",")
    for name, raw in members if present else ():
        match = _MEMBER_START.match(body, position)
        assert match is not None, "what has been decoded is well-formed"  # noqa: S101 - msgspec read it just now
        start, position = match.end(), match.end() + len(raw)
        if name in present:
            pieces += (body[kept:start], changes[name])
            kept = position
    pieces.append(body[kept:])
    return b"".join(pieces)


def error_body(message: str, type_: str, param: str | None, code: str | None, **extra: Any) -> bytes:
    """An error as OpenAI's API words it; `extra` are further fields of the error object."""
    return msgspec.json.encode({"error": {"message": message, "type": type_, "param": param, "code": code, **extra}})


def _bad_request(exc: Exception) -> BadRequest:
    """What msgspec found, in OpenAI's words."""
    if isinstance(exc, UnicodeDecodeError):
        return BadRequest("The body is not valid UTF-8.", code="invalid_json")
    if isinstance(exc, RecursionError):
        return BadRequest("The body is nested too deeply.", code="invalid_json")
    if not isinstance(exc, msgspec.ValidationError):
        return BadRequest(f"The body is not valid JSON: {exc}.", code="invalid_json")
    match = _WHERE.fullmatch(str(exc))
    what, path = (match["what"], match["path"] or "") if match is not None else (str(exc), "")
    if missing := _MISSING.fullmatch(what):
        place = f"{path}.{missing['field']}" if path else missing["field"]
        return BadRequest(
            f"Missing required parameter: '{place}'.", param=_top(place), code="missing_required_parameter"
        )
    kind = "type" if ", got " in what else "value"
    whose = f"'{path}'" if path else "the body"
    return BadRequest(f"Invalid {kind} for {whose}: {what}.", param=_top(path), code=f"invalid_{kind}")


def _top(path: str) -> str | None:
    """The top-level field of a path such as `messages[0].role`."""
    return re.split(r"[.\[]", path, maxsplit=1)[0] or None


def _members(raw: bytes | Raw) -> list[tuple[str, Raw]]:
    """The members of an object in their order, with those that are there twice."""
    fields = _decode_fields(raw)
    if len(raw) == _compact_bytes(1, fields, fields.values()):
        return list(fields.items())
    return [(name.text, value) for name, value in _decode_members(raw).items()]


def _unique_fields(raw: bytes | Raw, param: str | None = None) -> _Fields:
    """The fields of an object. Raises `BadRequest` when a name is there twice."""
    fields = _decode_fields(raw)
    if len(raw) != _compact_bytes(1, fields, fields.values()):
        _refuse_duplicates(_decode_members(raw), param)
    return fields


def _compact_bytes(objects: int, names: Collection[str], values: Iterable[Raw]) -> int:
    """The length of so many objects with these members, written without white space.

    Each object has two braces, each member two quotes and a colon, and all but the first of an object a comma. An
    object of just this length has no room for anything else: no second member of the same name, of which a dict
    keeps only the last, and no escape in a name. So that needs no further look. (Names that are not ASCII and
    objects without members are longer than this, and are looked at.)
    """
    return objects + 4 * len(names) + sum(map(len, names)) + sum(map(len, values))


def _refuse_duplicates(members: _Members, param: str | None) -> None:
    seen = set()
    for name in members:
        if name.text in seen:
            where = _place(name.text, param)
            raise BadRequest(f"{where} is there more than once.", param=param or name.text, code="duplicate_field")
        seen.add(name.text)


def _check_spelling(names: Iterable[str], spelling: _Spelling, param: str | None = None) -> None:
    """Raises `BadRequest` when a name is another spelling of one that we read."""
    if spelling.right.issuperset(names):
        return
    for name in names:
        meant = spelling.meant(name)
        if meant is not None:
            raise BadRequest(
                f"{_place(name, param)} must be spelled '{meant}', lest a provider read it otherwise.",
                param=param or meant,
                code="ambiguous_field",
            )


def _checked_objects(lists: Sequence[Raw], spelling: _Spelling, param: str) -> list[_Fields]:
    """The objects in all these `lists`. Raises `BadRequest` for their names as the two above."""
    objects = [fields for raw in lists for fields in _decode_fields_list(raw)]
    names = list(chain.from_iterable(objects))
    # A list of k objects has two brackets and k - 1 commas around them.
    compact_bytes = (
        len(lists) + len(objects) + _compact_bytes(len(objects), names, chain.from_iterable(map(dict.values, objects)))
    )
    if sum(map(len, lists)) != compact_bytes:
        for raw in lists:
            for members in _decode_members_list(raw):
                _refuse_duplicates(members, param)
    _check_spelling(names, spelling, param)
    return objects


def _checked(request: ChatRequest, body: bytes) -> ChatRequest:
    fields = _unique_fields(body)
    _check_spelling(fields, _TOP)
    _refuse_unbounded(request, fields)
    has_options = request.stream_options is not None
    if has_options:
        options = _unique_fields(fields["stream_options"], "stream_options")
        _check_spelling(options, _STREAM_OPTIONS, "stream_options")
    # What remains to be checked are the objects inside of messages, and tools. When there are no more braces than
    # those of the body, of its messages and of the stream options, then there is no such object, whatever names
    # and strings there may be: the common case, at the price of a memchr.
    if body.count(b"{") != 1 + len(request.messages) + has_options:
        _check_messages(request, fields["messages"])
        if request.tools:
            _checked_objects([fields["tools"]], _TOOL, "tools")
    return request


def _place(name: str, param: str | None) -> str:
    return f"'{name}'" if param is None else f"'{name}' in '{param}'"


def _refuse_unbounded(request: ChatRequest, fields: Mapping[str, Raw]) -> None:
    """Raises `BadRequest` for what is billed outside of tokens or kept at the provider, by top-level fields."""
    if not _REFUSED.keys().isdisjoint(fields):
        for field, reason in _REFUSED.items():
            if field in fields and bytes(fields[field]) not in _SWITCHED_OFF:
                raise _unsupported(field, f"'{field}' is not supported: {reason}.")
    if request.service_tier not in _PRICED_TIERS:
        raise _unsupported("service_tier", f"The service tier '{request.service_tier}' is not priced here.")
    if request.best_of is not None and request.best_of > 1:
        raise _unsupported("best_of", "'best_of' is not supported: the choices that are not shown would be billed.")
    if request.modalities is not None and any(modality != "text" for modality in request.modalities):
        raise _unsupported("modalities", "Only the output modality 'text' is priced here.")
    for tool in request.tools or ():
        if tool.type not in _PRICED_TOOLS:
            raise _unsupported(
                "tools", f"Tools of type '{tool.type}' are billed outside of tokens, and not priced here."
            )


def _check_messages(request: ChatRequest, raw: Raw) -> None:
    """The checks of names, and for state at the provider, in each message and each part of its content."""
    messages = _checked_objects([raw], _MESSAGE, "messages")
    if any("audio" in fields and bytes(fields["audio"]) != b"null" for fields in messages):
        raise _unsupported("messages", "Audio kept at the provider is not supported: its size is not known.")
    contents = [
        fields["content"]
        for message, fields in zip(request.messages, messages, strict=True)
        if isinstance(message.content, list)
    ]
    parts = _checked_objects(contents, _PART, "messages")
    if has_media(request):
        for part in parts:
            _check_files(part)


def _check_files(part: _Fields) -> None:
    """Refuse ids of files, in a part and in what it holds."""
    inner = [value for value in part.values() if memoryview(value)[0] == ord("{")]
    for fields in (part, *(_unique_fields(value, "messages") for value in inner)):
        _check_spelling(fields, _FILE, "messages")
        if "file_id" in fields and bytes(fields["file_id"]) != b"null":
            raise _unsupported("messages", "Files kept at the provider are not supported: send 'file_data' instead.")


def _unsupported(param: str, message: str) -> BadRequest:
    return BadRequest(message, param=param, code="unsupported_parameter")
