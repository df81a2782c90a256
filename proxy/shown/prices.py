"""Prices: decimal strings of credits per million tokens, and for one of what is billed beside."""

from typing import Any

import msgspec

from proxy.administration import PriceRecord
from proxy.catalog import Catalog
from proxy.pricing import TOOL_CLASSES, Price, Rates
from proxy.units import TOKEN_CLASSES, format_credits, format_instant, format_percent

_PER_MILLION = 10**6


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


def past_of(row: PriceRecord) -> PricePast:
    """A row of the price book, as it is shown."""
    return PricePast(row.target, row.source, row.version, format_instant(row.valid_from), row.entry)


def shown_price(price: Price) -> dict[str, Any]:
    """`price` for people and programs.

    Left out are images and requests that are free, tools that are not for sale, and an hour in the cache where it costs
    what any other time there does.
    """
    shown: dict[str, Any] = {**_rates(price)}
    for name in ("image", "request"):
        nanos = getattr(price, name)
        if nanos:
            shown[name] = format_credits(-(-nanos // _PER_MILLION))
    for name in TOOL_CLASSES:
        nanos = getattr(price, name)
        if nanos is not None:
            shown[name] = format_credits(-(-nanos // _PER_MILLION))
    if price.long_context:
        shown["long_context"] = [{"above_tokens": step.above_tokens, **_rates(step)} for step in price.long_context]
    if price.service_tier is not None:
        shown["service_tier"] = price.service_tier
    return shown


def _rates(rates: Rates) -> dict[str, str]:
    shown = {name: format_credits(getattr(rates, name)) for name in TOKEN_CLASSES}
    if not rates.cache_write_1h:
        del shown["cache_write_1h"]
    return shown
