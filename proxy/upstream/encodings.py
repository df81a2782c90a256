"""Answers that are encoded against our request for identity (RFC 9110, section 8.4).

Some servers, and what stands before them, compress whatever they send. Such an answer was paid for, so it is read.
"""

import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from proxy.errors import UpstreamBroken
from proxy.upstream import Headers

_ENCODINGS = {b"gzip": zlib.MAX_WBITS | 16, b"x-gzip": zlib.MAX_WBITS | 16, b"deflate": zlib.MAX_WBITS}
_NOT_ENCODED = frozenset({b"identity", b"none", b""})
"""Only the first is a name; servers send the others for what they leave as it is."""

_INFLATED_BYTES = 65_536
"""At most so much comes out of one step, however well it was compressed."""

_SLICE_BYTES = 65_536
"""At most so much goes in at once: what follows a member of gzip is copied with each of them."""

MEMBERS_MAX = 10_000
"""Of a whole answer: each costs time, even if there is nothing in it, and nobody else is served meanwhile."""


def content_encoding(headers: Headers) -> bytes | None:
    """How a body is encoded; None when it is not."""
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() not in _NOT_ENCODED:
            return value.strip().lower()
    return None


def decoded(chunks: AsyncIterator[bytes], headers: Headers, provider: str) -> AsyncIterator[bytes]:
    """What the `chunks` of a body say, in bounded pieces: themselves where the body is not encoded.

    Reading it raises `UpstreamBroken` when they are not what their encoding says, or not to its end, or when that is
    not known here.
    """
    encoding = content_encoding(headers)
    return chunks if encoding is None else _inflated(chunks, encoding, provider)


def decoded_whole(body: bytes, headers: Headers, bytes_max: int) -> bytes:
    """What `body` says, up to `bytes_max` bytes; `body` itself when it is not encoded, or that cannot be said."""
    encoding = content_encoding(headers)
    if encoding not in _ENCODINGS:
        return body
    inflater = _Inflater(encoding)
    said = bytearray()
    try:
        for start in range(0, len(body), _SLICE_BYTES):
            for piece in inflater.feed(body[start : start + _SLICE_BYTES]):
                said += piece
                if len(said) >= bytes_max:
                    return bytes(said[:bytes_max])
            if inflater.members > MEMBERS_MAX:
                return body
    except zlib.error:
        return body
    return bytes(said)


async def _inflated(chunks: AsyncIterator[bytes], encoding: bytes, provider: str) -> AsyncGenerator[bytes]:
    if encoding not in _ENCODINGS:
        raise UpstreamBroken("The provider's answer is encoded in a way that was not asked for.", provider=provider)
    inflater = _Inflater(encoding)
    try:
        async for chunk in chunks:
            for piece in inflater.feed(chunk):
                yield piece
    except zlib.error as exc:
        raise UpstreamBroken("The provider's answer is not encoded as it says.", provider=provider) from exc
    if not inflater.is_whole:
        raise UpstreamBroken("The provider's answer ends inside of its encoding.", provider=provider)


class _Inflater:
    """Inflates what it is fed: all members of gzip, one after the other."""

    def __init__(self, encoding: bytes) -> None:
        self._wbits = _ENCODINGS[encoding]
        self._member = zlib.decompressobj(self._wbits)
        self.members = 0
        """How many have begun."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing has begun that has not ended."""
        return self._member.eof or not self.members

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What `data` adds, in bounded pieces. Raises `zlib.error`."""
        while data:
            if self._member.eof:
                self._member = zlib.decompressobj(self._wbits)
                self.members += 1
            self.members = self.members or 1
            piece = self._member.decompress(data, _INFLATED_BYTES)
            data = self._member.unconsumed_tail or self._member.unused_data
            if piece:
                yield piece
