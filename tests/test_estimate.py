"""The bound of a call, against what a provider could bill for it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.estimate import (
    USEFUL_OUTPUT_TOKENS,
    USEFUL_OUTPUT_TOKENS_REASONING,
    estimate,
    input_bound,
    maximum_affordable,
    maximum_bought,
)
from proxy.pricing import LongContext, Price, bound, cost
from proxy.routing import Candidate, Offer
from proxy.units import Usage
from proxy.wire.chat import decode_chat

CHEAP = Price(input=1000, cached_input=500, cache_write=1250, audio_input=3000, output=4000, audio_output=8000)
DEAR = Price(input=9000, cached_input=900, cache_write=9000, audio_input=9000, output=30_000, audio_output=30_000)
MARKUP_BPS = 1500


def candidate(**changes) -> Candidate:
    """One model at one provider."""
    fields = {
        "provider": "p",
        "model": "m",
        "price": CHEAP,
        "output_tokens_max": 4096,
        "context_tokens": 128_000,
        "maximum_field": "max_tokens",
        "is_reasoning": False,
        "knows_stream_options": True,
    }
    return Candidate(**{**fields, **changes})


def offer(**changes) -> Offer:
    """That model, at its own price."""
    found = candidate(**changes)
    return Offer(found, found.price, MARKUP_BPS)


def estimated(candidates, **fields):
    """The estimate of a chat with these fields."""
    body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields})
    offered = [Offer(found, found.price, MARKUP_BPS) for found in candidates]
    return estimate(decode_chat(body), len(body), offered), len(body)


RATES = {"input": 1000, "cached_input": 100, "cache_write": 1250, "cache_write_1h": 2000, "audio_input": 1000}
FREE = {"output": 0, "audio_output": 0}
CACHING = Price(
    **RATES,
    **FREE,
    long_context=(LongContext(**{name: 2 * rate for name, rate in RATES.items()}, **FREE, above_tokens=50_000),),
)


@pytest.mark.parametrize("characters", [10, 100_000])
@pytest.mark.parametrize(
    ("caches_unasked", "more", "dearest"),
    [
        (False, {}, "input"),
        (False, {"cache_control": {"type": "ephemeral"}}, "cache_write_1h"),
        (True, {}, "cache_write_1h"),
    ],
)
def test_caches_are_reserved_for_where_there_can_be_some(characters, caches_unasked, more, dearest):
    """Writing to one costs more than what is only read, and some write to them only when they are asked to."""
    found, size = estimated(
        [candidate(price=CACHING, caches_unasked=caches_unasked)],
        messages=[{"role": "user", "content": "x" * characters, **more}],
    )
    offered = offer(price=CACHING, caches_unasked=caches_unasked)
    assert found.at_most == cost(Usage(**{dearest: size}), CACHING, MARKUP_BPS)
    assert maximum_bought(found, offered, found.at_most) is None
    assert maximum_bought(found, offered, found.at_most - 1) == 0


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, 0),
        ({"tools": []}, 0),
        ({"response_format": None}, 0),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 700),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, 700),
    ],
)
def test_what_the_provider_adds_to_a_prompt(fields, added):
    """It explains tools and formats in words of its own, which are in no body; never beyond the context."""
    found, size = estimated([candidate(added_tokens=700)], max_tokens=100, **fields)
    assert found.input_tokens == size - len("100") + added
    assert estimated([candidate(added_tokens=700, context_tokens=100)], max_tokens=50, **fields)[0].input_tokens <= 100


def test_a_maximum_that_was_named_is_the_bound():
    """Nothing less would cover it and nothing more is needed."""
    found, size = estimated([candidate()], max_tokens=100, n=3)
    assert (found.input_tokens, found.output_tokens, found.choices) == (size - len("100"), 300, 3)
    assert found.at_least == found.at_most
    assert found.is_maximum_named


@pytest.mark.parametrize(
    ("is_reasoning", "useful"), [(False, USEFUL_OUTPUT_TOKENS), (True, USEFUL_OUTPUT_TOKENS_REASONING)]
)
def test_without_a_maximum_the_least_is_a_useful_answer(is_reasoning, useful):
    """The most is the model's own maximum; the least what is worth starting for."""
    found, size = estimated([candidate(is_reasoning=is_reasoning, output_tokens_max=50_000)])
    assert found.at_most == bound(size, 50_000, CHEAP, MARKUP_BPS)
    assert found.at_least == bound(size, useful, CHEAP, MARKUP_BPS)


def test_a_maximum_is_no_prompt():
    """A call costs the same input whatever its maximum is, so that what 402 says can be asked for."""
    few, _ = estimated([candidate()], max_tokens=9, max_completion_tokens=9)
    many, _ = estimated([candidate()], max_tokens=2**50, max_completion_tokens=2**50)
    assert few.input_tokens == many.input_tokens


def test_what_is_affordable_leaves_room_to_name_it():
    """A body is longer once it names the maximum that it was told."""
    unnamed, _ = estimated([candidate()])
    affordable = maximum_affordable(unnamed, [offer()], unnamed.at_least - 1)
    assert affordable < USEFUL_OUTPUT_TOKENS
    for field in ("max_tokens", "max_completion_tokens"):
        named, _ = estimated([candidate()], **{field: affordable})
        assert named.at_most < unnamed.at_least


def test_each_candidate_is_bounded_by_its_own_context():
    """A dear one with a small context is not clamped as if it took the input of the large one."""
    small, large = candidate(price=DEAR, context_tokens=50), candidate()
    found, size = estimated([small, large], messages=[{"role": "user", "content": "x" * 5000}])
    assert (input_bound(found, small), input_bound(found, large)) == (50, size)
    assert maximum_bought(found, Offer(small, DEAR, MARKUP_BPS), found.at_least) >= USEFUL_OUTPUT_TOKENS


def test_the_dearest_candidate_sets_the_bound():
    """Whoever serves it in the end, it is covered."""
    both, _ = estimated([candidate(), candidate(price=DEAR, output_tokens_max=10)])
    dear, _ = estimated([candidate(price=DEAR, output_tokens_max=10)])
    cheap, _ = estimated([candidate()])
    assert both.at_most == max(dear.at_most, cheap.at_most)
    assert both.at_least == max(dear.at_least, cheap.at_least)


def test_a_prediction_is_paid_on_top_of_the_maximum():
    """What of it does not come true is billed as output, beside what the maximum allows."""
    prediction = {"type": "content", "content": "x" * 1000}
    with_it, _ = estimated([candidate()], max_tokens=100, n=2, prediction=prediction)
    assert with_it.output_tokens == 2 * (100 + with_it.prediction_tokens)
    assert with_it.prediction_tokens >= 1000


def test_media_count_as_the_whole_context():
    """Their size is not that of the body; where the context is unknown too, they are refused."""
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]
    found, _ = estimated([candidate()], messages=image)
    assert found.input_tokens == 128_000
    with pytest.raises(BadRequest, match="cannot be priced"):
        estimated([candidate(context_tokens=None)], messages=image)


def pictures(*urls) -> list[dict]:
    """Messages with these images, and a text."""
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]


def test_images_with_a_maximum_count_as_that():
    """Whether they are in the body or not: their own bytes are no tokens, all others are."""
    data = "data:image/png;base64," + "A" * 50_000
    sized = candidate(image_tokens_max=1000)
    found, size = estimated([sized], messages=pictures(data, "https://x/y.png"))
    assert size > 50_000
    assert 2000 < found.input_tokens < 2500
    assert found.images == 2
    unsized, _ = estimated([candidate()], messages=pictures(data))
    assert unsized.input_tokens == 128_000
    without_context, _ = estimated([candidate(image_tokens_max=1000, context_tokens=None)], messages=pictures(data))
    assert 1000 < without_context.input_tokens < 1500


def test_other_media_beside_images_count_as_the_whole_context():
    """A maximum of images says nothing of files."""
    messages = pictures("https://x/y.png")
    messages[0]["content"].append({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}})
    found, _ = estimated([candidate(image_tokens_max=1000)], messages=messages)
    assert found.input_tokens == 128_000


def test_images_and_requests_are_held_where_they_have_a_price():
    """On top of the tokens."""
    priced = msgspec.structs.replace(CHEAP, image=10**15, request=5 * 10**15)
    found, _ = estimated([candidate(price=priced, image_tokens_max=1)], messages=pictures("https://x/y", "https://x/z"))
    plain, _ = estimated([candidate(image_tokens_max=1)], messages=pictures("https://x/y", "https://x/z"))
    extra = 7 * 10**9 * (10_000 + MARKUP_BPS) // 10_000
    assert 0 <= found.at_most - plain.at_most - extra <= 1


@given(
    amount=st.integers(0, 10**12),
    n=st.integers(1, 5),
    predicted=st.integers(0, 500),
    named=st.none() | st.integers(1, 10_000),
)
def test_what_a_grant_buys_is_within_the_grant(amount, n, predicted, named):
    """A provider that obeys the clamped maximum, and bills every token of a prediction, stays within the grant."""
    fields = {"n": n, "max_tokens": named, "prediction": {"type": "content", "content": "x" * predicted}}
    found, _ = estimated([candidate()], **fields)
    predicted = found.prediction_tokens
    bought = maximum_bought(found, offer(), amount)
    affordable = maximum_affordable(found, [offer()], amount)
    assert affordable <= bought if named is None else affordable == bought
    if not bought:
        return
    worst = Usage(audio_input=found.input_tokens, audio_output=(bought + predicted) * n)
    assert cost(worst, CHEAP, MARKUP_BPS) <= amount
