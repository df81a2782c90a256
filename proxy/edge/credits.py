"""What a caller can read of its own books: balance, transactions, spending, the charge of any call."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, cast

from litestar import MediaType, Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, Schema
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.errors import NotFound
from proxy.identity.keys import Caller
from proxy.identity.keys import Scope as KeyScope
from proxy.journal import read_call
from proxy.ledger.decide import CreditType
from proxy.pages import PAGE_DEFAULT, check_limit
from proxy.shown.charges import Charge, ChargePage, charge_of, charge_page
from proxy.shown.credits import Balance, TransactionPage, filter_of, read_balance, transaction_page, transactions_csv
from proxy.shown.usage import Stats, wallet_stats
from proxy.storage.database import reading

CSV_MEDIA_TYPE = "text/csv"

From = Annotated[
    str | None,
    QueryParameter(name="from", description="The first UTC day, such as 2026-11-01; the beginning if left out."),
]
To = Annotated[str | None, QueryParameter(name="to", description="The last UTC day, itself included.")]
FromOfStats = Annotated[
    str | None, QueryParameter(name="from", description="The first UTC day; 29 days before the last if left out.")
]


class ListFormat(StrEnum):
    """How a list is answered."""

    JSON = "json"
    CSV = "csv"


@dataclass
class ListOrCsv(Operation):
    """An operation that answers with a list in JSON, or with all of it in CSV."""

    def __post_init__(self) -> None:
        content = self.responses["200"].content  # type: ignore[index, union-attr]
        content[CSV_MEDIA_TYPE] = OpenAPIMediaType(schema=Schema(type=OpenAPIType.STRING))  # type: ignore[index]


CallerRequest = Request[Caller, Any, Any]


@get("/api/v1/credits/balance", opt=needs(KeyScope.INFERENCE), summary="Your balance", responses=documented(404))
async def balance(request: CallerRequest, engine: NamedDependency[AsyncEngine]) -> Balance:
    """What the wallet holds, what open calls hold of it, and what is left for new ones."""
    async with reading(engine) as connection:
        return await read_balance(connection, request.user.wallet_id)


# ---- transactions


@get(
    "/api/v1/credits/transactions",
    opt=needs(KeyScope.INFERENCE),
    summary="Your transactions",
    responses=documented(400),
    operation_class=ListOrCsv,
)
async def transactions(  # noqa: PLR0913, PLR0917 - what can be asked
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
    type: FromQuery[CreditType | None] = None,  # noqa: A002 - errors name it as it is here
    first: From = None,
    last: To = None,
    key: Annotated[str | None, QueryParameter(description="The id of the key whose calls are wanted.")] = None,
    model: Annotated[str | None, QueryParameter(description="The model of the calls that are wanted.")] = None,
    format: FromQuery[ListFormat | None] = None,  # noqa: A002 - likewise
) -> Response[TransactionPage]:
    """Everything that ever changed the balance, newest first.

    With `format=csv`, or with `Accept: text/csv`, all of it at once instead of a page.
    """
    check_limit(limit)
    wanted = filter_of(type, first, last, key, model)
    wallet_id = request.user.wallet_id
    if format is ListFormat.CSV or (format is None and _prefers_csv(request)):
        lines = await transactions_csv(engine, wallet_id, wanted, cursor)
        headers = {"content-disposition": 'attachment; filename="transactions.csv"'}
        stream = Stream(lines, media_type=CSV_MEDIA_TYPE, headers=headers)
        return cast("Response[TransactionPage]", stream)  # the document says what else there is: see `ListOrCsv`
    return Response(await transaction_page(engine, wallet_id, wanted, limit, cursor))


def _prefers_csv(request: CallerRequest) -> bool:
    return request.accept.best_match([MediaType.JSON, CSV_MEDIA_TYPE]) == CSV_MEDIA_TYPE


# ---- stats


@get(
    "/api/v1/credits/stats",
    opt=needs(KeyScope.INFERENCE),
    summary="Your spending",
    responses=documented(400),
)
async def stats(
    request: CallerRequest, engine: NamedDependency[AsyncEngine], first: FromOfStats = None, last: To = None
) -> Stats:
    """What your calls add up to, in all and by day, model and key; days are those of UTC."""
    return await wallet_stats(engine, request.user.wallet_id, first, last)


# ---- charges


@get("/api/v1/credits/charges", opt=needs(KeyScope.INFERENCE), summary="Your calls", responses=documented(400))
async def charges(
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    limit: FromQuery[int] = PAGE_DEFAULT,
    cursor: FromQuery[str | None] = None,
) -> ChargePage:
    """The receipts of all calls, newest first, those too that are open or cost nothing."""
    return await charge_page(engine, request.user.wallet_id, limit, cursor)


@get(
    "/api/v1/credits/charges/{request_id:str}",
    opt=needs(KeyScope.INFERENCE),
    summary="The charge of one call",
    responses=documented(400, 404),
)
async def charge(request: CallerRequest, engine: NamedDependency[AsyncEngine], request_id: FromPath[str]) -> Charge:
    """What a call cost and why, by the `x-request-id` of its answer; admins may read anybody's."""
    caller = request.user
    sees_all = caller.is_admin and caller.scope.includes(KeyScope.ADMIN)
    try:
        return charge_of(await read_call(engine, request_id, wallet_id=None if sees_all else caller.wallet_id))
    except NotFound as exc:
        raise NotFound(f"There is no call {request_id!r} of yours.") from exc
