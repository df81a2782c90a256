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
from proxy.administration import NAME_CHARACTERS_MAX, PriceRecord, Rule, parts_of
from proxy.administration.config import set_default_markup
from proxy.catalog import Catalog
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.edge.llm import ProviderItem, ProviderList, Refresh, provider_list
from proxy.edge.llm import disable as disable_provider
from proxy.edge.llm import enable as enable_provider
from proxy.edge.prices import shown_price
from proxy.errors import BadRequest, NotFound
from proxy.identity.keys import Caller, Scope
from proxy.identity.users import find_user
from proxy.pricing import TOOL_CLASSES, TOOL_USES_MAX, MarkupKind, cost, provider_cost
from proxy.routing import Candidate, candidates
from proxy.settings import Settings
from proxy.storage.database import reading
from proxy.units import Usage, format_credits, format_instant, format_percent

AdminRequest = Request[Caller, Any, Any]
Percent = str | int | float
Tokens = Annotated[int, Meta(ge=0, le=10**9)]
ToolUses = Annotated[int, Meta(ge=0, le=TOOL_USES_MAX)]


class Markup(msgspec.Struct):
    """The default rule."""

    percent: str


class MarkupChange(msgspec.Struct, forbid_unknown_fields=True):
    """A percentage with at most two decimals, such as `"15"`."""

    percent: Percent


class NewRule(msgspec.Struct, forbid_unknown_fields=True):
    """A rule: for a user (id or e-mail address), a model (as clients name it, or `provider/model`) or a provider."""

    kind: MarkupKind
    subject: Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX)]
    percent: Percent


class RuleList(msgspec.Struct):
    """The rules beside the default one, the most specific kind first."""

    items: list[Rule]
    next_cursor: None = None


class Hypothesis(msgspec.Struct, forbid_unknown_fields=True):
    """A call that might be made: by a user, or by somebody without a rule of their own."""

    model: str
    user: str | None = None
    provider: str | None = None
    service_tier: str | None = None
    input_tokens: Tokens = 0
    cached_input_tokens: Tokens = 0
    cache_write_tokens: Tokens = 0
    cache_write_1h_tokens: Tokens = 0
    audio_input_tokens: Tokens = 0
    output_tokens: Tokens = 0
    audio_output_tokens: Tokens = 0
    images: Annotated[int, Meta(ge=0, le=20_000)] = 0
    web_search_uses: ToolUses = 0
    file_search_uses: ToolUses = 0
    code_interpreter_uses: ToolUses = 0


class AppliedRule(msgspec.Struct):
    """The rule that decides the markup; `subject` is null for the default one."""

    kind: str
    subject: str | None
    percent: str


class Quote(msgspec.Struct):
    """What the call would cost at one provider."""

    provider: str
    model: str
    rule: AppliedRule
    prices: dict[str, Any]
    provider_cost: str
    markup: str
    charged: str


class Preview(msgspec.Struct):
    """One quote for each who may serve the call, the preferred one first; `charged` and `rule` are of that one."""

    model: str
    charged: str
    provider_cost: str
    rule: AppliedRule
    items: list[Quote]


class PriceChange(msgspec.Struct, forbid_unknown_fields=True):
    """The operator's own price of `provider/model`, with the fields of `[prices]` in the configuration."""

    target: str
    price: dict[str, Any]


class PriceItem(msgspec.Struct):
    """A model on offer, at the provider's prices."""

    target: str
    prices: dict[str, Any]
    service_tiers: dict[str, dict[str, Any]]
    context_tokens: int | None
    max_output_tokens: int | None
    markup_percent: str


class PriceItems(msgspec.Struct):
    """What is on offer."""

    items: list[PriceItem]
    next_cursor: None = None


class PricePast(msgspec.Struct):
    """One row of the price book: from `valid_from` on; `entry` is null where a price was taken back."""

    target: str
    source: str
    version: str
    valid_from: str
    entry: dict[str, Any] | None


class PricePasts(msgspec.Struct):
    """All that the book ever said of a model, the newest first; amounts in nano-dollars per million."""

    items: list[PricePast]
    next_cursor: None = None


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


def quoted(catalog: Catalog, user_id: str | None, data: Hypothesis) -> Preview:
    """What the call that `data` describes would be charged to a user. Raises `BadRequest`, `NotFound`."""
    quotes = [
        _quote(catalog, user_id, data, candidate)
        for candidate in candidates(catalog.models, data.model)
        if data.provider in {None, candidate.provider}
    ]
    if not quotes:
        raise NotFound(f"The provider {data.provider!r} does not serve {data.model!r}.")
    first = quotes[0]
    return Preview(data.model, first.charged, first.provider_cost, first.rule, quotes)


def _quote(catalog: Catalog, user_id: str | None, data: Hypothesis, candidate: Candidate) -> Quote:
    rule = catalog.markup(user_id, data.model, candidate)
    price = candidate.price if data.service_tier is None else candidate.price_bounding(data.service_tier)
    if price is None:
        raise BadRequest("That service tier is not priced here.", param="service_tier", code="unsupported_parameter")
    usage = Usage(
        input=data.input_tokens,
        cached_input=data.cached_input_tokens,
        cache_write=data.cache_write_tokens,
        cache_write_1h=data.cache_write_1h_tokens,
        audio_input=data.audio_input_tokens,
        output=data.output_tokens,
        audio_output=data.audio_output_tokens,
        images=data.images,
        requests=1,
        web_search=data.web_search_uses,
        file_search=data.file_search_uses,
        code_interpreter=data.code_interpreter_uses,
    )
    for name in TOOL_CLASSES:
        if getattr(usage, name) and getattr(price, name) is None:
            raise BadRequest(f"'{name}' is not priced here.", param=f"{name}_uses", code="unsupported_parameter")
    theirs, charged = provider_cost(usage, price), cost(usage, price, rule.bps)
    return Quote(
        provider=candidate.provider,
        model=candidate.model,
        rule=AppliedRule(rule.kind, rule.subject, format_percent(rule.bps)),
        prices=shown_price(price),
        provider_cost=format_credits(theirs),
        markup=format_credits(charged - theirs),
        charged=format_credits(charged),
    )


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


def price_list(catalog: Catalog, provider: str | None, model: str | None) -> PriceItems:
    """The models on offer at the provider's prices, of one provider or of one model unless those are None."""
    found = {candidate.target: candidate for offered in catalog.models.values() for candidate in offered}
    return PriceItems(
        [
            PriceItem(
                target=target,
                prices=shown_price(candidate.price),
                service_tiers={name: shown_price(price) for name, price in candidate.service_prices.items()},
                context_tokens=candidate.context_tokens,
                max_output_tokens=candidate.output_tokens_max,
                markup_percent=format_percent(catalog.markup(None, target, candidate).bps),
            )
            for target, candidate in sorted(found.items())
            if provider in {None, candidate.provider} and model in {None, candidate.model, target}
        ]
    )


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


def past_of(row: PriceRecord) -> PricePast:
    """A row of the price book, as it is shown."""
    return PricePast(row.target, row.source, row.version, format_instant(row.valid_from), row.entry)


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
