"""What the parts of a paid call cost by themselves, in µs of CPU: each replayed over one typical call."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from types import SimpleNamespace

import msgspec

from proxy.calls import Call, OpenCall
from proxy.ended import note_end
from proxy.estimate import estimate
from proxy.identity.keys import Caller, Scope, hash_key
from proxy.ledger.decide import Key, Receipt, Reserve, Settle, State, User, Wallet, decide
from proxy.ledger.store import _as_json, _writes
from proxy.metering import meter_plain, stream_meter
from proxy.metrics import Charge, Metrics
from proxy.observability import configure_logs
from proxy.outgoing import answer_headers, provider_call
from proxy.pricing import Price, cost, provider_cost
from proxy.routing import Candidate, Offer
from proxy.units import Usage, new_id
from proxy.upstream.http1 import AnswerParser, address, request_head
from proxy.wire.endpoints import decode
from proxy.wire.requests import Endpoint
from proxy.wire.sse import EventSplitter
from tests.bench import load

REPEATS = 5
CALLS = 400
PAIRS = 8
"""Calls in one batch of the ledger."""

BODY = msgspec.json.encode(
    {
        "model": "bench-model",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Tell me about the quick brown fox. " * 5},
        ],
        "temperature": 0.7,
        "max_tokens": 100,
    }
)
BIG_BODY = BODY.replace(b"Tell me", b"The quick brown fox jumps over the lazy dog. " * 440 + b"Tell me", 1)
PRICE = Price(input=150, cached_input=75, cache_write=150, audio_input=150, output=600, audio_output=600)
HEADERS = [(b"host", b"bench"), (b"content-type", b"application/json"), (b"authorization", b"Bearer sk-tg-x")]
KEY = "sk-tg-" + "x" * 43


def cpu_us(work: Callable[[], object]) -> float:
    """CPU of one `work`, the best of several rounds."""
    work()
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.process_time()
        for _ in range(CALLS):
            work()
        best = min(best, time.process_time() - begun)
    return best / CALLS * 1e6


def stages() -> Iterator[tuple[str, float]]:
    """Each stage with its cost."""
    candidate = Candidate("bench", "bench-model", PRICE, 16_384, 128_000, "max_tokens", False, True)
    request = decode(Endpoint.CHAT, BODY)
    offered = (Offer(candidate, PRICE, 1500),)
    estimated = estimate(request, len(BODY), offered)
    caller = Caller("user", "wallet", "key", Scope.INFERENCE, is_admin=False)
    call = Call(Endpoint.CHAT, "req", None, caller, HEADERS, BODY)
    opened = OpenCall(call, request, estimated, offered, estimated.at_most, 0.0, 1.0, offered[0], candidate)
    answer = load._PLAIN.partition(b"\r\n\r\n")[2]
    place = address("http://127.0.0.1:9000/v1/chat/completions")
    sent = [(b"authorization", b"Bearer sk-upstream"), (b"accept", b"application/json"), (b"user-agent", b"tollgate")]
    response = SimpleNamespace(status=200, headers=[(b"content-type", b"application/json"), (b"x-request-id", b"x")])
    parser = AnswerParser()

    def parse() -> None:
        parser.start([])
        parser.feed(load._PLAIN)

    def metered() -> Usage:
        return meter_plain(Endpoint.CHAT, answer, prompt=BODY, bound=Usage(input=400, output=100)).usage

    def charged() -> None:
        usage = metered_usage
        cost(usage, PRICE, 1500)
        provider_cost(usage, PRICE)
        msgspec.json.encode(usage)
        msgspec.json.encode(PRICE)

    metered_usage = metered()
    yield "hash of the key", cpu_us(lambda: hash_key(KEY))
    yield "decode and check the request", cpu_us(lambda: decode(Endpoint.CHAT, BODY))
    yield "… of 20 kB", cpu_us(lambda: decode(Endpoint.CHAT, BIG_BODY))
    yield "estimate", cpu_us(lambda: estimate(request, len(BODY), offered))
    yield "the provider's request", cpu_us(lambda: (provider_call(opened), request_head("POST", place, sent, 400)))
    yield "parse the answer", cpu_us(parse)
    yield "meter", cpu_us(metered)
    yield "price", cpu_us(charged)
    yield "headers of the answer", cpu_us(lambda: answer_headers(opened, response))
    yield "ledger: decide and encode", cpu_us(ledger_batch()) / PAIRS
    yield "count and log", count_and_log(opened)
    yield "a chunk: split and meter", chunk()


def ledger_batch() -> Callable[[], object]:
    """The ledger's pure part for a batch in which `PAIRS` calls are reserved and as many settled."""
    wallet = Wallet(id="wallet", owner_id="user", balance=10**15)
    settled = [_reserve() for _ in range(PAIRS)]
    receipt = Receipt(outcome="completed", provider="bench", usage="{}", usage_source="reported", price="{}")
    settles = [Settle(id=one.id, wallet_id="wallet", cost=700, tokens=40, receipt=receipt) for one in settled]
    operations = [*settles, *(_reserve() for _ in range(PAIRS))]

    def state(reservations: dict) -> State:
        return State(
            now=10**15,
            is_fenced=False,
            wallets={"wallet": msgspec.structs.replace(wallet)},
            users={"user": User(id="user", is_active=True, token_version=1)},
            keys={"key": Key(id="key", user_id="user", wallet_id="wallet", is_active=True)},
            reservations=reservations,
            transactions={},
        )

    held, _ = decide(state({}), settled)

    def batch() -> None:
        open_ones = {id_: msgspec.structs.replace(row) for id_, (row, _) in held.reserved.items()}
        changes, _ = decide(state(open_ones), operations)
        for _, rows in _writes(changes, "instance"):
            _as_json(rows)

    return batch


def _reserve() -> Reserve:
    return Reserve(
        id=new_id("req"),
        wallet_id="wallet",
        user_id="user",
        key_id="key",
        at_least=1000,
        at_most=1000,
        window_tokens=100,
        models=("bench/bench-model",),
        original_model="bench-model",
        is_stream=False,
    )


def count_and_log(opened: OpenCall) -> float:
    """All that is observed of one call: its end, a batch of the ledger, and its line, to a file in memory."""

    async def measured() -> float:
        metrics = Metrics()
        charge = Charge(Usage(input=400, output=100), "reported", 12_345, 11_111, 0)

        def observed() -> None:
            metrics.batch(PAIRS, 0.001)
            note_end(metrics, opened, "completed", charge)

        return cpu_us(observed)

    with redirect_stderr(StringIO()):
        configure_logs()
        return asyncio.run(measured())


def chunk() -> float:
    """One event with content."""
    event = load._CHUNK.partition(b"\r\n")[2].removesuffix(b"\r\n")
    splitter = EventSplitter(10**6)
    meter = stream_meter(Endpoint.CHAT, 10**4)
    return cpu_us(lambda: [meter.feed(one) for one in splitter.feed(event)])


def table() -> str:
    """The stages as a table."""
    rows = "".join(f"| {name} | {cost_us:.1f} |\n" for name, cost_us in stages())
    return f"| stage of a call | µs |\n| --- | --- |\n{rows}"
