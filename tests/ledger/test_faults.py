"""A server that dies at a named point of a call: what the call then costs, and that the books are right.

Real processes, a real provider, both databases. After the death a server is started on the same books (SQLite: it
sweeps before it serves) or the command line sweeps (PostgreSQL), and what was promised for the point holds.
"""

import json
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple

import httpx2
import pytest

from proxy.units import NANOS_PER_CREDIT, format_credits
from tests.books import Books, opened_books
from tests.ledger.faulty_server import Point
from tests.serving import MODEL, Served, environment

GRANTED = 10 * NANOS_PER_CREDIT


class Promise(NamedTuple):
    """What must be true of a call whose server died at a point."""

    state: str | None
    """Of its reservation; None when there is none."""
    is_charged: bool = False
    provider_calls: int = 1
    is_stream: bool = False


PROMISES = {
    Point.BEFORE_RESERVE_COMMIT: Promise(None, provider_calls=0),
    Point.AFTER_RESERVE_COMMIT: Promise("expired", provider_calls=0),
    Point.AFTER_PROVIDER_ANSWERED: Promise("expired"),
    Point.MID_STREAM: Promise("expired", is_stream=True),
    Point.BEFORE_SETTLE: Promise("expired", is_stream=True),
    Point.AFTER_SETTLE_COMMIT: Promise("settled", is_charged=True),
    Point.AFTER_SETTLE_BEFORE_LAST_BYTE: Promise("settled", is_charged=True, is_stream=True),
}


class FaultyServed(Served):
    """A server that fails at `point`."""

    point: Point

    def program(self) -> list[str]:
        return [sys.executable, "-m", "tests.ledger.faulty_server", self.point]


@pytest.fixture
def faulty(tmp_path, database_url, upstream) -> Iterator[FaultyServed]:
    """A server that is yet to be started, killed if it outlives its test."""
    served = FaultyServed(environment(tmp_path, database_url, upstream.base_url))
    yield served
    if served.process is not None and served.process.poll() is None:
        served.stop(signal.SIGKILL)
    served.errors.close()


def wish(**behaviour: object) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": f"!fake {json.dumps(behaviour)}"}]}


def answer_until_the_end(served: Served, key: str, *, is_stream: bool) -> tuple[bytes, bool]:
    """What a client receives of one call, and whether it saw the end."""
    body = {**wish(tokens=200, chunk_tokens=10, pace_s=0.01), "stream": is_stream}
    received = b""
    try:
        with served.client(key) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
            for chunk in answer.iter_raw():
                received += chunk
    except httpx2.TransportError:
        return received, False
    return received, True


async def new_caller(url: str) -> str:
    """The key of somebody with credits."""
    async with opened_books(url, is_second=True) as books:
        return (await books.person(GRANTED)).key


async def on_record(books: Books, table: str) -> list[dict]:
    return [await books.row(table, row_id) for row_id in await books.ids(table)]


async def let_leases_end(url: str) -> None:
    """What happens when nobody renews for a while and another process looks."""
    async with opened_books(url, is_second=True) as books:
        await books.execute("UPDATE instances SET is_fenced = TRUE, lease_until = 1")


@pytest.mark.parametrize("point", PROMISES)
async def test_a_server_that_dies(faulty, upstream, database_url, point):
    """The promise for the point holds, once the dead server's lease is over and somebody has swept."""
    promise = PROMISES[point]
    key = await new_caller(database_url)
    faulty.point = point
    faulty.start()
    before = len(upstream.journal)
    received, is_complete = answer_until_the_end(faulty, key, is_stream=promise.is_stream)
    assert faulty.process.wait(20) == -signal.SIGKILL, faulty.log()
    faulty.process.stdout.close()
    assert not is_complete
    assert b"[DONE]" not in received
    assert bool(received) == promise.is_stream
    assert len(upstream.journal) - before == promise.provider_calls
    if database_url.startswith("postgresql"):
        await let_leases_end(database_url)
        assert faulty.command("sweep")["expired"] == (promise.state == "expired")
    revived = Served(faulty.environ)
    revived.start()
    try:
        await check_promise(revived, key, database_url, promise)
        with revived.client(key) as http:
            assert http.post("/v1/chat/completions", json=wish()).status_code == 200
        async with opened_books(database_url, is_second=True) as books:
            assert (await books.audit()).is_clean
    finally:
        assert revived.stop() == 0
        revived.errors.close()


async def check_promise(served: Served, key: str, url: str, promise: Promise) -> None:
    with served.client(key) as http:
        balance = http.get("/api/v1/credits/balance").json()
        journal = http.get("/api/v1/credits/transactions").json()["items"]
    async with opened_books(url, is_second=True) as books:
        calls = await on_record(books, "reservations")
    assert [call["state"] for call in calls] == ([] if promise.state is None else [promise.state])
    charged = sum(call["charged"] for call in calls)
    assert (charged > 0) == promise.is_charged
    assert balance["reserved"] == "0"
    assert balance["balance"] == format_credits(GRANTED - charged)
    assert [item["type"] for item in journal] == ["deduction"] * promise.is_charged + ["topup"]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_settle_whose_answer_is_lost(faulty, upstream, database_url, is_stream):
    """The connection is cut behind the commit: the settle is sent again, booked once, and the client sees its end."""
    key = await new_caller(database_url)
    faulty.point = Point.DURING_SETTLE
    faulty.start()
    received, is_complete = answer_until_the_end(faulty, key, is_stream=is_stream)
    assert is_complete
    assert received.endswith(b"data: [DONE]\n\n") == is_stream
    assert faulty.log().count("ledger_lost") == 1
    async with opened_books(database_url, is_second=True) as books:
        [call] = await on_record(books, "reservations")
        assert (await books.audit()).is_clean
    assert call["state"] == "settled"
    with faulty.client(key) as http:
        balance = http.get("/api/v1/credits/balance").json()
        journal = http.get("/api/v1/credits/transactions").json()["items"]
    assert [item["type"] for item in journal] == ["deduction", "topup"]
    assert call["charged"] > 0
    assert balance["balance"] == format_credits(GRANTED - call["charged"])
    assert faulty.stop() == 0


def test_every_point_has_a_test():
    """A point without a promise would be one that nobody looks at."""
    assert set(PROMISES) | {Point.DURING_SETTLE} == set(Point)
