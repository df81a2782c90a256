"""What is sent in one tick goes out together, at its end at the latest."""

import asyncio

from proxy.outbox import TOGETHER, Outbox, outbox_of


async def test_what_is_added_in_a_tick_is_sent_at_its_end():
    """In its order, after all who have something to send in it, and in one go."""
    outbox, seen = Outbox(asyncio.get_running_loop()), []

    async def sends(number):
        seen.append(f"call {number}")
        outbox.add(lambda: seen.append(f"sent {number}"))

    await asyncio.gather(*(sends(number) for number in range(3)))
    await asyncio.sleep(0)
    assert seen == ["call 0", "call 1", "call 2", "sent 0", "sent 1", "sent 2"]
    await sends(3)
    await asyncio.sleep(0)
    assert seen[6:] == ["call 3", "sent 3"]


async def test_what_is_added_while_sending_is_sent_in_the_next_tick():
    """So that none is lost, and none sent twice."""
    outbox, seen = Outbox(asyncio.get_running_loop()), []
    outbox.add(lambda: outbox.add(lambda: seen.append("second")))
    await asyncio.sleep(0)
    assert not seen
    await asyncio.sleep(0)
    assert seen == ["second"]


async def test_many_do_not_wait_for_each_other():
    """As soon as there are enough, they go out; the rest at the end of the tick."""
    outbox, seen = Outbox(asyncio.get_running_loop()), []
    counts = []
    for number in range(2 * TOGETHER + 1):
        outbox.add(lambda number=number: seen.append(number))
        counts.append(len(seen))
    assert counts == [0] * (TOGETHER - 1) + [TOGETHER] * TOGETHER + [2 * TOGETHER] * 2
    await asyncio.sleep(0)
    assert seen == list(range(2 * TOGETHER + 1))


async def test_one_that_cannot_be_sent_does_not_keep_the_others():
    """They belong to other calls."""
    outbox, seen = Outbox(asyncio.get_running_loop()), []

    def fails():
        raise RuntimeError

    outbox.add(fails)
    outbox.add(lambda: seen.append("sent"))
    await asyncio.sleep(0)
    assert seen == ["sent"]


def test_each_loop_has_an_outbox_of_its_own():
    """And only one."""

    async def found():
        loop = asyncio.get_running_loop()
        return outbox_of(loop), outbox_of(loop)

    (first, again), (other, _) = asyncio.run(found()), asyncio.run(found())
    assert first is again
    assert other is not first
