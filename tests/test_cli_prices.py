"""The operator's commands for prices and markup, as processes of their own."""

import json
import sqlite3
from contextlib import closing

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
    shown = program.command("prices", "history", "openai/gpt-4o")
    assert [(item["source"], item["entry"]["price"]["output"]) for item in shown["items"]] == [("list", 10**10)]
    assert "says nothing" in program.run("prices", "history", "openai/nothing").stdout


def test_the_file_that_ships_is_written_by_a_sync(program, tmp_path):
    """As it is read."""
    file = tmp_path / "prices.json"
    synced = program.command("prices", "sync", "--file", str(file))
    listed = pricebook.read(file.read_bytes())
    assert (len(listed.rows), listed.version) == (synced["written"], pricebook.shipped().version)
    nowhere = program.run("prices", "sync", "--file", str(tmp_path / "no" / "prices.json"))
    assert nowhere.returncode == 2
    said = f"tollgate: {tmp_path}/no/prices.json cannot be written: No such file or directory"
    assert said in nowhere.stderr.splitlines()


def test_the_default_markup(program):
    """With at most two decimals; anything else is one line on standard error."""
    assert program.command("markup", "show") == {"percent": "15", "rules": []}
    assert program.command("markup", "set", "17.5") == {"percent": "17.5"}
    assert json.loads(program.run("markup", "show", "--json").stdout)["percent"] == "17.5"
    refused = program.run("markup", "set", "1.234")
    assert refused.returncode == 1
    assert refused.stderr.startswith("tollgate: percent: must be from 0 to 10000")
    with closing(sqlite3.connect(f"{program.environ['TOLLGATE_DATA_DIR']}/prices.db")) as books, books:
        books.execute("UPDATE system_config SET value = '\"x\"' WHERE key = 'markup_percent'")
    assert program.command("markup", "show")["percent"] == "15", "what counts is what the configuration says"
    assert program.command("markup", "set", "17.5") == {"percent": "17.5"}


def test_a_price_of_ones_own(program):
    """With the fields of the configuration, nested ones as JSON; wrong ones are one line on standard error."""
    tiers = 'service_tiers={"flex": {"input": "1", "output": "2"}}'
    words = ("input=2", "output=4", "web_search=0.01", "tool_calls_max=3", "max_output_tokens=10", tiers)
    percent = program.command("markup", "show")["percent"]
    made = program.command("prices", "set", "fake/mine", *words)
    assert made["entry"]["price"]["web_search"] == 10**7 * 10**6
    assert made["entry"]["service_prices"]["flex"]["input"] == 10**9
    [item] = program.command("prices", "list", "--model", "fake/mine")["items"]
    assert (item["prices"]["input"], item["prices"]["web_search"], item["markup_percent"]) == ("2", "0.01", percent)
    lines = program.run("prices", "list", "--provider", "fake").stdout.splitlines()
    assert ["fake/mine", "2", "2", "4", "-", "10", percent] in [line.split() for line in lines]
    assert program.command("prices", "remove", "fake/mine")["entry"] is None
    assert program.command("prices", "list", "--model", "fake/mine")["items"] == []
    past = program.command("prices", "history", "fake/mine")["items"]
    assert [row["entry"] is None for row in past] == [True, False]
    for words, status, said in (
        (("set", "fake/mine", "input=2"), 1, "price: Object missing required field `output`"),
        (("set", "fake/mine", "input"), 2, "is not FIELD=VALUE"),
        (("set", "mine", "input=2", "output=2"), 2, "provider/model"),
        (("set", "nobody/mine", "input=2", "output=2"), 1, "no provider 'nobody'"),
        (("remove", "fake/mine"), 1, "no price of your own"),
    ):
        refused = program.run("prices", *words)
        assert refused.returncode == status
        assert said in refused.stderr


def test_rules_of_the_markup(program):
    """They are set, found by what they are for, and taken away; the preview says which one counts."""
    user = program.command("users", "create", "--email", "u@example.com")["id"]
    made = program.command("markup", "set", "3", "--model", "fake-model")
    assert (made["kind"], made["subject"], made["percent"]) == ("model", "fake-model", "3")
    assert program.command("markup", "set", "4", "--model", "fake-model")["id"] == made["id"]
    assert program.command("markup", "set", "5", "--user", "u@example.com")["subject"] == user
    rules = program.command("markup", "rules")["items"]
    assert [(rule["kind"], rule["percent"]) for rule in rules] == [("user", "5"), ("model", "4")]
    anybody = program.command("markup", "preview", "fake-model", "--usage", "cached_input_tokens=1000000")
    assert (anybody["provider_cost"], anybody["charged"], anybody["rule"]["kind"]) == ("1.5", "1.56", "model")
    theirs = program.command("markup", "preview", "fake-model", "--user", "u@example.com", "--output-tokens", "500000")
    assert (theirs["charged"], theirs["rule"]["percent"]) == ("2.1", "5")
    for subject in (("--model", "fake-model"), ("--user", "u@example.com")):
        program.command("markup", "remove", *subject)
    assert program.command("markup", "rules") == {"items": []}
    for words, status, said in (
        (("set", "5", "--model", "a", "--user", "u@example.com"), 2, "name one of them"),
        (("remove",), 2, "can only be set"),
        (("remove", "--provider", "fake"), 1, "There is no rule"),
        (("set", "20", "--provider", "opnai"), 1, "no provider 'opnai'"),
        (("set", "20", "--model", "a\nb"), 1, "subject: "),
        (("preview", "nothing"), 1, "nothing"),
        (("preview", "fake-model", "--usage", "x=1"), 2, "x"),
    ):
        refused = program.run("markup", *words)
        assert refused.returncode == status, refused.stderr
        assert said in refused.stderr


def test_providers_are_switched(program):
    """As the admin endpoints do it, with the same record of who did."""
    listed = {item["name"]: item for item in program.command("providers", "list")["items"]}
    assert (listed["fake"]["enabled"], listed["fake"]["ready"], listed["fake"]["kind"]) == (True, True, "openai")
    assert "fake-model" in listed["fake"]["models"]
    assert program.command("providers", "disable", "fake") == {"name": "fake", "enabled": False}
    lines = program.run("providers", "list").stdout.splitlines()
    assert ["fake", "openai", "0", "disabled"] in [line.split() for line in lines]
    assert program.command("providers", "enable", "fake") == {"name": "fake", "enabled": True}
    refused = program.run("providers", "enable", "nobody")
    assert (refused.returncode, refused.stderr) == (
        1,
        "tollgate: There is no provider 'nobody' in the configuration.\n",
    )
