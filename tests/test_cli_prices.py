"""The operator's commands for prices and markup, as processes of their own."""

import json

import pytest

from proxy import pricebook
from tests.serving import Served, environment


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The command line on a new database."""
    folder = tmp_path_factory.mktemp("prices")
    served = Served(environment(folder, "sqlite+aiosqlite:///prices.db"))
    served.command("migrate")
    yield served
    served.errors.close()


def test_the_list_that_ships_is_that_of_the_package(program):
    """There is nothing to synchronize in a new database: `make prices` renews the file after the package."""
    assert program.command("prices", "diff")["changes"] == []
    synced = program.command("prices", "sync")
    assert (synced["written"], synced["version"]) == (0, pricebook.shipped().version)
    assert "openai/gpt-4o-search-preview" in synced["left_out"]
    assert "openai/davinci-002" in synced["unbounded"]
    assert "up to date" in program.run("prices", "diff").stdout


def test_a_price_and_its_history(program):
    """What the list says, in nano-dollars per million tokens."""
    shown = program.command("prices", "show", "openai/gpt-4o")
    assert [(item["source"], item["entry"]["price"]["output"]) for item in shown["items"]] == [("list", 10**10)]
    assert "says nothing" in program.run("prices", "show", "openai/nothing").stdout


def test_the_file_that_ships_is_written_by_a_sync(program, tmp_path):
    """As it is read."""
    file = tmp_path / "prices.json"
    synced = program.command("prices", "sync", "--file", str(file))
    listed = pricebook.read(file.read_bytes())
    assert (len(listed.rows), listed.version) == (synced["written"], pricebook.shipped().version)


def test_the_default_markup(program):
    """With at most two decimals; anything else is one line on standard error."""
    assert program.command("markup", "show") == {"percent": "15", "rules": []}
    assert program.command("markup", "set", "17.5") == {"percent": "17.5"}
    assert json.loads(program.run("markup", "show", "--json").stdout)["percent"] == "17.5"
    refused = program.run("markup", "set", "1.234")
    assert refused.returncode == 1
    assert refused.stderr.startswith("tollgate: percent: must be from 0 to 10000")
