import gc
import itertools
import weakref
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.upstream import Headers
from proxy.upstream.http1 import HEAD_BYTES_MAX, HEADERS_MAX, AnswerParser, address, request_head

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


class Outcome(NamedTuple):
    status: int
    headers: Headers
    body: bytes
    end: str


def read(wire, cuts=(), *, ends=True, is_bodiless=False):
    """What a parser makes of `wire`, cut at `cuts`, and then of the connection's end; and whether it could go on."""
    parser = AnswerParser()
    pieces = []
    parser.start(pieces, is_bodiless=is_bodiless)
    edges = [0, *sorted(cuts), len(wire)]
    for start, stop in itertools.pairwise(edges):
        parser.feed(wire[start:stop])
    is_reusable = parser.is_complete and parser.is_reusable
    if ends:
        parser.end()
    assert not (parser.is_complete and parser.is_broken)
    assert parser.has_head or not parser.is_complete
    end = "complete" if parser.is_complete else "broken" if parser.is_broken else "open"
    head = (parser.status, parser.headers) if parser.has_head else (0, [])
    return Outcome(*head, b"".join(pieces), end), is_reusable


def byte_by_byte(wire):
    return range(1, len(wire))


@pytest.mark.parametrize(
    ("url", "is_tls", "host", "port", "authority", "target"),
    [
        ("http://a.test", False, "a.test", 80, b"a.test", b"/"),
        ("https://a.test/v1/x?y=1&z#part", True, "a.test", 443, b"a.test", b"/v1/x?y=1&z"),
        ("https://a.test:443/", True, "a.test", 443, b"a.test", b"/"),
        ("http://a.test:443/", False, "a.test", 443, b"a.test:443", b"/"),
        ("http://A.test:8080/%7e", False, "a.test", 8080, b"a.test:8080", b"/%7e"),
        ("http://[::1]:81/x", False, "::1", 81, b"[::1]:81", b"/x"),
        ("http://[fe80::1]", False, "fe80::1", 80, b"[fe80::1]", b"/"),
        ("http://user:secret@a.test/x", False, "a.test", 80, b"a.test", b"/x"),
    ],
)
def test_where_a_request_goes(url, is_tls, host, port, authority, target):
    """The parts of an address, none of which has the credentials."""
    assert address(url) == (is_tls, host, port, authority, target)
    assert address(url).origin == (is_tls, host, port)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.test/x",
        "ftp://a.test/",
        "http://",
        "http:///x",
        "http://[::1",
        "http://a.test:0/",
        "http://a.test:99999/",
        "http://a.test:x/",
        "http://a.test/a b",
        "http://a.test/a\r\nx: y",
        "http://a.test/a\tb",
        "http://a.test/\x00",
        "http://ä.test/",
        "http://a.test/ä",
    ],
)
def test_what_is_no_address(url):
    """Nothing is sent there."""
    with pytest.raises(ValueError):
        address(url)


def test_the_head_of_a_request():
    """The given headers as they are, between host and content-length."""
    place = address("http://a.test:8080/v1/x?y=1")
    assert request_head("POST", place, [(b"X-a", b""), (b"x-A", b"\xff \t~")], 3) == (
        b"POST /v1/x?y=1 HTTP/1.1\r\nHost: a.test:8080\r\nX-a: \r\nx-A: \xff \t~\r\nContent-Length: 3\r\n\r\n"
    )
    assert request_head("POST", place, [], 0).endswith(b"\r\nContent-Length: 0\r\n\r\n")
    assert b"Content-Length" not in request_head("GET", place, [], 0)


@pytest.mark.parametrize("at", range(2))
@settings(deadline=None)
@given(bad=st.binary(min_size=1, max_size=20), good=st.sampled_from([b"x-a", b"1", b""]))
@example(bad=b"a\r\nx-evil: 1", good=b"x-a")
@example(bad=b"a\nb", good=b"x-a")
def test_no_header_becomes_another_line(at, bad, good):
    """Whatever a name or a value holds, the head has one line for it, or is not made at all."""
    header = (bad, good) if at == 0 else (good, bad)
    try:
        head = request_head("POST", address("http://a.test/"), [header], 0)
    except ValueError:
        return
    lines = head.split(b"\r\n")
    assert lines == [b"POST / HTTP/1.1", b"Host: a.test", b"%b: %b" % header, b"Content-Length: 0", b"", b""]
    assert not set(b"\r\n\0") & set(b"".join(header))
    assert header[0]
    assert not set(b" \t:") & set(header[0])


@pytest.mark.parametrize("name", [b"Host", b"content-length", b"Transfer-Encoding", b"connection", b"expect", b"te"])
def test_fields_that_are_ours(name):
    """A second framing would let one call be read as two."""
    with pytest.raises(ValueError):
        request_head("POST", address("http://a.test/"), [(name, b"5")], 5)


@pytest.mark.parametrize("method", ["", "GET /", "PO\r\nST"])
def test_what_is_no_method(method):
    """Nothing is sent with it."""
    with pytest.raises(ValueError):
        request_head(method, address("http://a.test/"), [], 0)


READ = {
    "length": (OK + b"Content-Length: 2\r\n\r\nok", (200, [(b"content-length", b"2")], b"ok", "complete"), True),
    "empty": (OK + b"Content-Length: 0\r\n\r\n", (200, [(b"content-length", b"0")], b"", "complete"), True),
    "white space": (OK + b"x: \t a b \t\r\n\r\n", (200, [(b"x", b"a b")], b"", "complete"), False),
    "no reason": (
        b"HTTP/1.1 503\r\ncontent-length:0\r\n\r\n",
        (503, [(b"content-length", b"0")], b"", "complete"),
        True,
    ),
    "chunked": (
        CHUNKED + b"2\r\nab\r\n1;x=y\r\nc\r\n0\r\nx-t: 1\r\n\r\n",
        (200, [(b"transfer-encoding", b"chunked")], b"abc", "complete"),
        True,
    ),
    "until the end": (OK + b"x: \r\n\r\nabc", (200, [(b"x", b"")], b"abc", "complete"), False),
    "old": (b"HTTP/1.0 200 OK\r\n\r\nabc", (200, [], b"abc", "complete"), False),
    "close": (
        OK + b"connection: close\r\ncontent-length: 1\r\n\r\na",
        (200, [(b"connection", b"close"), (b"content-length", b"1")], b"a", "complete"),
        False,
    ),
    "after informational ones": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + OK + b"content-length: 1\r\n\r\na",
        (200, [(b"content-length", b"1")], b"a", "complete"),
        True,
    ),
    "no content": (b"HTTP/1.1 204 No\r\n\r\n", (204, [], b"", "complete"), True),
    "not modified": (
        b"HTTP/1.1 304 No\r\ncontent-length: 9\r\n\r\n",
        (304, [(b"content-length", b"9")], b"", "complete"),
        True,
    ),
    "half a body": (OK + b"content-length: 9\r\n\r\nab", (200, [(b"content-length", b"9")], b"ab", "broken"), False),
    "half a chunk": (CHUNKED + b"9\r\nab", (200, [(b"transfer-encoding", b"chunked")], b"ab", "broken"), False),
    "no last chunk": (CHUNKED + b"2\r\nab\r\n", (200, [(b"transfer-encoding", b"chunked")], b"ab", "broken"), False),
    "no end of trailers": (
        CHUNKED + b"2\r\nab\r\n0\r\nx: y\r\n",
        (200, [(b"transfer-encoding", b"chunked")], b"ab", "broken"),
        False,
    ),
    "bad chunk": (CHUNKED + b"2\r\nabc", (200, [(b"transfer-encoding", b"chunked")], b"ab", "broken"), False),
    "half a head": (OK + b"content-length: 9\r\n", (0, [], b"", "broken"), False),
    "nothing": (b"", (0, [], b"", "broken"), False),
    "nonsense": (b"nonsense\r\n\r\n", (0, [], b"", "broken"), False),
    "only informational": (b"HTTP/1.1 100 Continue\r\n\r\n", (0, [], b"", "broken"), False),
    "a request": (b"POST / HTTP/1.1\r\n\r\n", (0, [], b"", "broken"), False),
    "both framings": (OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n", (0, [], b"", "broken"), False),
    "both, the other way": (
        OK + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n",
        (0, [], b"", "broken"),
        False,
    ),
    "two lengths": (OK + b"content-length: 1\r\ncontent-length: 1\r\n\r\na", (0, [], b"", "broken"), False),
    "a huge length": (OK + b"content-length: 99999999999999999999\r\n\r\na", (0, [], b"", "broken"), False),
    "a negative length": (OK + b"content-length: -1\r\n\r\na", (0, [], b"", "broken"), False),
    "another coding": (OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", (0, [], b"", "broken"), False),
    "chunked twice": (OK + b"transfer-encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", (0, [], b"", "broken"), False),
    "a huge chunk": (
        CHUNKED + b"fffffffffffffffff\r\nab",
        (200, [(b"transfer-encoding", b"chunked")], b"", "broken"),
        False,
    ),
    "upgrade": (b"HTTP/1.1 101 Go\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nraw", (0, [], b"", "broken"), False),
    "upgrade unasked": (b"HTTP/1.1 101 Go\r\n\r\n" + OK + b"\r\n", (0, [], b"", "broken"), False),
    "informational with a body": (
        b"HTTP/1.1 103 Hints\r\ncontent-length: 1\r\n\r\na" + OK + b"\r\n",
        (0, [], b"", "broken"),
        False,
    ),
    "status too low": (b"HTTP/1.1 099 Low\r\ncontent-length: 0\r\n\r\n", (0, [], b"", "broken"), False),
    "status too high": (b"HTTP/1.1 600 High\r\ncontent-length: 0\r\n\r\n", (0, [], b"", "broken"), False),
    "another version": (b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n", (0, [], b"", "broken"), False),
    "a folded line": (OK + b"x: a\r\n b\r\ncontent-length: 0\r\n\r\n", (0, [], b"", "broken"), False),
    "no name": (OK + b": a\r\ncontent-length: 0\r\n\r\n", (0, [], b"", "broken"), False),
    "a space in a name": (OK + b"x : a\r\ncontent-length: 0\r\n\r\n", (0, [], b"", "broken"), False),
    "a zero in a value": (OK + b"x: a\0b\r\ncontent-length: 0\r\n\r\n", (0, [], b"", "broken"), False),
    "bare line feeds": (b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", (0, [], b"", "broken"), False),
}


@pytest.mark.parametrize(("wire", "outcome", "is_reusable"), READ.values(), ids=READ)
def test_what_an_answer_is(wire, outcome, is_reusable):
    """The same, whole and one byte at a time."""
    assert read(wire) == (outcome, is_reusable)
    assert read(wire, byte_by_byte(wire)) == (outcome, is_reusable)


@pytest.mark.parametrize("excess", [b"x", b"HTTP/1.1 200 OK\r\n\r\n", OK, b"\0"])
@pytest.mark.parametrize("wire", [READ["length"][0], READ["chunked"][0], READ["no content"][0]])
def test_bytes_after_the_answer(wire, excess):
    """The answer is good, and the connection is not used again."""
    whole, is_reusable = read(wire + excess)
    assert (whole, is_reusable) == (read(wire)[0], False)
    assert read(wire + excess, [len(wire)]) == (whole, False)


def test_the_answer_to_a_head_request():
    """It has no body, whatever its head says."""
    outcome, is_reusable = read(OK + b"content-length: 9\r\n\r\n", ends=False, is_bodiless=True)
    assert (outcome.end, outcome.body, is_reusable) == ("complete", b"", False)


def test_one_answer_after_the_other():
    """A parser reads what the connection brings, and nothing is left of the answer before."""
    parser = AnswerParser()
    for status in (b"200", b"404"):
        parser.start(pieces := [])
        parser.feed(b"HTTP/1.1 %b X\r\ncontent-length: 3\r\nx: %b\r\n\r\n%b" % (status, status, status))
        assert (parser.status, b"".join(pieces)) == (int(status), status)
        assert parser.headers == [(b"content-length", b"3"), (b"x", status)]
        assert parser.is_complete
        assert parser.is_reusable


def padded(size):
    """An answer whose head has `size` bytes."""
    head = OK + b"content-length: 2\r\nx: "
    return head + b"y" * (size - len(head) - 4) + b"\r\n\r\nok"


@pytest.mark.parametrize("cut", [1, 100, 4096, HEAD_BYTES_MAX - 1, HEAD_BYTES_MAX, 1_000_000])
def test_the_size_of_a_head(cut):
    """It is bounded to the byte, however it arrives."""
    for size, end in ((HEAD_BYTES_MAX, "complete"), (HEAD_BYTES_MAX + 1, "broken")):
        wire = padded(size)
        cuts = range(cut, len(wire), cut)
        assert read(wire, cuts, ends=False)[0].end == end


@pytest.mark.parametrize("name", [b"HTTP/1.1 200 ", OK + b"x: ", OK, b"HTTP/1.1 103 H\r\nx: y\r\n\r\n"])
def test_a_head_without_end(name):
    """Nothing is kept of what goes on for ever."""
    parser = AnswerParser()
    parser.feed(name)
    fed = 0
    while not parser.is_broken:
        parser.feed(b"y" * 1000 if name != b"HTTP/1.1 103 H\r\nx: y\r\n\r\n" else name)
        fed += 1000
        assert fed < 5_000_000


def test_the_number_of_headers():
    """It is bounded."""
    for count, end in ((HEADERS_MAX, "complete"), (HEADERS_MAX + 1, "broken")):
        wire = OK + b"".join(b"x%d: y\r\n" % i for i in range(count - 1)) + b"content-length: 0\r\n\r\n"
        assert read(wire)[0].end == read(wire, byte_by_byte(wire))[0].end == end


@pytest.mark.parametrize("endless", [b"x: y\r\n", b"x: " + b"y" * 10_000 + b"\r\n", b"y" * 1000])
def test_trailers_without_end(endless):
    """They are dropped, and bounded."""
    parser = AnswerParser()
    parser.feed(CHUNKED + b"1\r\na\r\n0\r\n")
    fed = 0
    while not parser.is_broken:
        parser.feed(endless)
        fed += len(endless)
        assert fed < 3 * HEAD_BYTES_MAX
    assert parser.headers == [(b"transfer-encoding", b"chunked")]


TOKENS = st.text("abcXYZ-_!09", min_size=1, max_size=12).map(str.encode)
VALUES = st.binary(max_size=12).map(lambda value: bytes(byte for byte in value if byte > 0x20 and byte != 0x7F))


@st.composite
def answers(draw):
    """A valid answer and what it says: wire, status, body."""
    status = draw(st.sampled_from([200, 201, 404, 429, 500, 599]))
    body = draw(st.binary(max_size=200))
    framing = draw(st.sampled_from(["length", "chunked", "end"]))
    headers = draw(st.lists(st.tuples(TOKENS.map(lambda name: b"x-" + name), VALUES), max_size=5))
    lines = [b"HTTP/1.1 %d Reason" % status, *(b"%b: %b" % header for header in headers)]
    if framing == "length":
        lines.append(b"Content-Length: %d" % len(body))
        payload = body
    elif framing == "chunked":
        lines.append(b"transfer-encoding: Chunked")
        payload = b"".join(
            b"%x%b\r\n%b\r\n" % (len(piece), draw(st.sampled_from([b"", b";a", b";a=b"])), piece)
            for piece in _cut(body, draw(st.lists(st.integers(0, len(body)), max_size=5)))
            if piece
        )
        payload += b"0\r\n" + draw(st.sampled_from([b"", b"x-trailer: 1\r\n"])) + b"\r\n"
    else:
        payload = body
    before = draw(st.sampled_from([b"", b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n"]))
    return before + b"\r\n".join([*lines, b"", payload]), status, headers, body, framing != "end"


def _cut(wire, cuts):
    edges = [0, *sorted(cuts), len(wire)]
    return [wire[start:stop] for start, stop in itertools.pairwise(edges)]


@st.composite
def damaged(draw):
    """A valid answer in which some bytes were replaced, inserted or left out."""
    wire = bytearray(draw(answers())[0])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(wire)))
        length = draw(st.integers(0, 3))
        wire[at : at + length] = draw(st.binary(max_size=3) | st.sampled_from([b"\r\n", b"\n", b":", b"0", b"\0"]))
    return bytes(wire)


CUTS = st.lists(st.integers(0, 600), max_size=20)


@settings(deadline=None)
@given(answer=answers(), cuts=CUTS)
def test_a_valid_answer_however_it_is_cut(answer, cuts):
    """It is read as it was meant."""
    wire, status, headers, body, is_reusable = answer
    for edges in ((), [cut for cut in cuts if cut < len(wire)], byte_by_byte(wire)):
        outcome, could_go_on = read(wire, edges)
        assert (outcome.status, outcome.body, outcome.end) == (status, body, "complete")
        assert outcome.headers[: len(headers)] == [(name.lower(), value) for name, value in headers]
        assert could_go_on == is_reusable


@settings(max_examples=300, deadline=None)
@given(wire=damaged() | st.binary(max_size=300) | st.binary(max_size=100).map(OK.__add__), cuts=CUTS)
def test_any_bytes_however_they_are_cut(wire, cuts):
    """No exception, and the same verdict."""
    whole, _ = read(wire)
    assert read(wire, [cut for cut in cuts if cut < len(wire)])[0] == whole
    assert read(wire, byte_by_byte(wire))[0] == whole


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.binary(max_size=40) | st.sampled_from([b"0\r\n\r\n", b"\r\n", b"1\r\na\r\n", OK]), max_size=12)
)
def test_any_bytes_inside_a_chunked_body(pieces):
    """Whatever follows the head, the body is a prefix that grows and never changes."""
    parser = AnswerParser()
    body = []
    parser.start(body)
    parser.feed(CHUNKED)
    for piece in pieces:
        before = b"".join(body)
        was_over = parser.is_complete or parser.is_broken
        parser.feed(piece)
        assert b"".join(body).startswith(before)
        assert not was_over or b"".join(body) == before
    wire = CHUNKED + b"".join(pieces)
    assert read(wire, ends=False)[0] == read(wire, byte_by_byte(wire), ends=False)[0]


def test_a_closed_parser_is_freed():
    """At once, since it and llhttp's let go of each other; what still comes is not read."""
    parser = AnswerParser()
    parser.start([])
    parser.feed(OK)
    parser.close()
    parser.feed(b"\r\n")
    assert not parser.has_head
    gc.disable()
    try:
        known = weakref.ref(parser)
        del parser
        assert known() is None
    finally:
        gc.enable()
