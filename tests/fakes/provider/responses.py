"""`POST /responses`, without any state kept."""

from collections.abc import Iterator
from typing import Any

from tests.fakes.provider.answer import CREATED_AT, Answer, Piece, as_json, plain, stream, wished_error_object
from tests.fakes.provider.behaviour import Behaviour
from tests.fakes.provider.journal import Served
from tests.fakes.provider.reply import TOKENS_PER_MEDIUM, Bill, Reply, bytes_of, compose, least, slices

_TOKENS_PER_ITEM = 4
_MEDIA = ("input_image", "input_audio", "input_file")
_STATEFUL = ("previous_response_id", "conversation", "background")
FOUND_TOKENS = 300
_ECHOED = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


def fault(request: Any) -> str | None:
    """Why `request` is none that a provider without state can answer; None if it is one."""
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        return "A response has a model and an input."
    given = request.get("input")
    if not isinstance(given, str) and not (isinstance(given, list) and all(isinstance(item, dict) for item in given)):
        return "An input is a string or a list of items."
    if kept := [name for name in _STATEFUL if request.get(name)]:
        return f"No state is kept here: {', '.join(kept)}."
    if any(item.get("type") == "item_reference" for item in _items(request)):
        return "No state is kept here: item_reference."
    return None


def behaviour(request: dict[str, Any]) -> Behaviour:
    """The one that the last user message asks for."""
    return Behaviour.from_texts([_text(item, "content") for item in _items(request) if item.get("role") == "user"])


def prompt_tokens(request: dict[str, Any]) -> int:
    """What instructions, input and tools cost."""
    items = _items(request)
    texts = [_text(item, name) for item in items for name in ("content", "name", "arguments", "output")]
    shapes = sum(len(as_json(request[name])) for name in ("tools", "text") if request.get(name))
    media = sum(_media(item) for item in items) * TOKENS_PER_MEDIUM
    return sum(map(bytes_of, [_text(request, "instructions"), *texts])) + shapes + media + _TOKENS_PER_ITEM * len(items)


def answer(served: Served, request: dict[str, Any]) -> Answer:
    """The response, plain or streamed; completes the journal's counts."""
    wish = served.behaviour
    tokens_max = least(request.get("max_output_tokens"))
    reply = compose(wish, tokens_max, has_tool_results=_has_tool_results(_items(request)))
    served.unseen_tokens = reply.unseen_tokens
    uses = wish.hosted_tools if wish.ignore_max else wish.hosted_tools[: least(request.get("max_tool_calls"))]
    served.prompt_tokens += FOUND_TOKENS * len(uses)
    usage = _usage(Bill(behaviour=wish, prompt=served.prompt_tokens, shown=reply.tokens, unseen=reply.unseen_tokens))
    started = _started(served, request)
    ended = started | {
        "status": "incomplete" if reply.is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if reply.is_cut else None,
        "output": [*_hosted(uses, served), *_output(reply, served)],
        "service_tier": "default",
        "usage": usage,
    }
    if request.get("stream"):
        return stream(_pieces(started, ended, wish), wish)
    if wish.failed:
        return plain(_failed(started, wish))
    return plain(ended, tokens=reply.tokens, usage=usage)


def _items(request: dict[str, Any]) -> list[dict[str, Any]]:
    given = request["input"]
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _text(item: dict[str, Any], name: str) -> str:
    """The field's text, or the texts of its parts one after the other."""
    given = item.get(name)
    if isinstance(given, str):
        return given
    parts = given if isinstance(given, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _media(item: dict[str, Any]) -> int:
    """How many of the item's parts are images, audio or files."""
    parts = item.get("content")
    return (
        sum(isinstance(part, dict) and part.get("type") in _MEDIA for part in parts) if isinstance(parts, list) else 0
    )


def _has_tool_results(items: list[dict[str, Any]]) -> bool:
    """Whether the results of tools come after what the user said last."""
    for item in reversed(items):
        if item.get("role") == "user" or item.get("type") == "function_call_output":
            return item.get("role") != "user"
    return False


def _usage(bill: Bill) -> dict[str, Any] | None:
    """The usage in this endpoint's words."""
    usage = bill.usage()
    if usage is None or isinstance(bill.behaviour.usage, dict):
        return usage
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    reasoning = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage["total_tokens"],
    }


def _started(served: Served, request: dict[str, Any]) -> dict[str, Any]:
    """The response before there is anything in it."""
    echoed = {name: usual if request.get(name) is None else request[name] for name, usual in _ECHOED.items()}
    return {
        "id": f"resp_fake_{served.id}",
        "object": "response",
        "created_at": CREATED_AT,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": request["model"],
        "output": [],
        "previous_response_id": None,
        "service_tier": "auto",
        **echoed,
        "usage": None,
    }


def _failed(started: dict[str, Any], wish: Behaviour) -> dict[str, Any]:
    shape = wished_error_object(wish)
    return started | {
        "status": "failed",
        "error": {"code": shape["code"] or "server_error", "message": shape["message"]},
    }


def _hosted(uses: list[str], served: Served) -> list[dict[str, Any]]:
    """The items of tools that the provider runs; a code interpreter has one container, whatever it does."""
    items = []
    for position, use in enumerate(uses):
        item = {"id": f"ht_fake_{served.id}_{position}", "type": use, "status": "completed"}
        match use:
            case "open_page":
                item |= {"type": "web_search_call", "action": {"type": "open_page", "url": "https://example.test/"}}
            case "web_search_call":
                item["action"] = {"type": "search", "query": "fox", "queries": ["fox"]}
            case "code_interpreter_call":
                item |= {"container_id": "cntr_fake", "code": "1 + 1", "outputs": None}
        items.append(item)
    return items


def _output(reply: Reply, served: Served) -> list[dict[str, Any]]:
    """The reply's items: reasoning if there was any, then a message or calls of functions."""
    status = "incomplete" if reply.is_cut else "completed"
    items: list[dict[str, Any]] = []
    if served.behaviour.usage == "reasoning":
        items.append({"id": f"rs_fake_{served.id}", "type": "reasoning", "summary": []})
    if reply.calls:
        return items + [
            {
                "id": f"fc_fake_{served.id}_{position}",
                "type": "function_call",
                "status": status,
                "arguments": call.arguments,
                "call_id": f"call_fake_{served.id}_{position}",
                "name": call.name,
            }
            for position, call in enumerate(reply.calls)
        ]
    message = {"id": f"msg_fake_{served.id}", "type": "message", "status": status, "role": "assistant"}
    return [*items, message | {"content": [_part(reply)]}]


def _part(reply: Reply) -> dict[str, Any]:
    if reply.refusal is not None:
        return {"type": "refusal", "refusal": reply.refusal}
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": reply.text}


def _pieces(started: dict[str, Any], ended: dict[str, Any], wish: Behaviour) -> Iterator[Piece]:
    """The events as they are sent, numbered from 0."""
    events = list(_events(started, ended, wish.chunk_tokens))
    middle = len(events) // 2
    if wish.error_event:
        error = wished_error_object(wish)
        shape = {"code": error["code"] or error["type"], "message": error["message"], "param": error["param"]}
        events = [*events[: 0 if wish.error_event == "first" else middle], ("error", shape, 0)]
    elif wish.failed:
        events = [*events[:middle], ("response.failed", {"response": _failed(started, wish)}, 0)]
    elif wish.no_done:
        events.pop()
    for number, (name, shape, tokens) in enumerate(events):
        data = as_json({"type": name, "sequence_number": number} | shape)
        usage = shape["response"]["usage"] if "response" in shape else None
        yield Piece(b"event: %b\ndata: %b\n\n" % (name.encode(), data), tokens=tokens, usage=usage)


def _events(
    started: dict[str, Any], ended: dict[str, Any], chunk_tokens: int
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Names and fields of all events, with the tokens in them."""
    yield "response.created", {"response": started}, 0
    yield "response.in_progress", {"response": started}, 0
    for index, item in enumerate(ended["output"]):
        place = {"item_id": item["id"], "output_index": index}
        match item["type"]:
            case "message":
                opened, bits = (
                    item | {"status": "in_progress", "content": []},
                    _message_events(item, place, chunk_tokens),
                )
            case "function_call":
                opened, bits = (
                    item | {"status": "in_progress", "arguments": ""},
                    _call_events(item, place, chunk_tokens),
                )
            case _:
                opened, bits = item, iter(())
        yield "response.output_item.added", {"output_index": index, "item": opened}, bytes_of(item.get("name", ""))
        yield from bits
        yield "response.output_item.done", {"output_index": index, "item": item}, 0
    yield f"response.{ended['status']}", {"response": ended}, 0


def _message_events(
    item: dict[str, Any], place: dict[str, Any], chunk_tokens: int
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The events of a message's one part, a text or a refusal."""
    part = item["content"][0]
    kind, field = ("refusal", "refusal") if part["type"] == "refusal" else ("output_text", "text")
    logprobs = {} if kind == "refusal" else {"logprobs": []}
    place = place | {"content_index": 0}
    yield "response.content_part.added", place | {"part": part | {field: ""}}, 0
    for bit in slices(part[field], chunk_tokens):
        yield f"response.{kind}.delta", place | {"delta": bit} | logprobs, bytes_of(bit)
    yield f"response.{kind}.done", place | {field: part[field]} | logprobs, 0
    yield "response.content_part.done", place | {"part": part}, 0


def _call_events(
    item: dict[str, Any], place: dict[str, Any], chunk_tokens: int
) -> Iterator[tuple[str, dict[str, Any], int]]:
    for bit in slices(item["arguments"], chunk_tokens):
        yield "response.function_call_arguments.delta", place | {"delta": bit}, bytes_of(bit)
    yield "response.function_call_arguments.done", place | {"arguments": item["arguments"]}, 0
