"""`/api/v1/admin/config`: the settings that change while calls go on, for admins."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Router, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.administration.config import set_value
from proxy.edge.authentication import needs
from proxy.edge.errors import documented
from proxy.edge.llm import Refresh
from proxy.identity.keys import Caller, Scope
from proxy.settings import Settings
from proxy.shown.config import SettingItem, SettingList, setting_item, setting_list

AdminRequest = Request[Caller, Any, Any]

BODY_BYTES_MAX = 4096


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


router = Router("/api/v1/admin/config", opt=needs(Scope.ADMIN), route_handlers=[config, set_config])
