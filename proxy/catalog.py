"""Prices, markup, providers and models as one immutable snapshot that a call keeps from its start to its end."""

from decimal import Decimal

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.pricing import Price, price_nanos_per_mtok
from proxy.routing import Candidate, Models
from proxy.settings import Configuration, PriceSettings
from proxy.storage.database import reading
from proxy.storage.tables import system_config
from proxy.units import now_micros, parse_percent

MARKUP_PERCENT = "markup_percent"
"""The row of `system_config` that holds the default rule."""


class Catalog(msgspec.Struct, frozen=True):
    """What may be sold just now, and at what price."""

    models: Models
    markup_bps: int
    """The default rule."""


async def load_catalog(
    configuration: Configuration, engine: AsyncEngine, built_in: dict[str, PriceSettings]
) -> Catalog:
    """The catalogue of the configured providers and prices at the markup that the database holds.

    `built_in` are prices of providers that come with Tollgate; the configuration's own go before them.
    """
    async with reading(engine) as connection:
        percent = await connection.scalar(sa.select(system_config.c.value).where(system_config.c.key == MARKUP_PERCENT))
    markup = configuration.settings.credits.markup_percent if percent is None else Decimal(str(percent))
    return Catalog(models=_models(configuration, built_in), markup_bps=parse_percent(markup))


async def seed_markup(connection: AsyncConnection, percent: Decimal) -> None:
    """Make `percent` the default rule of a database that has none yet."""
    exists = await connection.scalar(sa.select(system_config.c.key).where(system_config.c.key == MARKUP_PERCENT))
    if exists is None:
        await connection.execute(
            system_config.insert().values(
                key=MARKUP_PERCENT,
                value=str(percent),
                description="The operator's markup on the provider's cost, in percent, where no rule says otherwise.",
                updated_at=now_micros(),
            )
        )


def _models(configuration: Configuration, built_in: dict[str, PriceSettings]) -> Models:
    """Aliases as configured, and every priced model under its full name and under its bare one."""
    settings = configuration.settings
    priced: dict[str, Candidate] = {}
    for target, price in {**built_in, **settings.prices}.items():
        provider, _, model = target.partition("/")
        if provider in configuration.providers and (price.max_output_tokens or price.context_tokens):
            knows_stream_options = configuration.providers[provider].knows_stream_options
            priced[target] = _candidate(provider, model, price, knows_stream_options=knows_stream_options)
    models: dict[str, tuple[Candidate, ...]] = {}
    for target, candidate in priced.items():
        models[target] = (candidate,)
        models[candidate.model] = (*models.get(candidate.model, ()), candidate)
    for alias, model_settings in settings.models.items():
        models[alias] = tuple(priced[target] for target in model_settings.candidates if target in priced)
    return {name: found for name, found in models.items() if found}


def _candidate(provider: str, model: str, price: PriceSettings, *, knows_stream_options: bool) -> Candidate:
    return Candidate(
        provider=provider,
        model=model,
        price=_price(price),
        output_tokens_max=price.max_output_tokens,
        context_tokens=price.context_tokens,
        maximum_field=price.maximum_field or ("max_completion_tokens" if price.is_reasoning else "max_tokens"),
        is_reasoning=price.is_reasoning,
        knows_stream_options=knows_stream_options,
        tokenizer=price.tokenizer,
    )


def _price(price: PriceSettings) -> Price:
    def nanos(dollars: Decimal | None, otherwise: Decimal) -> int:
        return price_nanos_per_mtok(otherwise if dollars is None else dollars)[0]

    return Price(
        input=nanos(price.input, price.input),
        cached_input=nanos(price.cached_input, price.input),
        cache_write=nanos(price.cache_write, price.input),
        audio_input=nanos(price.audio_input, price.input),
        output=nanos(price.output, price.output),
        audio_output=nanos(price.audio_output, price.output),
    )
