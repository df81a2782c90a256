"""What usage costs: exact integer arithmetic, the same for the estimate and for the charge.

Because one function serves both, it is monotone where it matters: usage within the bound costs no more than
what was reserved for the bound.
"""

from decimal import ROUND_CEILING, Decimal

import msgspec

from proxy.units import MARKUP_BPS_WHOLE, NANOS_MAX, NANOS_PER_CREDIT, Nanos, Usage

_UNITS_PER_PRICE = 10**6
_CHARGE_DIVISOR = _UNITS_PER_PRICE * MARKUP_BPS_WHOLE


class Price(msgspec.Struct, frozen=True):
    """Nano-dollars per million tokens of each usage class of one model at one provider."""

    input: int
    cached_input: int
    cache_write: int
    audio_input: int
    output: int
    audio_output: int

    @property
    def dearest_input(self) -> int:
        """The most that any input token can cost."""
        return max(self.input, self.cached_input, self.cache_write, self.audio_input)

    @property
    def dearest_output(self) -> int:
        """The most that any output token can cost."""
        return max(self.output, self.audio_output)


def price_nanos_per_mtok(dollars_per_mtok: Decimal) -> tuple[int, bool]:
    """A price in nano-dollars per million tokens, and whether it is exact; what is not a whole number is rounded up."""
    nanos = dollars_per_mtok * NANOS_PER_CREDIT
    whole = int(nanos.to_integral_value(rounding=ROUND_CEILING))
    return whole, whole == nanos


def cost(usage: Usage, price: Price, markup_bps: int) -> Nanos:
    """What `usage` costs the caller, in nano-credits, rounded up once.

    Multiplies first and divides once, so nothing is lost before the single rounding.
    """
    return _charge(_provider_total(usage, price), markup_bps)


def provider_cost(usage: Usage, price: Price) -> Nanos:
    """What `usage` costs the operator, in nano-dollars, rounded up."""
    return _charge(_provider_total(usage, price), 0)


def bound(input_tokens: int, output_tokens: int, price: Price, markup_bps: int) -> Nanos:
    """The most that a call of at most so many tokens can cost the caller, whatever their classes."""
    return _charge(input_tokens * price.dearest_input + output_tokens * price.dearest_output, markup_bps)


def tokens_payable_max(price: Price, markup_bps: int) -> int:
    """How many tokens of any class can be charged for in 64 bits."""
    dearest = max(price.dearest_input, price.dearest_output, 1)
    return NANOS_MAX * _UNITS_PER_PRICE // dearest * MARKUP_BPS_WHOLE // (MARKUP_BPS_WHOLE + markup_bps)


def dearest_usage(input_tokens: int, output_tokens: int, price: Price) -> Usage:
    """The usage of so many tokens that costs the most: its `cost` is their `bound`."""
    dearest_input = max(("input", "cached_input", "cache_write", "audio_input"), key=lambda name: getattr(price, name))
    dearest_output = max(("output", "audio_output"), key=lambda name: getattr(price, name))
    return Usage(**{dearest_input: input_tokens, dearest_output: output_tokens})


def output_tokens_affordable(amount: Nanos, input_tokens: int, price: Price, markup_bps: int) -> int | None:
    """How many output tokens `amount` covers beside `input_tokens`; negative when not even the input is covered.

    None when output is free, so that any number is covered. Exact: `bound` of the answer is within `amount`, and
    of one token more it is not.
    """
    total = amount * _CHARGE_DIVISOR // (MARKUP_BPS_WHOLE + markup_bps)
    left = total - input_tokens * price.dearest_input
    if left < 0:
        return -1
    if not price.dearest_output:
        return None
    return left // price.dearest_output


def _provider_total(usage: Usage, price: Price) -> int:
    return (
        usage.input * price.input
        + usage.cached_input * price.cached_input
        + usage.cache_write * price.cache_write
        + usage.audio_input * price.audio_input
        + usage.output * price.output
        + usage.audio_output * price.audio_output
    )


def _charge(total: int, markup_bps: int) -> Nanos:
    return -(-total * (MARKUP_BPS_WHOLE + markup_bps) // _CHARGE_DIVISOR)
