"""The composition root: from the configuration to a running application. Everything is built here and handed down."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from decimal import Decimal
from typing import Literal

import structlog
from litestar import Litestar
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy import __version__
from proxy.catalog import Catalog, load_catalog, seed_markup
from proxy.edge import credits as credit_routes
from proxy.edge import health, inference
from proxy.edge.answer import identify
from proxy.edge.authentication import Authentication, authenticated
from proxy.edge.errors import respond
from proxy.errors import Unavailable
from proxy.exchange import Exchange, ExchangeLimits
from proxy.ledger.ledger import Ledger
from proxy.ledger.recovery import Lease
from proxy.ledger.store import PostgresStore, SqliteStore, Store
from proxy.settings import Configuration, PriceSettings, ProviderSettings
from proxy.storage import database
from proxy.upstream import Provider
from proxy.upstream.client import HttpClient, Timeouts
from proxy.upstream.demo import (
    DEMO_CONTEXT_TOKENS,
    DEMO_INPUT_PRICE,
    DEMO_MODEL,
    DEMO_OUTPUT_PRICE,
    DEMO_OUTPUT_TOKENS_MAX,
    DemoProvider,
)
from proxy.upstream.httpx import HttpxClient
from proxy.upstream.lean import LeanClient
from proxy.upstream.openai import OpenAIProvider

log = structlog.get_logger(__name__)

CATALOG_REFRESH_S = 1.0
"""How long a change of markup may take to reach every process."""


class Tollgate:
    """One process's parts, alive between `open` and the end of its block."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.engine: AsyncEngine = database.connect(configuration.database_url)
        self.catalog: Catalog
        self.ledger: Ledger
        self.exchange: Exchange

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connect, recover what an earlier process left open, and work until the block ends.

        Raises `SettingsError` on a schema that is not ours, `Unavailable` when the database is out of reach.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.engine.dispose)
            await database.check_schema(self.engine)
            await self._refresh_catalog()
            lease = Lease(
                self.engine,
                is_embedded=self.configuration.is_embedded,
                lease_s=self.configuration.settings.database.lease_s,
            )
            self.ledger = Ledger(store(self.configuration, self.engine, is_server=True), lambda: lease.id)
            self.ledger.start()
            stack.push_async_callback(self.ledger.aclose)
            await stack.enter_async_context(lease.held(self.ledger))
            client = http_client(self.configuration.settings.server.http_client)
            stack.push_async_callback(client.aclose)
            self.exchange = Exchange(
                self.ledger, self._providers(client), lambda: self.catalog, _limits(self.configuration)
            )
            refreshing = asyncio.create_task(self._keep_catalog_fresh(), name="catalog")
            stack.callback(refreshing.cancel)
            yield

    def _providers(self, client: HttpClient) -> dict[str, Provider]:
        return {
            name: _provider(name, settings, self.configuration.api_keys.get(name), client)
            for name, settings in self.configuration.providers.items()
        }

    async def _refresh_catalog(self) -> None:
        self.catalog = await load_catalog(self.configuration, self.engine, _built_in_prices(self.configuration))

    async def _keep_catalog_fresh(self) -> None:
        while True:
            await asyncio.sleep(CATALOG_REFRESH_S)
            with suppress(Unavailable):
                await self._refresh_catalog()


def build(tollgate: Tollgate) -> ASGIApp:
    """The web application over an open `tollgate`."""
    authentication = Authentication(tollgate.engine)
    server = tollgate.configuration.settings.server
    paid = inference.paid_handlers(tollgate.exchange, body_bytes_max=server.body_bytes_max, stall_s=server.stall_s)
    app = Litestar(
        route_handlers=[
            *paid,
            inference.kept_responses,
            inference.models,
            inference.model,
            credit_routes.balance,
            credit_routes.transactions,
            credit_routes.charge,
            health.live,
            health.ready,
        ],
        middleware=[lambda app: authenticated(app, authentication)],
        exception_handlers={Exception: respond},
        dependencies={
            "engine": Provide(lambda: tollgate.engine, sync_to_thread=False),
            "ledger": Provide(lambda: tollgate.ledger, sync_to_thread=False),
            "catalog": Provide(lambda: tollgate.catalog, sync_to_thread=False),
        },
        openapi_config=OpenAPIConfig(
            title="Tollgate", version=__version__, path="/schema", render_plugins=[JsonRenderPlugin()]
        ),
        logging_config=None,
        debug=False,
    )
    return inference.shortcut(identified(app), paid, authentication, stall_s=server.stall_s)


def identified(app: ASGIApp) -> ASGIApp:
    """`app` with an id of our own for every request, in `x-request-id` of every answer, unknown paths included."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        header = (b"x-request-id", identify(scope).encode())

        async def send_identified(message: Message) -> None:
            if message["type"] == "http.response.start" and header not in message["headers"]:
                message["headers"] = [*message["headers"], header]
            await send(message)

        await app(scope, receive, send_identified)

    return middleware


def store(configuration: Configuration, engine: AsyncEngine, *, is_server: bool) -> Store:
    """The ledger's own connection to the books."""
    if configuration.is_embedded:
        return SqliteStore(configuration.sqlite_file, checkpoints=is_server)
    return PostgresStore(engine)


async def prepare(configuration: Configuration) -> None:
    """Create or upgrade the schema and give a new database its first values.

    Raises `SettingsError` when an embedded database is served or migrated by another process.
    """
    engine = database.connect(configuration.database_url)
    try:
        if await database.revision(engine) != database.SCHEMA_HEAD:
            await database.migrate(engine)
        async with database.writing(engine) as connection:
            await seed_markup(connection, configuration.settings.credits.markup_percent)
    finally:
        await engine.dispose()


def _limits(configuration: Configuration) -> ExchangeLimits:
    server = configuration.settings.server
    return ExchangeLimits(
        answer_bytes_max=server.answer_bytes_max,
        event_bytes_max=server.event_bytes_max,
        call_s=server.call_s,
        settle_wait_s=server.settle_wait_s,
        keep_alive_s=server.keep_alive_s,
    )


def http_client(choice: Literal["lean", "httpx"]) -> HttpClient:
    """What speaks to providers."""
    return LeanClient() if choice == "lean" else HttpxClient()


def _provider(name: str, settings: ProviderSettings, api_key: str | None, client: HttpClient) -> Provider:
    if settings.kind == "demo":
        return DemoProvider(name)
    timeouts = Timeouts(connect_s=settings.connect_s, first_byte_s=settings.first_byte_s, idle_s=settings.idle_s)
    return OpenAIProvider(name, settings.base_url or "", api_key, client, timeouts)


def _built_in_prices(configuration: Configuration) -> dict[str, PriceSettings]:
    """The demo model has a price under whatever name its provider was given."""
    return {
        f"{name}/{DEMO_MODEL}": PriceSettings(
            input=Decimal(DEMO_INPUT_PRICE),
            output=Decimal(DEMO_OUTPUT_PRICE),
            max_output_tokens=DEMO_OUTPUT_TOKENS_MAX,
            context_tokens=DEMO_CONTEXT_TOKENS,
        )
        for name, provider in configuration.providers.items()
        if provider.kind == "demo"
    }
