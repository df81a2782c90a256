"""The markup: its rules, and what they make of a call."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from proxy.administration import Rule
from proxy.catalog import Catalog
from proxy.errors import BadRequest, NotFound
from proxy.pricing import TOOL_CLASSES, TOOL_USES_MAX, cost, provider_cost
from proxy.routing import Candidate, candidates
from proxy.shown.prices import shown_price
from proxy.units import Usage, format_credits, format_percent

Tokens = Annotated[int, Meta(ge=0, le=10**9)]
ToolUses = Annotated[int, Meta(ge=0, le=TOOL_USES_MAX)]


class Markup(msgspec.Struct):
    """The default rule."""

    percent: str


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
