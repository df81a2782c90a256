"""Waiting for what nobody announces: looking again until it is so."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(
    is_so: Callable[[], Found], what: str = "it never was so", *, within_s: float = 10, pause_s: float = 0.02
) -> Found:
    """What `is_so` returns, once that is true; fails with `what` when it is not in time."""
    give_up_at = time.monotonic() + within_s
    while not (found := is_so()):
        assert time.monotonic() < give_up_at, what
        time.sleep(pause_s)
    return found
