"""A paid call on its way: what came in, who answers, and how far it has got."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import msgspec

from proxy import relay, tokens
from proxy.deadline import Deadline
from proxy.errors import UpstreamTimeout
from proxy.estimate import Estimate
from proxy.identity.keys import Caller
from proxy.ledger.decide import Receipt, Settled
from proxy.routing import Candidate, Offer, Offers
from proxy.upstream import Headers
from proxy.wire.requests import Endpoint, PaidRequest

now = time.monotonic
"""The clock of event loops; asking for the running one takes several times as long."""

CHUNKED = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS})
"""The endpoints whose streams report usage only when asked, in `stream_options`."""


class Call(msgspec.Struct, frozen=True):
    """One paid call as it came in.

    Only `provider` may serve it, where one is named. `on_settled` gets the charge as soon as it is durable, before the
    end of the answer; never where nothing is charged.
    """

    endpoint: Endpoint
    request_id: str
    client_request_id: str | None
    caller: Caller
    headers: Headers
    body: bytes
    provider: str | None = None
    on_settled: Callable[[Receipt, Settled], None] | None = None


class Answer(relay.Answer, Protocol):
    """An answer whose client may leave before its end."""

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the client leaves; at once if it has left already."""
        ...


class OpenCall(msgspec.Struct):
    """A call with its reservation, from the reserve to its settle or release; `offer` is who serves it just now.

    `reserved` is in nano-credits; `started`, `deadline` and `first_byte` are instants of `now`, in seconds.
    """

    call: Call
    request: PaidRequest
    estimated: Estimate
    offered: Offers
    reserved: int
    started: float
    deadline: float
    offer: Offer
    candidate: Candidate
    """That of `offer`."""
    first_byte: float | None = None
    is_closed: bool = False
    is_client_gone: bool = False
    is_ended: bool = False
    """Whether the server stops and could not wait for it any longer."""
    is_stopped: bool = False
    """Whether its provider was stopped because the client had left."""
    is_perhaps_billed: bool = False
    """Whether a provider has had the call and did not say that it would not bill it."""
    provider_time: Deadline | None = None
    """The limit on what is under way at the provider."""
    provider_s: float = 0.0
    """How long the call has been at its providers, the passing on of what they sent included."""

    def begin(self) -> None:
        """The first of the answer has come."""
        self.first_byte = now()

    def leave(self) -> None:
        """The client has left: stop the provider if what it did so far can be counted, else let it come to its end."""
        self.is_client_gone = True
        if self.provider_time is not None and self.is_countable:
            self.is_stopped = True
            self.provider_time.end_now()

    def end(self) -> None:
        """The server stops: the time for providers is over."""
        self.is_ended = True
        self.deadline = 0.0
        if self.provider_time is not None:
            self.provider_time.end_now()

    @property
    def is_countable(self) -> bool:
        """Whether what was relayed until now is all that can be billed, and can be counted."""
        candidate = self.candidate
        return (
            self.first_byte is not None
            and self.call.endpoint in CHUNKED
            and tokens.is_known(candidate.tokenizer)
            and not candidate.is_reasoning
            and not self.request.is_unsized
            and not self.request.wants_audio
            and not self.request.prediction_tokens
        )


class AtProvider(Deadline):
    """The time of one call, for what its provider has to do in it. Raises `UpstreamTimeout` beyond it."""

    __slots__ = ("_entered", "_opened")

    def __init__(self, opened: OpenCall) -> None:
        super().__init__(opened.deadline)
        self._opened = opened

    def __enter__(self) -> Self:
        self._opened.provider_time = self
        self._entered = now()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.provider_time = None
        self._opened.provider_s += now() - self._entered
        try:
            super().__exit__(kind, exc, trace)
        except TimeoutError as timeout:
            is_ended = self._opened.is_ended
            message = "The server is stopping." if is_ended else "The call took longer than it may."
            raise UpstreamTimeout(message, provider=self._opened.candidate.provider) from timeout


def milliseconds(seconds: float) -> int:
    """`seconds` in whole milliseconds."""
    return round(seconds * 1000)
