"""What holds for the body of every request that the framework decodes."""

from contextlib import suppress
from typing import Any

from litestar import Request

from proxy.wire.objects import UNREADABLE, unique_fields

_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


async def refuse_duplicates(request: Request[Any, Any, Any]) -> None:
    """Litestar's hook before every handler. Raises `BadRequest` for a field that is there twice.

    The framework would take the last one, and whoever looked at the request on its way perhaps the first. A body that
    cannot be read is left to the framework, which says what is wrong with it.
    """
    if request.method in _WITH_BODY:
        body = await request.body()
        with suppress(*UNREADABLE):
            unique_fields(body)
