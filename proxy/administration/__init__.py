"""What an operator changes while calls go on: markup, providers and prices.

Each change is one transaction that also writes who changed what into `admin_events`, and lets every process know.
"""

from collections.abc import Container, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy import pricebook
from proxy.catalog import ProviderState, touch
from proxy.errors import BadRequest, Conflict, NotFound
from proxy.pricebook import ADMIN, LIST, Change, Entry, PriceList, Row, entry_of, is_payable
from proxy.pricing import MarkupKind
from proxy.settings import PriceSettings, check_price
from proxy.storage.database import database_now, reading, writing
from proxy.storage.tables import admin_events, markup_rules, prices, providers
from proxy.units import AmountError, Micros, format_percent, is_id, new_id, now_micros, parse_decimal, parse_percent

COMMAND_LINE = "command line"
"""Who changes what by a command: whoever may run it."""

BY_HAND = "by hand"
"""The version of prices that no list says."""


NAME_CHARACTERS_MAX = 300
"""Of a provider, a model, or whatever else a rule is for."""


class Rule(msgspec.Struct, frozen=True):
    """One rule of the markup."""

    id: str
    kind: str
    subject: str
    percent: str


def bps_of(percent: Any) -> int:
    """Basis points of a percentage as somebody typed it. Raises `BadRequest`."""
    try:
        return parse_percent(parse_decimal(percent))
    except AmountError as exc:
        raise BadRequest(f"percent: {exc}", param="percent", code="invalid_value") from exc


def check_name(text: str, param: str) -> str:
    """`text`, if it can be the name of anything. Raises `BadRequest` about `param`."""
    if len(text) > NAME_CHARACTERS_MAX or not text.strip() or not text.isprintable():
        message = f"{param}: a name has at most {NAME_CHARACTERS_MAX} printable characters."
        raise BadRequest(message, param=param, code="invalid_value")
    return text


def parts_of(target: str) -> tuple[str, str]:
    """The provider and the model of `provider/model`. Raises `BadRequest`."""
    provider, _, model = target.partition("/")
    if not provider or not model:
        raise BadRequest("A target is of the form provider/model.", param="target", code="invalid_value")
    return check_name(provider, "target"), check_name(model, "target")


def _check_provider(known: Container[str], name: str) -> None:
    if name not in known:
        raise NotFound(f"There is no provider {name!r} in the configuration.")


async def record(  # noqa: PLR0913, PLR0917 - the columns of one row
    connection: AsyncConnection, actor: str, action: str, subject: str, before: object, after: object
) -> None:
    """Write into `admin_events` what `actor` changes."""
    await connection.execute(
        admin_events.insert().values(
            id=new_id("event"),
            actor=actor,
            action=action,
            subject=subject,
            before=before,
            after=after,
            created_at=now_micros(),
        )
    )


# ---- markup


async def rules(engine: AsyncEngine) -> list[Rule]:
    """All rules but the default one, the most specific kind first."""
    order = [MarkupKind.USER, MarkupKind.MODEL, MarkupKind.PROVIDER]
    async with reading(engine) as connection:
        found = [_rule(row) for row in await connection.execute(sa.select(markup_rules))]
    return sorted(found, key=lambda rule: (order.index(MarkupKind(rule.kind)), rule.subject))


async def add_rule(  # noqa: PLR0913, PLR0917 - who adds what, where which providers are known
    engine: AsyncEngine, actor: str, known: Container[str], kind: MarkupKind, subject: str, percent: Any
) -> Rule:
    """Add a rule; `known` are the providers that the configuration has.

    Raises `BadRequest`, `NotFound` for a provider that is none of them, and `Conflict` when there is one for this
    subject.
    """
    check_name(subject, "subject")
    if kind is MarkupKind.PROVIDER:
        _check_provider(known, subject)
    bps, now = bps_of(percent), now_micros()
    rule = Rule(new_id("rule"), kind, subject, format_percent(bps))
    try:
        async with writing(engine) as connection:
            await connection.execute(
                markup_rules.insert().values(
                    id=rule.id, kind=kind, subject=subject, markup_bps=bps, created_at=now, updated_at=now
                )
            )
            await record(connection, actor, "markup.add", f"{kind} {subject}", None, rule.percent)
            await touch(connection)
    except IntegrityError as exc:
        raise Conflict(f"There is a rule for the {kind} {subject!r} already.", code="rule_exists") from exc
    return rule


async def change_rule(engine: AsyncEngine, actor: str, rule_id: str, percent: Any) -> Rule:
    """Give a rule another percentage. Raises `BadRequest`, `NotFound`."""
    bps = bps_of(percent)
    async with writing(engine) as connection:
        before = await _find_rule(connection, rule_id)
        await connection.execute(
            markup_rules.update().where(markup_rules.c.id == rule_id).values(markup_bps=bps, updated_at=now_micros())
        )
        after = msgspec.structs.replace(before, percent=format_percent(bps))
        await record(
            connection, actor, "markup.change", f"{before.kind} {before.subject}", before.percent, after.percent
        )
        await touch(connection)
    return after


async def find_rule(engine: AsyncEngine, kind: MarkupKind, subject: str) -> Rule | None:
    """The rule for this subject; None without one."""
    return next((rule for rule in await rules(engine) if (rule.kind, rule.subject) == (kind, subject)), None)


async def remove_rule(engine: AsyncEngine, actor: str, rule_id: str) -> None:
    """Take a rule away. Raises `NotFound`."""
    async with writing(engine) as connection:
        before = await _find_rule(connection, rule_id)
        await connection.execute(markup_rules.delete().where(markup_rules.c.id == rule_id))
        await record(connection, actor, "markup.remove", f"{before.kind} {before.subject}", before.percent, None)
        await touch(connection)


async def _find_rule(connection: AsyncConnection, rule_id: str) -> Rule:
    query = sa.select(markup_rules).where(markup_rules.c.id == rule_id).with_for_update()
    row = (await connection.execute(query)).one_or_none() if is_id(rule_id, "rule") else None
    if row is None:
        raise NotFound(f"There is no rule {rule_id!r}.")
    return _rule(row)


def _rule(row: Any) -> Rule:
    return Rule(row.id, row.kind, row.subject, format_percent(row.markup_bps))


# ---- providers


async def set_provider(
    engine: AsyncEngine, actor: str, known: Mapping[str, ProviderState], name: str, *, is_enabled: bool
) -> None:
    """Enable or disable a provider for new calls.

    Raises `NotFound` for one that the configuration does not have, `Conflict` for enabling one that lacks something.
    """
    _check_provider(known, name)
    state = known[name]
    if is_enabled and not state.is_ready:
        raise Conflict(
            f"The provider {name!r} lacks its address or a variable of the environment.", code="provider_not_ready"
        )
    async with writing(engine) as connection:
        before = await connection.scalar(sa.select(providers.c.is_enabled).where(providers.c.name == name))
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        statement = insert(providers).values(name=name, is_enabled=is_enabled, updated_at=now_micros())
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=["name"],
                set_={"is_enabled": statement.excluded.is_enabled, "updated_at": statement.excluded.updated_at},
            )
        )
        was_enabled = state.is_enabled if before is None else bool(before)
        action = "provider.enable" if is_enabled else "provider.disable"
        await record(connection, actor, action, name, {"enabled": was_enabled}, {"enabled": is_enabled})
        await touch(connection)


# ---- prices


def entry_from(price: Mapping[str, Any]) -> Entry:
    """The entry that `price`, with the fields of `[prices]` in the configuration, describes. Raises `BadRequest`."""
    try:
        settings = msgspec.convert(price, PriceSettings, strict=False)
        check_price(settings)
    except (msgspec.ValidationError, AmountError) as exc:
        raise BadRequest(f"price: {exc}", param="price", code="invalid_value") from exc
    entry, _ = entry_of(settings)
    if not is_payable(entry):  # it would be kept, and take the model off the offer
        message = "price: a call that fills these limits could cost more than can be booked"
        raise BadRequest(message, param="price", code="invalid_value")
    return entry


class PriceRecord(msgspec.Struct, frozen=True):
    """One row of the book's history; `entry` is None where a price was taken back."""

    target: str
    source: str
    version: str
    valid_from: Micros
    entry: dict[str, Any] | None


async def set_price(
    engine: AsyncEngine, actor: str, known: Container[str], target: tuple[str, str], entry: Entry | None
) -> PriceRecord:
    """Put a price of the operator's own before that of the list, or with None take it back; returns what it wrote.

    `target` are a provider, which for a price must be one of those `known`, and a model. Raises `NotFound` when it is
    not, and when there is none to be taken back.
    """
    provider, model = target
    if entry is not None:
        _check_provider(known, provider)
    async with writing(engine) as connection:
        now = await database_now(connection)
        before = (await pricebook.current(connection, now, (provider,)))[ADMIN].get(target)
        if entry is None and before is None:
            raise NotFound(f"There is no price of your own for {provider}/{model}.")
        row = Row(provider=provider, model=model, entry=entry)
        await pricebook.add(connection, [row], source=ADMIN, version=BY_HAND, now=now)
        action = "price.set" if entry is not None else "price.remove"
        after = _shown(entry)
        await record(connection, actor, action, row.target, _shown(before), after)
        await touch(connection)
    return PriceRecord(row.target, ADMIN, BY_HAND, now, after)


async def sync_prices(engine: AsyncEngine, actor: str, listed: PriceList) -> list[Change]:
    """Write what `listed` says otherwise than the book into it; returns that."""
    async with writing(engine) as connection:
        now = await database_now(connection)
        found = await pricebook.changes(connection, listed, now)
        if found:
            await pricebook.add(
                connection, [change.row for change in found], source=LIST, version=listed.version, now=now
            )
            await record(connection, actor, "prices.sync", listed.version, None, {"rows": len(found)})
            await touch(connection)
    return found


async def price_history(engine: AsyncEngine, target: tuple[str, str]) -> list[PriceRecord]:
    """All that the book ever said of a provider's model, the newest first."""
    provider, model = target
    async with reading(engine) as connection:
        rows = await connection.execute(
            sa.select(prices)
            .where(prices.c.provider == provider, prices.c.model == model)
            .order_by(prices.c.valid_from.desc(), prices.c.id.desc())
        )
        return [
            PriceRecord(f"{row.provider}/{row.model}", row.source, row.version, row.valid_from, row.entry)
            for row in rows
        ]


def _shown(entry: Entry | None) -> Any:
    return None if entry is None else msgspec.to_builtins(entry)
