"""Several processes with the same operations on one database: no deadlock, and each operation counts once."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

from proxy.ledger.decide import Credit, CreditType
from tests.books import Books, opened_books, release_of, reserve_of, settle_of
from tests.ledger.rival import Round, Tally

PEOPLE = 6
CALLS_EACH = 20


@contextmanager
def rival(books: Books, seed: int, *flags: str) -> Iterator[subprocess.Popen]:
    """A process that holds what it reserves on the lease of `books`; killed if it does not end by itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ledger.rival", books.url, str(seed), books.lease.id, *flags],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()


async def play(rivals: list[subprocess.Popen], round_: Round) -> list[Tally]:
    """Let all of them write the round, each at its own pace."""
    line = msgspec.json.encode(round_) + b"\n"
    for process in rivals:
        process.stdin.write(line)
        process.stdin.flush()
    answers = await asyncio.gather(*(asyncio.to_thread(process.stdout.readline) for process in rivals))
    return [msgspec.json.decode(answer, type=Tally) for answer in answers]


async def each_operation_counts_once(books: Books, count: int, *flags: str) -> None:
    """Reserve, top up, settle and release from `count` processes; every sum is that of the operations sent once."""
    people = [await books.person(10_000) for _ in range(PEOPLE)]
    reserves = [reserve_of(person, 60) for person in people for _ in range(CALLS_EACH)]
    top_ups = [
        Credit(wallet_id=person.wallet_id, type=CreditType.TOPUP, amount=7, description="test", idempotency_key=f"k{n}")
        for person in people
        for n in range(5)
    ]
    rounds = [
        Round(reserves=reserves, credits=top_ups[::2]),
        Round(
            settles=[settle_of(reserve, 25) for reserve in reserves[::2]],
            releases=[release_of(reserve) for reserve in reserves[1::2]],
            credits=top_ups[1::2],
        ),
    ]
    with ExitStack() as stack:
        rivals = [stack.enter_context(rival(books, seed, *flags)) for seed in range(count)]
        for round_ in rounds:
            tallies = await play(rivals, round_)
            operations = len(round_.operations)
            assert [(tally.lost, tally.refused, tally.other) for tally in tallies] == [(0, 0, [])] * count
            assert sum(tally.first for tally in tallies) == operations
            assert sum(tally.replays for tally in tallies) == operations * (count - 1)
    for person in people:
        wallet = await books.row("wallets", person.wallet_id)
        balance = 10_000 - CALLS_EACH // 2 * 25 + 5 * 7
        assert (wallet["balance"], wallet["reserved"], wallet["open_calls"]) == (balance, 0, 0)
        assert wallet["seq"] == 1 + CALLS_EACH // 2 + 5


async def test_processes_with_the_same_operations(books):
    """In whatever order and batches they come, over the same wallets, there is no deadlock and no doubt."""
    await each_operation_counts_once(books, 3)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_without_the_lock_processes_get_in_each_others_way(database_url):
    """The control: leave the lock out and they end in deadlocks, refusals or wrong sums."""
    async with opened_books(database_url) as books:
        with pytest.raises(AssertionError):
            await each_operation_counts_once(books, 3, "--unlocked")
