from decimal import Decimal
from fractions import Fraction
from math import ceil

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.pricing import (
    TOOL_CLASSES,
    LongContext,
    Markup,
    MarkupRules,
    Price,
    billed,
    bound,
    cost,
    costs,
    dearest_price,
    dearest_usage,
    is_no_dearer,
    output_tokens_affordable,
    price_nanos_per_mtok,
    provider_cost,
    stepped,
    tokens_payable_max,
)
from proxy.units import NANOS_MAX, TOKEN_CLASSES, Usage

rates = st.integers(0, 10**14)
tokens = st.integers(0, 2_000_000)
steps = st.builds(LongContext, *[rates] * 7, above_tokens=tokens)
raw_prices = st.builds(
    Price,
    *[rates] * 7,
    image=st.integers(0, 10**15),
    request=st.integers(0, 10**15),
    **{name: st.none() | st.integers(0, 10**15) for name in TOOL_CLASSES},
    long_context=st.lists(steps, max_size=3, unique_by=lambda step: step.above_tokens).map(tuple),
)
prices = raw_prices.map(lambda price: stepped(price)[0])
images = st.integers(0, 50)
uses = st.integers(0, 50)
usages = st.builds(Usage, *[tokens] * 6, cache_write_1h=tokens, **dict.fromkeys(TOOL_CLASSES, uses))
tools = st.lists(st.sampled_from(TOOL_CLASSES), unique=True).map(tuple)
markups = st.integers(0, 1_000_000)


def test_ten_cents_at_fifteen_percent():
    """A provider's cost of $0.10 books 0.115 credits."""
    price = Price(input=10**9, cached_input=0, cache_write=0, audio_input=0, output=0, audio_output=0)
    usage = Usage(input=100_000)
    assert provider_cost(usage, price) == 100_000_000
    assert cost(usage, price, 1500) == 115_000_000


def test_dollars_become_nanos_exactly_or_are_rounded_up_and_said():
    """A price that is not a whole number of nano-dollars costs the next one, and the caller is told."""
    assert price_nanos_per_mtok(Decimal("0.15")) == (150_000_000, True)
    assert price_nanos_per_mtok(Decimal("0.0000000001")) == (1, False)


@given(usages, prices, markups, images)
def test_what_a_settle_needs_of_a_price(usage, price, bps, images):
    """Both amounts at once, and the price as a receipt keeps it."""
    usage = billed(usage, price, images)
    assert costs(usage, price, bps) == (cost(usage, price, bps), provider_cost(usage, price))
    assert msgspec.json.decode(price.as_json, type=Price) == price


@given(usages, prices, markups, images)
def test_cost_is_rounded_up_once(usage, price, bps, images):
    """The cost is the exact product, rounded up to the next nano-credit and no further."""
    usage = billed(usage, price, images)
    reached = [price, *(step for step in price.long_context if usage.input_tokens > step.above_tokens)]
    rates = {name: getattr(reached[-1], name) for name in TOKEN_CLASSES}
    rates["cache_write_1h"] = max(rates["cache_write_1h"], rates["cache_write"])
    total = sum(getattr(usage, name) * rate for name, rate in rates.items())
    total += sum(getattr(usage, name) * (getattr(price, name) or 0) for name in TOOL_CLASSES)
    exact = Fraction(total + usage.images * price.image + usage.requests * price.request, 10**6)
    assert provider_cost(usage, price) == ceil(exact)
    assert cost(usage, price, bps) == ceil(exact * (10_000 + bps) / 10_000)


@given(usages, prices, markups, images, tokens, tokens)
def test_what_is_within_the_bound_costs_no_more_than_the_bound(usage, price, bps, images, more_in, more_out):
    """Whatever classes the tokens fall into, and below however many of them, the estimate covers the charge."""
    uses = {"tools": TOOL_CLASSES, "tool_uses": usage.tool_uses}
    held = bound(usage.input_tokens + more_in, usage.output_tokens + more_out, price, bps, images=images, **uses)
    assert cost(billed(usage, price, images), price, bps) <= held


@given(usages, prices, markups, images)
def test_a_call_that_writes_no_cache_is_bounded_without_it(usage, price, bps, images):
    """By no more than with it, and its charge at the whole price is still within the bound."""
    unwritten = msgspec.structs.replace(usage, cache_write=0, cache_write_1h=0)
    total = (unwritten.input_tokens, unwritten.output_tokens)
    beside = {"images": images, "tools": TOOL_CLASSES, "tool_uses": usage.tool_uses}
    held = bound(*total, price.without_writes, bps, **beside)
    assert cost(billed(unwritten, price, images), price, bps) <= held <= bound(*total, price, bps, **beside)
    dearer = msgspec.structs.replace(price, cache_write_1h=10**15, long_context=())
    assert dearer.without_writes.dearest_input == max(price.input, price.cached_input, price.audio_input)


@given(tokens, tokens, prices, markups, images, tools, uses)
def test_the_dearest_usage_costs_its_bound(input_tokens, output_tokens, price, bps, images, tools, uses):
    """What is charged where nobody knows the usage is what was held for it."""
    beside = {"images": images, "tools": tools, "tool_uses": uses}
    usage = dearest_usage(input_tokens, output_tokens, price, **beside)
    assert (usage.input_tokens, usage.output_tokens) == (input_tokens, output_tokens)
    assert usage.tool_uses == (uses if tools else 0)
    assert cost(usage, price, bps) == bound(input_tokens, output_tokens, price, bps, **beside)


def test_an_hour_in_the_cache_has_its_price():
    """Where there is none it is that of any other time there; in the bound it counts only where it is the dearest."""
    price = Price(input=4, cached_input=1, cache_write=5, audio_input=4, output=9, audio_output=9)
    usage = Usage(cache_write_1h=10**6, cache_write=10**6)
    assert provider_cost(usage, price) == 10
    assert bound(10**6, 0, price, 0) == 5
    dearer = msgspec.structs.replace(price, cache_write_1h=8)
    assert provider_cost(usage, dearer) == 13
    assert bound(10**6, 0, dearer, 0) == 8


@given(st.integers(0, 10**15), tokens, prices, markups, images, tools, uses)
def test_the_affordable_maximum_is_exact(amount, input_tokens, price, bps, images, tools, uses):
    """What it says is covered, and one token more is not."""
    beside = {"images": images, "tools": tools, "tool_uses": uses}
    affordable = output_tokens_affordable(amount, input_tokens, price, bps, **beside)
    if affordable is None:
        assert bound(input_tokens, 10**9, price, bps, **beside) <= amount
        return
    assert affordable < 0 or bound(input_tokens, affordable, price, bps, **beside) <= amount
    assert bound(input_tokens, affordable + 1, price, bps, **beside) > amount


@given(usages, st.lists(prices, min_size=1, max_size=4), images)
def test_the_dearest_price_covers_all_of_them(usage, several, images):
    """No usage costs more at any of them, and the comparison of two prices knows it."""
    dearest = dearest_price(several)
    for price in several:
        assert provider_cost(billed(usage, price, images), price) <= provider_cost(
            billed(usage, dearest, images), dearest
        )
        assert is_no_dearer(price, dearest)


@given(prices, prices, usages)
def test_a_price_that_is_no_dearer_costs_no_more(one, other, usage):
    """For whatever usage."""
    if is_no_dearer(one, other):
        assert provider_cost(usage, one) <= provider_cost(usage, other)


@given(raw_prices)
def test_a_longer_context_is_never_cheaper(price):
    """A list that says so is raised, and that is said."""
    raised, _ = stepped(price)
    thresholds = [0, *(step.above_tokens + 1 for step in raised.long_context)]
    assert thresholds[1:] == sorted(thresholds[1:])
    for name in TOKEN_CLASSES:
        along = [getattr(raised.at(above), name) for above in thresholds]
        assert along == sorted(along)
        assert along[0] == getattr(price, name)


@given(prices, markups, st.booleans())
def test_what_is_payable_fits_into_the_books(price, bps, is_input):
    """So many tokens of the dearest class, with an image and a use of a tool, are charged within 64 bits."""
    payable = tokens_payable_max(price, bps)
    inputs, outputs = (payable, 0) if is_input else (0, payable)
    assert not payable or bound(inputs, outputs, price, bps, images=1, tools=TOOL_CLASSES, tool_uses=1) <= NANOS_MAX


def test_a_price_is_stored_as_it_always_was():
    """Receipts of before tiers are read as they are, and a plain price is written like them."""
    stored = b'{"input":1,"cached_input":2,"cache_write":3,"audio_input":4,"output":5,"audio_output":6}'
    price = msgspec.json.decode(stored, type=Price)
    assert msgspec.json.encode(price) == stored
    assert cost(msgspec.json.decode(b'{"input":1000000,"output":2}', type=Usage), price, 0) == 2


RULES = MarkupRules(
    default_bps=1500,
    users={"usr_1": 100},
    models={"alias": 200, "p/m": 300, "m": 400},
    providers={"p": 500},
)


@pytest.mark.parametrize(
    ("call", "markup"),
    [
        (("usr_1", "alias", "p", "m"), Markup("user", "usr_1", 100)),
        (("usr_2", "alias", "p", "m"), Markup("model", "alias", 200)),
        ((None, "other", "p", "m"), Markup("model", "p/m", 300)),
        ((None, "other", "q", "m"), Markup("model", "m", 400)),
        ((None, "other", "p", "n"), Markup("provider", "p", 500)),
        ((None, "other", "q", "n"), Markup("default", None, 1500)),
    ],
)
def test_the_most_specific_rule_wins(call, markup):
    """User before model before provider before default."""
    assert RULES.of_call(*call) == markup


def test_a_price_with_its_markup_is_rounded_up_number_by_number():
    """For people to read: no number is less than what a charge would come to, steps and images included."""
    step = LongContext(above_tokens=10, **dict.fromkeys(TOKEN_CLASSES, 7))
    price = Price(**dict.fromkeys(TOKEN_CLASSES, 3), image=1, request=100, web_search=100, long_context=(step,))
    shown = price.marked_up(1500)
    assert (shown.web_search, shown.file_search) == (115, None)
    assert {getattr(shown, name) for name in TOKEN_CLASSES} == {4}
    assert (shown.image, shown.request, shown.long_context[0].output, shown.long_context[0].above_tokens) == (
        2,
        115,
        9,
        10,
    )
    assert price.marked_up(0) == price
