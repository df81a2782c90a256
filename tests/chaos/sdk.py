"""Customers who call by OpenAI's own client for Python, its retries included: each attempt is put down as a call."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Self

import httpx2
import openai

from tests.chaos.calls import Conduct, Intent, Seen, body, rest_after_piece
from tests.chaos.journal import Journal, Said

_SDK_S_MAX = 40.0
"""Between two pieces of an answer. More than anything here may take: who waits for so long was left hanging."""

_RETRIES = 2
"""The SDK's own default."""


class _Noted(httpx2.AsyncByteStream):
    """The body of an answer, noted as the SDK reads it."""

    def __init__(self, stream: httpx2.AsyncByteStream, attempt: "_Attempt") -> None:
        self._stream = stream
        self._attempt = attempt

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = self._attempt.seen
        try:
            async for chunk in self._stream:
                seen.body += chunk
                yield chunk
            seen.is_ended = True
        except httpx2.HTTPError:
            self._attempt.is_broken = True
            raise

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._attempt.close()


class _Attempt:
    """One request of the SDK's; noted once, when it is over."""

    def __init__(self, customer: "Customer", token: str) -> None:
        self.seen = Seen()
        self.is_broken = False
        self._customer = customer
        self._token = token
        self._is_closed = False

    def close(self) -> None:
        """Put it down. Whoever closes before the end has left, unless there is nothing to wait for."""
        if self._is_closed:
            return
        self._is_closed = True
        seen = self.seen
        if not seen.is_ended and not self.is_broken:
            seen.is_ended = seen.has_end_marker
            seen.has_left = not seen.is_ended and not seen.has_error
        self._customer.note(self._token, seen)


class _Transport(httpx2.AsyncBaseTransport):
    """Gives each attempt a token of its own, where the provider and the ledger will find it."""

    def __init__(self, customer: "Customer") -> None:
        self._customer = customer
        self._inner = httpx2.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        token = secrets.token_hex(16)
        attempt = _Attempt(self._customer, token)
        headers = httpx2.Headers(request.headers)
        headers["x-client-request-id"] = token
        content = request.content.replace(self._customer.placeholder.encode(), token.encode())
        sent = httpx2.Request(
            request.method, request.url, headers=headers, content=content, extensions=request.extensions
        )
        try:
            answer = await self._inner.handle_async_request(sent)
        except httpx2.HTTPError:
            attempt.is_broken = True
            attempt.close()
            raise
        except BaseException:
            attempt.close()
            raise
        attempt.seen.status, attempt.seen.headers = answer.status_code, answer.headers
        return httpx2.Response(
            answer.status_code,
            headers=answer.headers,
            stream=_Noted(answer.stream, attempt),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


class Customer:
    """One who makes a call at a time, through `base_url`."""

    def __init__(self, base_url: str, journal: Journal) -> None:
        self.placeholder = secrets.token_hex(16)
        """The token in a body until its attempt has one."""
        self._base_url = base_url
        self._journal = journal
        self._http = httpx2.AsyncClient(transport=_Transport(self), timeout=_SDK_S_MAX, trust_env=False)
        self._attempts = 0
        self._intent: Intent | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    def note(self, token: str, seen: Seen) -> None:
        """An attempt of the call under way is over."""
        self._attempts += 1
        intent = self._intent
        self._journal.append(seen.call(token, intent.wallet.id, self._base_url, is_stream=intent.is_stream))

    async def call(self, intent: Intent) -> Said:
        """Make one call, and put it down as its caller sees it; whatever the SDK raises is part of that."""
        self._intent, self._attempts = intent, 0
        error: Exception | None = None
        leaves_after = intent.leaves_after if intent.conduct is Conduct.LEAVES_EARLY else None
        with suppress(TimeoutError):
            async with asyncio.timeout(leaves_after):
                try:
                    await self._exchange(intent)
                except Exception as exc:  # noqa: BLE001 - which one it is, is the question
                    error = exc
        said = Said(
            ended_at=time.time(),
            attempts=self._attempts,
            raised=None if error is None else type(error).__name__,
            status=getattr(error, "status_code", None),
            code=getattr(error, "code", None),
        )
        self._journal.append(said)
        return said

    async def _exchange(self, intent: Intent) -> None:
        client = openai.AsyncOpenAI(
            api_key=intent.wallet.key, base_url=self._base_url, http_client=self._http, max_retries=_RETRIES
        )
        answer = await client.chat.completions.create(**body(intent, self.placeholder))
        if not intent.is_stream:
            return
        chunks = 0
        async with answer:
            async for _ in answer:
                chunks += 1
                if intent.conduct is Conduct.LEAVES_MIDWAY and chunks >= intent.leaves_after:
                    return
                await rest_after_piece(intent)
