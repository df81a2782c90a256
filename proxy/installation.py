"""What a configuration says is there: the books, the catalogue and the schema, for servers and commands alike."""

from decimal import Decimal

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.catalog import Loader, seed
from proxy.ledger.store import PostgresStore, SqliteStore, Store
from proxy.settings import Configuration, PriceSettings
from proxy.storage import database
from proxy.upstream.demo import (
    DEMO_CONTEXT_TOKENS,
    DEMO_INPUT_PRICE,
    DEMO_MODEL,
    DEMO_OUTPUT_PRICE,
    DEMO_OUTPUT_TOKENS_MAX,
)


def store(configuration: Configuration, engine: AsyncEngine, *, is_server: bool) -> Store:
    """The ledger's own connection to the books."""
    if configuration.is_embedded:
        return SqliteStore(configuration.sqlite_file, checkpoints=is_server)
    return PostgresStore(engine)


def catalog_loader(configuration: Configuration, engine: AsyncEngine) -> Loader:
    """What makes the catalogue of `configuration`."""
    return Loader(configuration, engine, _built_in_prices(configuration))


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


async def prepare(configuration: Configuration) -> None:
    """Create or upgrade the schema and give a new database its first values.

    Raises `SettingsError` when an embedded database is served or migrated by another process.
    """
    engine = database.connect(configuration.database_url, pooled=False)

    async def seeded(connection: AsyncConnection) -> None:
        await seed(connection, configuration.settings.credits.markup_percent)

    try:
        if await database.revision(engine) != database.SCHEMA_HEAD:
            await database.migrate(engine, then=seeded)
        else:
            async with database.writing(engine) as connection:
                await seeded(connection)
    finally:
        await engine.dispose()
