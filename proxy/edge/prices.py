"""Prices as they are shown: decimal strings of credits per million tokens, and for one image or request."""

from typing import Any

from proxy.pricing import TOKEN_CLASSES, Price, Rates
from proxy.units import format_credits

_PER_MILLION = 10**6


def shown_price(price: Price) -> dict[str, Any]:
    """`price` for people and programs; what is billed beside tokens is left out where it is free.

    So are caches of an hour that cost what others do.
    """
    shown: dict[str, Any] = {**_rates(price)}
    for name in ("image", "request"):
        nanos = getattr(price, name)
        if nanos:
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
