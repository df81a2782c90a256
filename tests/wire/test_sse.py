import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.wire.sse import EventSplitter, EventTooLong, event_data, with_data

STREAMS = {
    "lf": [b'data: {"a":1}\n\n', b"data: b\n\n", b"data: [DONE]\n\n"],
    "crlf": [b'data: {"a":1}\r\n\r\n', b"data: b\r\n\r\n", b"data: [DONE]\r\n\r\n"],
    "mixed": [b"data: a\n\r\n", b"data: b\r\n\n", b"data: c\r\r\n", b"data: d\n\n", b"data: e\r\n\r\n"],
    "comments": [b": ping\n\n", b"data: a\n\n", b":\r\n\r\n"],
    "fields": [b"event: m\nid: 7\ndata: a\ndata: b\nretry: 10\n\n", b"id\ndata\n\n"],
    "unicode": ['data: {"a":"x\u2028y\u2029z\x85\x0b\x0c"}\n\n'.encode(), b"data: b\n\n"],
    "bom": [b"\xef\xbb\xbfdata: a\n\n", b"data: b\n\n"],
    "empty lines": [b"\n\n", b"\ndata: a\n\n", b"\n\n"],
}

raw_streams = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"data: x", b"\x00\xff"])).map(b"".join) | st.binary()


def split(chunks, event_bytes_max=10_000):
    splitter = EventSplitter(event_bytes_max)
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    return events, splitter.rest


@pytest.mark.parametrize("events", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("trailing", [b"", b"data: unfin"])
def test_every_cut(events, trailing):
    """However a stream is cut in three, its events are the same."""
    stream = b"".join(events) + trailing
    for i in range(len(stream) + 1):
        for j in range(i, len(stream) + 1):
            assert split([stream[:i], stream[i:j], stream[j:]]) == (events, trailing)


@pytest.mark.parametrize("events", STREAMS.values(), ids=STREAMS)
def test_one_byte_at_a_time(events):
    """An event comes with its last byte, not later."""
    splitter = EventSplitter(10_000)
    for event in events:
        assert [splitter.feed(event[i : i + 1]) for i in range(len(event))] == [[]] * (len(event) - 1) + [[event]]
    assert splitter.rest == b""


def test_bare_carriage_returns():
    """An event that ends in a bare CR comes with the byte after it, wherever the cut; the last one stays in `rest`."""
    stream = b"data: a\r\rdata: b\r\r"
    for i in range(len(stream) + 1):
        assert split([stream[:i], stream[i:]]) == ([b"data: a\r\r"], b"data: b\r\r")


@settings(deadline=None)
@given(raw_streams, st.lists(st.integers(0, 200)))
def test_nothing_is_lost(stream, cuts):
    """Events and rest together are what was fed, and where it was cut makes no difference."""
    ends = sorted({min(cut, len(stream)) for cut in cuts})
    chunks = [stream[i:j] for i, j in zip([0, *ends], [*ends, len(stream)], strict=True)]
    events, rest = split(chunks)
    assert b"".join(events) + rest == stream
    assert (events, rest) == split([stream])


@settings(deadline=None)
@given(raw_streams)
def test_events_end_at_their_first_empty_line(stream):
    """No event holds an empty line before its end, and the rest none at all."""
    events, rest = split([stream])
    for event in events:
        lines = event.splitlines(keepends=True)
        ends = [i for i in range(1, len(lines)) if lines[i] in {b"\n", b"\r", b"\r\n"}]
        assert ends[:1] == [len(lines) - 1]
    assert not re.search(rb"(?>\r\n|\n|\r){2}[^\n]", rest)


def test_an_event_that_does_not_end():
    """It is refused as soon as it is over the limit, and not at the limit."""
    splitter = EventSplitter(10)
    assert splitter.feed(b"data: 7890") == []
    with pytest.raises(EventTooLong, match="10 bytes"):
        splitter.feed(b"1")


def test_the_limit_is_for_one_event():
    """Many events in one chunk are no long event."""
    assert len(split([b"data: a\n\n" * 100], event_bytes_max=10)[0]) == 100


def test_a_long_event_takes_linear_time():
    """What was searched is not searched again: a megabyte in chunks of a few bytes is done within the time limit."""
    chunks = [b"data: "] + [b"0123456\r"] * 125_000 + [b"\r\n"]
    events, rest = split(chunks, event_bytes_max=2_000_000)
    assert (len(events), rest) == (1, b"")


@pytest.mark.parametrize(
    ("event", "value"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\n\n", b"a"),
        (b"data:  a \n\n", b" a "),
        (b"data: a\r\n\r\n", b"a"),
        (b"data: a\r\r", b"a"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata\r\ndata: b\n\n", b"a\n\nb"),
        (b"id: 1\ndata: a\nevent: x\n\n", b"a"),
        (b"\xef\xbb\xbfdata: a\n\n", b"a"),
        (b"\ndata: a\n\n", b"a"),
        (b"data\n\n", b""),
        (b"data: \n\n", b""),
        (b"data: cut short", b"cut short"),
        ("data: x\u2028y\x85z\x0b\x0c\n\n".encode(), "x\u2028y\x85z\x0b\x0c".encode()),
        (b": ping\n\n", None),
        (b"database: a\n\n", None),
        (b" data: a\n\n", None),
        (b"event: x\n\n", None),
        (b"", None),
    ],
)
def test_event_data(event, value):
    """The values of the data lines, joined by line feeds."""
    assert event_data(event) == value


@pytest.mark.parametrize(
    ("event", "changed"),
    [
        (b"data: a\n\n", b"data: {}\n\n"),
        (b"id: 1\r\ndata: a\r\ndata: b\r\n: note\r\n\r\n", b"id: 1\r\n: note\r\ndata: {}\n\n"),
        (b"\n\nevent: x\ndata\n\n", b"event: x\ndata: {}\n\n"),
        (b"\xef\xbb\xbfdata: a\n\n", b"data: {}\n\n"),
    ],
)
def test_with_data(event, changed):
    """One data line takes the place of all; the other lines of the event stay."""
    assert with_data(event, b"{}") == changed
    assert event_data(changed) == b"{}"
