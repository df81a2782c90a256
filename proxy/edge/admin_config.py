"""`/api/v1/admin/config`: the settings that change while calls go on, for admins."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Router, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration.config import Known, known, set_value
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.edge.llm import Refresh
from proxy.identity.keys import Caller, Scope
from proxy.settings import Settings
from proxy.units import format_instant

AdminRequest = Request[Caller, Any, Any]

BODY_BYTES_MAX = 4096


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


class NewValue(msgspec.Struct, forbid_unknown_fields=True):
    """What the setting is to be from now on."""

    value: Annotated[str | int | bool, Meta(examples=["0.25"])]


@get("/", summary="The settings", responses=documented())
async def config(engine: NamedDependency[AsyncEngine], settings: NamedDependency[Settings]) -> SettingList:
    """Every setting that can be changed while calls go on."""
    return await setting_list(engine, settings)


@put(
    "/{name:str}",
    summary="Change a setting",
    request_max_body_size=BODY_BYTES_MAX,
    responses=documented(400, 404, 409, 413),
)
async def set_config(  # noqa: PLR0913, PLR0917 - what the framework hands to a handler
    request: AdminRequest,
    engine: NamedDependency[AsyncEngine],
    settings: NamedDependency[Settings],
    refresh: NamedDependency[Refresh],
    name: FromPath[str],
    data: JSONBody[NewValue],
) -> SettingItem:
    """Set one; here at once, in every other process within a second, for new calls and accounts.

    Starting credits while anybody may register are refused unless `give_to_strangers` insists.
    """
    item = setting_item(await set_value(engine, settings, request.user.user_id, name, data.value))
    await refresh()
    return item


async def setting_list(engine: AsyncEngine, settings: Settings) -> SettingList:
    """All settings, as they are shown."""
    return SettingList([setting_item(one) for one in await known(engine, settings)])


def setting_item(one: Known) -> SettingItem:
    """A setting, as it is shown."""
    updated_at = None if one.updated_at is None else format_instant(one.updated_at)
    return SettingItem(**{**msgspec.structs.asdict(one), "updated_at": updated_at})


router = Router("/api/v1/admin/config", opt=needs(Scope.ADMIN), route_handlers=[config, set_config])
