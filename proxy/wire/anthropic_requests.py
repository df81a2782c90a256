"""From a chat completion request to one of Anthropic's Messages API (https://platform.claude.com/docs/en/api/messages).

What that API has no words for is refused, and never left out in silence: a caller who asked for it would be told
nothing. Only what says what is so anyhow is left out, such as `n` of 1.

Three things are told differently there:

* Instructions stand before the conversation, wherever the client put them: Anthropic's own layer for OpenAI's SDKs
  does the same.
* A turn is one message: what several messages in a row of one side say, results of tools included, becomes one.
* Thinking comes in blocks with signatures, which must come back as they were where a tool was called in between. A
  chat message carries them in `thinking_blocks`, each with its `position` among what else the message becomes.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw

from proxy.errors import BadRequest
from proxy.wire.objects import NULL, UNREADABLE, bad_request, decode_fields, patch
from proxy.wire.requests import ITEMS_MAX, THINKING_TOKENS_MIN, Tokens, check_number, is_set, unsupported

OUTPUT_TOKENS_UNKNOWN: Final = 32_000
"""The maximum of a call that names none, at a model whose own nobody knows: all since Claude 4 take as much."""

_BUDGETS: Final = {"minimal": 1_024, "low": 2_048, "medium": 8_192, "high": 24_576, "xhigh": 32_768, "max": 32_768}
"""Tokens of thinking by effort, for models that know budgets; never more than half of the maximum, which holds them."""

_EFFORTS: Final = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}

_ADAPTIVE_SINCE: Final = (4, 6)
"""From this version on models think as much as they find right, by an effort; older ones know budgets only."""

_SAID_ANYHOW: Final[Mapping[str, object]] = {
    "best_of": 1,
    "frequency_penalty": 0,
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "presence_penalty": 0,
    "store": False,
    "top_logprobs": 0,
    "verbosity": "medium",
}
"""Fields that the Messages API has not, with the value that asks for nothing."""

_HOLDS: Final = ("text", "refusal", "image_url", "file", "input_audio")
"""What parts hold, each under the name of its type."""

_INSTRUCTING: Final = frozenset({"system", "developer"})
_NO_CHOICES: Final = (None, "auto", "none")
_TIERS: Final = {"auto": "auto", "default": "standard_only", "standard": "standard_only", "on_demand": "standard_only"}
_IMAGE_TYPES: Final = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
_DETAILS: Final = frozenset({None, "auto", "high", "original"})
_DATA_URL = re.compile(r"data:([\w.+/-]+);base64,(.*)", re.DOTALL | re.IGNORECASE)
_TOOL_ID = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_NO_PARAMETERS: Final = Raw(b'{"type":"object","properties":{}}')

_SHORT: Final = (None, "5m")
"""How long caches last by default."""

_Block = dict[str, Any]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _StreamOptions(_Strict, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Image(_Strict, frozen=True):
    url: str
    detail: str | None = None


class _File(_Strict, frozen=True):
    file_data: str | None = None
    filename: str | None = None


class _Part(_Strict, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: _Image | None = None
    file: _File | None = None
    input_audio: Any = None
    cache_control: Raw = NULL


class _Called(_Strict, frozen=True):
    """OpenAI's SDKs put what they have parsed beside it, and send it along."""

    name: str
    arguments: str = ""
    parsed_arguments: Any = None


class _Call(_Strict, frozen=True):
    id: str
    type: str = "function"
    function: _Called | None = None
    index: int | None = None
    custom: Any = None


class _Thought(_Strict, frozen=True):
    """A block of thinking as an answer had it; those of other gateways have no `position`, and stand first."""

    type: str
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    index: int | None = None
    position: Annotated[int, Meta(ge=0, le=ITEMS_MAX)] | None = None
    cache_control: Any = None


class _Message(_Strict, frozen=True):
    """A message, with what an answer of ours has beside, as clients send it back."""

    role: str
    content: str | list[_Part] | None = None
    name: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    thinking_blocks: list[_Thought] | None = None
    cache_control: Raw = NULL
    reasoning_content: Any = None
    reasoning: Any = None
    annotations: Any = None
    parsed: Any = None
    audio: Any = None
    function_call: Any = None


class _Function(_Strict, frozen=True):
    name: str
    description: str | None = None
    parameters: Raw = NULL
    strict: bool | None = None
    cache_control: Raw = NULL


class _Tool(_Strict, frozen=True):
    type: str
    function: _Function | None = None
    custom: Any = None
    cache_control: Raw = NULL


class _Named(_Strict, frozen=True):
    name: str


class _Choice(msgspec.Struct, frozen=True):
    type: str
    function: _Named | None = None


class _Schema(_Strict, frozen=True):
    name: str | None = None
    description: str | None = None
    schema: Raw = NULL
    strict: bool | None = None


class _Format(_Strict, frozen=True):
    type: str
    json_schema: _Schema | None = None


class _Chat(msgspec.Struct, frozen=True, kw_only=True):
    """Every field that the Messages API has words for."""

    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: str | list[str] | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | _Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    reasoning_effort: str | None = None
    thinking: Raw = NULL
    cache_control: Raw = NULL
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None


_decode_chat = msgspec.json.Decoder(_Chat).decode
_READ: Final = frozenset(_Chat.__struct_fields__)


def messages_request(body: bytes, output_tokens_max: int | None) -> bytes:
    """The body of a Messages request that asks for what the chat completion request `body` does.

    `output_tokens_max` is the maximum where the client named none, None where nobody knows the model's own.

    Raises `BadRequest` for what cannot be expressed; `param` is the top-level field.
    """
    try:
        _check_expressed(body)
        chat = _decode_chat(body)
    except UNREADABLE as exc:
        raise bad_request(exc) from exc
    if chat.stream_options is not None and chat.stream_options.include_obfuscation:
        raise _refused("stream_options", "'include_obfuscation'")
    for items in ("tool_calls", "thinking_blocks"):
        check_number(sum(len(getattr(message, items) or ()) for message in chat.messages), "messages")
    named = [maximum for maximum in (chat.max_completion_tokens, chat.max_tokens) if maximum is not None]
    max_tokens = min(named) if named else output_tokens_max or OUTPUT_TOKENS_UNKNOWN
    system, turns = _conversation(chat.messages)
    optional: dict[str, object] = {
        "system": system or None,
        "stop_sequences": [chat.stop] if isinstance(chat.stop, str) else chat.stop,
        "temperature": _temperature(chat.temperature),
        "top_p": None if chat.top_p == 1 else chat.top_p,
        "top_k": chat.top_k,
        "tools": _tools(chat) or None,
        "tool_choice": _tool_choice(chat),
        "metadata": _metadata(chat),
        "service_tier": _service_tier(chat.service_tier),
        "cache_control": _cache(chat.cache_control),
        "stream": chat.stream or None,
        **_thinking_and_format(chat, max_tokens),
    }
    said = {name: value for name, value in optional.items() if value is not None}
    return msgspec.json.encode({"model": chat.model, "max_tokens": max_tokens, "messages": turns, **said})


def _check_expressed(body: bytes) -> None:
    for name, raw in decode_fields(body).items():
        if name in _READ or not is_set(raw):
            continue
        if name not in _SAID_ANYHOW or msgspec.json.decode(raw) != _SAID_ANYHOW[name]:
            raise unsupported(name, f"'{name}' cannot be asked of this model: Anthropic's API has no such field.")


def _refused(param: str, message: str) -> BadRequest:
    return unsupported(param, f"{message} cannot be sent to this model: Anthropic's API has no such thing.")


# ---- the conversation


def _conversation(messages: Sequence[_Message]) -> tuple[list[_Block], list[_Block]]:
    """The instructions, and the turns of both sides."""
    system: list[_Block] = []
    turns: list[_Block] = []
    for message in messages:
        _check_fields(message)
        if message.role in _INSTRUCTING:
            system += _cached_last(_saying(_content(message)), message)
            continue
        match message.role:
            case "user":
                side, blocks = "user", _cached_last(_saying(_content(message)), message)
            case "tool":
                side, blocks = "user", [_tool_result(message)]
            case "assistant":
                side, blocks = "assistant", _cached_last(_said(message), message)
            case _:
                raise _refused("messages", f"A message of the role '{message.role}'")
        if turns and turns[-1]["role"] == side:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": side, "content": blocks})
    speakers = [message.role for message in messages if message.role not in _INSTRUCTING]
    # A conversation that ends with the assistant asks for more of what it said last.
    if not turns or (speakers[-1] == "user" and turns[-1]["role"] != "user"):
        raise BadRequest(
            "There must be a message of the user's, and the last one must say something.",
            param="messages",
            code="invalid_value",
        )
    return system, turns


def _saying(blocks: list[_Block]) -> list[_Block]:
    """`blocks` without texts that are empty, nor blank ones beside no other text: the API takes neither."""
    if any(block.get("text", "").strip() for block in blocks):
        return [block for block in blocks if block.get("text") != ""]
    return [block for block in blocks if block["type"] != "text"]


def _check_fields(message: _Message) -> None:
    if message.name is not None and message.role != "tool":  # a tool's is known from its call
        raise _refused("messages", "The 'name' of a message")
    if message.function_call is not None:
        raise _refused("messages", "'function_call', the older form of 'tool_calls',")
    if message.role != "assistant" and (message.tool_calls or message.thinking_blocks or message.refusal):
        raise _refused("messages", f"What only the assistant says, in a message of the role '{message.role}',")
    if message.role != "tool" and message.tool_call_id is not None:
        raise _refused("messages", f"'tool_call_id' in a message of the role '{message.role}'")


def _content(message: _Message) -> list[_Block]:
    if not isinstance(message.content, list):
        return [_text(message.content or "")]
    return [_part(part, message.role) for part in message.content]


def _part(part: _Part, role: str) -> _Block:
    held = [name for name in _HOLDS if getattr(part, name) is not None]
    if held != [part.type]:
        raise _refused("messages", f"A part of the type '{part.type}' that holds {held or 'nothing'}")
    if part.text is not None:
        block = _text(part.text)
    elif part.image_url is not None and role in {"user", "tool"}:
        block = _image(part.image_url)
    elif part.file is not None and role in {"user", "tool"}:
        block = _document(part.file)
    elif part.refusal is not None and role == "assistant":
        block = _text(part.refusal)
    else:
        raise _refused("messages", f"A part of the type '{part.type}' in a message of the role '{role}'")
    return _cached(block, part.cache_control)


def _text(text: str) -> _Block:
    return {"type": "text", "text": text}


def _image(image: _Image) -> _Block:
    if image.detail not in _DETAILS:
        raise _refused("messages", f"An image's detail '{image.detail}'")
    if image.url[:8].lower().startswith(("http://", "https://")):
        return {"type": "image", "source": {"type": "url", "url": image.url}}
    media_type, encoded = _data(image.url)
    media_type = media_type.replace("image/jpg", "image/jpeg")
    if media_type not in _IMAGE_TYPES:
        raise _refused("messages", f"An image of the type '{media_type}'")
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": encoded}}


def _document(file: _File) -> _Block:
    media_type, encoded = _data(file.file_data or "")
    if media_type != "application/pdf":
        raise _refused("messages", f"A file of the type '{media_type}'")
    source = {"type": "base64", "media_type": media_type, "data": encoded}
    title = {} if file.filename is None else {"title": file.filename}
    return {"type": "document", "source": source, **title}


def _data(url: str) -> tuple[str, str]:
    match = _DATA_URL.fullmatch(url)
    if match is None:
        raise BadRequest(
            "Media must have an address that begins with http:// or https://, or be base64 data in a data: URL.",
            param="messages",
            code="invalid_value",
        )
    return match[1].lower(), match[2]


def _said(message: _Message) -> list[_Block]:
    """What the assistant said: text, calls of tools, and thinking where it stood."""
    blocks = [block for block in _content(message) if block["text"]]
    if message.refusal:
        blocks.append(_text(message.refusal))
    blocks += [_tool_use(call) for call in message.tool_calls or ()]
    return _saying(_with_thoughts(blocks, message.thinking_blocks or ()))


def _with_thoughts(blocks: list[_Block], thoughts: Sequence[_Thought]) -> list[_Block]:
    """`blocks` with each of `thoughts` at its position, where nothing is said in the order they have."""
    places = [place if thought.position is None else thought.position for place, thought in enumerate(thoughts)]
    said: list[_Block] = []
    others = iter(blocks)
    for place, thought in sorted(zip(places, thoughts, strict=True), key=lambda placed: placed[0]):
        said += islice(others, max(0, place - len(said)))
        said.append(_thought(thought))
    return [*said, *others]


def _thought(thought: _Thought) -> _Block:
    if thought.type == "redacted_thinking" and thought.data is not None:
        return {"type": thought.type, "data": thought.data}
    if thought.type == "thinking" and thought.signature is not None:
        return {"type": thought.type, "thinking": thought.thinking or "", "signature": thought.signature}
    raise _refused("messages", f"A block of thinking of the type '{thought.type}', or without its signature,")


def _tool_use(call: _Call) -> _Block:
    if call.type != "function" or call.function is None:
        raise _refused("messages", f"A call of a tool of the type '{call.type}'")
    # The bytes stay: numbers of any size, and the order of names.
    arguments = call.function.arguments.strip() or "{}"
    try:
        decode_fields(arguments.encode())
    except UNREADABLE as exc:
        message = f"The arguments of the call '{call.id}' are no JSON object, as this model needs them to be."
        raise BadRequest(message, param="messages", code="invalid_value") from exc
    return {
        "type": "tool_use",
        "id": _tool_id(call.id),
        "name": call.function.name,
        "input": Raw(arguments.encode()),
    }


def _tool_result(message: _Message) -> _Block:
    if message.tool_call_id is None:
        raise BadRequest(
            "Missing required parameter: 'messages.tool_call_id'.", param="messages", code="missing_required_parameter"
        )
    result: _Block = {"type": "tool_result", "tool_use_id": _tool_id(message.tool_call_id)}
    if isinstance(message.content, str):
        result["content"] = message.content
    else:
        result["content"] = _saying(_content(message))
    return _cached(result, message.cache_control)


def _tool_id(name: str) -> str:
    """An id that may be sent; those of other providers' calls may have any characters."""
    return name if _TOOL_ID.fullmatch(name) else f"toolu_{hashlib.sha256(name.encode()).hexdigest()[:32]}"


# ---- caches


def _cache(control: Raw) -> Raw | None:
    return control if is_set(control) else None


def _cached(block: _Block, control: Raw) -> _Block:
    cache = _cache(control)
    return block if cache is None else {**block, "cache_control": cache}


def _cached_last(blocks: list[_Block], message: _Message) -> list[_Block]:
    """`blocks` with what the whole message says about caches at its last one."""
    return [*blocks[:-1], _cached(blocks[-1], message.cache_control)] if blocks else blocks


class _Cacheable(msgspec.Struct, frozen=True):
    """A block, a message or a request as it is sent, as far as it says what is cached."""

    cache_control: Any = None
    content: str | list["_Cacheable"] | None = None
    system: list["_Cacheable"] = []
    messages: list["_Cacheable"] = []
    tools: list["_Cacheable"] = []


_decode_cacheable = msgspec.json.Decoder(_Cacheable).decode


def caches_for_an_hour(request: bytes) -> bool:
    """Whether something in a Messages request may be cached for longer than the usual five minutes."""
    if b'"cache_control"' not in request:
        return False
    try:
        return _is_cached_long(_decode_cacheable(request))
    except UNREADABLE:  # what controls a cache is the client's own, and may hold what only the provider can read
        return True


def _is_cached_long(block: _Cacheable) -> bool:
    control = block.cache_control
    if isinstance(control, dict) and control.get("ttl") not in _SHORT:
        return True
    inside = block.content if isinstance(block.content, list) else []
    return any(map(_is_cached_long, (*inside, *block.system, *block.messages, *block.tools)))


# ---- tools


def _tools(chat: _Chat) -> list[_Block]:
    """The tools, or else those that were called before: the API wants those to be there, though none may be called."""
    if chat.tools:
        return [_tool(tool) for tool in chat.tools]
    return [{"name": name, "input_schema": _NO_PARAMETERS} for name in _called(chat.messages)]


def _called(messages: Sequence[_Message]) -> list[str]:
    """The names of the tools that the conversation has calls of, each once."""
    calls = (call for message in messages for call in message.tool_calls or ())
    return list(dict.fromkeys(call.function.name for call in calls if call.function is not None))


def _tool(tool: _Tool) -> _Block:
    function = tool.function
    if tool.type != "function" or function is None:
        raise _refused("tools", f"A tool of the type '{tool.type}'")
    block: _Block = {"name": function.name, "input_schema": _input_schema(function.parameters)}
    if function.description is not None:
        block["description"] = function.description
    if function.strict:
        block["strict"] = True
    return _cached(_cached(block, function.cache_control), tool.cache_control)


def _input_schema(parameters: Raw) -> Raw:
    if not is_set(parameters):
        return _NO_PARAMETERS
    try:
        is_typed = "type" in decode_fields(parameters)
    except UNREADABLE as exc:
        message = "The parameters of a function must be a JSON schema, which is an object."
        raise BadRequest(message, param="tools", code="invalid_type") from exc
    return parameters if is_typed else Raw(patch(bytes(parameters), {"type": b'"object"'}))


def _tool_choice(chat: _Chat) -> _Block | None:
    if not chat.tools:
        if chat.tool_choice not in _NO_CHOICES:
            raise unsupported("tool_choice", "'tool_choice' is only allowed when 'tools' are specified.")
        return {"type": "none"} if _called(chat.messages) else None
    choice: _Block
    match chat.tool_choice:
        case None | "auto":
            choice = {"type": "auto"}
        case "required":
            choice = {"type": "any"}
        case "none":
            return {"type": "none"}
        case _Choice(type="function", function=_Named(name=name)):
            choice = {"type": "tool", "name": name}
        case _Choice(type=kind):
            raise _refused("tool_choice", f"A choice of the type '{kind}'")
        case other:
            raise _refused("tool_choice", f"The choice '{other}'")
    if chat.parallel_tool_calls is False:
        choice["disable_parallel_tool_use"] = True
    is_default = choice == {"type": "auto"} and chat.tool_choice is None
    return None if is_default else choice


# ---- everything else


def _temperature(temperature: float | None) -> float | None:
    if temperature is not None and not 0 <= temperature <= 1:
        raise unsupported("temperature", "'temperature' must be from 0 to 1 for this model.")
    # Models that take none take the default, which need not be said.
    return None if temperature == 1 else temperature


def _metadata(chat: _Chat) -> _Block | None:
    metadata = dict(chat.metadata or {})
    user_id = metadata.pop("user_id", None) or chat.safety_identifier or chat.user
    if metadata:
        raise _refused("metadata", "'metadata' with another field than 'user_id'")
    return None if user_id is None else {"user_id": user_id}


def _service_tier(service_tier: str | None) -> str | None:
    if service_tier is None:
        return None
    if service_tier not in _TIERS:
        raise _refused("service_tier", f"The service tier '{service_tier}'")
    return _TIERS[service_tier]


def _thinking_and_format(chat: _Chat, max_tokens: int) -> dict[str, object]:
    thinking, effort = _thinking(chat, max_tokens)
    config: dict[str, object] = {}
    if effort is not None:
        config["effort"] = effort
    output_format = _output_format(chat.response_format)
    if output_format is not None:
        config["format"] = output_format
    return {"thinking": thinking, "output_config": config or None}


def _thinking(chat: _Chat, max_tokens: int) -> tuple[object, str | None]:
    """How to think: the client's own words, or what an effort becomes; and the effort for models that know it."""
    own = chat.thinking if is_set(chat.thinking) else None
    asked = chat.reasoning_effort
    if asked is None:
        return own, None
    if asked == "none":
        return own or {"type": "disabled"}, None
    if asked not in _EFFORTS:
        raise _refused("reasoning_effort", f"The effort '{asked}'")
    if is_adaptive(chat.model):
        return own or {"type": "adaptive", "display": "summarized"}, _EFFORTS[asked]
    if own is not None:
        raise unsupported("reasoning_effort", "This model takes either 'thinking' or 'reasoning_effort'.")
    budget = min(_BUDGETS[asked], max_tokens // 2)
    if budget < THINKING_TOKENS_MIN:
        least = 2 * THINKING_TOKENS_MIN
        raise unsupported("reasoning_effort", f"Thinking needs a maximum of at least {least} tokens with this model.")
    return {"type": "enabled", "budget_tokens": budget}, None


def is_adaptive(model: str) -> bool:
    """Whether a model thinks by effort, told by the version in its name; what has none is taken to be a new one."""
    numbers = [int(piece) for piece in re.split(r"[-@.:]", model) if piece.isdecimal() and len(piece) <= 2]
    return not numbers or tuple([*numbers, 0][:2]) >= _ADAPTIVE_SINCE


def _output_format(asked: _Format | None) -> _Block | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type != "json_schema" or asked.json_schema is None or not is_set(asked.json_schema.schema):
        raise _refused("response_format", f"The format '{asked.type}' without a JSON schema")
    schema, description = asked.json_schema.schema, asked.json_schema.description
    if description is not None:
        schema = _described(schema, description)
    return {"type": "json_schema", "schema": schema}


def _described(schema: Raw, description: str) -> Raw:
    """The schema with the format's description, unless it has one of its own."""
    try:
        has_own = "description" in decode_fields(schema)
    except UNREADABLE as exc:
        message = "The schema of a format must be an object."
        raise BadRequest(message, param="response_format", code="invalid_type") from exc
    return schema if has_own else Raw(patch(bytes(schema), {"description": msgspec.json.encode(description)}))
