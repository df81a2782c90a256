"""HTTP/1.1 as bytes, without a socket: the head of a request out, an answer in.

The answer's syntax is llhttp's business (through httptools, in its strict mode). What it leaves open is decided here:

* An answer has one framing: a content-length, or the one transfer coding `chunked`, or the end of the connection.
  Both together, and codings that nobody would undo, are refused.
* Memory has a bound: `HEAD_BYTES_MAX` and `HEADERS_MAX` for the head with all informational answers (1xx) before
  it, and again for the trailers, which are dropped.
* `101 Switching Protocols` was not asked for and is refused.
* Whatever follows a complete answer makes the connection unfit for another one.
"""

import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools

from proxy.upstream import Headers

HEAD_BYTES_MAX = 65_536
"""Servers send less than 8 kB; some put policies and tracing into headers. h11 has the same bound."""

HEADERS_MAX = 256

_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""RFC 9110, section 5.6.2."""

_VALUE = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
"""RFC 9110, section 5.5."""

_FRAMING = frozenset(
    {b"connection", b"content-length", b"expect", b"host", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
"""Fields that speak of this connection or say where the request ends: ours alone to send."""

_PLAIN_ASCII = re.compile(r"[\x21-\x7e]+")
_PORTS = {"http": 80, "https": 443}
_BODILESS = frozenset({204, 304})


class Address(NamedTuple):
    """Where a request goes: to whom one connects, what its first line and its `host` say."""

    is_tls: bool
    host: str
    """A name or an IP address, without brackets."""
    port: int
    authority: bytes
    target: bytes

    @property
    def origin(self) -> tuple[bool, str, int]:
        """What requests that may share a connection have in common."""
        return self[:3]


@lru_cache(maxsize=256)
def address(url: str) -> Address:
    """The address in `url`; its credentials and fragment are left out.

    Raises `ValueError` when it is not an http or https address in plain ASCII.
    """
    # Before splitting: `urlsplit` takes tabs and line breaks out without a word.
    if not _PLAIN_ASCII.fullmatch(url):
        raise ValueError("not plain ASCII")
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.port == 0:
        raise ValueError("not an address of HTTP")
    port = _PORTS[parts.scheme]
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if parts.port in {None, port} else f"{host}:{parts.port}"
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return Address(
        is_tls=parts.scheme == "https",
        host=parts.hostname,
        port=parts.port or port,
        authority=authority.encode(),
        target=target.encode(),
    )


def request_head(method: str, address: Address, headers: Headers, body_bytes: int) -> bytes:
    """The first line, `host`, `headers` as they are, and `content-length`.

    Raises `ValueError` when a name, a value or the method has a byte that is not allowed in it, or `headers` have a
    field that is ours to send: what one caller sends never becomes another line or another request.
    """
    head = _head(method, address, tuple(headers))
    if body_bytes or method not in {"GET", "HEAD"}:
        return b"%b\r\nContent-Length: %d\r\n\r\n" % (head, body_bytes)
    return head + b"\r\n\r\n"


@lru_cache(maxsize=256)
def _head(method: str, address: Address, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """A head without its last two lines: most are like one that was sent before."""
    names = [name for name, _ in headers]
    if b"".join(names).translate(None, _TOKEN) or not all(names):
        raise ValueError("not the name of a header field")
    if b"".join([value for _, value in headers]).translate(None, _VALUE):
        raise ValueError("not the value of a header field")
    if not _FRAMING.isdisjoint([name.lower() for name in names]):
        raise ValueError("a header field that is not the caller's to send")
    verb = method.encode()
    if not verb or verb.translate(None, _TOKEN):
        raise ValueError("not a method")
    lines = [b"%b %b HTTP/1.1\r\nHost: %b" % (verb, address.target, address.authority)]
    lines += [b"%b: %b" % header for header in headers]
    return b"\r\n".join(lines)


class AnswerParser:
    """Reads the answers on one connection, one after the other.

    Begin each with `start()`, then `feed()` bytes as they come, and say `end()` when no more can come. Neither ever
    raises; what has been learned is in the attributes, and stays true however the bytes were cut:

        status, headers    the final ones, names in lower case; complete once `has_head`
        pieces             the body, not decoded; the list is the caller's, who may empty it at any time
        is_complete        the answer has come to its end
        is_broken          it never will
        is_reusable        if complete: nothing speaks against another request on this connection
    """

    def __init__(self) -> None:
        self._llhttp = httptools.HttpResponseParser(self)
        self.start([])

    def start(self, pieces: list[bytes], *, is_bodiless: bool = False) -> None:
        """Expect a new answer, and put its body into `pieces`; `is_bodiless` when the request was a HEAD."""
        self.pieces = pieces
        self.status = 0
        self.headers: Headers = []
        self.has_head = False
        self.is_complete = False
        self.is_broken = False
        self.is_reusable = False
        self._is_over = False
        self._is_bodiless = is_bodiless
        self._ends_with_connection = False
        self._frame_bytes = 0
        """Of the head; after it, of what came since the last piece of the body."""
        self._trailers_bytes = 0

    def close(self) -> None:
        """Read no more. This and llhttp's parser know each other, and would wait for the garbage collector."""
        self._is_over = True
        self._llhttp = _NOBODYS

    def feed(self, received: bytes) -> None:
        """Read the next bytes of the connection."""
        if self._is_over:
            self.is_reusable = False
        elif self.has_head:
            self._feed_body(received)
        else:
            self._feed_head(received)

    def end(self) -> None:
        """The connection has ended: so has the answer, if that is its framing."""
        self.is_reusable = False
        if self._is_over:
            return
        if self.has_head and self._ends_with_connection:
            self._complete()
        else:
            self._break()

    def _feed_head(self, received: bytes) -> None:
        room = HEAD_BYTES_MAX - self._frame_bytes
        self._frame_bytes += len(received)
        if len(received) <= room:
            self._execute(received)
            return
        # The bound lies within these bytes; a head that ends before it is a good one.
        self._execute(received[:room])
        if not self.has_head:
            self._break()
        elif not self._is_over:
            self._execute(received[room:])
        else:
            self.is_reusable = False

    def _feed_body(self, received: bytes) -> None:
        pieces = len(self.pieces)
        self._execute(received)
        if len(self.pieces) > pieces:
            self._frame_bytes = 0
            return
        self._frame_bytes += len(received)
        if self._frame_bytes > 2 * HEAD_BYTES_MAX and not self._is_over:
            self._break()

    def _execute(self, received: bytes) -> None:
        try:
            self._llhttp.feed_data(received)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._break()

    def _break(self) -> None:
        """Nothing more can be read; an answer that was complete before stays so."""
        self.is_reusable = False
        self.is_broken = not self.is_complete
        self._is_over = True

    def _complete(self) -> None:
        self.is_complete = True
        self._is_over = True

    # ---- llhttp's callbacks. None raises: httptools would turn that into errors of its own.

    def on_message_begin(self) -> None:
        """An answer begins: ours, one after a 1xx, or one too many."""
        if self.is_complete:
            self.is_reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field is complete."""
        if self._is_over:
            return
        if self.has_head:
            self._trailers_bytes += len(name) + len(value)
            if self._trailers_bytes > HEAD_BYTES_MAX:
                self._break()
            return
        # llhttp takes white space off the front only.
        self.headers.append((name.lower(), value.rstrip(b" \t")))
        if len(self.headers) > HEADERS_MAX:
            self._break()

    def on_headers_complete(self) -> None:
        """A head is complete: find out where its answer ends."""
        if self._is_over:
            return
        status = self._llhttp.get_status_code()
        has_length, codings = _framing(self.headers)
        if (
            not 100 <= status <= 599
            or self._llhttp.get_http_version() not in {"1.1", "1.0"}
            or (codings and (has_length or codings != [b"chunked"]))
            # No answer of its own, so without a body (RFC 9110, section 15.2); we never ask for an upgrade.
            or (status < 200 and (status == 101 or has_length or codings))
        ):
            self._break()
            return
        if status < 200:
            return
        self.status = status
        self.has_head = True
        self.is_reusable = self._llhttp.should_keep_alive()
        self._ends_with_connection = not (has_length or codings or status in _BODILESS)
        self._frame_bytes = 0
        if self._is_bodiless:
            # llhttp would wait for the body that the head speaks of.
            self._complete()
            self.is_reusable = False

    def on_body(self, piece: bytes) -> None:
        """A part of the body has come."""
        if piece and not self._is_over:
            self.pieces.append(piece)

    def on_message_complete(self) -> None:
        """An answer is complete: ours, or one that only informs and is not kept."""
        if self._is_over:
            return
        if self.has_head:
            self._complete()
        else:
            self.headers.clear()


_NOBODYS = httptools.HttpResponseParser(None)


def _framing(headers: Headers) -> tuple[bool, list[bytes]]:
    """Whether there is a content-length, whose value llhttp has checked, and all transfer codings."""
    has_length = False
    codings: list[bytes] = []
    for name, value in headers:
        if name == b"content-length":
            has_length = True
        elif name == b"transfer-encoding":
            codings.append(value.lower())
    return has_length, codings
