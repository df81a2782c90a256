"""From the open price list to rows of our own."""

from datetime import UTC, date, datetime, time
from decimal import Decimal

import pytest
from genai_prices import types as listed

from proxy import pricebook, pricelist
from proxy.pricebook import PriceList
from proxy.pricelist import Converted, convert
from proxy.pricing import LongContext

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def model(name="m", *, context=1000, variants=None, prices=None, match=None, **classes) -> listed.ModelInfo:
    """A model of the list."""
    found = listed.ModelPrice(
        **{key: value if isinstance(value, listed.TieredPrices) else Decimal(value) for key, value in classes.items()}
    )
    return listed.ModelInfo(
        id=name,
        match=match or listed.ClauseEquals(name),
        context_window=context,
        prices=prices or found,
        price_variants=variants,
    )


def taken(found, name=None, known=None) -> Converted:
    """What becomes of one model."""
    converted = Converted(PriceList(version="test", rows=[]), {}, {})
    pricelist._take(converted, "p", name or found.id, found, known or {}, NOW)
    return converted


def price_of(found):
    return taken(found).prices.rows[0].entry.price


def test_each_class_has_its_price_or_that_of_its_side():
    """In nano-dollars per million; a request's likewise."""
    price = price_of(
        model(input_mtok="1", output_mtok="4", cache_read_mtok="0.1", input_audio_mtok="7", requests_kcount="5")
    )
    assert (price.input, price.cached_input, price.cache_write, price.audio_input) == (10**9, 10**8, 10**9, 7 * 10**9)
    assert (price.output, price.audio_output) == (4 * 10**9, 4 * 10**9)
    assert price.request == 5 * 10**6 * 10**6, "half a cent for one"


def test_an_hour_in_the_cache_has_the_lists_price():
    """As Anthropic's models have it; without one it is that of any other time there."""
    fields = {"input_mtok": "1", "output_mtok": "4", "cache_write_mtok": "1.25"}
    assert price_of(model(**fields, cache_write_1h_mtok="2")).cache_write_1h == 2 * 10**9
    assert price_of(model(**fields)).cache_write_1h == 0


def test_tiers_become_steps():
    """Each with all classes, those that do not change included."""
    tiered = listed.TieredPrices(base=Decimal(1), tiers=[listed.Tier(start=200_000, price=Decimal(2))])
    price = price_of(model(input_mtok=tiered, output_mtok="3"))
    steps = price.long_context
    assert steps == (
        LongContext(
            input=2 * 10**9,
            cached_input=2 * 10**9,
            cache_write=2 * 10**9,
            audio_input=2 * 10**9,
            output=3 * 10**9,
            audio_output=3 * 10**9,
            above_tokens=200_000,
        ),
    )


def test_a_step_down_is_rounded_up_and_said():
    """A longer context never gets cheaper here."""
    tiered = listed.TieredPrices(base=Decimal(3), tiers=[listed.Tier(start=100, price=Decimal(2))])
    found = taken(model(input_mtok=tiered, output_mtok="3"))
    assert found.prices.rows[0].entry.price.long_context[0].input == 3 * 10**9
    assert "p/m" in found.rounded_up


def test_service_tiers_become_prices_of_their_own():
    """What a tier does not say is as in the standard one; a batch is none, as it cannot be asked for here."""
    variants = [
        listed.PriceVariant({"service_tier": "flex"}, listed.ModelPrice(input_mtok=Decimal("0.5"))),
        listed.PriceVariant({"service_tier": "default"}, listed.ModelPrice()),
        listed.PriceVariant({"processing": "batch"}, listed.ModelPrice(input_mtok=Decimal("0.1"))),
    ]
    entry = taken(model(input_mtok="1", output_mtok="4", variants=variants)).prices.rows[0].entry
    assert {name: (price.input, price.output) for name, price in entry.service_prices.items()} == {
        "flex": (5 * 10**8, 4 * 10**9)
    }
    assert entry.service_prices["flex"].service_tier == "flex"


def test_what_changes_by_the_hour_costs_what_its_dearest_hour_does():
    """Rounded up, and said."""
    prices = [
        listed.ConditionalPrice(prices=listed.ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(9))),
        listed.ConditionalPrice(
            listed.TimeOfDateConstraint(time(0, 30, tzinfo=UTC), time(16, 30, tzinfo=UTC)),
            prices=listed.ModelPrice(input_mtok=Decimal(2), output_mtok=Decimal(8)),
        ),
    ]
    found = taken(model(prices=prices))
    price = found.prices.rows[0].entry.price
    assert (price.input, price.output) == (2 * 10**9, 9 * 10**9)
    assert "p/m" in found.rounded_up


def test_a_price_of_a_later_day_is_a_row_of_that_day():
    """The one of now is valid as soon as it is read."""
    prices = [
        listed.ConditionalPrice(prices=listed.ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(1))),
        listed.ConditionalPrice(
            listed.StartDateConstraint(date(2026, 12, 1)),
            prices=listed.ModelPrice(input_mtok=Decimal(3), output_mtok=Decimal(3)),
        ),
    ]
    rows = taken(model(prices=prices)).prices.rows
    later = int(datetime(2026, 12, 1, tzinfo=UTC).timestamp()) * 10**6
    assert [(row.valid_from, row.entry.price.input) for row in rows] == [(0, 10**9), (later, 3 * 10**9)]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (model(input_mtok="1"), "no price for tokens"),
        (model(audio_hours="1", input_mtok="1", output_mtok="1"), "audio_hours"),
        (model(input_mtok="1", output_mtok="1", input_image_mtok="2"), "input_image_mtok"),
        (model("gpt-audio", input_mtok="1", output_mtok="1"), "no price for audio"),
        (model("gpt-4o-search-preview", input_mtok="1", output_mtok="1"), "tools by itself"),
        (model("tts-1", input_mtok="1", output_mtok="1"), "other endpoints"),
    ],
)
def test_what_cannot_be_metered_is_left_out_and_said(found, reason):
    """It would run for free, or for less than it costs."""
    converted = taken(found)
    assert not converted.prices.rows
    assert reason in converted.left_out[f"p/{found.id}"]


def test_what_is_metered_as_something_dearer_is_covered():
    """Images at the price of text, and embeddings without any output."""
    assert price_of(model(input_mtok="1", output_mtok="1", input_image_mtok="1")).input == 10**9
    assert price_of(model("text-embedding", input_mtok="1")).output == 0


def test_a_context_is_never_made_smaller():
    """Of what the list and our own facts say, the larger one counts."""
    found = model(input_mtok="1", output_mtok="1", context=1000)
    assert taken(found, known={"context_tokens": 500}).prices.rows[0].entry.context_tokens == 1000
    assert taken(found, known={"context_tokens": 5000}).prices.rows[0].entry.context_tokens == 5000


def test_a_model_without_any_bound_is_said():
    """It is in the book, and not on offer."""
    converted = taken(model(input_mtok="1", output_mtok="1", context=None))
    assert converted.unbounded == ["p/m"]


def test_the_list_that_is_installed(tmp_path):
    """Its models by all of their names, and the same again after having been a file."""
    converted = convert(NOW)
    entries = {(row.target, row.valid_from): row.entry for row in converted.prices.rows}
    snapshot = entries["openai/gpt-4o-2024-11-20", 0]
    assert snapshot == entries["openai/gpt-4o", 0]
    assert (snapshot.output_tokens_max, snapshot.tokenizer) == (16384, "o200k_base")
    assert entries["openai/gpt-5", 0].is_reasoning
    assert entries["openai/gpt-5", 0].maximum_field == "max_completion_tokens"
    assert {"openrouter", "together", "x-ai", "groq", "deepseek"} <= {row.provider for row in converted.prices.rows}
    file = pricebook.as_file(converted.prices)
    back = pricebook.read(file)
    key = lambda row: (row.target, row.valid_from)  # noqa: E731 - twice, in one line
    assert sorted(back.rows, key=key) == sorted(converted.prices.rows, key=key)
