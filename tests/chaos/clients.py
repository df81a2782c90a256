"""The customers: a process of its own, whose calls and top-ups go on whatever happens to the proxies.

`python -m tests.chaos.clients PLAN` works on a `Plan` until SIGTERM, then finishes what is under way.
"""

import asyncio
import json
import random
import secrets
import signal
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from tests.chaos.journal import Call, End, Grant, Journal
from tests.serving import MODEL

PATIENCE_S = 20.0
"""After this a customer gives a call up. Longer than any pause or outage of the schedule."""

GRANT_NANOS = 30_000_000
_GRANT_S_MAX = 60.0
_BREATH_S = 0.25
"""Before another try where there was no answer or no credit, and between top-ups: customers are not a busy loop."""

_END_MARKER = b"data: [DONE]"


class Wallet(msgspec.Struct, frozen=True):
    """Who pays, and with which key. A small wallet runs dry, and is topped up now and then."""

    id: str
    email: str
    key: str
    is_small: bool


class Plan(msgspec.Struct, frozen=True):
    """What the customers are to do; each sticks to one of `base_urls`."""

    seed: int
    customers: int
    base_urls: list[str]
    wallets: list[Wallet]
    journal: str


class Conduct(Enum):
    """How a client behaves."""

    PATIENT = "waits for the end"
    LEAVES_EARLY = "leaves before the first byte"
    LEAVES_MIDWAY = "leaves in the middle of the stream"


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
)


def intend(dice: random.Random, wallets: list[Wallet]) -> Intent:
    """The next call of a customer: mostly harmless."""
    is_stream = dice.random() < 0.6
    wish: dict[str, Any] = {"tokens": dice.randint(1, 80), "delay_s": dice.choice((0, 0, 0.05))}
    if is_stream:
        wish["pace_s"] = dice.choice((0, 0.01, 0.03))
    if dice.random() < 0.25:
        wish |= dice.choice(_MISBEHAVIOURS)
    [conduct] = dice.choices(list(Conduct), (85, 5, 10))
    if conduct is Conduct.LEAVES_MIDWAY and not is_stream:
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


class _Seen:
    """What has come of an answer."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: Any = {}
        self.body = b""
        self.is_ended = False
        self.has_left = False

    def end(self) -> End:
        if self.has_left:
            return End.HUNG_UP
        if self.status is None:
            return End.UNANSWERED
        if not self.is_ended or any("error" in event for event in self.events()):
            return End.CUT_OFF
        return End.COMPLETE if self.status == 200 else End.REFUSED

    def events(self) -> list[dict[str, Any]]:
        """The JSON of a stream's events; none of a plain answer's."""
        lines = (line.removeprefix(b"data: ") for line in self.body.split(b"\n\n") if line.startswith(b"data: {"))
        return [event for line in lines if (event := _decoded(line)) is not None]

    def usage_cost(self) -> str | None:
        costs = (event["usage"].get("cost") for event in self.events() if isinstance(event.get("usage"), dict))
        return next((cost for cost in costs if cost is not None), None)


def _decoded(line: bytes) -> dict[str, Any] | None:
    """The event in `line`; None when it was cut."""
    try:
        return json.loads(line)
    except ValueError:
        return None


async def place(http: httpx2.AsyncClient, base_url: str, intent: Intent) -> Call:
    """Make one call and say what became of it; it never raises for what a proxy does."""
    token = secrets.token_hex(16)
    seen = _Seen()
    try:
        async with asyncio.timeout(intent.leaves_after if intent.conduct is Conduct.LEAVES_EARLY else PATIENCE_S):
            await _exchange(http, base_url, intent, token, seen)
    except TimeoutError:
        seen.has_left = True
    except httpx2.HTTPError:
        seen.is_ended = False
    return Call(
        token=token,
        wallet_id=intent.wallet.id,
        base_url=base_url,
        is_stream=intent.is_stream,
        end=seen.end(),
        ended_at=time.time(),
        status=seen.status,
        request_id=seen.headers.get("x-request-id"),
        has_end_marker=_END_MARKER in seen.body,
        credits_charged=seen.headers.get("x-credits-charged"),
        usage_cost=seen.usage_cost(),
    )


async def _exchange(http: httpx2.AsyncClient, base_url: str, intent: Intent, token: str, seen: _Seen) -> None:
    headers = {"Authorization": f"Bearer {intent.wallet.key}", "x-client-request-id": token}
    request = http.stream("POST", f"{base_url}/chat/completions", json=_body(intent, token), headers=headers)
    async with request as answer:
        seen.status, seen.headers = answer.status_code, answer.headers
        chunks = 0
        async for chunk in answer.aiter_raw():
            seen.body += chunk
            chunks += 1
            if intent.conduct is Conduct.LEAVES_MIDWAY and chunks >= intent.leaves_after:
                seen.has_left = True
                return
        seen.is_ended = True


def _body(intent: Intent, token: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": f"token {token}"},
            {"role": "user", "content": f"!fake {json.dumps(intent.wish)}"},
        ],
    }
    if intent.is_stream:
        body["stream"] = True
        if intent.wants_usage:
            body["stream_options"] = {"include_usage": True}
    if intent.maximum is not None:
        body["max_tokens"] = intent.maximum
    return body


async def _buy(plan: Plan, number: int, journal: Journal, stopped: asyncio.Event) -> None:
    """One customer: call after call, each put down when it is over."""
    dice = random.Random(f"{plan.seed}/{number}")  # noqa: S311 - to be repeated, not to be secret
    base_url = plan.base_urls[number % len(plan.base_urls)]
    async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
        while not stopped.is_set():
            call = await place(http, base_url, intend(dice, plan.wallets))
            journal.append(call)
            if call.end is End.UNANSWERED or call.status in {402, 503}:
                await _rest(stopped)


async def _tell(plan: Plan, journal: Journal, stopped: asyncio.Event) -> None:
    """The teller: tops small wallets up, by the command line. Much is sent again, or twice at once."""
    dice = random.Random(f"{plan.seed}/teller")  # noqa: S311 - likewise
    small = [wallet for wallet in plan.wallets if wallet.is_small]
    sent: list[tuple[Wallet, str]] = []
    while not stopped.is_set():
        if sent and dice.random() < 0.3:
            wallet, key = dice.choice(sent)
        else:
            wallet, key = small[len(sent) % len(small)], f"grant-{len(sent)}"
            sent.append((wallet, key))
        copies = dice.choice((1, 1, 2))
        for grant in await asyncio.gather(*(_grant(wallet, key) for _ in range(copies))):
            journal.append(grant)
        await _rest(stopped)


async def _grant(wallet: Wallet, idempotency_key: str) -> Grant:
    command = [sys.executable, "-m", "proxy", "credits", "grant", "--json", "--email", wallet.email]
    command += ["--amount", f"0.{GRANT_NANOS:09d}", "--idempotency-key", idempotency_key]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        async with asyncio.timeout(_GRANT_S_MAX):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
    told = json.loads(output) if process.returncode == 0 else {}
    return Grant(
        wallet_id=wallet.id,
        idempotency_key=idempotency_key,
        amount=GRANT_NANOS,
        is_acknowledged=process.returncode == 0,
        is_replay=bool(told.get("replayed")),
    )


async def _rest(stopped: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(_BREATH_S):
            await stopped.wait()
    except TimeoutError:
        return


async def _work(plan: Plan) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    journal = Journal(Path(plan.journal))
    async with asyncio.TaskGroup() as group:
        group.create_task(_tell(plan, journal, stopped))
        for number in range(plan.customers):
            group.create_task(_buy(plan, number, journal, stopped))
    journal.close()


def main() -> None:
    """Work on the plan in the file that the command line names."""
    asyncio.run(_work(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)))


if __name__ == "__main__":
    main()
