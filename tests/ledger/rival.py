"""One of several processes that send the same operations to one database, each in an order and in batches of its own.

`python -m tests.ledger.rival URL SEED INSTANCE [--unlocked]` reads rounds from standard input, a line each: operations
as JSON, by kind. When it has written a round it answers with a line: how many operations it was the first to write, how
often the database was lost or refused a batch. A batch that was lost or refused is sent again, a few times.
"""

import asyncio
import random
import sys
from collections.abc import Iterator

import msgspec

from proxy.ledger.decide import Credit, Operation, Release, Reserve, Settle
from proxy.ledger.store import Store, StoreLostError, StoreRefusedError
from proxy.storage import database
from tests.books import second_store
from tests.ledger.stepping import SteppedStore

BATCH_MAX = 12
ATTEMPTS_MAX = 5


class Round(msgspec.Struct):
    """What to do until everybody is through with it."""

    reserves: list[Reserve] = []
    settles: list[Settle] = []
    releases: list[Release] = []
    credits: list[Credit] = []

    @property
    def operations(self) -> list[Operation]:
        return [*self.reserves, *self.settles, *self.releases, *self.credits]


class Tally(msgspec.Struct):
    """What one rival saw in one round."""

    first: int = 0
    replays: int = 0
    lost: int = 0
    refused: int = 0
    other: list[str] = []


def _batches(operations: list[Operation], dice: random.Random) -> Iterator[list[Operation]]:
    shuffled = dice.sample(operations, len(operations))
    while shuffled:
        size = dice.randint(1, BATCH_MAX)
        yield shuffled[:size]
        del shuffled[:size]


async def _write(store: Store, batch: list[Operation], instance: str, tally: Tally) -> None:
    for _ in range(ATTEMPTS_MAX):
        try:
            outcomes = await store.transact(batch, owner_id=instance)
        except StoreLostError:
            tally.lost += 1
        except StoreRefusedError:
            tally.refused += 1
        else:
            break
    else:
        return
    for outcome in outcomes:
        is_replay = getattr(outcome, "is_replay", None)
        if is_replay is None:
            tally.other.append(repr(outcome))
        elif is_replay:
            tally.replays += 1
        else:
            tally.first += 1


async def main(url: str, seed: str, instance: str, *, is_unlocked: bool) -> None:
    """Write the rounds that come in."""
    dice = random.Random(seed)  # noqa: S311 - an order, not a secret
    engine = database.connect(url, pooled=False)
    store = SteppedStore(engine, is_unlocked=True) if is_unlocked else second_store(url, engine)
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        tally = Tally()
        for batch in _batches(msgspec.json.decode(line, type=Round).operations, dice):
            await _write(store, batch, instance, tally)
        sys.stdout.buffer.write(msgspec.json.encode(tally) + b"\n")
        sys.stdout.buffer.flush()
    await store.aclose()
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4], is_unlocked="--unlocked" in sys.argv))
