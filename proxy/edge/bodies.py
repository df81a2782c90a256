"""What holds for the body of every request that the framework decodes."""

from contextlib import suppress
from typing import Any

import msgspec
from litestar import Request

from proxy.wire.objects import UNREADABLE, bad_request, unique_fields

_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


async def check_body(request: Request[Any, Any, Any]) -> None:
    """Litestar's hook before every handler. Raises `BadRequest` for a field that is there twice or of another type.

    Of the former the framework would take the last one, and whoever looked at the request on its way perhaps the first.
    Of the latter it makes what it can: true of 1, 7 of "7". A body that it cannot read either is left to the framework,
    which says what is wrong with it.
    """
    if request.method not in _WITH_BODY:
        return
    body = await request.body()
    with suppress(*UNREADABLE):
        unique_fields(body)
    expected = request.route_handler.parsed_data_field
    if expected is None:
        return
    with suppress(*UNREADABLE):
        msgspec.json.decode(body, type=expected.annotation, strict=False)
        try:
            msgspec.json.decode(body, type=expected.annotation)
        except msgspec.ValidationError as exc:
            raise bad_request(exc) from exc
