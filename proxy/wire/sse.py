"""Server-sent events, as far as a relay needs them: where an event ends, and what data it carries.

The format is section 9.2 of the WHATWG HTML standard (https://html.spec.whatwg.org/multipage/server-sent-events.html).
Everything here works on bytes: splitting decoded text into lines would also split at U+2028 and its like, which
may stand unescaped inside of JSON.
"""

import re

_BLANK_LINE = re.compile(rb"(?:\n|\r\n?+)(?:\n|\r\n?+)")
"""The end of a line and an empty line. The LF after a CR is possessed: CR LF is one line end and never two."""

_BLANK_LINE_BYTES_MAX = len(b"\r\n\r\n")

_BOM = b"\xef\xbb\xbf"
_PLAIN_START = b"data: "
_PLAIN_END = b"\n\n"


class EventTooLong(ValueError):
    """An event did not end within the limit."""


class EventSplitter:
    """Cuts a stream of bytes, pushed in chunks of any size, into raw events.

    Events come back byte for byte, each with its terminating empty line; together with `rest` they are exactly
    what was fed, and where the chunks were cut makes no difference to them. Further empty lines count to the
    event that follows them.

    An event that ends in a bare CR is given back with the first byte after it, since until then that CR may be
    half of a CR LF. Nobody is known to send such streams; their last event is in `rest`.
    """

    def __init__(self, event_bytes_max: int) -> None:
        self._event_bytes_max = event_bytes_max
        self._unfinished = bytearray()
        self._has_cr = False

    @property
    def rest(self) -> bytes:
        """The bytes of the event that has not ended yet. Raises `EventTooLong` when it is over the limit."""
        self._check_unfinished()
        return bytes(self._unfinished)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that end in `chunk`, in their order.

        Raises `EventTooLong` when there are none, and the event that has not ended is over the limit; the stream is
        then of no more use.
        """
        # Searches of single bytes: `in` first tries what it is given as a number.
        if chunk.find(b"\r") >= 0:
            self._has_cr = True
        if self._unfinished or self._has_cr:
            events = self._finished(chunk)
        elif chunk.endswith(_PLAIN_END) and chunk.find(_PLAIN_END) == len(chunk) - len(_PLAIN_END):
            return [chunk]  # one event, as most come
        else:
            *whole, rest = chunk.split(_PLAIN_END)
            events = [event + _PLAIN_END for event in whole]
            self._unfinished += rest
        if not events:
            self._check_unfinished()
        return events

    def _check_unfinished(self) -> None:
        if len(self._unfinished) > self._event_bytes_max:
            raise EventTooLong(f"An event is over the limit of {self._event_bytes_max} bytes.")

    def _finished(self, chunk: bytes) -> list[bytes]:
        buffer = self._unfinished
        # An empty line may have begun in what was searched already, but not earlier than this. Nothing else is
        # searched twice, so a long event in small chunks takes linear time.
        searched = max(0, len(buffer) - _BLANK_LINE_BYTES_MAX + 1)
        buffer += chunk
        events = []
        start = 0
        while (end := self._end(searched)) is not None:
            events.append(bytes(buffer[start:end]))
            start = searched = end
        del buffer[:start]
        return events

    def _end(self, searched: int) -> int | None:
        """Where the event ends that is open at `searched`, if it is certain."""
        if not self._has_cr:
            found = self._unfinished.find(_PLAIN_END, searched)
            return None if found < 0 else found + len(_PLAIN_END)
        match = _BLANK_LINE.search(self._unfinished, searched)
        if match is None:
            return None
        end = match.end()
        is_half_line_end = end == len(self._unfinished) and self._unfinished[-1] == ord("\r")
        return None if is_half_line_end else end


def event_data(event: bytes) -> bytes | None:
    """The values of the `data` lines of a raw event, joined by line feeds; None when it has no such line.

    Takes an event without its empty line as well: the last one of a stream that was cut short.
    """
    if event.startswith(_PLAIN_START) and event.endswith(_PLAIN_END):
        value = event[len(_PLAIN_START) : -len(_PLAIN_END)]
        if value.find(b"\n") < 0 and value.find(b"\r") < 0:
            return value
    # Of bytes, unlike of text, `splitlines` knows only the three line ends that the standard has.
    lines = [_value(line) for line in event.removeprefix(_BOM).splitlines() if _is_data(line)]
    return b"\n".join(lines) if lines else None


def with_data(event: bytes, data: bytes) -> bytes:
    """The raw `event` with `data`, which must not hold a line end, in place of its own; its other lines stay."""
    kept = [
        line
        for line in event.removeprefix(_BOM).splitlines(keepends=True)
        if line.strip(b"\r\n") and not _is_data(line)
    ]
    return b"".join(kept) + _PLAIN_START + data + _PLAIN_END


def _is_data(line: bytes) -> bool:
    return line.startswith(b"data:") or line.rstrip(b"\r\n") == b"data"


def _value(line: bytes) -> bytes:
    return line[len(b"data:") :].removeprefix(b" ")
