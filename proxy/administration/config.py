"""The settings in `system_config`, as an operator reads and changes them."""

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.administration import bps_of, record
from proxy.catalog import put_config, touch
from proxy.errors import BadRequest, Conflict, NotFound
from proxy.policy import MARKUP_PERCENT, SETTINGS, STRANGERS, Setting, Value, configured, policy_of
from proxy.settings import Settings
from proxy.storage.database import reading, writing
from proxy.storage.tables import system_config
from proxy.units import AmountError, Micros, format_percent


class Known(msgspec.Struct, frozen=True):
    """A setting: what counts, what the configuration says, and when an operator last said otherwise, if one did."""

    name: str
    value: Value
    default: Value
    type: str
    description: str
    updated_at: Micros | None


async def known(engine: AsyncEngine, settings: Settings) -> list[Known]:
    """Every setting that can be changed while calls go on."""
    async with reading(engine) as connection:
        rows = await _rows(connection)
    return [_known(setting, settings, rows) for setting in SETTINGS.values()]


async def set_value(engine: AsyncEngine, settings: Settings, actor: str, name: str, value: Any) -> Known:
    """Set one; every process knows it within a second.

    Raises `NotFound` for a name that is none, `BadRequest` for a value that is none, and `Conflict` for one that would
    give credits to whoever comes along.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        raise NotFound(f"There is no setting {name!r}.")
    try:
        after = setting.normalise(value)
    except AmountError as exc:
        raise BadRequest(f"{name}: {exc}.", param="value", code="invalid_value") from exc
    async with writing(engine) as connection:
        await touch(connection)  # first: whoever else changes a setting waits here, and sees what this one did
        rows = await _rows(connection)
        if name in STRANGERS:
            policy, _ = policy_of(settings, {**{key: row.value for key, row in rows.items()}, name: after})
            if not policy.is_safe:
                raise Conflict(
                    "Anybody may register and would get credits for it. Close registration (registration_open), or"
                    " insist (give_to_strangers).",
                    code="gives_to_strangers",
                )
        before = _known(setting, settings, rows).value
        await put_config(connection, name, after, setting.description)
        await record(connection, actor, "config.set", name, before, after)
        return _known(setting, settings, await _rows(connection))


async def set_default_markup(engine: AsyncEngine, settings: Settings, actor: str, percent: Any) -> str:
    """Likewise `markup_percent`, as somebody typed it; returns it as it is stored. Raises `BadRequest`."""
    after = format_percent(bps_of(percent))
    await set_value(engine, settings, actor, MARKUP_PERCENT, after)
    return after


async def _rows(connection: AsyncConnection) -> dict[str, Any]:
    table = system_config
    query = sa.select(table.c.key, table.c.value, table.c.updated_at).where(table.c.key.in_(SETTINGS))
    return {row.key: row for row in await connection.execute(query)}


def _known(setting: Setting, settings: Settings, rows: dict[str, Any]) -> Known:
    default = configured(setting, settings)
    value, row = default, rows.get(setting.name)
    if row is not None:
        try:
            value = setting.normalise(row.value)
        except AmountError:
            row = None  # what somebody wrote there by hand counts for nothing
    return Known(
        name=setting.name,
        value=value,
        default=default,
        type=setting.type,
        description=setting.description,
        updated_at=None if row is None else row.updated_at,
    )
