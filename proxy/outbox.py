"""What is sent in one tick of an event loop goes out together at its end, one socket right after the other.

Sending wakes whoever reads at the other end, which costs as much as all the rest of a system call and more; a reader
that is awake already, since somebody else's bytes came just before, need not be woken. Calls whose reservations were
granted by one transaction go on in one tick, and so do streams whose chunks came together.
"""

import asyncio
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)


class Outbox:
    """Whoever has something to send on the loop `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: list[Callable[[], None]] = []

    def add(self, send: Callable[[], None]) -> None:
        """Call `send` at the end of this tick; in the order in which they were added."""
        if not self._waiting:
            self.loop.call_soon(self._send)
        self._waiting.append(send)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for send in waiting:
            try:
                send()
            except Exception:
                log.exception("sending_failed")  # the others have nothing to do with it


_outboxes: list[Outbox] = []
"""That of the loop that was asked for last: a process has one loop, but for tests."""


def outbox_of(loop: asyncio.AbstractEventLoop) -> Outbox:
    """The one outbox of `loop`."""
    if not _outboxes or _outboxes[0].loop is not loop:
        _outboxes[:] = [Outbox(loop)]
    return _outboxes[0]
