"""Providers: what answers a call, over HTTP or in this process.

`exchange` sees the seam below and nothing else; a new kind of provider is a new `Provider`. Nothing in here reads,
changes or keeps the bytes of an answer, unless it comes from somebody with another API and has to be translated.
"""

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

Headers = list[tuple[bytes, bytes]]
"""Header fields in the order they came, names in lower case, as ASGI has them."""


def content_type(headers: Headers) -> bytes:
    """The type of a body, in lower case; nothing where it has none."""
    for name, value in headers:
        if name == b"content-type":
            return value.strip().lower()
    return b""


def is_event_stream(kind: bytes, *, is_asked: bool) -> bool:
    """Whether an answer of that type is a stream of events: it says so, or that was asked for and it denies nothing."""
    return kind.startswith(b"text/event-stream") or (is_asked and b"json" not in kind)


class ProviderCall(msgspec.Struct, frozen=True):
    """One request to one provider.

    `path` is relative to the provider's base, such as `chat/completions`. `model` is the request model: its name
    at the provider, as `body` has it. `headers` are the client's own: what crosses is the provider's choice.
    `output_tokens_max` is the model's own maximum, for providers that need one where `body` names none.
    """

    path: str
    model: str
    body: bytes
    headers: Headers
    stream: bool
    output_tokens_max: int | None = None


class UpstreamResponse(Protocol):
    """An answer whose head has arrived and whose body has not been read.

    Whoever got one must call `aclose()`, in every ending: until then, or until the body was read to its end,
    it holds one of the client's connections.
    """

    status: int
    headers: Headers

    def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they come, in pieces of any size, none empty and none decoded. To be read once.

        Raises `UpstreamBroken` when the body ends before its end, or is read again or after `aclose()`, and
        `UpstreamTimeout` when the provider falls silent. What was yielded before is real.
        """
        ...

    async def aclose(self) -> None:
        """Give the connection back or, if the body has not ended, break it: the provider sees that we stopped.

        May be called any number of times. The closing is finished even if the task that awaits it is cancelled.
        """
        ...


class Provider(Protocol):
    """Something that answers OpenAI-shaped calls."""

    name: str

    async def send(self, call: ProviderCall) -> UpstreamResponse:
        """Send `call` once and return as soon as the head of the answer is there, whatever its status.

        Raises `UpstreamUnreachable` when nothing was sent, `UpstreamBroken` or `UpstreamTimeout` when the
        provider may have read the call, and `BadRequest` for a call that it has no words for: nothing was sent.
        """
        ...

    async def aclose(self) -> None:
        """Let go of all that this provider holds, its connections included."""
        ...
