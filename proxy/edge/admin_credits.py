"""`/api/v1/admin/users/{id}/credits`: credits booked by hand, for admins."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Router, post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.spec import Example
from litestar.params import Body, FromPath, HeaderParameter
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration.credits import (
    DESCRIPTION_CHARACTERS_MAX,
    IDEMPOTENCY_KEY_CHARACTERS_MAX,
    Order,
    book,
)
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.errors import BadRequest
from proxy.identity.keys import Caller, Scope
from proxy.ledger.decide import CreditType
from proxy.ledger.ledger import Ledger
from proxy.shown.credits import CreditBooked, credit_booked
from proxy.units import AmountError, parse_credits

AdminRequest = Request[Caller, Any, Any]

BODY_BYTES_MAX = 16_384

IDEMPOTENCY_KEY = b"idempotency-key"


class CreditOrder(msgspec.Struct, forbid_unknown_fields=True):
    """What to book.

    A top-up is above zero, an adjustment above or below. A refund is of the charge of `request_id`: of `amount`, or
    without one of all that is left of it.
    """

    type: Literal["topup", "refund", "adjustment"]
    amount: Annotated[str | int | None, Meta(examples=["2.5"])] = None
    description: Annotated[str, Meta(max_length=DESCRIPTION_CHARACTERS_MAX, examples=["invoice 2026-117"])] = ""
    request_id: str | None = None


_EXAMPLES = [
    Example(summary="A top-up", value={"type": "topup", "amount": "2.5", "description": "invoice 2026-117"}),
    Example(summary="All of a charge", value={"type": "refund", "request_id": "req_" + "0" * 32}),
    Example(summary="An adjustment", value={"type": "adjustment", "amount": "-1", "description": "counted twice"}),
]


@post(
    "/{user_id:str}/credits",
    summary="Book credits by hand",
    request_max_body_size=BODY_BYTES_MAX,
    responses=documented(400, 404, 409, 413),
)
async def book_credits(  # noqa: PLR0913, PLR0917 - what the framework hands to a handler
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    ledger: NamedDependency[Ledger],
    user_id: FromPath[str],
    data: Annotated[CreditOrder, Body(media_type=RequestEncodingType.JSON, examples=_EXAMPLES)],
    idempotency_key: Annotated[
        str | None,
        HeaderParameter(
            name="Idempotency-Key",
            description="Sent again with the same key and values, the first result is answered again.",
            max_length=IDEMPOTENCY_KEY_CHARACTERS_MAX,
        ),
    ] = None,
) -> CreditBooked:
    """Top up a wallet, give a charge back, or adjust a balance.

    With an `Idempotency-Key` it is booked once, however often it is sent; the same key with other values is a 409. A
    503 that says that it may yet be booked names the key to repeat it with. What open calls hold cannot be adjusted
    away.
    """
    if sum(name == IDEMPOTENCY_KEY for name, _ in request.scope["headers"]) > 1:
        raise BadRequest(
            "More than one Idempotency-Key header was sent.", param="Idempotency-Key", code="invalid_value"
        )
    order = Order(
        type=CreditType(data.type),
        amount=None if data.amount is None else _nanos(data.amount),
        description=data.description,
        request_id=data.request_id,
        idempotency_key=idempotency_key,
    )
    booked = await book(engine, ledger, request.user.user_id, user_id, order)
    return credit_booked(booked.entry)


def _nanos(amount: str | int) -> int:
    try:
        return parse_credits(amount)
    except AmountError as exc:
        raise BadRequest(f"amount: {exc}.", param="amount", code="invalid_value") from exc


router = Router("/api/v1/admin/users", opt=needs(Scope.ADMIN), route_handlers=[book_credits])
