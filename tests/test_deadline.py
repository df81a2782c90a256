"""A deadline does what `asyncio.timeout` does: each case holds for both."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from proxy.deadline import CommonLimit, Deadline, within


@asynccontextmanager
async def ours(seconds):
    with within(seconds):
        yield


@pytest.fixture(params=[ours, asyncio.timeout], ids=["ours", "asyncio's"])
def limit(request):
    return request.param


async def forever():
    await asyncio.get_running_loop().create_future()


async def test_a_block_that_takes_too_long_is_cut_off(limit):
    """With `TimeoutError`, from the cancellation; the task is not cancelled any more."""
    with pytest.raises(TimeoutError) as caught:
        async with limit(0.01):
            await forever()
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert not asyncio.current_task().cancelling()


async def test_a_block_within_its_time_is_left_alone(limit):
    """Nothing comes after it either."""
    async with limit(0.01):
        await asyncio.sleep(0)
    await asyncio.sleep(0.03)


async def test_a_cancellation_from_elsewhere_stays_one(limit):
    """Whoever cancels a task does not get a time-out."""

    async def work():
        async with limit(10):
            await forever()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_from_elsewhere_goes_before_a_time_out(limit):
    """Both in one moment: the task is cancelled."""

    async def work():
        try:
            async with limit(0.01):
                await forever()
        except TimeoutError:
            await forever()

    task = asyncio.create_task(work())

    def both():
        task.cancel()
        task.cancel()

    asyncio.get_running_loop().call_later(0.01, both)
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(5):
            await task


@pytest.mark.parametrize(("outer_s", "inner_s"), [(0.01, 10), (10, 0.01)])
async def test_each_of_two_limits_cuts_off_its_own_block(limit, outer_s, inner_s):
    """The inner one is not blamed for the outer one's end, nor the other way round."""
    ended = []
    try:
        async with limit(outer_s):
            try:
                async with limit(inner_s):
                    await forever()
            except TimeoutError:
                ended.append("inner")
            await asyncio.sleep(0)
    except TimeoutError:
        ended.append("outer")
    assert ended == ["outer" if outer_s < inner_s else "inner"]


async def test_an_error_of_the_block_is_its_own(limit):
    """It is not touched, even if the time is up by then."""

    async def work():
        async with limit(0.001):
            try:
                await forever()
            except asyncio.CancelledError:
                raise KeyError from None

    with pytest.raises(KeyError):
        await work()


async def test_a_deadline_can_be_brought_forward():
    """Its block ends at once, as if the time were up."""

    async def work():
        with Deadline(asyncio.get_running_loop().time() + 10) as deadline:
            asyncio.get_running_loop().call_soon(deadline.end_now)
            await forever()

    with pytest.raises(TimeoutError):
        await work()


async def test_a_common_limit_ends_what_takes_too_long():
    """With `TimeoutError`, each at its own time; what was ended or done before is left alone."""
    loop = asyncio.get_running_loop()
    limit = CommonLimit(0.05)
    late, done, ended, later = (loop.create_future() for _ in range(4))
    begun_at = loop.time()
    for future in (late, done, ended):
        limit.begin(future)
    ended.cancel()
    done.set_result("in time")
    await asyncio.sleep(0.02)
    limit.begin(later)
    ended_at = {}
    for future in (late, later):
        with pytest.raises(TimeoutError):
            await future
        ended_at[future] = loop.time() - begun_at
    assert 0.05 <= ended_at[late] < ended_at[later]
    assert ended_at[later] >= 0.07
    assert await done == "in time"
    assert ended.cancelled()
