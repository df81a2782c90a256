"""`/api/v1/admin/*`: markup, providers and prices, for admins.

A change counts for new calls here at once and in every other process within a second, never for calls in flight.
"""

from typing import Annotated, Any

import msgspec
from litestar import Request, Router, delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy import administration
from proxy.administration import NAME_CHARACTERS_MAX, Rule, parts_of
from proxy.administration.config import set_default_markup
from proxy.catalog import Catalog
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.edge.llm import Refresh
from proxy.edge.llm import disable as disable_provider
from proxy.edge.llm import enable as enable_provider
from proxy.errors import BadRequest, NotFound
from proxy.identity.keys import Caller, Scope
from proxy.identity.users import find_user
from proxy.pricing import MarkupKind
from proxy.settings import Settings
from proxy.shown.markup import Hypothesis, Markup, Preview, RuleList, quoted
from proxy.shown.prices import PriceItems, PricePast, PricePasts, past_of, price_list
from proxy.shown.providers import ProviderItem, ProviderList, provider_list
from proxy.storage.database import reading
from proxy.units import format_percent

AdminRequest = Request[Caller, Any, Any]
Percent = str | int | float


class MarkupChange(msgspec.Struct, forbid_unknown_fields=True):
    """A percentage with at most two decimals, such as `"15"`."""

    percent: Percent


class NewRule(msgspec.Struct, forbid_unknown_fields=True):
    """A rule: for a user (id or e-mail address), a model (as clients name it, or `provider/model`) or a provider."""

    kind: MarkupKind
    subject: Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX)]
    percent: Percent


class PriceChange(msgspec.Struct, forbid_unknown_fields=True):
    """The operator's own price of `provider/model`, with the fields of `[prices]` in the configuration."""

    target: str
    price: dict[str, Any]


# ---- markup


_ERRORS = documented(400, 404, 409, 413)


@get("/markup", summary="The default markup", responses=_ERRORS)
async def markup(catalog: NamedDependency[Catalog]) -> Markup:
    """The percentage where no rule says otherwise."""
    return Markup(format_percent(catalog.rules.default_bps))


@put("/markup", summary="Set the default markup", responses=_ERRORS)
async def set_markup(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    settings: NamedDependency[Settings],
    refresh: NamedDependency[Refresh],
    data: JSONBody[MarkupChange],
) -> Markup:
    """Set the percentage where no rule says otherwise: the setting `markup_percent`."""
    percent = await set_default_markup(engine, settings, request.user.user_id, data.percent)
    await refresh()
    return Markup(percent)


@get("/markup/rules", summary="The rules", responses=_ERRORS)
async def rules(engine: NamedDependency[AsyncEngine]) -> RuleList:
    """The rules beside the default one."""
    return RuleList(await administration.rules(engine))


@post("/markup/rules", summary="Add a rule", responses=_ERRORS)
async def add_rule(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    catalog: NamedDependency[Catalog],
    refresh: NamedDependency[Refresh],
    data: JSONBody[NewRule],
) -> Rule:
    """Add a rule; a user's goes before a model's, and that before a provider's."""
    admin = request.user
    if data.kind is MarkupKind.DEFAULT:
        raise BadRequest("The default rule is set at /api/v1/admin/markup.", param="kind", code="invalid_value")
    subject = await _user_id(engine, data.subject) if data.kind is MarkupKind.USER else data.subject
    rule = await administration.add_rule(engine, admin.user_id, catalog.providers, data.kind, subject, data.percent)
    await refresh()
    return rule


@put("/markup/rules/{rule_id:str}", summary="Change a rule", responses=_ERRORS)
async def change_rule(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    refresh: NamedDependency[Refresh],
    rule_id: FromPath[str],
    data: JSONBody[MarkupChange],
) -> Rule:
    """Give a rule another percentage."""
    rule = await administration.change_rule(engine, request.user.user_id, rule_id, data.percent)
    await refresh()
    return rule


@delete("/markup/rules/{rule_id:str}", summary="Remove a rule", responses=_ERRORS)
async def remove_rule(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    refresh: NamedDependency[Refresh],
    rule_id: FromPath[str],
) -> None:
    """Take a rule away."""
    await administration.remove_rule(engine, request.user.user_id, rule_id)
    await refresh()


@post("/markup/preview", status_code=200, summary="What a call would cost", responses=_ERRORS)
async def preview(
    engine: NamedDependency[AsyncEngine],
    catalog: NamedDependency[Catalog],
    data: JSONBody[Hypothesis],
) -> Preview:
    """What a hypothetical call would be charged, and by which rule."""
    return quoted(catalog, None if data.user is None else await _user_id(engine, data.user), data)


async def _user_id(engine: AsyncEngine, user: str) -> str:
    """The id of a user, given by it or by e-mail address. Raises `NotFound`, and `BadRequest` for neither."""
    async with reading(engine) as connection:
        return (await find_user(connection, user)).id


# ---- providers


@get("/providers", sync_to_thread=False, summary="The providers", responses=_ERRORS)
def providers(catalog: NamedDependency[Catalog]) -> ProviderList:
    """Every provider, and whether it serves new calls."""
    return provider_list(catalog)


@get("/providers/{name:str}", sync_to_thread=False, summary="One provider", responses=_ERRORS)
def provider(catalog: NamedDependency[Catalog], name: FromPath[str]) -> ProviderItem:
    """One provider."""
    for item in provider_list(catalog).items:
        if item.name == name:
            return item
    raise NotFound(f"There is no provider {name!r} in the configuration.")


# ---- prices


@get("/prices", sync_to_thread=False, summary="The prices", responses=_ERRORS)
def prices(
    catalog: NamedDependency[Catalog],
    provider: FromQuery[str | None] = None,
    model: FromQuery[str | None] = None,
) -> PriceItems:
    """What the models on offer cost the operator, of one provider or of one model if asked so."""
    return price_list(catalog, provider, model)


@get("/prices/history", summary="The history of a price", responses=_ERRORS)
async def price_history(engine: NamedDependency[AsyncEngine], target: FromQuery[str]) -> PricePasts:
    """All that the price book ever said of `provider/model`."""
    return PricePasts([past_of(row) for row in await administration.price_history(engine, parts_of(target))])


@put("/prices", summary="Set a price", responses=_ERRORS)
async def set_price(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    catalog: NamedDependency[Catalog],
    refresh: NamedDependency[Refresh],
    data: JSONBody[PriceChange],
) -> PricePast:
    """Put a price of your own before that of the list; what the configuration says goes before both."""
    target, entry = parts_of(data.target), administration.entry_from(data.price)
    written = await administration.set_price(engine, request.user.user_id, catalog.providers, target, entry)
    await refresh()
    return past_of(written)


@delete("/prices", summary="Take a price back", responses=_ERRORS)
async def remove_price(
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    catalog: NamedDependency[Catalog],
    refresh: NamedDependency[Refresh],
    target: FromQuery[str],
) -> None:
    """Take a price of your own back: that of the list counts again."""
    await administration.set_price(engine, request.user.user_id, catalog.providers, parts_of(target), None)
    await refresh()


router = Router(
    "/api/v1/admin",
    opt=needs(Scope.ADMIN),
    route_handlers=[
        markup,
        set_markup,
        rules,
        add_rule,
        change_rule,
        remove_rule,
        preview,
        providers,
        provider,
        enable_provider,
        disable_provider,
        prices,
        price_history,
        set_price,
        remove_price,
    ],
)
