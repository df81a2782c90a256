"""The schema's way up and down, on both databases."""

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from proxy.storage import database
from proxy.storage.tables import metadata


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
