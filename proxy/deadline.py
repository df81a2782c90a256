"""Time limits: on a block of code, at a third of the price of `asyncio.timeout`, and on many futures at once, at none.

A call has several, and on Python 3.11 each of asyncio's takes as long as decoding the request. Most never come to
their end, so one timer looks after all of them.
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

    __slots__ = ("_at", "_cancelling", "_is_over", "_task", "_watch")

    def __init__(self, at: float) -> None:
        self._at = at
        self._watch = _watch()
        self._task: asyncio.Task[object] | None = None
        self._is_over = False

    def __enter__(self) -> Self:
        task = asyncio.current_task(self._watch.loop)
        if task is None:
            raise RuntimeError("a deadline needs a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._watch.begin(self, self._at)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: TracebackType | None) -> None:
        self._watch.end(self)
        task, self._task = self._task, None
        if not self._is_over or task is None or task.uncancel() > self._cancelling:
            return
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from exc

    @property
    def task(self) -> "asyncio.Task[object] | None":
        """The one whose block this is, while it is in there."""
        return self._task

    def end_now(self) -> None:
        """Let the time be up."""
        if self._task is not None and not self._is_over:
            self._is_over = True
            self._task.cancel()


_LOOK_S = 0.005
"""Between two looks at all deadlines of a loop at least: each takes time, and thousands may end one after the other.

So a deadline may be kept so many seconds late.
"""


class _Watch:
    """Ends the deadlines of one event loop when they are due: one timer, for whichever is the first."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._due: dict[Deadline, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = math.inf
        """When the timer is due."""

    def begin(self, deadline: Deadline, at: float) -> None:
        self._due[deadline] = at
        if at < self._looks_at:
            self._look_at(at)

    def end(self, deadline: Deadline) -> None:
        self._due.pop(deadline, None)

    def _look_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(at, self._look)
        self._looks_at = at

    def _look(self) -> None:
        self._timer, self._looks_at = None, math.inf
        now = self.loop.time()
        for deadline in [deadline for deadline, at in self._due.items() if at <= now]:
            del self._due[deadline]
            deadline.end_now()
        if self._due:
            self._look_at(max(min(self._due.values()), now + _LOOK_S))


_watches: list[_Watch] = []
"""That of the loop that asked last: a process has one loop, but for tests."""


def _watch() -> _Watch:
    loop = asyncio.get_running_loop()
    if not _watches or _watches[0].loop is not loop:
        _watches[:] = [_Watch(loop)]
    return _watches[0]


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
