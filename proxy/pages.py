"""Pages of lists: how many items one may have, and the cursors that ask for the next."""

import base64
import binascii

from proxy.errors import BadRequest
from proxy.units import is_id

PAGE_MAX = 200
PAGE_DEFAULT = 50

GROUPS_MAX = 1000
"""Of one page of a report."""

_NUMBER_MAX = 2**63 - 1
"""What a column holds."""


def check_limit(limit: int, limit_max: int = PAGE_MAX) -> None:
    """Raises `BadRequest` unless a page may have so many items."""
    if not 1 <= limit <= limit_max:
        raise BadRequest(f"A page has from 1 to {limit_max} items.", param="limit", code="invalid_value")


def check_page(limit: int, cursor: str | None, prefix: str) -> None:
    """Raises `BadRequest` unless a page may have `limit` items, and `cursor` is an id with this prefix or None."""
    check_limit(limit)
    if cursor is not None and not is_id(cursor, prefix):
        raise unknown_cursor()


def cursor_at(place: str | int) -> str:
    """`place` as something that callers hand back unread."""
    return base64.urlsafe_b64encode(str(place).encode()).decode()


def place_of(cursor: str) -> str:
    """What `cursor_at` was given. Raises `BadRequest`."""
    try:
        return base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError) as exc:
        raise unknown_cursor() from exc


def number_of(cursor: str) -> int:
    """Likewise, where a number was given: one that a column holds."""
    place = place_of(cursor)
    if not place.isdecimal() or len(place) > 19 or int(place) > _NUMBER_MAX:
        raise unknown_cursor()
    return int(place)


def unknown_cursor() -> BadRequest:
    """The refusal of a cursor that nobody was given."""
    return BadRequest("This cursor was not given out here.", param="cursor", code="invalid_cursor")
