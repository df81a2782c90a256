"""`POST /chat/completions`."""

from collections.abc import Iterator
from typing import Any

from tests.fakes.provider.answer import CREATED_AT, Answer, as_json, plain
from tests.fakes.provider.behaviour import Behaviour
from tests.fakes.provider.chunks import chunk_stream
from tests.fakes.provider.journal import Served
from tests.fakes.provider.reply import TOKENS_PER_MEDIUM, Bill, Call, Reply, bytes_of, compose, least, slices

_TOKENS_PER_MESSAGE = 4
_MEDIA = ("image_url", "input_audio", "file")


def fault(request: Any) -> str | None:
    """Why `request` is none; None if it is one."""
    messages = request.get("messages") if isinstance(request, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "A chat completion has a model and a list of messages."
    if not isinstance(request.get("model"), str) or not isinstance(request.get("n", 1), int | None):
        return "A chat completion has a model and a list of messages."
    return None


def behaviour(request: dict[str, Any]) -> Behaviour:
    """The one that the last user message asks for."""
    return Behaviour.from_texts([_text(message) for message in request["messages"] if message.get("role") == "user"])


def prompt_tokens(request: dict[str, Any]) -> int:
    """What the prompt costs."""
    messages = request["messages"]
    texts = sum(bytes_of(_text(message)) for message in messages)
    calls = sum(_call_tokens(message) for message in messages)
    shapes = sum(len(as_json(request[name])) for name in ("tools", "response_format") if request.get(name))
    media = sum(_media(message) for message in messages) * TOKENS_PER_MEDIUM
    return texts + calls + shapes + media + _TOKENS_PER_MESSAGE * len(messages)


def answer(served: Served, request: dict[str, Any]) -> Answer:
    """The completion, plain or streamed; completes the journal's counts."""
    wish = served.behaviour
    choices = request.get("n") or 1
    tokens_max = least(request.get("max_tokens"), request.get("max_completion_tokens"))
    reply = compose(wish, tokens_max, has_tool_results=_has_tool_results(request["messages"]))
    served.unseen_tokens = choices * reply.unseen_tokens
    bill = Bill(
        behaviour=wish,
        prompt=served.prompt_tokens,
        shown=choices * reply.tokens,
        unseen=served.unseen_tokens,
        thrown=choices * _predicted(request),
    )
    served.unseen_tokens += bill.thrown
    envelope = {
        "id": f"chatcmpl-fake-{served.id}",
        "object": "chat.completion.chunk" if request.get("stream") else "chat.completion",
        "created": CREATED_AT,
        "model": request["model"],
    }
    end = {"service_tier": "default", "system_fingerprint": "fp_fake"}
    if request.get("stream"):
        return chunk_stream(envelope | end, _deltas(reply, choices, served), bill, request)
    usage = bill.usage()
    shape = envelope | {"choices": [_choice(reply, index, served.id) for index in range(choices)]}
    return plain(shape | ({} if usage is None else {"usage": usage}) | end, tokens=bill.shown, usage=usage)


def _text(message: dict[str, Any]) -> str:
    """The message's content, the texts of its parts one after the other."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _media(message: dict[str, Any]) -> int:
    """How many of the message's parts are images, audio or files."""
    parts = message.get("content")
    return (
        sum(isinstance(part, dict) and part.get("type") in _MEDIA for part in parts) if isinstance(parts, list) else 0
    )


def _predicted(request: dict[str, Any]) -> int:
    """The tokens of a prediction, none of which comes true."""
    prediction = request.get("prediction")
    return bytes_of(_text(prediction)) if isinstance(prediction, dict) else 0


def _call_tokens(message: dict[str, Any]) -> int:
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    texts = [
        function.get(name) for function in functions if isinstance(function, dict) for name in ("name", "arguments")
    ]
    return sum(bytes_of(text) for text in texts if isinstance(text, str))


def _has_tool_results(messages: list[dict[str, Any]]) -> bool:
    """Whether the results of tools come after what the user said last."""
    for message in reversed(messages):
        if message.get("role") in ("user", "tool"):
            return message["role"] == "tool"
    return False


def _choice(reply: Reply, index: int, call_id: int) -> dict[str, Any]:
    """A choice of a plain answer."""
    has_text = reply.refusal is None and not reply.calls
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reply.text if has_text else None,
        "refusal": reply.refusal,
        "annotations": [],
    }
    if reply.calls:
        message["tool_calls"] = [
            {"id": _call_id(call_id, position), "type": "function", "function": _function(call)}
            for position, call in enumerate(reply.calls)
        ]
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}


def _deltas(reply: Reply, choices: int, served: Served) -> Iterator[tuple[dict[str, Any], int]]:
    """The choices of a stream's chunks with their tokens: the role, the reply bit by bit, the reason of the end."""
    wish = served.behaviour
    role = {} if wish.role == "none" else {"role": "assistant"}
    start = {"content": "" if reply.refusal is None and not reply.calls else None, "refusal": None}
    every = role if wish.role == "every" else {}
    for index in range(choices):
        yield _delta(index, role | start), 0
    for delta, tokens in _bits(reply, wish.chunk_tokens, served.id):
        for index in range(choices):
            yield _delta(index, every | delta), tokens
    for index in range(choices):
        yield _delta(index, every, reply.finish_reason), 0


def _bits(reply: Reply, chunk_tokens: int, call_id: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The reply bit by bit; a tool's name comes first, with no arguments."""
    for name, text in (("content", reply.text), ("refusal", reply.refusal or "")):
        for bit in slices(text, chunk_tokens):
            yield {name: bit}, bytes_of(bit)
    for position, call in enumerate(reply.calls):
        opened = {"index": position, "id": _call_id(call_id, position), "type": "function"}
        yield {"tool_calls": [opened | {"function": _function(Call(call.name, ""))}]}, bytes_of(call.name)
        for bit in slices(call.arguments, chunk_tokens):
            yield {"tool_calls": [{"index": position, "function": {"arguments": bit}}]}, bytes_of(bit)


def _function(call: Call) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _call_id(call_id: int, position: int) -> str:
    return f"call_fake_{call_id}_{position}"


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
