"""The settings that change while calls go on."""

from typing import Annotated

import msgspec
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration.config import Known, known
from proxy.settings import Settings
from proxy.units import format_instant


class SettingItem(msgspec.Struct):
    """One setting. `default` is what the configuration says, which counts as long as `updated_at` is null.

    By `type`: a `percent` and `credits` are decimal strings, a `boolean` is true or false, a `choice` is a word.
    """

    name: Annotated[str, Meta(examples=["starting_credits"])]
    value: str | bool
    default: str | bool
    type: str
    description: str
    updated_at: str | None


class SettingList(msgspec.Struct):
    """All of them."""

    items: list[SettingItem]
    next_cursor: None = None


async def setting_list(engine: AsyncEngine, settings: Settings) -> SettingList:
    """All settings, as they are shown."""
    return SettingList([setting_item(one) for one in await known(engine, settings)])


def setting_item(one: Known) -> SettingItem:
    """A setting, as it is shown."""
    updated_at = None if one.updated_at is None else format_instant(one.updated_at)
    return SettingItem(**{**msgspec.structs.asdict(one), "updated_at": updated_at})
