"""The demo provider: answers chat completions in this process, so that a fresh machine needs no provider's key.

It answers as OpenAI does (https://platform.openai.com/docs/api-reference/chat), with a text that depends on nothing
but the request. Its tokens are pieces of text, each a word with the space before it or one other sign; a piece has
at least one byte, so the bytes of a prompt bound its tokens as they do for real models.
"""

import asyncio
import hashlib
import itertools
import re
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec

from proxy.errors import UpstreamBroken
from proxy.upstream import Headers, ProviderCall, UpstreamResponse

DEMO_MODEL = "demo-chat"

DEMO_INPUT_PRICE = "0.50"
"""Dollars per million tokens, like the output's: what a small model cost when this was written."""

DEMO_OUTPUT_PRICE = "1.50"

DEMO_CONTEXT_TOKENS = 8192
DEMO_OUTPUT_TOKENS_MAX = 1024

_CHOICES_MAX = 128
"""OpenAI's own limit of `n`."""

_EXCERPT_CHARS = 80

_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
"""Every text is the concatenation of its matches."""

_FAULT = re.compile(r" - at `\$\.(\w+)")
"""Where msgspec's messages name the field at fault."""

_TEXT = (
    "Hello, this is Tollgate's demo provider: it runs inside the proxy, and no language model is behind it. {echo} "
    "For real answers, add a provider to config.toml, with its base_url and the name of the environment variable "
    "that holds its key."
)


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[_Part] | None = None

    def text(self) -> str:
        """What can be read in it; images and other parts are passed over."""
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content if part.text)
        return self.content or ""


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class _Request(msgspec.Struct, frozen=True):
    """The fields that are served; others are passed over, as a provider does with what it does not know."""

    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None


class _Refusal(Exception):
    """The request is not served, and this is what OpenAI would say."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class _Answer(msgspec.Struct, frozen=True):
    """What will be answered, before it is put into either shape."""

    id: str
    created: int
    tokens: list[str]
    finish_reason: str
    choices: int
    prompt_tokens: int

    def usage(self) -> dict[str, Any]:
        completion_tokens = len(self.tokens) * self.choices
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


class DemoProvider:
    """Serves `DEMO_MODEL`, a token of a stream every `token_interval_s` seconds.

    The default can be read along. Answers that are not streamed come at once.
    """

    def __init__(self, name: str, *, token_interval_s: float = 0.02) -> None:
        self.name = name
        self._token_interval_s = token_interval_s

    async def send(self, call: ProviderCall) -> UpstreamResponse:
        """Answer `call`; what cannot be served is answered with 400 or 404 in OpenAI's shape."""
        try:
            request = _served_request(call)
            answer = _answer(request, call.body)
        except _Refusal as refusal:
            return self._whole(refusal.status, _refusal_object(refusal))
        if not request.stream:
            return self._whole(200, _completion_object(answer))
        includes_usage = bool(request.stream_options and request.stream_options.include_usage)
        return _DemoResponse(
            200,
            b"text/event-stream; charset=utf-8",
            _events(answer, includes_usage=includes_usage),
            provider=self.name,
            interval_s=self._token_interval_s,
        )

    async def aclose(self) -> None:
        """Nothing: there is nothing to let go of."""

    def _whole(self, status: int, content: dict[str, Any]) -> UpstreamResponse:
        body = msgspec.json.encode(content)
        return _DemoResponse(status, b"application/json", iter([body]), provider=self.name, interval_s=0)


class _DemoResponse:
    """An `UpstreamResponse` that makes its pieces when they are asked for, `interval_s` apart."""

    def __init__(
        self, status: int, content_type: bytes, pieces: Iterator[bytes], *, provider: str, interval_s: float
    ) -> None:
        self.status = status
        self.headers: Headers = [(b"content-type", content_type)]
        self._pieces = pieces
        self._provider = provider
        self._interval_s = interval_s
        self._is_spent = False

    async def chunks(self) -> AsyncGenerator[bytes]:
        is_first = True
        self._check_unspent()
        for piece in self._pieces:
            if not is_first:
                await asyncio.sleep(self._interval_s)
                self._check_unspent()
            is_first = False
            yield piece
        self._is_spent = True

    async def aclose(self) -> None:
        self._is_spent = True

    def _check_unspent(self) -> None:
        """As over HTTP, a body that was closed must not look as if it had ended."""
        if self._is_spent:
            raise UpstreamBroken("The provider's answer was already read or closed.", provider=self._provider)


def _served_request(call: ProviderCall) -> _Request:
    """The request in the call's body, or the `_Refusal` of what a real provider would not serve either."""
    if call.path != "chat/completions":
        raise _Refusal(404, f"Unknown request URL: POST /v1/{call.path}. The demo provider has chat completions only.")
    try:
        request = msgspec.json.decode(call.body, type=_Request)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        fault = _FAULT.search(str(exc))
        raise _Refusal(400, f"Invalid request: {exc}.", param=fault[1] if fault else None) from exc
    if request.model != DEMO_MODEL:
        message = f"The model {request.model!r} does not exist. The demo provider has {DEMO_MODEL!r} only."
        raise _Refusal(404, message, param="model", code="model_not_found")
    if not request.messages:
        raise _Refusal(400, "There must be at least one message.", param="messages")
    if not 1 <= _choices(request) <= _CHOICES_MAX:
        raise _Refusal(400, f"n must be from 1 to {_CHOICES_MAX}.", param="n")
    for param, value in (("max_tokens", request.max_tokens), ("max_completion_tokens", request.max_completion_tokens)):
        if value is not None and value < 1:
            raise _Refusal(400, f"{param} must be at least 1.", param=param)
    return request


def _answer(request: _Request, body: bytes) -> _Answer:
    prompt_tokens = _prompt_tokens(request)
    if prompt_tokens >= DEMO_CONTEXT_TOKENS:
        message = f"This model's context is {DEMO_CONTEXT_TOKENS} tokens, and the messages leave none to answer with."
        raise _Refusal(400, message, param="messages", code="context_length_exceeded")
    maxima = (
        request.max_tokens,
        request.max_completion_tokens,
        DEMO_OUTPUT_TOKENS_MAX,
        DEMO_CONTEXT_TOKENS - prompt_tokens,
    )
    tokens_max = min(maximum for maximum in maxima if maximum is not None)
    tokens = _TOKEN.findall(_stopped(_text(request), request.stop))
    return _Answer(
        id=f"chatcmpl-demo-{hashlib.sha256(body).hexdigest()[:24]}",
        created=int(time.time()),
        tokens=tokens[:tokens_max],
        finish_reason="length" if len(tokens) > tokens_max else "stop",
        choices=_choices(request),
        prompt_tokens=prompt_tokens,
    )


def _choices(request: _Request) -> int:
    return 1 if request.n is None else request.n


def _prompt_tokens(request: _Request) -> int:
    """The tokens of all messages; not counted past the context, so that no prompt can hold up the event loop."""
    tokens = itertools.chain.from_iterable(_TOKEN.finditer(message.text()) for message in request.messages)
    return sum(1 for _ in itertools.islice(tokens, DEMO_CONTEXT_TOKENS))


def _text(request: _Request) -> str:
    said = [message.text() for message in request.messages if message.role == "user"]
    words = " ".join(said[-1].split()) if said else ""
    if not words:
        return _TEXT.format(echo="You said nothing that it could repeat.")
    excerpt = words if len(words) <= _EXCERPT_CHARS else words[: _EXCERPT_CHARS - 1].rstrip() + "…"
    return _TEXT.format(echo=f"You said: “{excerpt}”.")


def _stopped(text: str, stop: str | list[str] | None) -> str:
    """`text` up to the first of the stop sequences."""
    sequences = [stop] if isinstance(stop, str) else stop or []
    ends = [text.find(sequence) for sequence in sequences if sequence]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def _refusal_object(refusal: _Refusal) -> dict[str, Any]:
    return {
        "error": {
            "message": str(refusal),
            "type": "invalid_request_error",
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def _completion_object(answer: _Answer) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(answer.tokens),
        "refusal": None,
        "annotations": [],
    }
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": answer.created,
        "model": DEMO_MODEL,
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
            for index in range(answer.choices)
        ],
        "usage": answer.usage(),
    }


def _events(answer: _Answer, *, includes_usage: bool) -> Iterator[bytes]:
    """The stream's events: the role, a token at a time of each choice, the reason of the end, usage, `[DONE]`."""
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": "", "refusal": None}, None)]
    deltas += [({"content": token}, None) for token in answer.tokens]
    deltas.append(({}, answer.finish_reason))
    unused = {"usage": None} if includes_usage else {}
    for (delta, finish_reason), index in itertools.product(deltas, range(answer.choices)):
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        yield _event(answer, [choice], unused)
    if includes_usage:
        yield _event(answer, [], {"usage": answer.usage()})
    yield b"data: [DONE]\n\n"


def _event(answer: _Answer, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
    chunk = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": DEMO_MODEL,
        "choices": choices,
        **more,
    }
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
