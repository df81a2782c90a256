"""What usage costs: exact integer arithmetic, the same for the estimate and for the charge.

Because one function serves both, it is monotone where it matters: usage within the bound costs no more than
what was reserved for the bound.
"""

from collections.abc import Collection, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from functools import cached_property
from typing import Final, TypeVar

import msgspec

from proxy.units import (
    INPUT_CLASSES,
    MARKUP_BPS_WHOLE,
    NANOS_MAX,
    NANOS_PER_CREDIT,
    OUTPUT_CLASSES,
    TOKEN_CLASSES,
    Nanos,
    Usage,
)

_UNITS_PER_PRICE = 10**6
_CHARGE_DIVISOR = _UNITS_PER_PRICE * MARKUP_BPS_WHOLE

TOOL_CLASSES: Final = ("web_search", "file_search", "code_interpreter")
"""Tools that the provider runs, and bills by their uses; of a code interpreter each container is one."""


class Rates(msgspec.Struct, frozen=True, dict=True):
    """Nano-dollars per million tokens of each class.

    `cache_write_1h` is 0 where it is that of `cache_write`, below which it never is.
    """

    input: int
    cached_input: int
    cache_write: int
    audio_input: int
    output: int
    audio_output: int
    cache_write_1h: int = 0

    @cached_property
    def dearest_input(self) -> int:
        """The most that any input token can cost."""
        return max(self.input, self.cached_input, self.cache_write, self.cache_write_1h, self.audio_input)

    @cached_property
    def dearest_output(self) -> int:
        """The most that any output token can cost."""
        return max(self.output, self.audio_output)


class LongContext(Rates, frozen=True, kw_only=True, omit_defaults=True):
    """The rates of all tokens of a call that has more than `above_tokens` of input, of every class together."""

    above_tokens: int


class Price(Rates, frozen=True, kw_only=True, omit_defaults=True):
    """What one model costs at one provider, in one service tier: the rates of its tokens, and what is billed beside.

    `image` and `request` are nano-dollars per million images and requests, and so are the prices of tools per million
    uses: None where nobody has said one, so that they are not for sale. `long_context` goes from the lowest
    threshold to the highest, and no class gets cheaper on the way (see `stepped`): else a bound of the input would not
    bound the cost. `service_tier` is None for the standard one.
    """

    image: int = 0
    request: int = 0
    web_search: int | None = None
    file_search: int | None = None
    code_interpreter: int | None = None
    long_context: tuple[LongContext, ...] = ()
    service_tier: str | None = None

    @cached_property
    def as_json(self) -> str:
        """The price in JSON, as receipts have it."""
        return msgspec.json.encode(self).decode()

    @cached_property
    def without_writes(self) -> "Price":
        """The price of calls that write nothing to a cache."""
        none = {"cache_write": 0, "cache_write_1h": 0}
        steps = tuple(msgspec.structs.replace(step, **none) for step in self.long_context)
        return msgspec.structs.replace(self, **none, long_context=steps)

    def at(self, input_tokens: int) -> Rates:
        """The rates of a call with so much input."""
        rates: Rates = self
        for step in self.long_context:
            if input_tokens > step.above_tokens:
                rates = step
        return rates

    def marked_up(self, markup_bps: int) -> "Price":
        """This price with the markup on it, for people: each number is rounded up, where a charge is only once."""
        steps = tuple(
            msgspec.structs.replace(step, **_marked_up(step, TOKEN_CLASSES, markup_bps)) for step in self.long_context
        )
        tools = [name for name in TOOL_CLASSES if getattr(self, name) is not None]
        numbers = _marked_up(self, (*TOKEN_CLASSES, "image", "request", *tools), markup_bps)
        return msgspec.structs.replace(self, **numbers, long_context=steps)


def _marked_up(rates: Rates, names: Sequence[str], markup_bps: int) -> dict[str, int]:
    whole = MARKUP_BPS_WHOLE + markup_bps
    return {name: -(-getattr(rates, name) * whole // MARKUP_BPS_WHOLE) for name in names}


def price_nanos_per_mtok(dollars_per_mtok: Decimal) -> tuple[int, bool]:
    """A price in nano-dollars per million tokens, and whether it is exact; what is not a whole number is rounded up."""
    nanos = dollars_per_mtok * NANOS_PER_CREDIT
    whole = int(nanos.to_integral_value(rounding=ROUND_CEILING))
    return whole, whole == nanos


def costs(usage: Usage, price: Price, markup_bps: int) -> tuple[Nanos, Nanos]:
    """`cost` and `provider_cost`."""
    total = _provider_total(usage, price)
    return _charge(total, markup_bps), -(-total // _UNITS_PER_PRICE)


def cost(usage: Usage, price: Price, markup_bps: int) -> Nanos:
    """What `usage` costs the caller, in nano-credits, rounded up once.

    Multiplies first and divides once, so nothing is lost before the single rounding.
    """
    return _charge(_provider_total(usage, price), markup_bps)


def provider_cost(usage: Usage, price: Price) -> Nanos:
    """What `usage` costs the operator, in nano-dollars, rounded up."""
    return _charge(_provider_total(usage, price), 0)


def billed(usage: Usage, price: Price, images: int) -> Usage:
    """The tokens of a call with what else of it is billed at `price`: itself, and its images."""
    if not price.request and not price.image:
        return usage
    return msgspec.structs.replace(usage, requests=1 if price.request else 0, images=images if price.image else 0)


def bound(  # noqa: PLR0913 - what the cost depends on
    input_tokens: int,
    output_tokens: int,
    price: Price,
    markup_bps: int,
    *,
    images: int = 0,
    tools: Collection[str] = (),
    tool_uses: int = 0,
) -> Nanos:
    """The most that a call of at most so many tokens, images and uses of `tools` can cost the caller.

    Whatever the tokens' classes, and whichever of the tools are used.
    """
    rates = price.at(input_tokens) if price.long_context else price
    tokens = input_tokens * rates.dearest_input + output_tokens * rates.dearest_output
    beside = _beside(price, images, tools, tool_uses) if images or tools else price.request
    return _charge(tokens + beside, markup_bps)


def _beside(price: Price, images: int, tools: Collection[str], tool_uses: int) -> int:
    """The most that is billed beside the tokens."""
    beside = price.request + images * price.image
    if not tools:
        return beside
    return beside + tool_uses * max(_tool_price(price, name) for name in tools)


def _tool_price(price: Price, name: str) -> int:
    said: int | None = getattr(price, name)
    return said or 0


def tokens_payable_max(price: Price, markup_bps: int) -> int:
    """How many tokens of any class can be charged for in 64 bits, beside what else is billed of a call."""
    rates = price.long_context[-1] if price.long_context else price
    dearest = max(rates.dearest_input, rates.dearest_output, 1)
    payable = NANOS_MAX * _UNITS_PER_PRICE * MARKUP_BPS_WHOLE // (MARKUP_BPS_WHOLE + markup_bps)
    return max(0, payable - _beside(price, IMAGES_MAX, TOOL_CLASSES, TOOL_USES_MAX)) // dearest


IMAGES_MAX = 20_000
"""In one call: as many as a request may have parts."""

TOOL_USES_MAX = 10_000
"""In one call."""


def dearest_usage(  # noqa: PLR0913 - as `bound`
    input_tokens: int,
    output_tokens: int,
    price: Price,
    *,
    images: int = 0,
    tools: Collection[str] = (),
    tool_uses: int = 0,
) -> Usage:
    """The usage of so many tokens, images and uses of `tools` that costs the most: its `cost` is their `bound`."""
    rates = price.at(input_tokens)
    dearest_input = max(INPUT_CLASSES, key=lambda name: getattr(rates, name))
    dearest_output = max(OUTPUT_CLASSES, key=lambda name: getattr(rates, name))
    most = {dearest_input: input_tokens, dearest_output: output_tokens}
    if tools:
        most[max(tools, key=lambda name: _tool_price(price, name))] = tool_uses
    return billed(Usage(**most), price, images)


def output_tokens_affordable(  # noqa: PLR0913 - as `bound`
    amount: Nanos,
    input_tokens: int,
    price: Price,
    markup_bps: int,
    *,
    images: int = 0,
    tools: Collection[str] = (),
    tool_uses: int = 0,
) -> int | None:
    """How many output tokens `amount` covers beside `input_tokens`; negative when not even the input is covered.

    None when output is free, so that any number is covered. Exact: `bound` of the answer is within `amount`, and
    of one token more it is not.
    """
    rates = price.at(input_tokens)
    total = amount * _CHARGE_DIVISOR // (MARKUP_BPS_WHOLE + markup_bps)
    left = total - input_tokens * rates.dearest_input - _beside(price, images, tools, tool_uses)
    if left < 0:
        return -1
    if not rates.dearest_output:
        return None
    return left // rates.dearest_output


def _provider_total(usage: Usage, price: Price) -> int:
    rates = price.at(usage.input_tokens) if price.long_context else price
    is_plain = not (usage.cache_write_1h or usage.web_search or usage.file_search or usage.code_interpreter)
    rare = 0 if is_plain else _rare_total(usage, rates, price)
    return (
        usage.input * rates.input
        + usage.cached_input * rates.cached_input
        + usage.cache_write * rates.cache_write
        + usage.audio_input * rates.audio_input
        + usage.output * rates.output
        + usage.audio_output * rates.audio_output
        + usage.images * price.image
        + usage.requests * price.request
        + rare
    )


def _rare_total(usage: Usage, rates: Rates, price: Price) -> int:
    tools: int = sum(getattr(usage, name) * _tool_price(price, name) for name in TOOL_CLASSES)
    return usage.cache_write_1h * max(rates.cache_write, rates.cache_write_1h) + tools


def _charge(total: int, markup_bps: int) -> Nanos:
    return -(-total * (MARKUP_BPS_WHOLE + markup_bps) // _CHARGE_DIVISOR)


# ---- making prices

_AnyRates = TypeVar("_AnyRates", bound=Rates)


def raised(rates: _AnyRates, *others: Rates) -> _AnyRates:
    """`rates` with each class at least as dear as in all of `others`."""
    dearest = {name: max(getattr(each, name) for each in (rates, *others)) for name in TOKEN_CLASSES}
    return msgspec.structs.replace(rates, **dearest)


def stepped(price: Price) -> tuple[Price, bool]:
    """`price` with no step of its long context below the one before, and whether it was so already."""
    steps: list[LongContext] = []
    floor: Rates = price
    for step in sorted(price.long_context, key=lambda step: step.above_tokens):
        steps.append(raised(step, floor))
        floor = steps[-1]
    changed = msgspec.structs.replace(price, long_context=tuple(steps))
    return changed, changed == price


def dearest_price(prices: Sequence[Price]) -> Price:
    """The price that costs at least as much as each of `prices`, whatever the usage."""
    if len(prices) == 1:
        return prices[0]
    first = prices[0]
    thresholds = sorted({step.above_tokens for price in prices for step in price.long_context})
    tools = {name: max(said) for name in TOOL_CLASSES if (said := _said(prices, name))}
    dearest = Price(
        **{name: max(getattr(price, name) for price in prices) for name in (*TOKEN_CLASSES, "image", "request")},
        long_context=tuple(
            raised(LongContext(**_rates(first.at(above + 1)), above_tokens=above), *(p.at(above + 1) for p in prices))
            for above in thresholds
        ),
    )
    return msgspec.structs.replace(dearest, **tools)


def _said(prices: Sequence[Price], tool: str) -> list[int]:
    """What those of `prices` say that have one for `tool`."""
    return [said for price in prices if (said := getattr(price, tool)) is not None]


def is_no_dearer(price: Price, than: Price) -> bool:
    """Whether no usage costs more at `price` than at `than`."""
    if price.image > than.image or price.request > than.request:
        return False
    if any(_tool_price(price, name) > _tool_price(than, name) for name in TOOL_CLASSES):
        return False
    inputs = [0, *(step.above_tokens + 1 for step in (*price.long_context, *than.long_context))]
    return all(
        getattr(price.at(tokens), name) <= getattr(than.at(tokens), name) for tokens in inputs for name in TOKEN_CLASSES
    )


def _rates(rates: Rates) -> dict[str, int]:
    return {name: getattr(rates, name) for name in TOKEN_CLASSES}


# ---- markup


class MarkupKind(StrEnum):
    """What a rule is for, the most specific first."""

    USER = "user"
    MODEL = "model"
    PROVIDER = "provider"
    DEFAULT = "default"


class Markup(msgspec.Struct, frozen=True):
    """A markup with the rule that it comes from; `subject` is None for the default one."""

    kind: MarkupKind
    subject: str | None
    bps: int


class MarkupRules(msgspec.Struct, frozen=True):
    """Every rule there is, in basis points by its subject.

    Users go by their ids; models by the name that a client asks for, by `provider/model`, or by their name at any
    provider, in this order.
    """

    default_bps: int
    users: Mapping[str, int] = {}
    models: Mapping[str, int] = {}
    providers: Mapping[str, int] = {}

    def of_model(self, asked: str, provider: str, model: str) -> Markup:
        """The markup of what serves the name `asked`, for everybody without a rule of their own."""
        for subject in (asked, f"{provider}/{model}", model):
            if subject in self.models:
                return Markup(MarkupKind.MODEL, subject, self.models[subject])
        if provider in self.providers:
            return Markup(MarkupKind.PROVIDER, provider, self.providers[provider])
        return Markup(MarkupKind.DEFAULT, None, self.default_bps)

    def of_call(self, user_id: str | None, asked: str, provider: str, model: str) -> Markup:
        """The markup of a call: the user's own rule goes before all others."""
        if user_id is not None and user_id in self.users:
            return Markup(MarkupKind.USER, user_id, self.users[user_id])
        return self.of_model(asked, provider, model)
