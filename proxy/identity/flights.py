"""One question, many who ask it at once, one answer for all of them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Flights(Generic[T]):
    """Work under way, by what it is about. Whoever asks for the same meanwhile waits for the same answer."""

    def __init__(self) -> None:
        self._flying: dict[str, asyncio.Task[T]] = {}

    def is_flying(self, about: str) -> bool:
        """Whether somebody is asking about this just now."""
        return about in self._flying

    async def join(self, about: str, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` answers or raises, begun by the first who asks and ended whoever leaves."""
        task = self._flying.get(about)
        if task is None:
            task = asyncio.ensure_future(_run(work))
            self._flying[about] = task
            task.add_done_callback(lambda done: self._land(about, done))
        return await asyncio.shield(task)

    def _land(self, about: str, task: "asyncio.Task[T]") -> None:
        del self._flying[about]
        if not task.cancelled():
            task.exception()  # or the loop complains about a failure when everybody who asked has left


async def _run(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
