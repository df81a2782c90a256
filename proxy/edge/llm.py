"""`/api/v1/llm/*` beside its calls: the balance, which providers serve, and switching them on and off."""

from collections.abc import Awaitable, Callable
from typing import Any

from litestar import Request, Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy import administration
from proxy.catalog import Catalog
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.identity.keys import Caller, Scope
from proxy.shown.credits import Balance, read_balance
from proxy.shown.providers import ProviderList, ProviderSwitched, provider_list
from proxy.storage.database import reading

CallerRequest = Request[Caller, Any, Any]
Refresh = Callable[[], Awaitable[None]]


async def switch(  # noqa: PLR0913 - what the framework hands to a handler
    request: CallerRequest, engine: AsyncEngine, catalog: Catalog, refresh: Refresh, name: str, *, is_enabled: bool
) -> ProviderSwitched:
    """Enable or disable a provider; here at once, in every other process within a second."""
    admin = request.user
    await administration.set_provider(engine, admin.user_id, catalog.providers, name, is_enabled=is_enabled)
    await refresh()
    return ProviderSwitched(name, is_enabled)


@get("/balance", opt=needs(Scope.INFERENCE), summary="Your balance", responses=documented(404))
async def simple_balance(request: CallerRequest, engine: NamedDependency[AsyncEngine]) -> Balance:
    """What the wallet holds, what open calls hold of it, and what is left for new ones."""
    async with reading(engine) as connection:
        return await read_balance(connection, request.user.wallet_id)


@get("/providers", sync_to_thread=False, summary="The providers", responses=documented(503, is_public=True))
def providers(catalog: NamedDependency[Catalog]) -> ProviderList:
    """The providers that serve new calls, with their models. Admins see all at `/api/v1/admin/providers`."""
    return ProviderList([item for item in provider_list(catalog).items if item.enabled])


@post(
    "/providers/{name:str}/enable",
    status_code=200,
    opt=needs(Scope.ADMIN),
    summary="Let a provider serve",
    responses=documented(400, 404, 409),
)
async def enable(
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    catalog: NamedDependency[Catalog],
    refresh: NamedDependency[Refresh],
    name: FromPath[str],
) -> ProviderSwitched:
    """Let a provider serve new calls (admins only)."""
    return await switch(request, engine, catalog, refresh, name, is_enabled=True)


@post(
    "/providers/{name:str}/disable",
    status_code=200,
    opt=needs(Scope.ADMIN),
    summary="Let a provider serve no more",
    responses=documented(400, 404),
)
async def disable(
    request: CallerRequest,
    engine: NamedDependency[AsyncEngine],
    catalog: NamedDependency[Catalog],
    refresh: NamedDependency[Refresh],
    name: FromPath[str],
) -> ProviderSwitched:
    """Send a provider no new calls (admins only); those in flight finish."""
    return await switch(request, engine, catalog, refresh, name, is_enabled=False)


router = Router("/api/v1/llm", route_handlers=[simple_balance, providers, enable, disable])
