"""The operator's commands: their help, what they change, and that they show what the HTTP API shows."""

import asyncio
import csv
import io
import json
import os
import shlex
import subprocess
import sys

import click
import pytest

from proxy.cli import cli
from proxy.cli.output import cell, numbers, progress, table, words
from tests.books import Books, opened_books, reserve_of, settle_of
from tests.commands import run_command
from tests.serving import environment, serving

NOWHERE = "http://127.0.0.1:9/v1"
EMAIL = "ann@example.com"
CALL = {"model": "demo-chat", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 20}


def all_commands(group: click.Group, *path: str):
    """Every command below `group`, groups too, with the words that call it."""
    for name, command in group.commands.items():
        yield pytest.param((*path, name), command, id=" ".join([*path, name]))
        if isinstance(command, click.Group):
            yield from all_commands(command, *path, name)


COMMANDS = list(all_commands(cli))
LEAVES = [each for each in COMMANDS if not isinstance(each.values[1], click.Group)]


# ---- help


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_command_says_what_it_does(path, command):
    """In a sentence that fits into the list of its group, and with a word on each option."""
    assert len(command.get_short_help_str(limit=1000)) <= 62
    assert command.get_help(click.Context(command, info_name=" ".join(path))).startswith("Usage: ")
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help or option.show_default, option.name


@pytest.mark.parametrize(("path", "command"), LEAVES)
def test_every_command_has_json_and_examples(path, command):
    """The examples are commands of this name that parse."""
    assert "--json" in {opt for param in command.params for opt in param.opts}
    examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("tollgate ")]
    mine = [shlex.split(line, comments=True) for line in examples]
    mine = [line[1:] for line in mine if tuple(line[1 : len(path) + 1]) == path]
    assert mine
    for line in mine:
        arguments = line[len(path) :]
        command.make_context(path[-1], arguments[: arguments.index(">")] if ">" in arguments else arguments)


def test_nobody_waits_for_a_database_to_read_help():
    """What a command needs when it runs is not imported before."""
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "proxy", "users", "list", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines()}
    assert "proxy.cli.users" in imported
    assert not imported & {"sqlalchemy", "litestar", "uvicorn", "asyncpg", "structlog", "uvloop"}


def test_a_new_user_has_an_address():
    """An id is none that could be given."""
    [email] = [param for param in cli.commands["users"].commands["create"].params if param.name == "email"]
    assert " id" not in email.help


# ---- what is printed


def test_tables_are_aligned():
    """Words begin and numbers end in one column; what is missing is a dash, and nothing is cut."""
    rows = [
        {"id": "a", "wallet": {"balance": "0.115"}, "is_active": True, "names": ["x", "y"]},
        {"id": "long", "wallet": {"balance": "10"}, "is_active": False, "names": None},
    ]
    columns = [*words("id", "active=is_active"), *numbers("wallet.balance"), *words("names")]
    assert table(rows, columns, nothing="none").splitlines() == [
        "ID    ACTIVE  BALANCE  NAMES",
        "a     yes       0.115  x,y",
        "long  no           10  -",
    ]
    assert table([], columns, nothing="none") == "none"


@pytest.mark.parametrize(
    ("value", "shown"), [("a\x1b[2Jb", "a�[2Jb"), ("two\nlines", "two�lines"), ({"a": 1}, '{"a": 1}')]
)
def test_cells_are_harmless(value, shown):
    """No text that somebody else chose moves the cursor of an operator's terminal."""
    assert cell(value) == shown


def test_progress_is_for_terminals(monkeypatch):
    """It is drawn on a terminal's standard error, and nowhere else."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        with progress("Checking") as advance:
            advance(0.5)
            advance(1)
        terminal.flush()
        drawn = b""
        while b"100%" not in drawn:
            drawn += os.read(ours, 65536)
    os.close(ours)
    assert b"Checking" in drawn
    silent = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", silent)
        with progress("Checking") as advance:
            advance(1)
    assert not silent.getvalue()


# ---- changes


class Operator:
    """The command line on one configuration."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ

    def __call__(self, *words_: str, read: str = "") -> dict:
        """What a command prints with `--json`."""
        done = run_command([*words_, "--json"], self.environ, read=read)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)

    def said(self, *words_: str) -> str:
        """What a command prints for people."""
        done = run_command(words_, self.environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *words_: str) -> tuple[int, str]:
        """The exit status of a command that fails, and the one line that it says of that."""
        done = run_command(words_, self.environ)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1), done.stderr
        return done.returncode, done.stderr.strip()


@pytest.fixture
def operator(tmp_path, database_url) -> Operator:
    """The command line on a fresh database, whose books add up in the end."""
    operator = Operator(environment(tmp_path, database_url))
    yield operator
    assert operator("audit")["clean"]


def in_books(url: str, work) -> object:
    async def run() -> object:
        async with opened_books(url, is_second=True) as books:
            return await work(books)

    return asyncio.run(run())


async def charged(books: Books) -> tuple[str, str]:
    """A call that was charged 600 nano-credits of 1,000, and one that holds 50; the charge and who paid."""
    person = await books.person(1000)
    reserve = reserve_of(person, 900)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(reserve, 600))
    return reserve.id, person.email


async def holding(books: Books) -> str:
    """Somebody with 1,000 nano-credits of which an open call holds 400."""
    person = await books.person(1000)
    await books.ledger.reserve(reserve_of(person, 400))
    return person.email


def test_credits_booked_by_hand(operator, database_url):
    """A charge is given back in parts and never more, all with the operator's name on the event."""
    call, email = in_books(database_url, charged)
    part = operator("credits", "refund", call, "--amount", "0.0000001", "--idempotency-key", "r-1")
    assert (part["email"], part["amount"], part["balance"], part["replayed"]) == (
        email,
        "0.0000001",
        "0.0000005",
        False,
    )
    assert (part["transaction"]["type"], part["transaction"]["request_id"]) == ("refund", call)
    again = operator("credits", "refund", call, "--amount", "0.0000001", "--idempotency-key", "r-1")
    assert again == {**part, "replayed": True}
    assert operator.refused("credits", "refund", call, "--amount", "0.000000501")[0] == 1
    assert operator("credits", "refund", call)["amount"] == "0.0000005"
    status, said = operator.refused("credits", "refund", call)
    assert (status, said.startswith("tollgate: ")) == (1, True)
    receipt = operator("credits", "charge", call)
    assert (receipt["charged"], receipt["refunded"]) == ("0.0000006", "0.0000006")
    assert (
        operator("credits", "adjust", "--email", email, "--amount", "-0.000001", "--description", "x")["balance"] == "0"
    )
    assert operator("credits", "grant", "--email", email, "--amount", "2")["balance"] == "2"
    events = operator("events", "--actor", "command line")["items"]
    booked = ["credits.topup", "credits.adjustment", "credits.refund", "credits.refund"]
    assert [event["action"] for event in events] == booked
    kinds = [item["type"] for item in operator("credits", "transactions", "--email", email)["items"]]
    assert kinds == ["topup", "adjustment", "refund", "refund", "deduction", "topup"]


def test_what_open_calls_hold_cannot_be_adjusted_away(operator, database_url):
    """The adjustment is refused in one line, and all that is available may go."""
    email = in_books(database_url, holding)
    status, said = operator.refused(
        "credits", "adjust", "--email", email, "--amount", "-0.000000601", "--description", "x"
    )
    assert (status, said.startswith("tollgate: ")) == (1, True)
    taken = operator("credits", "adjust", "--email", email, "--amount", "-0.0000006", "--description", "x")
    assert taken["balance"] == "0.0000004"


def test_users_are_changed(operator):
    """Limits come and go, the last admin stays, and each change is an event with what it was before."""
    made = operator("users", "create", "--email", EMAIL, "--full-name", "Ann", "--requests-per-minute", "5", "--admin")
    assert (made["full_name"], made["requests_per_minute"], made["is_admin"]) == ("Ann", 5, True)
    words_ = ("--requests-per-minute", "none", "--tokens-per-minute", "1000", "--allowed-models", "gpt*,demo-chat")
    edited = operator("users", "edit", "--email", EMAIL, *words_, "--new-email", "ann@example.org")
    assert (edited["email"], edited["requests_per_minute"], edited["tokens_per_minute"], edited["allowed_models"]) == (
        "ann@example.org",
        None,
        1000,
        ["gpt*", "demo-chat"],
    )
    assert operator("users", "show", "--email", made["id"]) == edited
    for last in (("deactivate", "--email", made["id"]), ("admin", "--email", made["id"], "off")):
        assert operator.refused("users", *last) == (
            1,
            "tollgate: This is the last active admin. Make another one first.",
        )
    operator("users", "create", "--email", "bob@example.com", "--admin")
    assert not operator("users", "admin", "--email", made["id"], "off")["is_admin"]
    assert not operator("users", "deactivate", "--email", made["id"])["is_active"]
    assert operator("users", "activate", "--email", made["id"])["is_active"]
    assert operator("users", "password", "--email", made["id"], read="correct horse battery\n")["id"] == made["id"]
    assert [item["email"] for item in operator("users", "list")["items"]] == ["bob@example.com", "ann@example.org"]
    page = operator("users", "list", "--limit", "1")
    assert operator("users", "list", "--limit", "1", "--cursor", page["next_cursor"])["items"][0]["id"] == made["id"]
    assert operator("users", "list", "--search", "nobody")["items"] == []
    events = operator("events", "--subject", made["id"])["items"]
    assert {event["actor"] for event in events} == {"command line"}
    assert [event["action"] for event in events] == ["user.password", *["user.change"] * 4, "user.create"]
    assert (events[1]["before"], events[1]["after"]) == ({"is_active": False}, {"is_active": True})


def test_keys_are_changed(operator):
    """What is left out stays, and `none` takes a limit away."""
    operator("users", "create", "--email", EMAIL)
    made = operator("keys", "create", "--email", EMAIL, "--limit-amount", "3", "--limit-period", "day", "--name", "old")
    assert made["key"].startswith(made["prefix"])
    mine = ("--email", EMAIL, "--id", made["id"])
    edited = operator(
        "keys", "edit", *mine, "--name", "new", "--expires-at", "2099-01-01", "--concurrent-calls-max", "2"
    )
    assert (edited["name"], edited["limit_amount"], edited["limit_period"]) == ("new", "3", "day")
    assert (edited["expires_at"], edited["concurrent_calls_max"]) == ("2099-01-01T00:00:00.000000Z", 2)
    freed = operator("keys", "edit", *mine, "--limit-amount", "none", "--limit-period", "none", "--expires-at", "none")
    assert (freed["limit_amount"], freed["limit_period"], freed["expires_at"]) == (None, None, None)
    assert not operator("keys", "revoke", *mine)["is_active"]
    events = operator("events", "--subject", made["id"])["items"]
    assert [event["action"] for event in events] == ["key.revoke", "key.change", "key.change", "key.create"]
    assert made["key"] not in json.dumps(events)


def test_settings_are_changed(operator):
    """By the same rules as by HTTP."""
    assert operator("config", "set", "registration_open", "false")["value"] is False
    assert operator("config", "set", "starting_credits", "0.50")["value"] == "0.5"
    listed = {item["name"]: item for item in operator("config", "list")["items"]}
    assert (listed["starting_credits"]["value"], listed["starting_credits"]["default"]) == ("0.5", "0")
    status, said = operator.refused("config", "set", "registration_open", "true")
    assert (status, "give_to_strangers" in said) == (1, True)
    assert operator.refused("config", "set", "registration_open", "maybe")[0] == 1
    assert operator.refused("config", "set", "nothing", "1") == (1, "tollgate: There is no setting 'nothing'.")
    actions = [event["after"] for event in operator("events", "--action", "config.set")["items"]]
    assert actions == ["0.5", False]


@pytest.mark.parametrize(
    "words_",
    [
        ("users", "edit", "--email", EMAIL),
        ("users", "edit", "--email", EMAIL, "--requests-per-minute", "many"),
        ("users", "admin", "--email", EMAIL, "perhaps"),
        ("keys", "edit", "--email", EMAIL, "--id", "key_1"),
        ("keys", "edit", "--email", EMAIL, "--id", "key_1", "--limit-amount", "0.0000000001"),
        ("credits", "grant", "--email", EMAIL, "--amount", "0"),
        ("credits", "adjust", "--email", EMAIL, "--amount", "0", "--description", "x"),
        ("credits", "adjust", "--email", EMAIL, "--amount", "1"),
        ("credits", "refund", "req_1", "--amount", "-1"),
        ("credits", "transactions", "--email", EMAIL, "--csv", "--json"),
        ("credits", "transactions", "--email", EMAIL, "--from", "soon"),
        ("users", "list", "--limit", "201"),
        ("usage", "--group-by", "colour"),
        ("events", "--since", "soon"),
        ("markup", "preview", "demo-chat", "--usage", "images"),
        ("users", "sow"),
        ("--jsn",),
    ],
)
def test_words_that_make_no_sense(tmp_path, words_):
    """Exit status 2 and one line that says why, before a database is looked for."""
    status, said = Operator(environment(tmp_path, "sqlite+aiosqlite:///none.db")).refused(*words_)
    assert (status, said.startswith("tollgate: ")) == (2, True), said


# ---- the same as by HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with a user who has made calls, and an admin."""
    with serving(tmp_path_factory.mktemp("commands"), "sqlite+aiosqlite:///books.db", NOWHERE) as server:
        yield server


@pytest.fixture(scope="module")
def spender(served):
    """The id of a user who has made two calls, and of the last of them."""
    operator = Operator(served.environ)
    user = operator("users", "create", "--email", EMAIL, "--tokens-per-minute", "100000")["id"]
    operator("credits", "grant", "--email", EMAIL, "--amount", "5")
    with served.client(operator("keys", "create", "--email", EMAIL, "--name", "laptop")["key"]) as http:
        answers = [http.post("/v1/chat/completions", json=CALL) for _ in range(2)]
    assert {answer.status_code for answer in answers} == {200}
    return user, answers[-1].headers["x-request-id"]


@pytest.fixture(scope="module")
def clients(served, spender):
    """The admin, and the user who has made calls."""
    operator = Operator(served.environ)
    operator("users", "create", "--email", "boss@example.com", "--admin")
    key = operator("keys", "create", "--email", "boss@example.com", "--scope", "admin")["key"]
    own = operator("keys", "create", "--email", EMAIL)["key"]
    with served.client(key) as admin, served.client(own) as user:
        yield {"admin": admin, "user": user}


SAME = [
    ("users list", "admin", "/api/v1/admin/users"),
    ("users list --search ann --limit 1", "admin", "/api/v1/admin/users?q=ann&limit=1"),
    ("users show --email {email}", "admin", "/api/v1/admin/users/{user}"),
    ("keys list --email {email}", "admin", "/api/v1/admin/users/{user}/keys"),
    ("config list", "admin", "/api/v1/admin/config"),
    ("events --limit 3", "admin", "/api/v1/admin/events?limit=3"),
    ("events --action user.create", "admin", "/api/v1/admin/events?action=user.create"),
    ("audit", "admin", "/api/v1/admin/audit"),
    ("usage", "admin", "/api/v1/admin/usage"),
    ("usage --group-by user --limit 1", "admin", "/api/v1/admin/usage?group_by=user&limit=1"),
    ("usage --group-by month --from 2026-01-01", "admin", "/api/v1/admin/usage?group_by=month&from=2026-01-01"),
    ("margin", "admin", "/api/v1/admin/margin"),
    ("margin --group-by key", "admin", "/api/v1/admin/margin?group_by=key"),
    ("prices list", "admin", "/api/v1/admin/prices"),
    ("credits balance --email {email}", "user", "/api/v1/credits/balance"),
    ("credits transactions --email {email}", "user", "/api/v1/credits/transactions"),
    (
        "credits transactions --email {email} --type deduction --limit 1",
        "user",
        "/api/v1/credits/transactions?type=deduction&limit=1",
    ),
    ("credits stats --email {email}", "user", "/api/v1/credits/stats"),
    ("credits charges --email {email}", "user", "/api/v1/credits/charges"),
    ("credits charge {call}", "user", "/api/v1/credits/charges/{call}"),
]


@pytest.mark.parametrize(("said", "who", "path"), SAME, ids=[said for said, _, _ in SAME])
def test_json_is_that_of_the_http_api(served, spender, clients, said, who, path):
    """Whoever reads one can read the other; where one user is asked for, the command adds who that is."""
    values = {"email": EMAIL, "user": spender[0], "call": spender[1]}
    shown = Operator(served.environ)(*said.format(**values).split())
    answer = clients[who].get(path.format(**values))
    assert answer.status_code == 200
    expected = answer.json()
    if "email" not in expected:
        shown.pop("email", None)
    assert shown == expected
    assert Operator(served.environ).said(*said.format(**values).split()).strip()


def test_csv_is_that_of_the_http_api(served, spender, clients):
    """Byte for byte, so that scripts may take either."""
    done = run_command(["credits", "transactions", "--email", spender[0], "--csv"], served.environ)
    answer = clients["user"].get("/api/v1/credits/transactions?format=csv")
    assert list(csv.reader(io.StringIO(done.stdout))) == list(csv.reader(io.StringIO(answer.text)))
    assert done.stdout.count("\n") == 4
