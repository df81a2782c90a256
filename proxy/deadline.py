"""Time limits: on a block of code, at half of the price of `asyncio.timeout`, and on many futures at once, at none.

A call has several, and on Python 3.11 each of asyncio's takes as long as decoding the request.
"""

import asyncio
import math
from collections import deque
from types import TracebackType
from typing import Any, Self


class Deadline:
    """Cancels its block at `at`, in the loop's time, and turns that into `TimeoutError`.

    As with `asyncio.timeout`, a cancellation from elsewhere stays one, and a block that ends in the moment in which its
    time is up has ended in time. Good for one block.
    """

    __slots__ = ("_at", "_cancelling", "_is_over", "_loop", "_task", "_timer")

    def __init__(self, at: float) -> None:
        self._at = at
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._is_over = False

    def __enter__(self) -> Self:
        task = asyncio.current_task(self._loop)
        if task is None:
            raise RuntimeError("a deadline needs a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = self._loop.call_at(self._at, self.end_now)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        self._timer.cancel()
        task, self._task = self._task, None
        if not self._is_over or task is None or task.uncancel() > self._cancelling:
            return
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from exc

    def end_now(self) -> None:
        """Let the time be up."""
        if self._task is not None and not self._is_over:
            self._is_over = True
            self._task.cancel()


def within(seconds: float) -> Deadline:
    """A limit of so many seconds from now."""
    return Deadline(asyncio.get_running_loop().time() + seconds)


class CommonLimit:
    """So many seconds for each of many futures, at the price of one timer.

    A future that is not done by then fails with `TimeoutError`; for `math.inf` seconds none ever does.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: deque[tuple[asyncio.Future[Any], float]] = deque()
        """In the order of their time, since all have the same; those that are done leave when they come first."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, future: "asyncio.Future[Any]") -> None:
        """From now on."""
        waiting, loop = self._due, future.get_loop()
        while waiting and waiting[0][0].done():
            waiting.popleft()
        due = loop.time() + self._seconds
        waiting.append((future, due))
        if self._timer is None and due < math.inf:
            self._timer = loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._due:
            future, due = self._due[0]
            if not future.done():
                if due > loop.time():
                    self._timer = loop.call_at(due, self._look)
                    return
                future.set_exception(TimeoutError())
            self._due.popleft()
