"""Answers that came encoded: what they say, and how long anybody waits for it."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import UpstreamBroken
from proxy.upstream.encodings import MEMBERS_MAX, decoded, decoded_whole

GZIP = [(b"content-encoding", b"gzip")]
DEFLATE = [(b"content-encoding", b"deflate")]
PACKED = [(GZIP, gzip.compress), (DEFLATE, zlib.compress), ([(b"content-encoding", b"identity")], bytes), ([], bytes)]


async def pieces(octets, headers, size):
    async def chunks():
        for start in range(0, len(octets), size):
            yield octets[start : start + size]

    return [piece async for piece in decoded(chunks(), headers, "p")]


@given(octets=st.binary(max_size=300), packed=st.sampled_from(PACKED), size=st.integers(1, 400))
async def test_what_was_encoded_comes_out_again(octets, packed, size):
    """Whole and in pieces, wherever they are cut."""
    headers, pack = packed
    assert decoded_whole(pack(octets), headers, 1000) == octets
    assert b"".join(await pieces(pack(octets), headers, size)) == octets


async def test_pieces_are_bounded_however_well_they_were_compressed():
    """A bomb costs as much memory as its own size."""
    octets = bytes(1_000_000)
    assert max(map(len, await pieces(gzip.compress(octets), GZIP, 10**6))) <= 65_536
    assert decoded_whole(gzip.compress(octets), GZIP, 100_000) == octets[:100_000]


GZIPPED = gzip.compress(b"x", mtime=0)


@pytest.mark.parametrize("octets", [b"x", b"\x1f\x8b", GZIPPED[:-1], GZIPPED + b"y"])
async def test_what_is_not_encoded_as_it_says(octets):
    """A stream of it is broken."""
    with pytest.raises(UpstreamBroken):
        await pieces(octets, GZIP, 3)


def test_what_cannot_be_decoded_is_what_it_is():
    """A whole answer is looked at as it came."""
    for headers, octets in ((GZIP, b"xx"), ([(b"content-encoding", b"br")], b"x")):
        assert decoded_whole(octets, headers, 100) == octets


def test_members_are_bounded():
    """Nobody waits for megabytes of empty ones; as many as anybody sends are read."""
    assert decoded_whole(gzip.compress(b"x") * MEMBERS_MAX, GZIP, 10**6) == b"x" * MEMBERS_MAX
    empty = gzip.compress(b"") * 400_000
    assert decoded_whole(empty, GZIP, 10**6) == empty
