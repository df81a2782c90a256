"""What the Python programs here share: one JSON object of what they saw, scenario by scenario.

A program is called with a base URL, a key with credits, a key without, a model, and the scenarios to run (all that
need no special state of the server, when none is named). A scenario that raises is reported as `{"crashed": …}`.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable

import httpx2

BASE_URL, KEY, BROKE_KEY, MODEL = sys.argv[1:5]
CITY = {"name": "Köln", "inhabitants": 1_087_000}


class Wire:
    """Counts what a client really sent, and keeps the ids of what it was answered."""

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.sent_at: list[float] = []

    def client(self) -> httpx2.Client:
        """An HTTP client for an SDK, with its eyes open."""
        return httpx2.Client(timeout=30, event_hooks={"request": [self._sent], "response": [self._answered]})

    def _sent(self, _request: httpx2.Request) -> None:
        self.sent_at.append(time.monotonic())

    def _answered(self, response: httpx2.Response) -> None:
        self.request_ids.append(response.headers["x-request-id"])


def wish(**behaviour: object) -> str:
    """The text that tells the fake provider how to behave."""
    return f"!fake {json.dumps(behaviour)}"


def failure(call: Callable[[Wire], object]) -> dict:
    """The exception that `call` raises, as its users would look at it."""
    wire = Wire()
    try:
        call(wire)
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        return {
            "classes": [kind.__name__ for kind in type(error).__mro__],
            "status": getattr(error, "status_code", None),
            "code": getattr(error, "code", None),
            "retry_after": error.response.headers.get("retry-after") if hasattr(error, "response") else None,
            "attempts": len(wire.sent_at),
            "waited_s": wire.sent_at[-1] - wire.sent_at[0],
        }
    return {"classes": []}


def report(usual: dict[str, Callable[[], dict]], **special: Callable[[], dict]) -> None:
    """Run the scenarios that were named, or the `usual` ones, and print what they saw."""
    scenarios = {**usual, **special}
    seen = {}
    for name in sys.argv[5:] or usual:
        try:
            seen[name] = scenarios[name]()
        except Exception:  # noqa: BLE001 - reported, and the others go on
            seen[name] = {"crashed": traceback.format_exc()}
    sys.stdout.write(json.dumps(seen) + "\n")
