"""What goes wrong for an operator is one line that can be acted on, never a traceback."""

import signal
import sqlite3
import time

import pytest

from tests.serving import Served, environment
from tests.waiting import until


@pytest.fixture
def operator(tmp_path):
    """The command line over an embedded database that is not there yet."""
    served = Served(environment(tmp_path, "sqlite+aiosqlite:///books.db"))
    yield served
    if served.process is not None and served.process.poll() is None:
        served.stop(signal.SIGKILL)
    served.errors.close()


def one_line(done, *words: str) -> None:
    """The command failed with a single line on standard error that has these words."""
    assert done.returncode in {1, 2}, done.stdout
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("{", "Usage", "Try", "\n"))]
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+asyncpg://u@127.0.0.1:99999/x", ["database.url", "host:port/database"]),
        ("postgresql+asyncpg://u@127.0.0.1:1", ["database.url", "host:port/database"]),
        ("postgresql+asyncpg://u@127.0.0.1:1/x?timeout=9", ["database.url", "timeout"]),
        ("postgresql+asyncpg://u:secret@127.0.0.1:1/x", ["out of reach", "u:***@127.0.0.1:1/x"]),
        ("postgresql+asyncpg://u@127.0.0.1:1/x?sslmode=require", ["out of reach"]),
    ],
)
def test_addresses_of_databases(operator, url, words):
    """What is wrong with one, or that nobody answers there."""
    operator.environ["TOLLGATE_DATABASE_URL"] = url
    one_line(operator.run("audit"), *words)


def test_a_data_folder_that_is_a_file(operator, tmp_path):
    """It is named, with the reason."""
    (tmp_path / "file").write_text("")
    operator.environ["TOLLGATE_DATA_DIR"] = str(tmp_path / "file")
    one_line(operator.run("serve"), "data folder", "cannot be used")


def test_a_damaged_database(operator, tmp_path):
    """Whichever command meets it says so."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "books.db").write_bytes(b"no database at all" * 100)
    for command in (["serve"], ["migrate"], ["audit"], ["credits", "balance", "--email", "a@example.com"]):
        one_line(operator.run(*command), "not a database")


def test_another_programs_database(operator, tmp_path):
    """It is not taken over."""
    (tmp_path / "data").mkdir()
    with sqlite3.connect(tmp_path / "data" / "books.db") as connection:
        connection.execute("CREATE TABLE users (id INTEGER)")
    connection.close()
    one_line(operator.run("serve"), "users")


def test_a_newer_schema(operator, tmp_path):
    """An older program leaves it alone."""
    operator.command("migrate")
    with sqlite3.connect(tmp_path / "data" / "books.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    for command in ("serve", "migrate", "audit"):
        one_line(operator.run(command), "9999", "newer")


@pytest.mark.parametrize("amount", ["1e999999", "-1e999999", "sNaN", "Infinity", "0", "-1", "1.0000000001"])
def test_amounts(operator, amount):
    """No number is too odd for a sentence."""
    operator.command("migrate")
    done = operator.run("credits", "grant", "--email", "a@example.com", "--amount", amount)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--amount" in done.stderr


def test_a_folder_with_odd_characters(operator, tmp_path):
    """A path is a path, whatever would be special in a URL."""
    folder = tmp_path / "what?is %41 this#here"
    operator.environ["TOLLGATE_DATA_DIR"] = str(folder)
    operator.command("migrate")
    operator.start()
    assert operator.stop() == 0
    assert (folder / "books.db").exists()


def test_a_key_in_place_of_its_variable_is_not_printed(operator, tmp_path):
    """The mistake is named without the secret."""
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace('"UPSTREAM_KEY"', '"sk-proj-realsecret"'))
    done = operator.run("migrate")
    one_line(done, "api_key_env", "not the key itself")
    assert "realsecret" not in done.stderr


def test_a_grant_on_a_locked_database_ends_and_says_how_to_repeat_it(operator, tmp_path):
    """It does not hang; sent again with the key that it names it is booked once."""
    operator.command("migrate")
    operator.command("users", "create", "--email", "a@example.com")
    blocking = sqlite3.connect(tmp_path / "data" / "books.db", isolation_level=None)
    blocking.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    done = operator.run("credits", "grant", "--email", "a@example.com", "--amount", "1")
    assert time.monotonic() - begun < 50
    blocking.close()
    one_line(done, "the idempotency key idem_")
    words = done.stderr.strip().splitlines()[-1].split("the idempotency key ")[1].split()
    granted = operator.command(
        "credits", "grant", "--email", "a@example.com", "--amount", "1", "--idempotency-key", words[0]
    )
    assert granted["balance"] == "1"


def test_a_server_ends_while_its_database_is_locked(operator, tmp_path):
    """A reserve that nobody waits for any more does not keep it."""
    operator.command("migrate")
    operator.start()
    key = operator.customer("a@example.com")
    blocking = sqlite3.connect(tmp_path / "data" / "books.db", isolation_level=None)
    blocking.execute("BEGIN IMMEDIATE")
    with operator.client(key) as http:
        body = {"model": "demo-chat", "messages": [{"role": "user", "content": "hi"}]}
        assert http.post("/v1/chat/completions", json=body).status_code == 503
        until(lambda: http.get("/health/ready").status_code != 200, within_s=20)
    begun = time.monotonic()
    assert operator.stop() == 0
    assert time.monotonic() - begun < 20
    blocking.close()
