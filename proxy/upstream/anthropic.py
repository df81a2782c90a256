"""Anthropic, by its own Messages API: chat completions are translated on the way there, and answers on the way back.

What is translated how is in `proxy.wire.anthropic_requests` and `proxy.wire.anthropic_answers`; here is what is sent,
and what an answer's head and the end of its body mean.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

from proxy import __version__
from proxy.errors import BadRequest, UpstreamBroken
from proxy.upstream import Headers, ProviderCall, UpstreamResponse, content_type, is_event_stream
from proxy.upstream.client import HttpClient, Timeouts
from proxy.upstream.encodings import decoded
from proxy.upstream.openai import checked_base_url, checked_headers, checked_key
from proxy.wire.anthropic_answers import Chunks, NotAMessage, completion, failure
from proxy.wire.anthropic_requests import caches_for_an_hour, messages_request
from proxy.wire.requests import Endpoint
from proxy.wire.sse import EventSplitter, EventTooLong

BASE_URL: Final = "https://api.anthropic.com/v1"

API_VERSION: Final = b"2023-06-01"
"""The version whose requests take `temperature` and `top_p`; an operator's `anthropic-version` goes before it."""

_FAILED_STATUS: Final = 300

_KEPT: Final = frozenset({b"retry-after", b"x-should-retry"})
_LIMITS: Final = b"anthropic-ratelimit-"


class AnthropicProvider:
    """The Messages API under `base_url`, Anthropic's own by default.

    `headers` go with every call. Answers of more than `answer_bytes_max` bytes, and events of more than
    `event_bytes_max`, are broken ones.

    Raises `SettingsError` like `OpenAIProvider`.
    """

    def __init__(  # noqa: PLR0913 - what the operator says of a provider
        self,
        name: str,
        base_url: str | None,
        api_key: str | None,
        client: HttpClient,
        timeouts: Timeouts,
        *,
        headers: Sequence[tuple[str, str]] = (),
        answer_bytes_max: int,
        event_bytes_max: int,
    ) -> None:
        self.name = name
        address, query = checked_base_url(base_url or BASE_URL, provider=name)
        self._url = f"{address}/messages{query}"
        own: Headers = [] if not api_key else [(b"x-api-key", checked_key(api_key, provider=name))]
        own += checked_headers(headers, beside=own, provider=name)
        if not any(field == b"anthropic-version" for field, _ in own):
            own.append((b"anthropic-version", API_VERSION))
        if not any(field == b"user-agent" for field, _ in own):
            own.append((b"user-agent", b"tollgate/" + __version__.encode()))
        self._own_headers = own
        self._client = client
        self._timeouts = timeouts
        self._answer_bytes_max = answer_bytes_max
        self._event_bytes_max = event_bytes_max

    async def send(self, call: ProviderCall) -> UpstreamResponse:
        """Post what `call` asks for, translated; see `Provider.send`."""
        if call.path != Endpoint.CHAT:
            message = f"Models of this provider serve /v1/{Endpoint.CHAT} only."
            raise BadRequest(message, param="model", code="unsupported_endpoint")
        body = messages_request(call.body, call.output_tokens_max)
        response = await self._client.send(
            provider=self.name,
            method="POST",
            url=self._url,
            headers=self._headers(call),
            body=body,
            timeouts=self._timeouts,
        )
        return _Translated(
            response,
            self.name,
            is_asked=call.stream,
            answer_bytes_max=self._answer_bytes_max,
            event_bytes_max=self._event_bytes_max,
            caches_for_an_hour=caches_for_an_hour(body),
        )

    async def aclose(self) -> None:
        """Close the provider's connections."""
        await self._client.aclose()

    def _headers(self, call: ProviderCall) -> Headers:
        return [
            *self._own_headers,
            (b"content-type", b"application/json"),
            (b"accept", b"text/event-stream" if call.stream else b"application/json"),
            (b"accept-encoding", b"identity"),
        ]


class _Translated:
    """An `UpstreamResponse` whose body is in OpenAI's shapes; `is_asked` where a stream was asked for.

    A failure's status may turn out to be another one once its body has been read: until then it is what came.
    """

    def __init__(  # noqa: PLR0913 - the parts of one answer
        self,
        response: UpstreamResponse,
        provider: str,
        *,
        is_asked: bool,
        answer_bytes_max: int,
        event_bytes_max: int,
        caches_for_an_hour: bool,
    ) -> None:
        self._response = response
        self._provider = provider
        self._answer_bytes_max = answer_bytes_max
        self._event_bytes_max = event_bytes_max
        self._caches_for_an_hour = caches_for_an_hour
        self._is_stream = response.status < _FAILED_STATUS and is_event_stream(
            content_type(response.headers), is_asked=is_asked
        )
        self.status = response.status
        self.headers = _relayed(response.headers, is_stream=self._is_stream)

    def chunks(self) -> AsyncIterator[bytes]:
        return self._events() if self._is_stream else self._whole()

    async def aclose(self) -> None:
        await self._response.aclose()

    async def _whole(self) -> AsyncGenerator[bytes]:
        body = bytearray()
        async for chunk in self._pieces():
            body += chunk
            if len(body) > self._answer_bytes_max:
                raise self._broken("The provider's answer is over the limit.")
        if self.status >= _FAILED_STATUS:
            self.status, answer = failure(self.status, bytes(body))
            yield answer
            return
        try:
            yield completion(bytes(body), int(time.time()), caches_for_an_hour=self._caches_for_an_hour)
        except NotAMessage as exc:
            raise self._broken("The provider's answer is no message.") from exc

    async def _events(self) -> AsyncGenerator[bytes]:
        splitter = EventSplitter(self._event_bytes_max)
        chunks = Chunks(int(time.time()), caches_for_an_hour=self._caches_for_an_hour)
        try:
            async for piece in self._pieces():
                translated = b"".join(map(chunks.feed, splitter.feed(piece)))
                if translated:
                    yield translated
            rest = chunks.feed(splitter.rest)
        except EventTooLong as exc:
            raise self._broken("The provider sent an event over the limit.") from exc
        except NotAMessage as exc:
            raise self._broken("The provider sent an event that is none of a message's.") from exc
        if rest:
            yield rest
        if not chunks.is_over:
            raise self._broken("The provider's stream ended before its message did.")

    def _pieces(self) -> AsyncIterator[bytes]:
        return decoded(self._response.chunks(), self._response.headers, self._provider)

    def _broken(self, message: str) -> UpstreamBroken:
        return UpstreamBroken(message, provider=self._provider)


def _relayed(headers: Headers, *, is_stream: bool) -> Headers:
    """What the head says that is true of the translated answer as well; limits and ids are named as OpenAI's are."""
    kept: Headers = [(b"content-type", b"text/event-stream" if is_stream else b"application/json")]
    for name, value in headers:
        if name in _KEPT:
            kept.append((name, value))
        elif name == b"request-id":
            kept.append((b"x-request-id", value))
        elif name.startswith(_LIMITS):
            kept.append((b"x-ratelimit-" + name.removeprefix(_LIMITS), value))
    return kept
