"""The price book: what models cost and how large they are, by provider, with the history of it.

A row is never changed: a newer one takes its place from `valid_from` on. Rows of an admin go before those of the list,
and the configuration before both. The list that ships is a file in the package, which an empty book is filled with;
`tollgate prices sync` writes what is new in the open price list that it comes from.
"""

from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from importlib import resources
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.pricing import TOOL_CLASSES, LongContext, Price, price_nanos_per_mtok, stepped, tokens_payable_max
from proxy.settings import PriceSettings, RateSettings, ServicePriceSettings
from proxy.storage.tables import prices
from proxy.units import MARKUP_BPS_MAX, TOKEN_CLASSES, Micros, new_id

LIST = "list"
ADMIN = "admin"

_MTOK = 10**6


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model costs, in the standard service tier and in others, and its limits: None where unknown."""

    price: Price
    service_prices: dict[str, Price] = {}
    context_tokens: int | None = None
    output_tokens_max: int | None = None
    image_tokens_max: int | None = None
    tool_calls_max: int | None = None
    tokenizer: str | None = None
    maximum_field: str | None = None
    is_reasoning: bool | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether its output has a bound; a model without is not on offer."""
        return bool(self.output_tokens_max or self.context_tokens)

    def completed(self, other: "Entry | None") -> "Entry":
        """This entry with the limits of `other` where it has none of its own."""
        if other is None:
            return self
        missing = {name: getattr(other, name) for name in _LIMITS if getattr(self, name) is None}
        is_reasoning = other.is_reasoning if self.is_reasoning is None else self.is_reasoning
        return msgspec.structs.replace(self, **missing, is_reasoning=is_reasoning)


_LIMITS = (
    "context_tokens",
    "output_tokens_max",
    "image_tokens_max",
    "tool_calls_max",
    "tokenizer",
    "maximum_field",
)


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model in the book; `entry` is None where a price was taken back. `valid_from` 0 is: as soon as it is read."""

    provider: str
    model: str
    entry: Entry | None
    valid_from: Micros = 0

    @property
    def target(self) -> str:
        """`provider/model`."""
        return f"{self.provider}/{self.model}"


class PriceList(msgspec.Struct, frozen=True, kw_only=True):
    """A whole list; `version` says of what, such as `genai-prices 0.2.3`."""

    version: str
    rows: list[Row]


class Change(msgspec.Struct, frozen=True):
    """What a newer list says otherwise: `before` is None for a model that is new."""

    row: Row
    before: Entry | None

    def as_text(self) -> str:
        """For people: prices in nano-dollars per million tokens."""
        return f"{self.row.target}: {_summary(self.before)} -> {_summary(self.row.entry)}"

    def as_object(self) -> dict[str, Any]:
        """For programs."""
        after = msgspec.to_builtins(self.row.entry)
        return {"target": self.row.target, "before": msgspec.to_builtins(self.before), "after": after}


def _summary(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    price = entry.price
    limits = f"context {entry.context_tokens}, maximum {entry.output_tokens_max}"
    return f"input {price.input}, cached {price.cached_input}, output {price.output}, {limits}"


Targets = Mapping[tuple[str, str], Entry]
"""Entries by provider and model."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Models of the same provider, price and limits, as the file has them."""

    provider: str
    models: list[str]
    valid_from: Micros = 0
    entry: Entry | None


class _File(msgspec.Struct, frozen=True):
    version: str
    rows: list[_Line]


def shipped() -> PriceList:
    """The list that comes with this program."""
    return read((resources.files("proxy") / "data" / "prices.json").read_bytes())


def read(data: bytes) -> PriceList:
    """The list in a file that `as_file` wrote."""
    file = msgspec.json.decode(data, type=_File)
    rows = [
        Row(provider=line.provider, model=model, entry=line.entry, valid_from=line.valid_from)
        for line in file.rows
        for model in line.models
    ]
    return PriceList(version=file.version, rows=rows)


def as_file(listed: PriceList) -> bytes:
    """`listed` as `read` takes it."""
    lines: dict[bytes, _Line] = {}
    for row in listed.rows:
        line = _Line(provider=row.provider, models=[], valid_from=row.valid_from, entry=row.entry)
        lines.setdefault(msgspec.json.encode(line), line).models.append(row.model)
    rows = b",\n".join(map(msgspec.json.encode, lines.values()))
    return b'{"version":' + msgspec.json.encode(listed.version) + b',"rows":[\n' + rows + b"\n]}\n"


# ---- rows


async def is_empty(connection: AsyncConnection) -> bool:
    """Whether no list has ever been read in."""
    return await connection.scalar(sa.select(prices.c.id).where(prices.c.source == LIST).limit(1)) is None


async def add(connection: AsyncConnection, rows: Iterable[Row], *, source: str, version: str, now: Micros) -> None:
    """Write `rows`, which take the place of older ones of the same source."""
    values = [
        {
            "id": new_id("price"),
            "provider": row.provider,
            "model": row.model,
            "source": source,
            "version": version,
            "valid_from": row.valid_from or now,
            "entry": None if row.entry is None else msgspec.to_builtins(row.entry),
            "created_at": now,
        }
        for row in rows
    ]
    if values:
        await connection.execute(prices.insert(), values)


async def current(
    connection: AsyncConnection, now: Micros, providers: Collection[str] | None = None
) -> dict[str, Targets]:
    """What is valid at `now`, by source; of all providers unless some are named."""
    query = (
        sa.select(prices.c.source, prices.c.provider, prices.c.model, prices.c.entry)
        .where(prices.c.valid_from <= now)
        .order_by(prices.c.valid_from, prices.c.id)
    )
    if providers is not None:
        query = query.where(prices.c.provider.in_(providers))
    # Decoded after the newest of each is known: of old rows nothing is made.
    newest: dict[tuple[str, str, str], Any] = {
        (row.source, row.provider, row.model): row.entry for row in await connection.execute(query)
    }
    found: dict[str, dict[tuple[str, str], Entry]] = {LIST: {}, ADMIN: {}}
    for (source, provider, model), entry in newest.items():
        if entry is not None:
            found[source][provider, model] = msgspec.convert(entry, Entry)
    return dict(found)


async def next_change_at(connection: AsyncConnection, now: Micros) -> Micros | None:
    """When the next row becomes valid by itself."""
    at: Micros | None = await connection.scalar(
        sa.select(sa.func.min(prices.c.valid_from)).where(prices.c.valid_from > now)
    )
    return at


async def changes(connection: AsyncConnection, listed: PriceList, now: Micros) -> list[Change]:
    """What `listed` says otherwise than the book does for the time from which each of its rows is valid."""
    found = []
    for at in sorted({row.valid_from for row in listed.rows}):
        known = (await current(connection, max(at, now)))[LIST]
        for row in listed.rows:
            before = known.get((row.provider, row.model))
            if row.valid_from == at and row.entry != before:
                found.append(Change(row, before))
    return found


# ---- from dollars


def entry_of(settings: PriceSettings) -> tuple[Entry, bool]:
    """The entry that `settings` describe, and whether all of its prices are exact; others were rounded up."""
    price, is_exact = _price_of(settings, None)
    services = {
        name: _price_of(_with_tools(service, settings), name) for name, service in settings.service_tiers.items()
    }
    entry = Entry(
        price=price,
        service_prices={name: found for name, (found, _) in services.items()},
        context_tokens=settings.context_tokens,
        output_tokens_max=settings.max_output_tokens,
        image_tokens_max=settings.image_tokens_max,
        tool_calls_max=settings.tool_calls_max,
        tokenizer=settings.tokenizer,
        maximum_field=settings.maximum_field,
        is_reasoning=settings.is_reasoning,
    )
    return entry, is_exact and all(exact for _, exact in services.values())


def is_payable(entry: Entry) -> bool:
    """Whether a call that fills the model's limits can be booked in 64 bits even at the highest markup."""
    tokens = (entry.context_tokens or 0) + (entry.output_tokens_max or 0)
    return all(
        tokens <= tokens_payable_max(price, MARKUP_BPS_MAX) for price in (entry.price, *entry.service_prices.values())
    )


def _price_of(settings: ServicePriceSettings, service_tier: str | None) -> tuple[Price, bool]:
    rates, is_exact = _rates_of(settings)
    beside, are_exact = {}, True
    for name in ("image", "request", *TOOL_CLASSES):
        dollars = getattr(settings, name)
        if dollars is not None:
            # Dollars for one: so many for a million of them.
            beside[name], exact = price_nanos_per_mtok(dollars * _MTOK)
            are_exact = are_exact and exact
    steps = []
    for step in settings.long_context:
        step_rates, exact = _rates_of(step)
        steps.append(LongContext(**step_rates, above_tokens=step.above_tokens))
        is_exact = is_exact and exact
    price, is_stepped = stepped(Price(**rates, **beside, long_context=tuple(steps), service_tier=service_tier))
    return price, is_exact and are_exact and is_stepped


def _with_tools(service: ServicePriceSettings, standard: PriceSettings) -> ServicePriceSettings:
    """`service` with the prices of tools that it does not say: those of the standard tier."""
    missing = {name: getattr(standard, name) for name in TOOL_CLASSES if getattr(service, name) is None}
    return msgspec.structs.replace(service, **missing)


def _rates_of(settings: RateSettings) -> tuple[dict[str, int], bool]:
    rates, are_exact = {}, True
    for name in TOKEN_CLASSES:
        dollars = getattr(settings, name)
        rates[name], is_exact = price_nanos_per_mtok(_like(settings, name) if dollars is None else dollars)
        are_exact = are_exact and is_exact
    return rates, are_exact


def _like(settings: RateSettings, name: str) -> Decimal:
    """What a class costs that has no price: as its side does, and an hour in the cache as any other time there."""
    if name == "cache_write_1h":
        return Decimal(0)
    return settings.output if name in {"output", "audio_output"} else settings.input
