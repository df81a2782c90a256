"""One call of a customer: what is wanted of the provider, how the customer behaves, and what came of it."""

import asyncio
import json
import random
import secrets
import time
from enum import Enum
from typing import Any

import httpx2
import msgspec

from tests.chaos.journal import Call, End
from tests.serving import MODEL

PATIENCE_S = 20.0
"""After this a customer gives a call up. Longer than any pause or outage of the schedule."""

_END_MARKER = b"data: [DONE]"


class Wallet(msgspec.Struct, frozen=True):
    """Who pays, and with which key. A small wallet runs dry, and is topped up now and then."""

    id: str
    email: str
    key: str
    is_small: bool


class Conduct(Enum):
    """How a client behaves."""

    PATIENT = "waits for the end"
    LEAVES_EARLY = "leaves before the first byte"
    LEAVES_MIDWAY = "leaves in the middle of the stream"
    READS_SLOWLY = "takes its time for each piece"


class Intent(msgspec.Struct, frozen=True):
    """One call to be made: the provider's part is in `wish`."""

    wallet: Wallet
    conduct: Conduct
    is_stream: bool
    wants_usage: bool
    maximum: int | None
    leaves_after: float
    """Seconds when it leaves early; chunks when it leaves midway."""
    wish: dict[str, Any]


_MISBEHAVIOURS: tuple[dict[str, Any], ...] = (
    {"usage": "none"},
    {"usage": "none", "half": True},
    {"half": True},
    {"half": True, "cut_event": True},
    {"reset": "mid"},
    {"reset": "after_read"},
    {"stall": "mid"},
    {"stall": "before_headers"},
    {"no_done": True},
    {"status": 500},
    {"status": 429, "retry_after": 1},
    {"ignore_max": True, "tokens": 400},
    {"usage": "implausible"},
    {"usage": "hidden"},
    {"usage": {"prompt_tokens": 10**9, "completion_tokens": 10**9, "total_tokens": 2 * 10**9}},
    {"usage": {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}},
    {"usage": {"prompt_tokens": "many", "completion_tokens": True, "total_tokens": None}},
)

_SLOW_S = 0.1
"""How long who reads slowly rests after each piece."""


def intend(dice: random.Random, wallets: list[Wallet]) -> Intent:
    """The next call of a customer: mostly harmless."""
    is_stream = dice.random() < 0.6
    wish: dict[str, Any] = {"tokens": dice.randint(1, 80), "delay_s": dice.choice((0, 0, 0.05))}
    if is_stream:
        wish["pace_s"] = dice.choice((0, 0.01, 0.03))
    if dice.random() < 0.25:
        wish |= dice.choice(_MISBEHAVIOURS)
    [conduct] = dice.choices(list(Conduct), (80, 5, 10, 5))
    if conduct in {Conduct.LEAVES_MIDWAY, Conduct.READS_SLOWLY} and not is_stream:
        conduct = Conduct.PATIENT
    return Intent(
        wallet=dice.choice(wallets),
        conduct=conduct,
        is_stream=is_stream,
        wants_usage=dice.random() < 0.6,
        maximum=dice.choice((None, 30, 100, 300)),
        leaves_after=dice.uniform(0, 0.05) if conduct is Conduct.LEAVES_EARLY else dice.randint(1, 8),
        wish=wish,
    )


class Seen:
    """What has come of an answer."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.status: int | None = None
        self.headers: Any = {}
        self.body = b""
        self.is_ended = False
        self.has_left = False

    @property
    def has_end_marker(self) -> bool:
        """Whether the end of a stream has been seen."""
        return _END_MARKER in self.body

    @property
    def has_error(self) -> bool:
        """Whether an error was said in a stream."""
        return any("error" in event for event in self._events())

    def call(self, token: str, wallet_id: str, base_url: str, *, is_stream: bool) -> Call:
        """The call as it is put down, now that it has ended."""
        return Call(
            token=token,
            wallet_id=wallet_id,
            base_url=base_url,
            is_stream=is_stream,
            end=self._end(),
            started_at=self.started_at,
            ended_at=time.time(),
            status=self.status,
            code=self._code(),
            request_id=self.headers.get("x-request-id"),
            has_end_marker=self.has_end_marker,
            credits_charged=self.headers.get("x-credits-charged"),
            usage_cost=self._usage_cost(),
        )

    def _end(self) -> End:
        if self.has_left:
            return End.HUNG_UP
        if self.status is None:
            return End.UNANSWERED
        if not self.is_ended or self.has_error:
            return End.CUT_OFF
        return End.COMPLETE if self.status == 200 else End.REFUSED

    def _code(self) -> str | None:
        """The code of an error in the body, or in a stream."""
        whole = _decoded(self.body)
        errors = (event.get("error") for event in ([] if whole is None else [whole]) + self._events())
        return next((error.get("code") for error in errors if isinstance(error, dict)), None)

    def _events(self) -> list[dict[str, Any]]:
        """The JSON of a stream's events; none of a plain answer's."""
        lines = (line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line.startswith(b"data: {"))
        return [event for line in lines if (event := _decoded(line)) is not None]

    def _usage_cost(self) -> str | None:
        costs = (event["usage"].get("cost") for event in self._events() if isinstance(event.get("usage"), dict))
        return next((cost for cost in costs if cost is not None), None)


def _decoded(line: bytes) -> dict[str, Any] | None:
    """The JSON object in `line`; None when it was cut, or is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


async def place(http: httpx2.AsyncClient, base_url: str, intent: Intent) -> Call:
    """Make one call and say what became of it; it never raises for what a proxy does."""
    token = secrets.token_hex(16)
    seen = Seen()
    try:
        async with asyncio.timeout(intent.leaves_after if intent.conduct is Conduct.LEAVES_EARLY else PATIENCE_S):
            await _exchange(http, base_url, intent, token, seen)
    except TimeoutError:
        seen.has_left = True
    except httpx2.HTTPError:
        seen.is_ended = False
    return seen.call(token, intent.wallet.id, base_url, is_stream=intent.is_stream)


async def _exchange(http: httpx2.AsyncClient, base_url: str, intent: Intent, token: str, seen: Seen) -> None:
    headers = {"Authorization": f"Bearer {intent.wallet.key}", "x-client-request-id": token}
    request = http.stream("POST", f"{base_url}/chat/completions", json=body(intent, token), headers=headers)
    async with request as answer:
        seen.status, seen.headers = answer.status_code, answer.headers
        chunks = 0
        async for chunk in answer.aiter_raw():
            seen.body += chunk
            chunks += 1
            if intent.conduct is Conduct.LEAVES_MIDWAY and chunks >= intent.leaves_after:
                seen.has_left = True
                return
            await rest_after_piece(intent)
        seen.is_ended = True


async def rest_after_piece(intent: Intent) -> None:
    """What who reads slowly does before the next piece, and nobody else."""
    if intent.conduct is Conduct.READS_SLOWLY:
        await asyncio.sleep(_SLOW_S)


def body(intent: Intent, token: str) -> dict[str, Any]:
    """What is sent for the call that has that token."""
    sent: dict[str, Any] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": f"token {token}"},
            {"role": "user", "content": f"!fake {json.dumps(intent.wish)}"},
        ],
    }
    if intent.is_stream:
        sent["stream"] = True
        if intent.wants_usage:
            sent["stream_options"] = {"include_usage": True}
    if intent.maximum is not None:
        sent["max_tokens"] = intent.maximum
    return sent
