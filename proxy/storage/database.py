"""The engine, the transactions of everything but the ledger's hot path, and the state of the schema.

On SQLite one process serves at a time, held by a lock file beside the database; the command line may write
beside it. Every transaction begins explicitly: with the driver's own default, a read that turns into a write
loses updates without an error.
"""

import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from proxy.errors import SettingsError, Unavailable, forget_frames
from proxy.units import Micros, now_micros

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMA_HEAD = "0006"
"""The revision this code is written for: the newest file in `migrations/versions`."""

CONNECTIONS_MAX = 5
STATEMENT_S_MAX = 5
WHOLE_S_MAX = 3600
"""For a statement over a whole table, however long that has become."""

_MIGRATION_LOCK = 0x746F6C6C
"""Any number, as long as every migration of Tollgate takes the same one."""


def connect(url: str, *, pooled: bool = True, command_s_max: float = 2 * STATEMENT_S_MAX) -> AsyncEngine:
    """An engine for `url`; nothing is opened yet. Not pooled: each connection is opened when asked for.

    On PostgreSQL a statement without an answer after `command_s_max` is given up.
    """
    pool: dict[str, Any] = (
        {"pool_size": CONNECTIONS_MAX, "max_overflow": 0, "pool_timeout": STATEMENT_S_MAX, "pool_pre_ping": True}
        if pooled
        else {"poolclass": NullPool}
    )
    if url.startswith("postgresql"):
        return create_async_engine(
            url,
            isolation_level="READ COMMITTED",
            connect_args={"timeout": STATEMENT_S_MAX, "command_timeout": command_s_max},
            hide_parameters=True,  # an error's text goes to the log, and hashes of passwords do not
            **pool,
        )
    # Not parsed as a URL: a path may hold any character.
    file = sa.URL.create("sqlite+aiosqlite", database=url.partition(":///")[2])
    engine = create_async_engine(file, connect_args={"timeout": STATEMENT_S_MAX}, hide_parameters=True, **pool)
    sa.event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


@asynccontextmanager
async def patient(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    """An engine for the same database whose statements may take long: for whoever reads or changes all of it."""
    if engine.dialect.name == "sqlite":
        yield engine  # which gives up nothing
        return
    url = engine.url.render_as_string(hide_password=False)
    patient_engine = connect(url, pooled=False, command_s_max=WHOLE_S_MAX)
    try:
        yield patient_engine
    finally:
        await patient_engine.dispose()


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 0"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    is_writing = connection.get_execution_options().get("is_writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


@asynccontextmanager
async def reading(engine: AsyncEngine, *, is_snapshot: bool = False) -> AsyncIterator[AsyncConnection]:
    """A transaction that only reads; with `is_snapshot` all of its statements see the same moment.

    On SQLite they always do. Raises `Unavailable` when the database is out of reach.
    """
    async with _reachable(engine), engine.connect() as connection:
        if is_snapshot and connection.dialect.name == "postgresql":
            await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        async with connection.begin():
            yield connection


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A transaction that may write, committed at its end. Raises `Unavailable` when the database is out of reach."""
    async with _reachable(engine), engine.connect() as connection:
        await connection.execution_options(is_writing=True)
        async with connection.begin():
            yield connection


@asynccontextmanager
async def _reachable(engine: AsyncEngine) -> AsyncIterator[None]:
    try:
        yield
    except (OSError, PoolTimeoutError) as exc:
        raise _unavailable(exc, engine) from exc
    except DBAPIError as exc:
        state = str(getattr(exc.orig, "sqlstate", None) or "")
        if isinstance(exc, OperationalError | InterfaceError) or exc.connection_invalidated or state[:2] in _PASSING:
            raise _unavailable(exc, engine) from exc
        raise


def _unavailable(error: Exception, engine: AsyncEngine) -> Unavailable:
    """What a driver's `error` is to us. Its frames hold each other, and a TLS context for each try to connect."""
    forget_frames(error)
    unavailable = Unavailable("The database is out of reach just now.", retry_after_s=2)
    unavailable.add_note(name_of(engine))  # which operators are told, and callers never
    return unavailable


_PASSING = ("08", "40", "53", "55", "57")
"""Connection exception, rollback, insufficient resources, not in prerequisite state (a database that takes no
connections just now), operator intervention (PostgreSQL manual, appendix A).
"""


MICROS_POSTGRESQL = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


async def database_now(connection: AsyncConnection) -> Micros:
    """The database's clock. SQLite's is this machine's."""
    if connection.dialect.name == "sqlite":
        return now_micros()
    now: Micros = await connection.scalar(sa.text(f"SELECT {MICROS_POSTGRESQL}"))
    return now


# ---- the schema


async def revision(engine: AsyncEngine) -> str | None:
    """The schema's revision; None in an empty database."""
    try:
        async with reading(engine) as connection:
            version: str | None = await connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
            return version
    except ProgrammingError:
        return None
    except Unavailable as exc:
        if isinstance(exc.__cause__, OperationalError) and "no such table" in str(exc.__cause__):
            return None
        raise


async def check_schema(engine: AsyncEngine) -> None:
    """Raises `SettingsError` unless the schema is the one this code is written for."""
    found = await revision(engine)
    if found == SCHEMA_HEAD:
        return
    if found is None:
        raise SettingsError(f"the database {name_of(engine)} holds no Tollgate schema: run `tollgate migrate` first")
    _refuse_newer(found, name_of(engine))
    raise SettingsError(
        f"the database {name_of(engine)} is at revision {found}, older than {SCHEMA_HEAD}: run `tollgate migrate`"
    )


def _refuse_newer(found: str | None, name: str) -> None:
    """Raises `SettingsError` when a newer program than this one has migrated the schema of the database `name`."""
    if found is not None and found > SCHEMA_HEAD:
        raise SettingsError(
            f"the database {name} is at revision {found}, newer than this program knows ({SCHEMA_HEAD}):"
            " install the newer Tollgate"
        )


async def migrate(
    engine: AsyncEngine,
    target: str = "head",
    *,
    then: Callable[[AsyncConnection], Awaitable[None]] | None = None,
) -> None:
    """Bring the schema up to date, or up or down to the revision `target` (`base`: to nothing), then do `then`.

    All in one transaction. Two at once wait for each other, and the second one finds its work done. Raises
    `SettingsError` when a newer program has migrated the schema.
    """
    async with patient(engine) as patient_engine, patient_engine.connect() as connection:
        await connection.execution_options(is_writing=True)
        async with connection.begin():
            if connection.dialect.name == "postgresql":
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            await connection.run_sync(_run_migrations, target, name_of(engine))
            if then is not None:
                await then(connection)


def _run_migrations(connection: sa.Connection, target: str, name: str) -> None:
    from alembic import command  # noqa: PLC0415 - takes a fifth of a second, and most starts need no migration
    from alembic.config import Config  # noqa: PLC0415 - likewise
    from alembic.migration import MigrationContext  # noqa: PLC0415 - likewise

    current = MigrationContext.configure(connection).get_current_revision()
    _refuse_newer(current, name)
    config = Config()
    config.set_main_option("script_location", str(_migrations()))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    is_up = target == "head" or (target != "base" and target > (current or ""))
    (command.upgrade if is_up else command.downgrade)(config, target)


def _migrations() -> Path:
    """The folder of revisions: inside of the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def name_of(engine: AsyncEngine) -> str:
    """The engine's database for people, without its password."""
    return engine.url.render_as_string(hide_password=True)


# ---- a copy of an embedded database


def copy_sqlite(source: Path, copy: Path) -> None:
    """Write the database `source` as it is at this moment into the new file `copy`, which is whole or not there.

    Whoever writes to `source` meanwhile is not kept waiting. Raises `SettingsError` when `copy` exists or cannot be
    written.
    """
    unfinished = copy.with_name(f"{copy.name}.unfinished")
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))  # it holds hashes of passwords
        with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(unfinished)) as written:
            read.backup(written)  # in one step, and so of one moment
            written.execute("PRAGMA journal_mode = DELETE")  # nothing of it is left in a file beside it
        _flush(unfinished)
        os.link(unfinished, copy)
        _flush(copy.parent)
    except FileExistsError as exc:
        raise SettingsError(f"{copy} is there already: a backup overwrites nothing") from exc
    except OSError as exc:
        raise SettingsError(f"{copy} cannot be written: {exc.strerror}") from exc
    finally:
        unfinished.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# ---- the one process of an embedded database


@contextmanager
def sole_process(file: Path) -> "Iterator[None]":
    """Hold the lock file of the SQLite database `file` for as long as the block runs.

    Raises `SettingsError` when another process serves or migrates it. The lock is the kernel's: it ends with the
    process, however that ends.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise SettingsError(f"the data folder {file.parent} cannot be used: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise SettingsError(
                f"another process serves or migrates {file}; SQLite takes one (use PostgreSQL for more)"
            ) from exc
        yield
    finally:
        os.close(lock)
