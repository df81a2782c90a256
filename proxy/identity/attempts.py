"""How often something may be tried by one address or for one account. Kept in memory, by each process for itself."""

import math
from collections.abc import Callable

from proxy.errors import RateLimited

HOLDERS_MAX = 100_000
"""How many are remembered; the oldest are forgotten first. A few dozen megabytes at most."""


class Attempts:
    """Counts attempts in fixed windows of `window_s` seconds that begin with the first one.

    `clock` gives seconds that never run backwards.
    """

    def __init__(self, attempts_max: int, window_s: float, clock: Callable[[], float]) -> None:
        self._attempts_max = attempts_max
        self._window_s = window_s
        self._clock = clock
        self._counts: dict[str, tuple[float, int]] = {}

    def take(self, holder: str) -> None:
        """Count one attempt of `holder`. Raises `RateLimited` when it has none left."""
        now = self._clock()
        started, count = self._counts.get(holder, (now, 0))
        if now - started >= self._window_s:
            started, count = now, 0
        if count >= self._attempts_max:
            wait_s = math.ceil(started + self._window_s - now)
            raise RateLimited("Too many attempts. Try again later.", retry_after_s=max(1, wait_s))
        if count == 0:
            self._counts.pop(holder, None)  # to the end of the order in which they are forgotten
            if len(self._counts) >= HOLDERS_MAX:
                del self._counts[next(iter(self._counts))]
        self._counts[holder] = (started, count + 1)

    def give_back(self, holder: str) -> None:
        """The last attempt of `holder` was a good one, and does not count."""
        started, count = self._counts.get(holder, (0.0, 0))
        if count:
            self._counts[holder] = (started, count - 1)
