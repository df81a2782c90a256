"""Whether this process lives, whether it can serve, and what it counts."""

import asyncio
from collections.abc import Callable
from hmac import compare_digest
from ipaddress import ip_address
from typing import Any

import msgspec
from litestar import Request, get
from litestar.di import NamedDependency
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.catalog import Catalog
from proxy.edge.errors import documented
from proxy.errors import Forbidden, NotReady, Unauthenticated, Unavailable
from proxy.exchange import Exchange
from proxy.ledger.ledger import Ledger
from proxy.ledger.recovery import Lease
from proxy.storage.database import SCHEMA_HEAD, revision

METRICS_TYPE = "text/plain; version=0.0.4"
"""The framework adds the character set."""

_DATABASE_S_MAX = 3.0
"""Longer than that nobody in front of us waits for an answer."""

_OK = "ok"
_FORWARDED = frozenset({"x-forwarded-for", "forwarded", "x-real-ip", "via"})
"""What proxies add: with one of these a request is not from this machine, whoever has connected."""


class Ready(msgspec.Struct):
    """Calls can be served. Providers are shown, and do not count: calls are served by those that are well."""

    status: str
    checks: dict[str, str]
    providers: dict[str, str]


class Readiness(msgspec.Struct, frozen=True):
    """What a process has to look at before it takes calls."""

    engine: AsyncEngine
    ledger: Ledger
    lease: Lease
    exchange: Exchange
    catalog: Callable[[], Catalog]
    is_stopping: Callable[[], bool]
    providers: tuple[str, ...]

    async def checks(self) -> dict[str, str]:
        """What was found, `ok` where all is well. Raises `NotReady` if calls should go elsewhere."""
        found = await self._database()
        found["ledger"] = "out of reach" if self.ledger.is_lost else _OK
        found["lease"] = _OK if self.lease.is_held else "run out"
        found["process"] = "stopping" if self.is_stopping() else _OK
        # A newer schema is what a replica sees while it is being replaced.
        if any(said != _OK and not said.startswith("newer") for said in found.values()):
            raise NotReady(found)
        return found

    async def _database(self) -> dict[str, str]:
        try:
            async with asyncio.timeout(_DATABASE_S_MAX):
                found = await revision(self.engine)
        except (Unavailable, TimeoutError):
            return {"database": "out of reach", "schema": "unknown"}
        if found is None:
            return {"database": _OK, "schema": "missing"}
        if found == SCHEMA_HEAD:
            return {"database": _OK, "schema": _OK}
        return {"database": _OK, "schema": f"{'newer' if found > SCHEMA_HEAD else 'older'}: {found}"}

    def of_providers(self) -> dict[str, str]:
        """`ok`, `cooling down` (for one of its models at least) or `off`, by name."""
        serving = {candidate.provider for found in self.catalog().models.values() for candidate in found}
        cooling = {target.partition("/")[0] for target in self.exchange.cooling()}
        return {
            name: "off" if name not in serving else "cooling down" if name in cooling else _OK
            for name in self.providers
        }


class Exposition(msgspec.Struct, frozen=True):
    """The page of metrics, and who may read it: whoever has the `token`; without one, this machine."""

    text: Callable[[], str]
    token: str | None

    def check(self, request: Request[Any, Any, Any]) -> None:
        """Raises `Unauthenticated` for another token than ours, `Forbidden` for another machine."""
        if self.token is not None:
            sent = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not compare_digest(sent.encode(), self.token.encode()):
                raise Unauthenticated("This needs the token of server.metrics_token.")
            return
        if request.client is None or not _is_loopback(request.client.host) or _FORWARDED & request.headers.keys():
            raise Forbidden("Without server.metrics_token this is for this machine.", code="metrics_closed")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@get("/health/live", sync_to_thread=False, summary="The process answers")
def live() -> dict[str, str]:
    """Answer whatever else is down: restart the process when this fails."""
    return {"status": "ok"}


@get("/health/ready", summary="Calls can be served", responses=documented(503, is_public=True))
async def ready(readiness: NamedDependency[Readiness]) -> Ready:
    """Answer 503, with what is wrong in `checks`, when calls should go elsewhere.

    That is while the database is out of reach or has another schema, while charges cannot be booked, when the lease has
    run out, and once the server is about to stop.
    """
    return Ready(_OK, await readiness.checks(), readiness.of_providers())


@get(
    "/metrics",
    sync_to_thread=False,
    media_type=METRICS_TYPE,
    summary="What is counted",
    responses=documented(401, 403, is_public=True),
)
def metrics(request: Request[Any, Any, Any], exposition: NamedDependency[Exposition]) -> str:
    """Show what all processes of this server count, in Prometheus' text format.

    It is for whoever sends the token of `server.metrics_token`; without one, for this machine.
    """
    exposition.check(request)
    return exposition.text()
