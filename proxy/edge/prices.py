"""Prices as they are shown: decimal strings of credits per million tokens, and for one of what is billed beside."""

from typing import Any

from proxy.pricing import TOOL_CLASSES, Price, Rates
from proxy.units import TOKEN_CLASSES, format_credits

_PER_MILLION = 10**6


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
