"""Fixtures named for roles: a database of each kind, an open ledger over it, people with and without credits."""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from proxy.units import new_id
from tests.books import Books, migrate_now, opened_books
from tests.fakes.provider import FakeProvider, run_in_thread
from tests.postgres import server_for_tests
from tests.serving import SQLITE

pytest_plugins = ("tests.skips",)

NODE_CLIENTS = Path(__file__).parent / "clients"
"""Programs for Node, and a `package.json` that names what they import at exact versions."""

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
    template = request.getfixturevalue("postgres_template")
    with request.getfixturevalue("postgres").lent_database(template) as url:
        yield url


@pytest.fixture(scope="module")
def postgres_database(postgres) -> Iterator[str]:
    """The URL of an empty database on PostgreSQL, of the module's own."""
    with postgres.lent_database() as url:
        yield url


@pytest.fixture(scope="module", params=DATABASES)
def database(request) -> str:
    """The URL of an empty database for the module's own server, on SQLite and on PostgreSQL in turn."""
    return SQLITE if request.param == "sqlite" else request.getfixturevalue("postgres_database")


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeProvider]:
    """A provider on a socket, of the module's own."""
    with run_in_thread() as provider:
        yield provider


@pytest.fixture
async def books(database_url) -> AsyncIterator[Books]:
    """An open ledger over a fresh database; the books are audited at the end."""
    async with opened_books(database_url) as books:
        yield books
        report = await books.audit()
        assert report.is_clean, report.as_text()


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory) -> Path:
    """A folder with the programs for Node and what they import, which is installed once beside the environment."""
    folder = tmp_path_factory.mktemp("node")
    for file in (*NODE_CLIENTS.glob("*.mjs"), NODE_CLIENTS / "package.json"):
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(_installed(Path(sys.prefix) / "node-clients"), target_is_directory=True)
    return folder


def _installed(folder: Path) -> Path:
    """The `node_modules` of `folder`, brought up to what `package.json` names, by one process at a time."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _brought_up(folder)


def _brought_up(folder: Path) -> Path:
    modules = folder / "node_modules"
    wanted = json.loads((NODE_CLIENTS / "package.json").read_text())["dependencies"]
    if all(_version(modules / name) == version for name, version in wanted.items()):
        return modules
    shutil.copy(NODE_CLIENTS / "package.json", folder)
    subprocess.run(
        ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=300,
    )
    return modules


def _version(package: Path) -> str | None:
    manifest = package / "package.json"
    return json.loads(manifest.read_text())["version"] if manifest.exists() else None
