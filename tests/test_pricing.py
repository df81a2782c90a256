from decimal import Decimal
from fractions import Fraction
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from proxy.pricing import (
    Price,
    bound,
    cost,
    dearest_usage,
    output_tokens_affordable,
    price_nanos_per_mtok,
    provider_cost,
)
from proxy.units import Usage

prices = st.builds(Price, *[st.integers(0, 10**14)] * 6)
tokens = st.integers(0, 2_000_000)
usages = st.builds(Usage, *[tokens] * 6)
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


@given(usages, prices, markups)
def test_cost_is_rounded_up_once(usage, price, bps):
    """The cost is the exact product, rounded up to the next nano-credit and no further."""
    exact = Fraction(
        usage.input * price.input
        + usage.cached_input * price.cached_input
        + usage.cache_write * price.cache_write
        + usage.audio_input * price.audio_input
        + usage.output * price.output
        + usage.audio_output * price.audio_output,
        10**6,
    )
    assert provider_cost(usage, price) == ceil(exact)
    assert cost(usage, price, bps) == ceil(exact * (10_000 + bps) / 10_000)


@given(usages, prices, markups)
def test_what_is_within_the_bound_costs_no_more_than_the_bound(usage, price, bps):
    """Whatever classes the tokens fall into, the estimate covers the charge."""
    assert cost(usage, price, bps) <= bound(usage.input_tokens, usage.output_tokens, price, bps)


@given(tokens, tokens, prices, markups)
def test_the_dearest_usage_costs_its_bound(input_tokens, output_tokens, price, bps):
    """What is charged where nobody knows the usage is what was held for it."""
    usage = dearest_usage(input_tokens, output_tokens, price)
    assert (usage.input_tokens, usage.output_tokens) == (input_tokens, output_tokens)
    assert cost(usage, price, bps) == bound(input_tokens, output_tokens, price, bps)


@given(st.integers(0, 10**15), tokens, prices, markups)
def test_the_affordable_maximum_is_exact(amount, input_tokens, price, bps):
    """What it says is covered, and one token more is not."""
    affordable = output_tokens_affordable(amount, input_tokens, price, bps)
    if affordable is None:
        assert bound(input_tokens, 10**9, price, bps) <= amount
        return
    assert affordable < 0 or bound(input_tokens, affordable, price, bps) <= amount
    assert bound(input_tokens, affordable + 1, price, bps) > amount
