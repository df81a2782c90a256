"""Cursors: what was given out is read back, and nothing else is."""

import pytest

from proxy.errors import BadRequest
from proxy.pages import cursor_at, number_of


@pytest.mark.parametrize(
    "cursor", ["", "!", "Mw", "LTE=", "Mi41", "4pyT", "OTIyMzM3MjAzNjg1NDc3NTgwOA==", "\ud800", "Mw==\n"]
)
def test_a_cursor_that_was_not_given_out_is_refused(cursor):
    """Whatever it decodes to."""
    with pytest.raises(BadRequest) as caught:
        number_of(cursor)
    assert caught.value.code == "invalid_cursor"


@pytest.mark.parametrize("place", [0, 1, 2**63 - 1])
def test_a_cursor_is_read_back(place):
    """As the number that it was made of."""
    assert number_of(cursor_at(place)) == place
