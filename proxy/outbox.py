"""What is sent in one tick of an event loop goes out together, a few sockets right after each other.

Sending wakes whoever reads at the other end, which costs as much as all the rest of a system call and more; a reader
that is awake already, since somebody else's bytes came just before, need not be woken. Calls whose reservations were
granted by one transaction go on in one tick, and so do streams whose chunks came together.

Waiting for all of a tick would save no more than waiting for a few, and make the first wait for the last.
"""

import asyncio
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

TOGETHER = 8
"""So many go out as soon as they are there."""


class Outbox:
    """Whoever has something to send on the loop `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: list[Callable[[], None]] = []

    def add(self, send: Callable[[], None]) -> None:
        """Call `send` soon, at the end of this tick at the latest; in the order in which they were added."""
        self._waiting.append(send)
        if len(self._waiting) == 1:
            self.loop.call_soon(self._send)
        elif len(self._waiting) == TOGETHER:
            self._send()

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
