"""Fixtures named for roles: a database of each kind, an open ledger over it, people with and without credits."""

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from proxy.units import new_id
from tests.books import Books, migrate_now, opened_books
from tests.postgres import server_for_tests

pytest_plugins = ("tests.skips",)

OPENAI_NODE = "7.57.0"
"""The release of OpenAI's client for Node that the tests use."""

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server that is ours for the session, or the one that TEST_DATABASE_URL names."""
    with server_for_tests() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory) -> Path:
    """A migrated SQLite file to be copied."""
    file = tmp_path_factory.mktemp("template") / "tollgate.db"
    migrate_now(f"sqlite+aiosqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def postgres_template(postgres) -> Iterator[str]:
    """The name of a migrated PostgreSQL database to be cloned."""
    name = new_id("template")
    postgres.create_database(name)
    migrate_now(postgres.url(name))
    yield name
    postgres.drop_database(name)


@pytest.fixture(params=DATABASES)
def database_url(request, tmp_path) -> Iterator[str]:
    """The URL of a fresh database with our schema, on SQLite and on PostgreSQL in turn."""
    if request.param == "sqlite":
        file = tmp_path / "tollgate.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), file)
        yield f"sqlite+aiosqlite:///{file}"
        return
    server = request.getfixturevalue("postgres")
    name = new_id("test")
    server.create_database(name, template=request.getfixturevalue("postgres_template"))
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
async def books(database_url) -> AsyncIterator[Books]:
    """An open ledger over a fresh database; the books are audited at the end."""
    async with opened_books(database_url) as books:
        yield books
        report = await books.audit()
        assert report.is_clean, report.as_text()


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """A folder with the scripts of `tests/clients` and what they import, installed once beside the environment."""
    folder = Path(sys.prefix) / "node-clients"
    folder.mkdir(exist_ok=True)
    for script in (Path(__file__).parent / "clients").iterdir():
        shutil.copy(script, folder)
    installed = folder / "node_modules" / "openai" / "package.json"
    if not installed.exists() or json.loads(installed.read_text())["version"] != OPENAI_NODE:
        subprocess.run(
            ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", f"openai@{OPENAI_NODE}"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=300,
        )
    return folder
