"""The schema's way up and down, on both databases."""

import asyncio
import re
import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from proxy.pricebook import shipped
from proxy.storage import database
from proxy.storage.tables import metadata
from tests.books import Books, opened_books, release_of, reserve_of, settle_of
from tests.serving import Served, environment


def _difference(connection):
    return compare_metadata(MigrationContext.configure(connection), metadata)


async def test_the_migrations_make_the_tables_of_the_code(database_url):
    """Whoever changes one and not the other is told here."""
    engine = database.connect(database_url, pooled=False)
    async with database.reading(engine) as connection:
        assert await connection.run_sync(_difference) == []


async def test_down_and_up_again_keeps_users(database_url):
    """Each revision can be taken back by itself; who has no e-mail address gets one that reaches nobody."""
    engine = database.connect(database_url, pooled=False)
    await database.migrate(engine, "head")
    insert = (
        "INSERT INTO users (id, email, is_active, is_admin, email_verified, token_version, created_at, updated_at)"
        " VALUES (:id, :email, true, false, false, 0, 1, 1)"
    )
    async with database.writing(engine) as connection:
        await connection.execute(sa.text(insert), [{"id": "a", "email": "a@example.com"}, {"id": "b", "email": None}])
    await database.migrate(engine, "0001")
    async with database.reading(engine) as connection:
        emails = list(await connection.scalars(sa.text("SELECT email FROM users ORDER BY id")))
    assert emails == ["a@example.com", "b@nowhere.invalid"]
    await database.migrate(engine)
    async with database.reading(engine) as connection:
        assert await connection.run_sync(_difference) == []
    await database.migrate(engine, "base")
    assert await database.revision(engine) is None


# ---- every revision, with data in place


def revisions() -> list[str]:
    """All of them, the first one first."""
    scripts = ScriptDirectory(str(database._migrations()))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def made_up(table: sa.Table, column: sa.Column) -> object:
    """A value that the column's type takes, and a check of the form `column IN ('a', …)`."""
    for constraint in table.constraints:
        if isinstance(constraint, sa.CheckConstraint):
            allowed = re.search(rf"\b{column.name} IN \('([^']+)'", str(constraint.sqltext))
            if allowed:
                return allowed[1]
    match column.type:
        case sa.Boolean():
            return True
        case sa.Integer():
            return 1
        case sa.JSON():
            return {"made": "up"}
        case _:
            return f"{table.name}.{column.name}"


async def fill(books: Books) -> None:
    """Calls of every end, and a row in each table that those leave empty."""
    person = await books.person(1000)
    charged, released = reserve_of(person, 60), reserve_of(person, 60)
    for reserve in (charged, released, reserve_of(person, 5)):
        await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(charged, 25))
    await books.ledger.release(release_of(released))
    async with database.writing(books.engine) as connection:
        for table in metadata.sorted_tables:
            if not await connection.scalar(sa.select(sa.func.count()).select_from(table)):
                await connection.execute(
                    table.insert().values({column.name: made_up(table, column) for column in table.columns})
                )


async def contents(engine) -> dict[str, list[dict]]:
    """All rows of all tables, in the order of their first columns."""

    def read(connection: sa.Connection) -> dict[str, list[dict]]:
        found = sa.MetaData()
        found.reflect(connection)
        return {
            table.name: [
                dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()
            ]
            for table in found.sorted_tables
            if table.name != "alembic_version"
        }

    async with database.reading(engine) as connection:
        return await connection.run_sync(read)


def check_kept(before: dict[str, list[dict]], after: dict[str, list[dict]], step: str) -> None:
    """What had a value keeps it, wherever its table and column are still there."""
    for table in before.keys() & after.keys():
        assert len(after[table]) == len(before[table]), (step, table)
        for was, now in zip(before[table], after[table], strict=True):
            kept = {name: value for name, value in was.items() if name in now and value is not None}
            assert {name: now[name] for name in kept} == kept, (step, table)


async def test_every_revision_goes_down_and_up_with_data_in_place(database_url):
    """One step at a time, down to the first and up again: rows stay as they are, and the books add up."""
    async with opened_books(database_url) as books:
        await fill(books)
    engine = database.connect(database_url, pooled=False)
    ladder = revisions()
    assert ladder[-1] == database.SCHEMA_HEAD
    now = await contents(engine)
    assert all(now.values()), "a table without a row proves nothing"
    for target in (*ladder[-2::-1], *ladder[1:]):
        before, now = now, None
        await database.migrate(engine, target)
        now = await contents(engine)
        assert await database.revision(engine) == target
        check_kept(before, now, f"to {target}")
    async with database.reading(engine) as connection:
        assert await connection.run_sync(_difference) == []
    async with opened_books(database_url, is_second=True) as books:
        report = await books.audit()
        assert report.is_clean, report.as_text()
        person = await books.person(10)
        await books.ledger.reserve(reserve_of(person, 10))


# ---- two at once


def test_migrations_at_once_are_one(tmp_path, postgres):
    """All succeed, and the database is made and filled once."""
    postgres.create_database(name := f"twice_{tmp_path.name}")
    served = Served(environment(tmp_path, postgres.url(name)))
    command = [sys.executable, "-m", "proxy", "migrate", "--json"]
    rivals = [
        subprocess.Popen(command, env=served.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    for process in rivals:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    served.errors.close()
    assert postgres.execute("SELECT version_num FROM alembic_version", name) == [(database.SCHEMA_HEAD,)]
    assert postgres.execute("SELECT count(*) FROM prices", name) == [(len(shipped().rows),)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_migration_waits_for_another_one(database_url):
    """It goes on when the lock is free."""
    engine = database.connect(database_url, pooled=False)
    async with database.writing(engine) as connection:
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(database._MIGRATION_LOCK)))
        waiting = asyncio.create_task(database.migrate(engine, "base"))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
    await waiting
    assert await database.revision(engine) is None
