"""The composition root: from the configuration to a running application. Everything is built here and handed down."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Literal

import structlog
from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.handlers import ASGIRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy import __version__
from proxy.catalog import Catalog
from proxy.edge import accounts as account_routes
from proxy.edge import admin, admin_config, admin_credits, admin_records, admin_users, health, inference, llm, reports
from proxy.edge import credits as credit_routes
from proxy.edge import keys as key_routes
from proxy.edge.addresses import Addresses
from proxy.edge.answer import BodyLimits, identify
from proxy.edge.authentication import Authentication, authenticated
from proxy.edge.bodies import check_body
from proxy.edge.document import DocumentPlugin, PagePlugin
from proxy.edge.errors import respond
from proxy.edge.health import Exposition, Readiness
from proxy.edge.invoke import Simple
from proxy.edge.protocol import Way
from proxy.errors import Unavailable, UpstreamFailed, reason_of
from proxy.exchange import Exchange, ExchangeLimits
from proxy.gauges import REFRESH_S, Gauges
from proxy.identity.accounts import Accounts, Welcome
from proxy.identity.attempts import Attempts
from proxy.identity.issuers import Fetch, Issuers
from proxy.identity.last_used import LastUsed
from proxy.identity.tokens import Tokens, kept_secret
from proxy.installation import catalog_loader, store
from proxy.ledger.ledger import Ledger
from proxy.ledger.recovery import Lease
from proxy.ledger.store import Store
from proxy.metrics import Metrics
from proxy.settings import Configuration
from proxy.storage import database
from proxy.units import SECONDS_PER_DAY
from proxy.upstream import Provider
from proxy.upstream.anthropic import AnthropicProvider
from proxy.upstream.client import CONNECTIONS_MAX, HttpClient, Timeouts
from proxy.upstream.demo import DemoProvider
from proxy.upstream.httpx import HttpxClient
from proxy.upstream.lean import LeanClient
from proxy.upstream.openai import OpenAIProvider

log = structlog.get_logger(__name__)

CATALOG_REFRESH_S = 1.0
"""How long a change of markup may take to reach every process."""

JWT_SECRET_FILE = "jwt_secret"  # noqa: S105 - a file's name
"""In the data folder of an embedded installation that was given no secret."""

_KEY_SET_BYTES_MAX = 500_000
_FETCH_S_MAX = 8.0
"""Within the patience of whoever sent the first token of an issuer."""


class Tollgate:
    """One process's parts, alive between `open` and the end of its block."""

    def __init__(self, configuration: Configuration, metrics: Metrics | None = None) -> None:
        self.configuration = configuration
        self.metrics = metrics or Metrics()
        self.engine: AsyncEngine = database.connect(configuration.database_url)
        self.catalog: Catalog
        self._loader = catalog_loader(configuration, self.engine)
        self.ledger: Ledger
        self.exchange: Exchange
        self.readiness: Readiness
        self.gauges: Gauges
        self.accounts: Accounts
        self.authentication: Authentication
        self.last_used = LastUsed(self.engine)
        self.is_stopping = False
        self.is_database_lost = False
        """Whether the last look at the catalogue, a second ago, did not reach the database."""

    def stop(self) -> None:
        """Turn readiness red: the server is about to end."""
        self.is_stopping = True

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connect, recover what an earlier process left open, and work until the block ends.

        Raises `SettingsError` on a schema that is not ours or a database that would forget in a crash what it has
        committed, `Unavailable` when the database is out of reach.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.engine.dispose)
            await database.check_schema(self.engine)
            self.catalog = await self._loader.load()
            for remark in self.catalog.remarks:
                log.warning("catalog", remark=remark)
            lease = Lease(
                self.engine,
                is_embedded=self.configuration.is_embedded,
                lease_s=self.configuration.settings.database.lease_s,
            )
            books = self._store()
            server = self.configuration.settings.server
            self.ledger = Ledger(books, lambda: lease.id, self.metrics, end_wait_s=server.settle_wait_s)
            stack.push_async_callback(self.ledger.aclose)
            await books.check()
            self.ledger.start()
            await stack.enter_async_context(lease.held(self.ledger))
            providers = self._providers()
            for provider in providers.values():
                stack.push_async_callback(provider.aclose)
            self.metrics.show_zeros(providers)
            limits = _limits(self.configuration)
            self.exchange = Exchange(self.ledger, providers, lambda: self.catalog, limits, self.metrics)
            self.gauges = Gauges(
                self.metrics, self.ledger, lease, self.exchange, self.engine, lambda: self.is_database_lost
            )
            self.readiness = Readiness(
                engine=self.engine,
                ledger=self.ledger,
                lease=lease,
                exchange=self.exchange,
                catalog=lambda: self.catalog,
                is_stopping=lambda: self.is_stopping,
                providers=tuple(providers),
            )
            client = http_client(server.http_client)
            stack.push_async_callback(client.aclose)
            self.accounts = _accounts(self.configuration, self.engine, self.ledger, client, self._welcome)
            self.authentication = Authentication(self.engine, self.accounts, self.last_used)
            stack.push_async_callback(self.last_used.write)
            writing = asyncio.create_task(self.last_used.keep_writing(), name="last_used")
            stack.push_async_callback(_ended, writing)
            refreshing = asyncio.create_task(self._keep_catalog_fresh(), name="catalog")
            stack.callback(refreshing.cancel)
            measuring = asyncio.create_task(self._keep_measuring(), name="gauges")
            stack.callback(measuring.cancel)
            yield

    def _store(self) -> Store:
        return store(self.configuration, self.engine, is_server=True)

    def _providers(self) -> dict[str, Provider]:
        """All that could serve: which of them do is the catalogue's to say."""
        return {name: _provider(name, self.configuration) for name in self.configuration.providers}

    def _welcome(self) -> Welcome:
        policy = self.catalog.policy
        return Welcome(policy.registration_open, policy.credits_given)

    async def refresh_catalog(self) -> None:
        """Look whether the catalogue has changed.

        Where the database is out of reach it stays as it is until the next look, within a second: whoever has just
        committed a change has changed something all the same.
        """
        try:
            self.catalog = await self._loader.load(self.catalog)
        except Unavailable as exc:
            self._note_database(reason_of(exc))
        else:
            self._note_database(None)

    def _note_database(self, failure: str | None) -> None:
        was_lost, self.is_database_lost = self.is_database_lost, failure is not None
        if failure is not None and not was_lost:
            log.error("database_lost", reason=failure)
        elif failure is None and was_lost:
            log.warning("database_back")

    async def _keep_catalog_fresh(self) -> None:
        while True:
            await asyncio.sleep(CATALOG_REFRESH_S)
            await self.refresh_catalog()

    async def _keep_measuring(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            self.gauges.refresh()
            due = clock() + REFRESH_S
            await asyncio.sleep(REFRESH_S)
            self.gauges.lag(clock() - due)

    def metrics_text(self) -> str:
        """What all processes of this server count, this one up to now."""
        self.gauges.refresh()
        return self.metrics.shared.text()


class Application:
    """An ASGI application, and the direct ways of its paid paths beside it (see `edge.protocol`)."""

    def __init__(self, app: ASGIApp, ways: Mapping[bytes, Way]) -> None:
        self._app = app
        self.ways = ways

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what takes ASGI's way."""
        await self._app(scope, receive, send)


def build(tollgate: Tollgate) -> Application:
    """The web application over an open `tollgate`."""
    configuration = tollgate.configuration
    ways = inference.paid_ways(
        tollgate.exchange,
        tollgate.authentication,
        _body_limits(configuration),
        stall_s=configuration.settings.server.stall_s,
        metrics=tollgate.metrics,
    )
    return Application(identified(routed(tollgate)), ways)


def routed(tollgate: Tollgate) -> Litestar:
    """Every route, behind authentication."""
    server = tollgate.configuration.settings.server
    addresses = Addresses(server.trusted_proxies)
    auditor = admin_records.Auditor(tollgate.engine)
    exposition = Exposition(tollgate.metrics_text, server.metrics_token)
    return Litestar(
        route_handlers=[
            *_paid_handlers(tollgate),
            inference.kept_responses,
            inference.models,
            inference.model,
            credit_routes.balance,
            credit_routes.transactions,
            credit_routes.stats,
            credit_routes.charges,
            credit_routes.charge,
            account_routes.register,
            account_routes.login,
            account_routes.me,
            account_routes.change_password,
            key_routes.keys,
            key_routes.make_key,
            key_routes.alter_key,
            key_routes.drop_key,
            llm.router,
            admin.router,
            reports.router,
            reports.overview,
            admin_users.router,
            admin_credits.router,
            admin_config.router,
            admin_records.router,
            health.live,
            health.ready,
            health.metrics,
        ],
        middleware=[lambda app: authenticated(app, tollgate.authentication)],
        exception_handlers={Exception: respond},
        before_request=check_body,
        dependencies={
            "engine": Provide(lambda: tollgate.engine, sync_to_thread=False),
            "ledger": Provide(lambda: tollgate.ledger, sync_to_thread=False),
            "catalog": Provide(lambda: tollgate.catalog, sync_to_thread=False),
            "accounts": Provide(lambda: tollgate.accounts, sync_to_thread=False),
            "addresses": Provide(lambda: addresses, sync_to_thread=False),
            "settings": Provide(lambda: tollgate.configuration.settings, sync_to_thread=False),
            "auditor": Provide(lambda: auditor, sync_to_thread=False),
            "readiness": Provide(lambda: tollgate.readiness, sync_to_thread=False),
            "exposition": Provide(lambda: exposition, sync_to_thread=False),
            "refresh": Provide(lambda: tollgate.refresh_catalog, sync_to_thread=False),
        },
        cors_config=_cors(server.cors_origins),
        openapi_config=_openapi(),
        logging_config=None,
        debug=False,
    )


def _openapi() -> OpenAPIConfig:
    document = DocumentPlugin()
    return OpenAPIConfig(
        title="Tollgate",
        version=__version__,
        description="OpenAI's API on prepaid credits. Amounts are decimal strings of credits; 1 credit is 1 USD.",
        path="/schema",
        use_handler_docstrings=True,
        render_plugins=[PagePlugin(document), document],
    )


def _paid_handlers(tollgate: Tollgate) -> list[ASGIRouteHandler]:
    server, metrics = tollgate.configuration.settings.server, tollgate.metrics
    limits = _body_limits(tollgate.configuration)
    simple = Simple(
        tollgate.exchange,
        lambda: tollgate.catalog,
        tollgate.engine,
        limits,
        answer_bytes_max=server.answer_bytes_max,
        metrics=metrics,
    )
    return [
        *inference.paid_handlers(tollgate.exchange, limits, stall_s=server.stall_s, metrics=metrics),
        *simple.handlers(stall_s=server.stall_s),
    ]


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


def _body_limits(configuration: Configuration) -> BodyLimits:
    server = configuration.settings.server
    return BodyLimits(bytes_max=server.body_bytes_max, wait_s=server.body_s)


async def _ended(task: "asyncio.Task[None]") -> None:
    """Cancel `task` and wait for its end: what it holds of the database is given back by then."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


_EXPOSED_HEADERS = [
    "x-request-id",
    "x-credits-reserved",
    "x-credits-charged",
    "x-credits-balance",
    "x-credits-max-tokens",
    "x-tollgate-provider",
    "retry-after",
]


def _cors(origins: list[str]) -> CORSConfig | None:
    """Browsers of these origins may call us; no cookie ever counts."""
    return CORSConfig(allow_origins=origins, expose_headers=_EXPOSED_HEADERS) if origins else None


def _accounts(
    configuration: Configuration,
    engine: AsyncEngine,
    ledger: Ledger,
    client: HttpClient,
    welcome: Callable[[], Welcome],
) -> Accounts:
    auth = configuration.settings.auth
    secret = auth.jwt_secret
    if secret is None and configuration.is_embedded:
        secret = kept_secret(configuration.data_dir / JWT_SECRET_FILE)
    if secret is None:
        log.warning("login_not_configured", missing="TOLLGATE_JWT_SECRET")
    clock = time.monotonic
    return Accounts(
        engine,
        ledger,
        tokens=None if secret is None else Tokens(secret, auth.token_days * SECONDS_PER_DAY),
        issuers=Issuers(auth.issuers, _fetch(client), clock),
        by_address=Attempts(auth.address_attempts_per_minute, 60, clock),
        by_account=Attempts(auth.account_failures_per_hour, 3600, clock),
        welcome=welcome,
    )


def _fetch(client: HttpClient) -> Fetch:
    """What gets an issuer's keys."""
    timeouts = Timeouts(connect_s=3, first_byte_s=5, idle_s=5)

    async def fetch(url: str) -> bytes:
        try:
            async with asyncio.timeout(_FETCH_S_MAX):
                response = await client.send(
                    provider="issuer",
                    method="GET",
                    url=url,
                    headers=[(b"accept", b"application/json"), (b"accept-encoding", b"identity")],
                    body=b"",
                    timeouts=timeouts,
                )
                try:
                    body = b""
                    async for chunk in response.chunks():
                        body += chunk
                        if len(body) > _KEY_SET_BYTES_MAX:
                            raise Unavailable("The issuer's answer is too long.")
                finally:
                    await response.aclose()
        except (UpstreamFailed, TimeoutError) as exc:
            raise Unavailable(str(exc) or "The issuer did not answer in time.") from exc
        if response.status != 200:
            raise Unavailable(f"The issuer answered with status {response.status}.")
        return body

    return fetch


def _limits(configuration: Configuration) -> ExchangeLimits:
    server = configuration.settings.server
    return ExchangeLimits(
        nesting_max=server.nesting_max,
        answer_bytes_max=server.answer_bytes_max,
        event_bytes_max=server.event_bytes_max,
        call_s=server.call_s,
        keep_alive_s=server.keep_alive_s,
        may_pay_twice=configuration.settings.routing.may_pay_twice,
    )


def http_client(choice: Literal["lean", "httpx"], connections_max: int = CONNECTIONS_MAX) -> HttpClient:
    """What speaks to a provider."""
    client = LeanClient if choice == "lean" else HttpxClient
    return client(connections_max=connections_max)


def _provider(name: str, configuration: Configuration) -> Provider:
    settings = configuration.providers[name]
    if settings.kind == "demo":
        return DemoProvider(name)
    server = configuration.settings.server
    client = http_client(server.http_client, settings.connections_max)
    timeouts = Timeouts(connect_s=settings.connect_s, first_byte_s=settings.first_byte_s, idle_s=settings.idle_s)
    key, headers = configuration.api_keys.get(name), configuration.headers[name]
    if settings.kind == "anthropic":
        return AnthropicProvider(
            name,
            settings.base_url,
            key,
            client,
            timeouts,
            headers=headers,
            answer_bytes_max=server.answer_bytes_max,
            event_bytes_max=server.event_bytes_max,
        )
    return OpenAIProvider(name, settings.base_url or "", key, client, timeouts, headers=headers)
