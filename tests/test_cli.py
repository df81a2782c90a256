"""The command line as operators run it: real processes over both databases."""

import asyncio
import json
import signal
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from proxy.ledger.decide import Credit, CreditType
from proxy.storage import database
from tests.books import Books, opened_books, reserve_of, settle_of
from tests.postgres import Cluster
from tests.serving import Served, environment

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def operator(tmp_path, database_url) -> Iterator[Served]:
    """The command line on the test's database; a server that the test starts is ended with it."""
    served = Served(environment(tmp_path, database_url))
    yield served
    if served.process is not None and served.process.poll() is None:
        served.stop(signal.SIGKILL)
    served.errors.close()


def in_books(url: str, work) -> object:
    """What `work` returns of books that are opened for it, in a process that then is as good as dead."""

    async def run() -> object:
        async with opened_books(url, is_second=True) as books:
            return await work(books)

    return asyncio.run(run())


async def holding(books: Books, count: int = 2) -> str:
    """`count` calls of 10 left open; returns the id of their wallet."""
    person = await books.person(1000)
    for _ in range(count):
        await books.ledger.reserve(reserve_of(person, 10))
    return person.wallet_id


def reserved(url: str, wallet_id: str) -> int:
    async def read(books: Books) -> int:
        return (await books.row("wallets", wallet_id))["reserved"]

    return in_books(url, read)


# ---- sweep


@on_sqlite
def test_sweep_frees_what_a_dead_server_held(operator, database_url):
    """Where no server runs, everything open is freed, and the books are clean."""
    wallet_id = in_books(database_url, holding)
    assert operator.command("sweep") == {"fenced": 1, "expired": 2, "is_served": False}
    assert reserved(database_url, wallet_id) == 0
    assert operator.command("audit")["clean"]
    done = operator.run("sweep")
    assert (done.returncode, done.stdout) == (0, "Dead processes fenced: 1. Reservations expired: 0.\n")


@on_sqlite
def test_sweep_leaves_a_running_server_alone(operator, database_url):
    """Beside a server nothing is touched, and it says so: what is open belongs to calls in flight."""
    operator.start()

    async def holding_as_the_server(books: Books) -> str:
        async with database.reading(books.engine) as connection:
            instance = await connection.scalar(sa.text("SELECT id FROM instances WHERE NOT is_fenced ORDER BY id"))
        books.lease.id = instance
        return await holding(books)

    wallet_id = in_books(database_url, holding_as_the_server)
    assert operator.command("sweep") == {"fenced": 0, "expired": 0, "is_served": True}
    done = operator.run("sweep")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert "a server runs" in done.stdout
    assert reserved(database_url, wallet_id) == 20
    operator.stop()


@on_postgresql
def test_sweep_watches_before_it_takes_anyone_for_dead(operator, database_url):
    """A process past its lease has one more to renew; then what it held is freed, and standard output stays JSON."""
    wallet_id = in_books(database_url, holding)

    async def end_leases(books: Books) -> None:
        await books.execute("UPDATE instances SET lease_until = 1 WHERE id <> :id", id=books.lease.id)

    in_books(database_url, end_leases)
    done = operator.run("sweep", "--json")
    assert json.loads(done.stdout) == {"fenced": 1, "expired": 2, "is_served": False}
    assert "watching_for_a_lease" in done.stderr
    assert reserved(database_url, wallet_id) == 0


@on_postgresql
def test_sweep_leaves_the_living_alone(operator, database_url):
    """A lease that runs protects what is held on it."""
    wallet_id = in_books(database_url, holding)
    assert operator.command("sweep") == {"fenced": 0, "expired": 0, "is_served": False}
    assert reserved(database_url, wallet_id) == 20


# ---- audit


async def in_order(books: Books) -> str:
    """Books with one call of each end; returns the id of the one that was charged."""
    person = await books.person(1000)
    reserve = reserve_of(person, 60)
    await books.ledger.reserve(reserve)
    await books.ledger.settle(settle_of(reserve, 25))
    refund = Credit(
        wallet_id=person.wallet_id,
        type=CreditType.REFUND,
        amount=4,
        description="test",
        reservation_id=reserve.id,
    )
    await books.ledger.credit(refund)
    return reserve.id


def test_audit_fails_and_shows_the_rows_that_are_wrong(operator, database_url):
    """Exit status 0 with clean books, 1 with others, and each violation names the rows, for people and programs."""
    call = in_books(database_url, in_order)
    done = operator.run("audit")
    assert (done.returncode, done.stdout) == (0, "1 settled calls; the books add up.\n")

    async def falsify(books: Books) -> None:
        await books.execute("UPDATE wallets SET balance = balance + 1")
        await books.execute("UPDATE reservations SET markup_bps = 100 WHERE id = :id", id=call)

    in_books(database_url, falsify)
    done = operator.run("audit")
    assert done.returncode == 1
    assert done.stdout.startswith("1 settled calls; the books DO NOT ADD UP.\n")
    assert "VIOLATED I1" in done.stdout
    assert call in done.stdout
    done = operator.run("audit", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    rows = {finding["name"]: finding["rows"] for finding in report["violations"]}
    assert not report["clean"]
    assert (rows["I1"][0]["balance"], rows["I1"][0]["transactions"]) == (980, 979)
    assert rows["I8"][0]["reservation_id"] == call


# ---- one server on SQLite, and the command line beside it


@on_sqlite
def test_a_second_server_on_the_same_file_is_refused(operator, tmp_path, database_url):
    """In one line, with exit status 2; the first one serves on, and nothing of its own was touched."""
    operator.start()
    for command in ("serve", "migrate"):
        done = operator.run(command)
        assert done.returncode == 2
        assert done.stderr.startswith("tollgate: another process serves or migrates ")
        assert done.stderr.count("\n") == 1
    with operator.client(None) as http:
        assert http.get("/health/ready").status_code == 200
    assert operator.stop() == 0


@on_sqlite
def test_a_killed_server_leaves_no_lock(operator):
    """The lock is the kernel's: it ends with the process, however that ends."""
    operator.start()
    operator.stop(signal.SIGKILL)
    operator.start()
    assert operator.stop() == 0


@on_sqlite
def test_the_command_line_writes_beside_a_running_server(operator):
    """Users, keys and credits are made while the server serves, and it sees them at once."""
    operator.start()
    key = operator.customer("beside@example.com", "2.5")
    with operator.client(key) as http:
        assert http.get("/api/v1/credits/balance").json()["balance"] == "2.5"
        call = {"model": "demo-chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        assert http.post("/v1/chat/completions", json=call).status_code == 200
    assert operator.command("audit")["clean"]
    assert operator.stop() == 0


# ---- what a database must promise


def refusal(operator: Served) -> str:
    """What the start was refused with."""
    done = operator.run("serve")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


@on_postgresql
def test_a_database_that_forgets_commits_is_refused(operator, postgres, database_url):
    """Set for this database alone, it is what the ledger's session has."""
    name = sa.make_url(database_url).database
    postgres.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    assert "synchronous_commit=off" in refusal(operator)
    for stronger in ("local", "remote_apply"):
        postgres.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = {stronger}')
        operator.start()
        assert operator.stop() == 0


@on_postgresql
def test_a_server_that_does_not_flush_is_refused(operator, own_postgres):
    """All that is wrong is named at once."""
    own_postgres.set(fsync="off", full_page_writes="off")
    try:
        assert "fsync=off, full_page_writes=off" in refusal(operator)
    finally:
        own_postgres.set(fsync=None, full_page_writes=None)
    operator.start()
    assert operator.stop() == 0


@pytest.fixture
def own_postgres(postgres):
    """A server whose settings are ours to change."""
    if postgres.is_ours:
        yield postgres
        return
    with Cluster() as cluster:
        yield cluster
