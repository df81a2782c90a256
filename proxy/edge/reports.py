"""Usage and margin for admins, from the sums by day: under `/api/v1/admin`, and `/api/v1/llm/usage`."""

from typing import Annotated

from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromQuery, QueryParameter
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.identity.keys import Scope
from proxy.pages import GROUPS_MAX
from proxy.reports import GroupBy
from proxy.shown.usage import MarginPage, UsageOverview, UsagePage, margin_page, usage_overview, usage_page

From = Annotated[
    str | None,
    QueryParameter(name="from", description="The first UTC day, such as 2026-11-01; by default 30 days are shown."),
]
To = Annotated[
    str | None, QueryParameter(name="to", description="The last UTC day, itself included; today by default.")
]


@get("/usage", summary="Usage", responses=documented(400))
async def usage(  # noqa: PLR0913, PLR0917 - what can be asked
    engine: NamedDependency[AsyncEngine],
    first: From = None,
    last: To = None,
    group_by: FromQuery[GroupBy] = GroupBy.DAY,
    limit: FromQuery[int] = GROUPS_MAX,
    cursor: FromQuery[str | None] = None,
) -> UsagePage:
    """What all users' calls add up to, by day, month, model, provider, user or key (by month: twelve, by default)."""
    return await usage_page(engine, (first, last), group_by, limit, cursor)


@get("/margin", summary="The margin", responses=documented(400))
async def margin(  # noqa: PLR0913, PLR0917 - likewise
    engine: NamedDependency[AsyncEngine],
    first: From = None,
    last: To = None,
    group_by: FromQuery[GroupBy] = GroupBy.PROVIDER,
    limit: FromQuery[int] = GROUPS_MAX,
    cursor: FromQuery[str | None] = None,
) -> MarginPage:
    """What the operator keeps of what was charged, and what calls may have cost that nobody paid for."""
    return await margin_page(engine, (first, last), group_by, limit, cursor)


@get("/api/v1/llm/usage", opt=needs(Scope.ADMIN), summary="Usage of the whole server", responses=documented(400))
async def overview(engine: NamedDependency[AsyncEngine], first: From = None, last: To = None) -> UsageOverview:
    """What all users' calls add up to, in all and by day, model, provider and user (admins only)."""
    return await usage_overview(engine, (first, last))


router = Router("/api/v1/admin", opt=needs(Scope.ADMIN), route_handlers=[usage, margin])
