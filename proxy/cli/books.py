"""The books, for commands: the configured database, whose schema must be up to date."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from proxy.errors import SettingsError
from proxy.settings import Configuration, load

if TYPE_CHECKING:
    from proxy.catalog import Catalog
    from proxy.identity.users import User
    from proxy.ledger.ledger import Ledger


class Books:
    """The database of a command, with the ledger when it is needed."""

    def __init__(self, configuration: Configuration) -> None:
        from proxy.storage.database import connect

        self.configuration = configuration
        self.engine = connect(configuration.database_url, pooled=False)

    async def user(self, email: str) -> "User":
        """The user with this address or id. Raises `NotFound`."""
        from proxy.identity.users import find_user
        from proxy.storage.database import reading

        async with reading(self.engine) as connection:
            return await find_user(connection, email)

    async def catalog(self) -> "Catalog":
        """What is on offer just now, as a server on this database sees it."""
        from proxy.installation import catalog_loader

        return await catalog_loader(self.configuration, self.engine).load()

    @asynccontextmanager
    async def ledger(self) -> AsyncIterator["Ledger"]:
        """An open ledger on these books."""
        from proxy.installation import store
        from proxy.ledger.ledger import Ledger

        ledger = Ledger(store(self.configuration, self.engine, is_server=False))
        ledger.start()
        try:
            yield ledger
        finally:
            await ledger.aclose(wait_s=0)


def with_books(work: Callable[[Books], Awaitable[Any]]) -> Any:
    """Run `work` on the configured database. Raises `SettingsError` when there is none yet, or an older one."""
    from proxy.observability import configure_logs
    from proxy.storage.database import check_schema

    configuration = load(os.environ)
    configure_logs(configuration.settings.logs.format, configuration.settings.logs.level)
    if configuration.is_embedded and not configuration.sqlite_file.exists():
        raise SettingsError(f"there is no database {configuration.sqlite_file} yet: run `tollgate migrate` first")

    async def working() -> Any:
        books = Books(configuration)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(books.engine.dispose)
            await check_schema(books.engine)
            return await work(books)

    return run(working())


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What `coroutine` returns."""
    import uvloop

    return uvloop.run(coroutine)
