"""`POST /messages`, as Anthropic's Messages API has it.

Requests are judged by the types of Anthropic's own SDK, in which nothing may be that they do not know, and by what its
documentation says of conversations (https://platform.claude.com/docs/en/build-with-claude/working-with-messages).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from tests.fakes.provider.answer import Answer, Piece, as_json, plain, stream
from tests.fakes.provider.behaviour import Behaviour
from tests.fakes.provider.journal import Served
from tests.fakes.provider.reply import TOKENS_PER_MEDIUM, Bill, Reply, bytes_of, compose, slices

_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_TOOLS = 804
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_SAMPLING = frozenset({"temperature", "top_p", "top_k"})
"""Version 2023-06-01 of the API takes them; the SDK's types are those of 2026-10-21, which has them no more."""

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


def signed(thinking: str) -> str:
    """The signature of a thought: without the right one, it is not taken back."""
    return f"sig{hashlib.sha256(thinking.encode()).hexdigest()}"


def decide(served: Served) -> Answer:
    """The answer to a request that was read; fills in the journal's counts and behaviour."""
    if not served.header("x-api-key") and not served.header("authorization").startswith("Bearer "):
        return _error(401, "x-api-key header is required")
    if not served.header("anthropic-version"):
        return _error(400, "anthropic-version: header is required")
    request = served.parsed
    if (fault := fault_of(request)) is not None:
        return _error(400, fault)
    served.behaviour = behaviour = Behaviour.from_texts(_texts_of_user(request["messages"]))
    served.prompt_tokens = prompt_tokens(request)
    is_stream = bool(request.get("stream"))
    if (verbatim := behaviour.verbatim) is not None:
        usual_type = "text/event-stream" if is_stream else "application/json"
        return Answer(status=behaviour.status or 200, content_type=usual_type, pieces=[Piece(verbatim)])
    if behaviour.status is not None and not behaviour.error_event:
        return _error(behaviour.status, None, behaviour)
    return _answer(served, request)


# ---- what is a request


def fault_of(request: Any) -> str | None:
    """Why `request` is none; None if it is one."""
    return _sdk_fault(request) or _fault(request)


@cache
def _sdk_shape() -> Any:
    # Not before it is needed: importing it takes seconds.
    from anthropic.types.message_create_params import MessageCreateParams  # noqa: PLC0415
    from pydantic import TypeAdapter  # noqa: PLC0415

    return TypeAdapter(MessageCreateParams)


def _sdk_fault(request: Any) -> str | None:
    """What the SDK's types find wrong; they leave out what they do not know, so that nothing else may be there."""
    if not isinstance(request, dict):
        return "not an object"
    request = {name: value for name, value in request.items() if name not in _SAMPLING}
    try:
        known = _read_out(_sdk_shape().validate_python(request))
    except ValueError as exc:
        return f"not as the SDK has it: {exc}"
    return None if known == request else f"more than the SDK knows: {request}"


def _read_out(value: Any) -> Any:
    """`value` with everything in it looked at: what is iterable is validated only then."""
    match value:
        case str() | bytes():
            return value
        case Mapping():
            return {name: _read_out(inner) for name, inner in value.items()}
        case Iterable():
            return [_read_out(inner) for inner in value]
        case _:
            return value


def _fault(request: dict[str, Any]) -> str | None:
    """What the documentation rules out, though the types do not; None if nothing is."""
    messages, tools = request["messages"], request.get("tools")
    roles = [message["role"] for message in messages]
    if not roles or roles[0] != "user" or any(first == second for first, second in pairwise(roles)):
        return f"messages: the roles are not those of turns: {roles}"
    if any(not message["content"] for message in messages):
        return "messages: content must not be empty"
    blocks = [block for message in messages for block in _blocks(message)]
    if any(block["type"] == "text" and not block["text"] for block in [*blocks, *_system(request)]):
        return "text content blocks must be non-empty"
    if any(texts and not "".join(texts).strip() for texts in map(_texts, messages)):
        return "messages: text content blocks must contain non-whitespace text"
    if any(block["type"] == "thinking" and block["signature"] != signed(block["thinking"]) for block in blocks):
        return "Invalid `signature` in `thinking` block"
    if (request.get("tool_choice") or any(block["type"] == "tool_use" for block in blocks)) and not tools:
        return "Requests which have `tool_use` or `tool_result` blocks in `messages` must define tools."
    thinking = request.get("thinking") or {}
    if thinking.get("type") == "enabled" and not 1024 <= thinking["budget_tokens"] < request["max_tokens"]:
        return "`max_tokens` must be greater than `thinking.budget_tokens`, which is at least 1024"
    if not 0 <= request.get("temperature", 1) <= 1 or request["max_tokens"] < 1:
        return "temperature: range: 0..1"
    return _unanswered(messages)


def _unanswered(messages: list[dict[str, Any]]) -> str | None:
    """Calls of tools whose results are not the first that comes after them, and results of none."""
    for number, message in enumerate(messages):
        following = _blocks(messages[number + 1]) if number + 1 < len(messages) else []
        called = [block["id"] for block in _blocks(message) if block["type"] == "tool_use"]
        answered = [block["tool_use_id"] for block in following[: len(called)] if block["type"] == "tool_result"]
        if sorted(called) != sorted(answered):
            return f"`tool_use` ids were found without `tool_result` blocks immediately after: {called}"
        before = (
            [block["id"] for block in _blocks(messages[number - 1]) if block["type"] == "tool_use"] if number else []
        )
        results = [block["tool_use_id"] for block in _blocks(message) if block["type"] == "tool_result"]
        if not set(results) <= set(before):
            return f"unexpected `tool_use_id` found in `tool_result` blocks: {results}"
    return None


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(message: dict[str, Any]) -> list[str]:
    return [block["text"] for block in _blocks(message) if block["type"] == "text"]


def _system(request: dict[str, Any]) -> list[dict[str, Any]]:
    return _blocks({"content": request.get("system") or []})


def _texts_of_user(messages: list[dict[str, Any]]) -> list[str]:
    texts = ["".join(block.get("text", "") for block in _blocks(each)) for each in messages if each["role"] == "user"]
    return [text for text in texts if text]


# ---- what it costs


def prompt_tokens(request: dict[str, Any]) -> int:
    """What the prompt costs: its texts, calls and results, schemas, images, and what explains tools to the model."""
    blocks = [block for message in request["messages"] for block in _blocks(message)] + _system(request)
    media = sum(block["type"] in {"image", "document"} for block in blocks) * TOKENS_PER_MEDIUM
    named = [block.get(name, "") for block in blocks for name in ("text", "thinking", "name")]
    inner = [as_json(block[name]).decode() for block in blocks for name in ("input", "content") if block.get(name)]
    shapes = [as_json(request[name]).decode() for name in ("tools", "output_config") if request.get(name)]
    explained = _TOKENS_PER_TOOLS if request.get("tools") else 0
    texts = sum(map(bytes_of, [*named, *inner, *shapes]))
    return texts + media + explained + _TOKENS_PER_MESSAGE * len(request["messages"])


def _usage(bill: Bill) -> dict[str, Any] | None:
    """The usage of the whole call in this endpoint's words: caches are counted beside `input_tokens`."""
    usage = bill.usage()
    if usage is None or isinstance(bill.behaviour.usage, dict):
        return usage
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "thinking_tokens": usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        },
        "service_tier": "standard",
    }


# ---- what is answered


def _answer(served: Served, request: dict[str, Any]) -> Answer:
    wish = served.behaviour
    last = _blocks(request["messages"][-1])[-1]
    reply = compose(wish, request["max_tokens"], has_tool_results=last["type"] == "tool_result")
    blocks = wish.blocks if wish.blocks is not None else _content(reply, served.id)
    shown = reply.tokens if wish.blocks is None else sum(bytes_of(_written(block)) for block in blocks)
    served.unseen_tokens = reply.unseen_tokens
    usage = _usage(Bill(behaviour=wish, prompt=served.prompt_tokens, shown=shown, unseen=reply.unseen_tokens))
    stop = {"stop_reason": "refusal" if reply.refusal is not None else _STOP_REASONS[reply.finish_reason]}
    if wish.stop_reason is not None:
        stop = {"stop_reason": wish.stop_reason}
    if any(block["type"] == "tool_use" for block in blocks):
        stop = {"stop_reason": "tool_use"}
    details = {"type": "refusal", "category": None, "explanation": reply.refusal}
    stop |= {"stop_sequence": None, "stop_details": None if reply.refusal is None else details}
    message = {
        "id": f"msg_fake_{served.id}",
        "type": "message",
        "role": "assistant",
        "model": request["model"],
        "content": blocks,
        **stop,
        **({} if usage is None else {"usage": usage}),
    }
    if request.get("stream"):
        return stream(_pieces(message, stop, wish), wish)
    return plain(message, tokens=shown, usage=usage)


def _content(reply: Reply, call_id: int) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
    for position, call in enumerate(reply.calls):
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            arguments = {}
        block = {"type": "tool_use", "id": f"toolu_fake_{call_id}_{position}", "name": call.name, "input": arguments}
        blocks.append(block)
    return blocks


def _written(block: dict[str, Any]) -> str:
    if block["type"] == "tool_use":
        return block["name"] + as_json(block["input"]).decode()
    return block.get("text") or block.get("thinking") or ""


def _pieces(message: dict[str, Any], stop: dict[str, Any], wish: Behaviour) -> list[Piece]:
    pieces = pieces_of(message, stop, wish.chunk_tokens)
    if wish.error_event:
        kept = 0 if wish.error_event == "first" else len(pieces) // 2
        return [*pieces[: max(kept, 1)], _event(_error_shape(wish.status or 500, None), "")]
    return pieces[:-1] if wish.no_done else pieces


def pieces_of(message: dict[str, Any], stop: dict[str, Any], characters: int) -> list[Piece]:
    """The events of a message, with pings and ones of a kind that nobody knows, so many characters in each delta."""
    usage = message.get("usage")
    begun = {**message, "content": [], "stop_reason": None, "stop_details": None}
    if usage is not None:
        begun["usage"] = {**usage, "output_tokens": 1, "output_tokens_details": None}
    events: list[tuple[dict[str, Any], str]] = [({"type": "message_start", "message": begun}, "")]
    for index, block in enumerate(message["content"]):
        events += _block_events(index, block, characters)
    totals = {name: value for name, value in (usage or {}).items() if name != "service_tier"}
    events.append(({"type": "message_delta", "delta": stop, "usage": totals}, ""))
    events.append(({"type": "message_stop"}, ""))
    pieces = [_event(event, text) for event, text in events]
    pieces[-1] = Piece(pieces[-1].octets, usage=usage)
    return pieces


def _block_events(index: int, block: dict[str, Any], characters: int) -> Iterator[tuple[dict[str, Any], str]]:
    no_input: dict[str, Any] = {"input": {}}
    empty = {
        "text": {"text": ""},
        "tool_use": no_input,
        "server_tool_use": no_input,
        "thinking": {"thinking": "", "signature": ""},
    }
    place = {"index": index}
    opened = {**block, **empty.get(block["type"], {})}
    name = block["name"] if block["type"] == "tool_use" else ""
    yield {"type": "content_block_start", **place, "content_block": opened}, name
    yield {"type": "ping"}, ""
    for delta, text in _deltas(block, characters):
        yield {"type": "content_block_delta", **place, "delta": delta}, text
    yield {"type": "content_block_stop", **place}, ""
    yield {"type": "something_new", "usage": {"input_tokens": 1}, "error": "none"}, ""


def _deltas(block: dict[str, Any], characters: int) -> Iterator[tuple[dict[str, Any], str]]:
    match block["type"]:
        case "text":
            for bit in slices(block["text"], characters):
                yield {"type": "text_delta", "text": bit}, bit
        case "tool_use" | "server_tool_use":
            yield {"type": "input_json_delta", "partial_json": ""}, ""
            text = as_json(block["input"]).decode(errors="surrogatepass")
            for bit in slices(text if block["input"] else "", characters):
                yield {"type": "input_json_delta", "partial_json": bit}, bit
        case "thinking":
            for bit in slices(block["thinking"], characters):
                yield {"type": "thinking_delta", "thinking": bit}, bit
            yield {"type": "signature_delta", "signature": block["signature"]}, ""
        case _:
            return


def _event(event: dict[str, Any], text: str) -> Piece:
    data = as_json(event)
    return Piece(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data), tokens=bytes_of(text))


def _error(status: int, message: str | None, behaviour: Behaviour | None = None) -> Answer:
    if behaviour is not None and behaviour.error_body == "html":
        return Answer(status=status, content_type="text/html", pieces=[Piece(b"<html>no</html>")])
    if behaviour is not None and behaviour.error_body == "empty":
        return Answer(status=status, pieces=[Piece(b"")])
    return Answer(status=status, pieces=[Piece(as_json(_error_shape(status, message, behaviour)))])


def _error_shape(status: int, message: str | None, behaviour: Behaviour | None = None) -> dict[str, Any]:
    error: dict[str, Any] = {"type": _ERRORS.get(status, "api_error"), "message": message or f"Told to be {status}."}
    if behaviour is not None and behaviour.error_code is not None:
        error["details"] = {"error_code": behaviour.error_code}
    return {"type": "error", "error": error, "request_id": "req_fake"}
