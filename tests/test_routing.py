"""Who serves a call, in which order, and who is left alone: plain values, and instants that are arguments."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest, ModelNotFound
from proxy.pricing import Price, dearest_price
from proxy.routing import (
    COOL_DOWN_S,
    COOL_DOWN_S_MAX,
    FAILURES_MAX,
    PROBE_S,
    RETRY_AFTER_S_MAX,
    Candidate,
    Health,
    Offer,
    candidates,
    offers,
    retry_after_s,
)

STANDARD = Price(input=100, cached_input=10, cache_write=100, audio_input=100, output=400, audio_output=400)
FLEX = Price(
    input=50, cached_input=5, cache_write=50, audio_input=50, output=200, audio_output=200, service_tier="flex"
)
PRIORITY = Price(
    input=200, cached_input=20, cache_write=200, audio_input=200, output=800, audio_output=800, service_tier="priority"
)


def candidate(provider="p", *, tiers=(), **more) -> Candidate:
    """One model at one provider."""
    services = {price.service_tier: price for price in tiers}
    return Candidate(
        provider=provider,
        model="m",
        price=STANDARD,
        output_tokens_max=100,
        context_tokens=1000,
        maximum_field="max_tokens",
        is_reasoning=False,
        knows_stream_options=True,
        service_prices=services,
        dearest_price=dearest_price((STANDARD, *tiers)) if tiers else None,
        **more,
    )


def offer(provider="p", **more) -> Offer:
    return Offer(candidate(provider, **more), STANDARD, 0)


def names(offered) -> list[str]:
    return [each.candidate.provider for each in offered]


def first() -> float:
    """A draw that always takes the first."""
    return 0.0


def test_nobody_serves_a_name_that_nobody_offers():
    """The refusal names it."""
    with pytest.raises(ModelNotFound, match="nobody"):
        candidates({"m": (candidate(),)}, "nobody")


TIERED = candidate(tiers=(FLEX, PRIORITY))


@pytest.mark.parametrize(
    ("asked", "bounding"),
    [
        (None, (200, 800)),
        ("auto", (200, 800)),
        ("default", (100, 400)),
        ("flex", (50, 200)),
        ("priority", (200, 800)),
    ],
)
def test_a_named_tier_bounds_the_call_and_else_the_dearest(asked, bounding):
    """What the account may choose at the provider is covered; what the client chose is no dearer than that."""
    price = TIERED.price_bounding(asked)
    assert (price.input, price.output) == bounding


@pytest.mark.parametrize(
    ("asked", "reported", "charged"),
    [
        (None, None, STANDARD),
        (None, "default", STANDARD),
        (None, "priority", PRIORITY),
        ("auto", "flex", FLEX),
        ("flex", "flex", FLEX),
        ("flex", None, FLEX),
        ("flex", "default", FLEX),
        ("priority", "default", STANDARD),
        ("priority", "priority", PRIORITY),
        ("priority", "unheard-of", PRIORITY),
        ("default", "priority", STANDARD),
        (None, "unheard-of", dearest_price((STANDARD, FLEX, PRIORITY))),
    ],
)
def test_the_tier_that_served_is_charged_but_none_that_was_not_covered(asked, reported, charged):
    """The provider's word counts, within what was held for the call."""
    assert TIERED.price_charged(asked, reported) == charged


def test_a_tier_without_a_price_is_refused():
    """Unless some candidate has one: then it goes there."""
    with pytest.raises(BadRequest, match="flex") as raised:
        offers((candidate(),), "flex", None)
    assert (raised.value.param, raised.value.code) == ("service_tier", "unsupported_parameter")
    offered = offers((candidate("plain"), candidate("tiered", tiers=(FLEX,))), "flex", None)
    assert [(each.candidate.provider, each.price) for each in offered] == [("tiered", FLEX)]


def test_a_users_own_markup_goes_before_the_candidates():
    """Everybody else gets that of the candidate."""
    found = (candidate(markup_bps=1500),)
    assert offers(found, None, None)[0].markup_bps == 1500
    assert offers(found, None, 0)[0].markup_bps == 0


def test_the_lowest_priority_comes_first():
    """Whatever the weights."""
    offered = [offer("second", priority=2, weight=1000), offer("first", priority=1)]
    assert names(Health().ordered(offered, 0, first)) == ["first", "second"]


def test_equals_share_the_calls_by_their_weights():
    """Three of four calls go to the one that weighs three."""
    offered = [offer("light", weight=1), offer("heavy", weight=3)]
    draw = random.Random(7).random  # noqa: S311 - a draw, no secret
    firsts = [names(Health().ordered(offered, 0, draw))[0] for _ in range(4000)]
    assert 0.72 < firsts.count("heavy") / len(firsts) < 0.78


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=6, max_size=6),
    st.sets(st.integers(0, 5)),
)
def test_every_candidate_is_tried_once_whatever_their_health(drawn, numbers, failing):
    """Nobody is left without a candidate, and none is tried twice."""
    offered = [offer(str(place), priority=priority, weight=weight) for place, (priority, weight) in enumerate(drawn)]
    health = Health()
    for place in failing:
        for _ in range(FAILURES_MAX):
            health.failed(f"{place}/m", 0)
    ordered = health.ordered(offered, 1, iter(numbers).__next__)
    assert sorted(names(ordered)) == sorted(names(offered))
    keys = [(int(each.candidate.provider) in failing, each.candidate.priority) for each in ordered]
    assert keys == sorted(keys)


def failed(health, times, *, at=0.0, retry_after=None):
    for _ in range(times):
        health.failed("a/m", at, retry_after)


PAIR = [offer("a", priority=0), offer("b", priority=1)]


def test_a_candidate_that_fails_again_and_again_is_left_alone_for_a_while():
    """A failure or two change nothing; the third does, until its time is over."""
    health = Health()
    failed(health, FAILURES_MAX - 1)
    assert names(health.ordered(PAIR, 0, first)) == ["a", "b"]
    failed(health, 1)
    assert names(health.ordered(PAIR, COOL_DOWN_S - 0.1, first)) == ["b", "a"]
    assert names(health.ordered(PAIR, COOL_DOWN_S, first)) == ["a", "b"]


def test_cool_downs_can_be_told():
    """Each when it begins, and for as long as it goes on."""
    health = Health()
    begun = [health.failed("a/m", 0) for _ in range(FAILURES_MAX)]
    assert begun == [False] * (FAILURES_MAX - 1) + [True]
    assert health.cooling(COOL_DOWN_S - 0.1) == ["a/m"]
    assert health.cooling(COOL_DOWN_S) == []


def test_one_call_at_a_time_finds_out_whether_it_is_well_again():
    """While it does, others go elsewhere; when it says nothing for long, the next one tries."""
    health = Health()
    failed(health, FAILURES_MAX)
    health.trying("a/m", COOL_DOWN_S)
    assert names(health.ordered(PAIR, COOL_DOWN_S + 1, first)) == ["b", "a"]
    assert names(health.ordered(PAIR, COOL_DOWN_S + PROBE_S, first)) == ["a", "b"]
    health.succeeded("a/m")
    assert names(health.ordered(PAIR, COOL_DOWN_S + 1, first)) == ["a", "b"]


def test_a_probe_that_was_not_sent_is_given_back():
    """The next call finds out instead, and nobody takes it from the one that does."""
    health = Health()
    assert not health.trying("a/m", 0), "it is well"
    failed(health, FAILURES_MAX)
    assert health.trying("a/m", COOL_DOWN_S)
    assert not health.trying("a/m", COOL_DOWN_S + 1)
    health.not_tried("a/m")
    health.not_tried("b/m")
    assert names(health.ordered(PAIR, COOL_DOWN_S + 1, first)) == ["a", "b"]
    assert health.trying("a/m", COOL_DOWN_S + 1)


def test_a_probe_that_fails_costs_a_longer_cool_down():
    """Twice as long each time, up to a limit, and a success forgets all of it."""
    health, now = Health(), 0.0
    failed(health, FAILURES_MAX)
    for wait_s in (COOL_DOWN_S, 2 * COOL_DOWN_S, 4 * COOL_DOWN_S):
        assert names(health.ordered(PAIR, now + wait_s - 0.1, first)) == ["b", "a"]
        now += wait_s
        assert names(health.ordered(PAIR, now, first)) == ["a", "b"]
        health.trying("a/m", now)
        health.failed("a/m", now)
    failed(health, 2000, at=now)
    assert names(health.ordered(PAIR, now + COOL_DOWN_S_MAX, first)) == ["a", "b"]
    health.succeeded("a/m")
    failed(health, FAILURES_MAX - 1)
    assert names(health.ordered(PAIR, 0, first)) == ["a", "b"]


def test_a_wish_to_be_left_alone_is_granted_at_once():
    """From the first failure on, for as long as the provider said."""
    health = Health()
    failed(health, 1, retry_after=20)
    assert names(health.ordered(PAIR, 19.9, first)) == ["b", "a"]
    assert names(health.ordered(PAIR, 20, first)) == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        (" 7 ", 7),
        ("0", 0),
        ("99999999999999999999999", RETRY_AFTER_S_MAX),
        ("Wed, 21 Oct 2015 07:28:10 GMT", 10),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0),
        (None, None),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("٣", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_retry_after_in_both_of_its_forms(value, seconds):
    """Seconds, or a date; anything else says nothing."""
    assert retry_after_s(value, 1_445_412_480) == seconds
