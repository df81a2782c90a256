"""From the open price list (the package genai-prices) to rows of our own book, in integers.

What cannot be represented is rounded up, or left out: what bills in units that no meter here reads, or by itself for
tools of the provider's. Both are said. Slow to import: only `tollgate prices` does.
"""

import fnmatch
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, time
from decimal import Decimal
from importlib import metadata, resources
from typing import Any, Final

import msgspec
from genai_prices import types as listed
from genai_prices.data_snapshot import get_snapshot

from proxy.pricebook import Entry, PriceList, Row
from proxy.pricing import LongContext, Price, price_nanos_per_mtok, raised, stepped
from proxy.units import MICROS_PER_SECOND, Micros

_CLASSES: Final = {
    "input": "input_mtok",
    "cached_input": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
    "audio_input": "input_audio_mtok",
    "output": "output_mtok",
    "audio_output": "output_audio_mtok",
}
"""Our usage classes, and the list's."""

_PER_REQUEST: Final = "requests_kcount"

_COVERED: Final = {
    # Audio that was cached is metered as audio, which is no cheaper.
    "cache_audio_read_mtok": "input_audio_mtok",
    # Metered as input, whatever they are: fine where they cost no more.
    "input_image_mtok": "input_mtok",
    "input_video_mtok": "input_mtok",
    "cache_image_read_mtok": "input_mtok",
}
"""Classes that no meter here tells apart, and the one that they are billed as; it must be as dear."""

_NOT_ASKED_FOR: Final = frozenset({"web_searches_kcount", "storage_searches_kcount"})
"""Tools that are refused until the operator prices them."""

_RUNS_TOOLS: Final = ("*-search*", "*deep-research*", "*computer-use*", "perplexity/*", "*sonar*", "compound*")
"""Models that use tools of the provider's by themselves, billed beside their tokens."""

_NOT_SERVED: Final = (
    "*tts*",
    "*transcribe*",
    "*whisper*",
    "*realtime*",
    "*-live-*",
    "*-image*",
    "*moderation*",
    "*ocr*",
)
"""Models for other endpoints than those that are served here."""

_HEARS: Final = "audio"
"""What a model is called that takes audio: at the price of text it would be given away."""

_HAS_NO_OUTPUT: Final = "embed"
"""What a model is called that has no output."""

_PROVIDERS: Final = frozenset(
    {
        "anthropic",
        "arcee",
        "avian",
        "azure",
        "baseten",
        "cerebras",
        "cloudflare",
        "cohere",
        "deepseek",
        "fireworks",
        "google",
        "groq",
        "meta",
        "minimax",
        "mistral",
        "moonshotai",
        "novita",
        "openai",
        "openrouter",
        "ovhcloud",
        "perplexity",
        "together",
        "x-ai",
        "zai",
        "zhipuai",
    }
)
"""Those that offer OpenAI's API under an address of their own."""


class Converted(msgspec.Struct, frozen=True):
    """A price list of ours, and what had to be said about models on the way to it."""

    prices: PriceList
    left_out: dict[str, str]
    rounded_up: dict[str, str]

    @property
    def unbounded(self) -> list[str]:
        """Models that have neither a maximum nor a context, and so are not on offer until somebody says one."""
        return sorted({row.target for row in self.prices.rows if row.entry is not None and not row.entry.is_bounded})


class _CannotBe(Exception):
    """A model's price is not one of ours; says why."""


def convert(now: datetime) -> Converted:
    """The installed price list, with what is valid at `now` or later."""
    facts = tomllib.loads((resources.files("proxy") / "data" / "models.toml").read_text())
    converted = Converted(PriceList(version=f"genai-prices {metadata.version('genai-prices')}", rows=[]), {}, {})
    for provider in get_snapshot().providers:
        seen: set[str] = set()
        for model in provider.models if provider.id in _PROVIDERS else ():
            for name in sorted(_names(model) - seen):
                seen.add(name)
                _take(converted, provider.id, name, model, _facts(f"{provider.id}/{name}", facts), now)
    converted.prices.rows.sort(key=lambda row: (row.provider, row.model, row.valid_from))
    return converted


def _take(  # noqa: PLR0913, PLR0917 - a model, and where it comes from
    converted: Converted, provider: str, name: str, model: listed.ModelInfo, known: dict[str, Any], now: datetime
) -> None:
    target = f"{provider}/{name}"
    known["context_tokens"] = max(known.get("context_tokens", 0), model.context_window or 0) or None
    before: Entry | None = None
    try:
        _check(target, name)
        for at in _days(model, now):
            entry, is_exact = _entry(name, model, known, at)
            if not is_exact:
                converted.rounded_up[target] = "changes by the hour, or a class is cheaper in a longer context"
            if entry != before:
                row = Row(provider=provider, model=name, entry=entry, valid_from=0 if at == now else _micros(at))
                converted.prices.rows.append(row)
            before = entry
    except _CannotBe as exc:
        converted.left_out[target] = str(exc)


def _check(target: str, name: str) -> None:
    if any(fnmatch.fnmatchcase(target, pattern) for pattern in _RUNS_TOOLS):
        raise _CannotBe("uses tools by itself that are billed outside of tokens")
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_SERVED):
        raise _CannotBe("is for other endpoints")


def _entry(name: str, model: listed.ModelInfo, known: dict[str, Any], at: datetime) -> tuple[Entry, bool]:
    """What a model costs on the day of `at`, and whether that is exact."""
    price, is_exact = _price(name, _prices_of_the_day(model, at, None), None)
    services = {}
    for tier in _service_tiers(model):
        services[tier], is_tier_exact = _price(name, _prices_of_the_day(model, at, {"service_tier": tier}), tier)
        is_exact = is_exact and is_tier_exact
    return Entry(price=price, service_prices=services, **known), is_exact


def _names(model: listed.ModelInfo) -> set[str]:
    """The model's own name, and others that it has just so at the provider."""
    return {model.id, *_equals(model.match)}


def _equals(clause: Any) -> Iterator[str]:
    match clause:
        case listed.ClauseEquals():
            yield clause.equals
        case listed.ClauseOr():
            for inner in clause.or_:
                yield from _equals(inner)


def _facts(target: str, facts: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for pattern, said in facts.items():
        if fnmatch.fnmatchcase(target, pattern):
            known |= said
    return known


def _constraints(model: listed.ModelInfo) -> list[Any]:
    conditional = model.prices if isinstance(model.prices, list) else []
    return [each.constraint for each in (*conditional, *(model.price_variants or ()))]


def _days(model: listed.ModelInfo, now: datetime) -> list[datetime]:
    """Now, and the later days on which a price of the model begins."""
    starts = {each.start_date for each in _constraints(model) if isinstance(each, listed.StartDateConstraint)}
    return [now, *(datetime.combine(day, time(), UTC) for day in sorted(starts) if day > now.date())]


def _is_hourly(model: listed.ModelInfo) -> bool:
    return any(isinstance(each, listed.TimeOfDateConstraint) for each in _constraints(model))


def _prices_of_the_day(
    model: listed.ModelInfo, at: datetime, context: dict[str, str] | None
) -> list[listed.ModelPrice]:
    """The prices of each hour of the day of `at`: a price of ours knows no hours, so the dearest will count."""
    if not _is_hourly(model):
        return [model.get_prices(at, context)]
    moments = [at.replace(hour=hour, minute=minute) for hour in range(24) for minute in (0, 30)]
    return [model.get_prices(moment, context) for moment in moments]


def _service_tiers(model: listed.ModelInfo) -> list[str]:
    tiers = {
        variant.when["service_tier"] for variant in model.price_variants or () if set(variant.when) == {"service_tier"}
    }
    return sorted(tiers - {"default"})


def _price(name: str, prices: list[listed.ModelPrice], service_tier: str | None) -> tuple[Price, bool]:
    """The price that is as dear as the dearest of `prices` in each class, and whether it is exact."""
    first, *others = [_one_price(name, price, service_tier) for price in prices]
    if not others:
        return stepped(first)
    if any(price.long_context for price in (first, *others)):
        raise _CannotBe("changes by the hour and by the context")
    return raised(first, *others), False


def _one_price(name: str, price: listed.ModelPrice, service_tier: str | None) -> Price:
    said = {key: value for key, value in vars(price).items() if value is not None and key not in _NOT_ASKED_FOR}
    if "input_mtok" not in said or ("output_mtok" not in said and _HAS_NO_OUTPUT not in name):
        raise _CannotBe("has no price for tokens")
    if _HEARS in name and _CLASSES["audio_input"] not in said:
        raise _CannotBe("has no price for audio")
    for key in said.keys() - set(_CLASSES.values()) - {_PER_REQUEST}:
        like = said.get(_COVERED.get(key, ""))
        if like is None or any(_at(said[key], above) > _at(like, above) for above in _thresholds(said)):
            raise _CannotBe(f"is billed by {key}")
    rates = _rates(said, 0)
    return Price(
        **rates,
        request=_nanos(_at(said.get(_PER_REQUEST, Decimal(0)), 0) * 1000),
        long_context=tuple(
            LongContext(**_rates(said, above), above_tokens=above) for above in _thresholds(said) if above
        ),
        service_tier=service_tier,
    )


def _thresholds(said: dict[str, Any]) -> list[int]:
    steps = {tier.start for value in said.values() if isinstance(value, listed.TieredPrices) for tier in value.tiers}
    return sorted({0, *steps})


def _rates(said: dict[str, Any], above: int) -> dict[str, int]:
    """The rates of a call with more input than `above`. Where the list has no cheaper class, it is its side's."""
    sides = {name: "output_mtok" if name in {"output", "audio_output"} else "input_mtok" for name in _CLASSES}
    del sides["cache_write_1h"]  # without a price of its own it is that of `cache_write`
    return {
        name: _nanos(_at(said.get(key, said.get(sides.get(name, ""), Decimal(0))), above))
        for name, key in _CLASSES.items()
    }


def _at(value: Any, above: int) -> Decimal:
    """A price of the list for calls with more input than `above`."""
    if not isinstance(value, listed.TieredPrices):
        return Decimal(value)
    reached = [tier.price for tier in value.tiers if tier.start <= above and above]
    return Decimal(reached[-1] if reached else value.base)


def _nanos(dollars_per_mtok: Decimal) -> int:
    return price_nanos_per_mtok(dollars_per_mtok)[0]


def _micros(at: datetime) -> Micros:
    return int(at.timestamp()) * MICROS_PER_SECOND
