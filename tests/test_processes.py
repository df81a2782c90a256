"""One server of several processes, and how servers end: workers die and are replaced, and nobody's call is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import httpx2
import psutil
import pytest

from proxy.supervisor import HUNG_S, PAUSE_S, PAUSE_S_MAX, YOUNG_DEATHS_MAX, listen, pause_before
from tests.postgres import Cluster
from tests.serving import CONFIG, MODEL, Served, environment, serving
from tests.waiting import until

SERVER = CONFIG.replace("port = 0", "port = 0\nworkers = 2\ndrain_s = 2\nsettle_wait_s = 2")

PATIENCE_S = 15


def workers(server: Served) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def events(server: Served, name: str) -> list[dict]:
    """What the server has logged under that name."""
    lines = [line for line in server.log().splitlines() if line.startswith("{")]
    return [event for event in map(json.loads, lines) if event["event"] == name]


def body(**behaviour) -> dict:
    wish = f"!fake {json.dumps(behaviour)}"
    return {"model": MODEL, "max_tokens": 500, "stream": True, "messages": [{"role": "user", "content": wish}]}


@pytest.fixture(scope="module")
def served(postgres_database, tmp_path_factory, upstream):
    """A running server of two workers."""
    with serving(tmp_path_factory.mktemp("served"), postgres_database, upstream.base_url, SERVER) as server:
        yield server


@pytest.fixture(scope="module")
def key(served):
    return served.customer("customer@example.com", "1000")


@pytest.fixture
def passing(postgres_database, tmp_path, upstream, served):
    """Another server on the same database, which the test may end as it likes."""
    server = Served(environment(tmp_path, postgres_database, upstream.base_url, configuration=SERVER))
    server.start()
    yield server
    for child in server_pids(server):
        psutil.Process(child).kill()
    server.process.kill()
    server.process.wait()
    server.process.stdout.close()
    server.errors.close()


def server_pids(server: Served) -> list[int]:
    try:
        return [process.pid for process in workers(server)]
    except psutil.NoSuchProcess:
        return []


class Stream:
    """A call that is being read, in a thread of its own."""

    def __init__(self, server: Served, key: str, **behaviour) -> None:
        self.read = b""
        self.request_id = ""
        self._is_begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(server, key, body(**behaviour)))
        self._thread.start()
        assert self._is_begun.wait(PATIENCE_S)

    def _run(self, server: Served, key: str, call: dict) -> None:
        with server.client(key) as http, http.stream("POST", "/v1/chat/completions", json=call) as answer:
            self.request_id = answer.headers["x-request-id"]
            try:
                for chunk in answer.iter_raw():
                    self.read += chunk
                    self._is_begun.set()
            except httpx2.HTTPError:
                self.read += b"(cut off)"

    def to_its_end(self) -> bytes:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.read


def test_sqlite_takes_one_process(tmp_path):
    """More are refused in one line that says why and what to do, before anything starts."""
    served = Served(environment(tmp_path, "sqlite+aiosqlite:///books.db"))
    done = served.run("serve", "--workers", "2")
    served.errors.close()
    assert (done.returncode, done.stdout) == (2, "")
    assert "server.workers: SQLite takes one process, not 2; name a PostgreSQL" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_schema_is_refused_once(tmp_path, postgres, served):
    """Whatever the number of workers, one line names the command to run."""
    postgres.create_database(name := f"empty_{tmp_path.name}")
    empty = Served(environment(tmp_path, postgres.url(name), configuration=SERVER))
    done = empty.run("serve")
    empty.errors.close()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run `tollgate migrate` first" in done.stderr


def test_connections_are_spread_over_the_workers(served, key, postgres, postgres_database):
    """Each worker gets a good part of connections that are made at once, by a lease of its own."""
    assert len(workers(served)) == 2
    found = []
    for _ in range(40):
        with served.client(key) as http:
            answer = http.post("/v1/chat/completions", json={**body(), "stream": False})
        assert answer.status_code == 200
        found.append(answer.headers["x-request-id"])
    owners = dict(postgres.execute("SELECT id, owner_id FROM reservations", postgres_database.rpartition("/")[2]))
    counts = Counter(owners[request_id] for request_id in found)
    assert len(counts) == 2
    assert min(counts.values()) >= 5, counts


def test_a_killed_worker_is_replaced_and_its_siblings_serve_on(served, key, postgres, postgres_database):
    """No new connection fails meanwhile; only the calls of the dead one are cut off."""
    victim = workers(served)[0]
    streams = [Stream(served, key, tokens=30, pace_s=0.05) for _ in range(6)]
    victim.kill()
    for _ in range(30):
        with served.client(key) as http:
            assert http.post("/v1/chat/completions", json={**body(), "stream": False}).status_code == 200
    ends = {stream.request_id: stream.to_its_end() for stream in streams}
    owners = dict(postgres.execute("SELECT id, owner_id FROM reservations", postgres_database.rpartition("/")[2]))
    cut_off = {owners[request_id] for request_id, end in ends.items() if not end.endswith(b"data: [DONE]\n\n")}
    whole = {owners[request_id] for request_id, end in ends.items() if end.endswith(b"data: [DONE]\n\n")}
    assert len(cut_off) <= 1
    assert whole
    assert not cut_off & whole
    until(
        lambda: len(workers(served)) == 2 and victim.pid not in server_pids(served),
        "the worker was not replaced",
        within_s=PATIENCE_S,
    )
    assert events(served, "worker_died")[-1]["pid"] == victim.pid
    until(lambda: events(served, "worker_ready"), "the new worker did not get ready", within_s=PATIENCE_S)


def test_a_worker_that_is_replaced_while_the_database_is_away_waits_for_it(tmp_path, upstream):
    """It does not die of that again and again, which would only keep it away for longer."""
    with Cluster() as cluster:
        cluster.create_database("away")
        with serving(tmp_path, cluster.url("away"), upstream.base_url, configuration=SERVER) as server:
            cluster.halt()
            workers(server)[0].kill()
            until(lambda: events(server, "worker_waits"), "the new worker did not wait", within_s=PATIENCE_S)
            cluster.launch()
            until(lambda: events(server, "worker_ready"), "the new worker did not get ready", within_s=PATIENCE_S)
            assert [event["status"] for event in events(server, "worker_died")] == [-signal.SIGKILL]


def test_a_worker_that_is_stuck_loses_nobody(served, key):
    """Its siblings take the connections that wait at it."""
    victim = workers(served)[1]
    victim.suspend()
    try:
        for _ in range(20):
            with socket.create_connection(served.address, timeout=PATIENCE_S) as connection:
                connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        victim.resume()


HUNG_SERVER = """
import os, sys
from proxy.cli.serve import supervise
from proxy.observability import configure_logs
from proxy.settings import load
from proxy.supervisor import listen

configuration = load(os.environ)
configure_logs("json", "info")
sys.exit(supervise(configuration, listen("127.0.0.1", 0, 2), as_json=True, hung_s=4))
"""


class Impatient(Served):
    """A server that kills a hung worker after seconds."""

    def program(self) -> list[str]:
        return [sys.executable, "-c", HUNG_SERVER]


def test_a_hung_worker_is_replaced_and_its_calls_are_freed(tmp_path, postgres, upstream):
    """Whoever beats is left alone, and serves meanwhile."""
    postgres.create_database(name := f"hung_{tmp_path.name}")
    config = f"{SERVER}\n[database]\nlease_s = 2\n"
    server = Impatient(environment(tmp_path, postgres.url(name), upstream.base_url, configuration=config))
    server.command("migrate")
    server.start()
    try:
        own_key = server.customer("customer@example.com", "1000")
        streams = [Stream(server, own_key, tokens=160, pace_s=0.05) for _ in range(6)]
        victim, sibling = workers(server)
        victim.suspend()
        until(lambda: events(server, "worker_ready"), "the hung worker was not replaced", within_s=20)
        assert [event["pid"] for event in events(server, "worker_hung")] == [victim.pid]
        assert [event["status"] for event in events(server, "worker_died")] == [-signal.SIGKILL]
        assert sibling.pid in server_pids(server)
        with server.client(own_key) as http:
            assert http.post("/v1/chat/completions", json={**body(), "stream": False}).status_code == 200
            page = http.get("/metrics").text
        assert "tollgate_worker_hangs_total 1\n" in page
        assert "tollgate_worker_deaths_total 1\n" in page
        ends = [stream.to_its_end() for stream in streams]
        assert any(b"(cut off)" in end for end in ends)
        until(lambda: server.balance(own_key)["reserved"] == "0", "what it held was not freed")
        assert server.stop() == 0, server.log()
    finally:
        for pid in server_pids(server):
            psutil.Process(pid).kill()
        server.stop(signal.SIGKILL)
        server.errors.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopping_server_finishes_its_calls(passing, key, number):
    """Streams come to their end, nobody new gets in, the exit status is 0, and no process and no hold is left."""
    children = workers(passing)
    streams = [Stream(passing, key, tokens=12, pace_s=0.1) for _ in range(4)]
    passing.process.send_signal(number)
    for stream in streams:
        assert stream.to_its_end().endswith(b"data: [DONE]\n\n")
    assert passing.process.wait(PATIENCE_S) == 0, passing.log()
    assert not any(child.is_running() for child in children)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(passing.address).close()
    assert not events(passing, "ending_calls")


def test_streams_that_take_too_long_are_ended_by_an_error_and_charged(passing, served, key):
    """After `drain_s` the client is told, pays for what it has got, and the server is gone."""
    stream = Stream(passing, key, tokens=400, pace_s=0.05)
    passing.process.send_signal(signal.SIGTERM)
    end = stream.to_its_end()
    assert passing.process.wait(PATIENCE_S) == 0, passing.log()
    last = end.rstrip().rpartition(b"\n\n")[2]
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["message"], error["code"]) == ("The server is stopping.", "stream_broken")
    assert b"[DONE]" not in end
    charge = served.charge(key, stream.request_id)
    assert (charge["state"], charge["outcome"], charge["usage_source"]) == ("settled", "server_stopped", "counted")
    assert 0 < charge["usage"]["output"] < 200


def test_workers_do_not_outlive_their_supervisor(passing, key):
    """Killed without a word, it leaves nobody: each worker finishes its calls and ends."""
    children = workers(passing)
    stream = Stream(passing, key, tokens=12, pace_s=0.1)
    passing.process.kill()
    passing.process.wait()
    assert stream.to_its_end().endswith(b"data: [DONE]\n\n")
    until(lambda: not any(child.is_running() for child in children), "a worker lived on", within_s=PATIENCE_S)


def test_a_worker_that_is_asked_to_end_is_replaced(passing, key):
    """So each can be renewed by itself; its calls are finished."""
    streams = [Stream(passing, key, tokens=12, pace_s=0.1) for _ in range(4)]
    victim = workers(passing)[0]
    victim.terminate()
    for stream in streams:
        assert stream.to_its_end().endswith(b"data: [DONE]\n\n")
    until(
        lambda: len(workers(passing)) == 2 and victim.pid not in server_pids(passing),
        "it was not replaced",
        within_s=PATIENCE_S,
    )
    assert not events(passing, "worker_died")


def test_a_taken_port_is_refused(served, tmp_path, postgres_database):
    """Also when its owner shares it among its workers, which would share it with ours."""
    _, port = served.address
    other = Served(environment(tmp_path, postgres_database, configuration=SERVER))
    for count in ("1", "2"):
        done = other.run("serve", "--port", str(port), "--workers", count)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "Address already in use" in done.stderr
    other.errors.close()


def test_sockets_of_one_server_share_a_port():
    """One for each worker, all on the same port."""
    sockets = listen("127.0.0.1", 0, 3)
    ports = {each.getsockname()[1] for each in sockets}
    for each in sockets:
        each.close()
    assert (len(sockets), len(ports)) == (3, 1)


PROGRAM = """
import os, sys, time
from proxy import supervisor
from proxy.supervisor import Supervisor
supervisor.PAUSE_S *= {haste}

def work(lifeline):
    with open(sys.argv[1], "a") as starts:
        starts.write(f"{{time.monotonic()}}\\n")
    if len(open(sys.argv[1]).read().split()) > {healthy}:
        {sick}
    lifeline.say_ready()
    {then}

sys.exit(Supervisor(work, 1, [], stop_s_max=1, hung_s={hung_s}, on_ready=lambda: print("ready", flush=True)).run())
"""

BEATING = "[(lifeline.beat(), time.sleep(0.02)) for _ in range(5000)]"


@pytest.fixture
def supervised(tmp_path):
    """What runs `PROGRAM` and returns the process and the file in which its workers note when they start."""
    running = []

    def run(
        healthy: int, then: str, haste: float = 1, sick: str = "os._exit(7)", hung_s: float = HUNG_S
    ) -> tuple[subprocess.Popen, Path]:
        file = tmp_path / "starts"
        program = PROGRAM.format(healthy=healthy, then=then, haste=haste, sick=sick, hung_s=hung_s)
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(file)],
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )
        running.append(process)
        return process, file

    yield run
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_worker_that_keeps_dying_is_replaced_with_pauses(supervised):
    """One at a time, each time later: never in a loop that eats the machine."""
    process, file = supervised(1, "sys.exit(1)")
    assert process.stdout.readline() == b"ready\n"
    until(lambda: len(file.read_text().split()) >= 4, "it was not replaced", within_s=PATIENCE_S)
    starts = [float(line) for line in file.read_text().split()]
    gaps = [after - before for before, after in pairwise(starts)]
    assert gaps[0] >= PAUSE_S
    assert gaps[1] >= 2 * PAUSE_S
    assert gaps[2] >= 4 * PAUSE_S
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) in {0, 1}  # 1 is the fourth worker's, if it had not died yet


def test_a_server_whose_workers_all_keep_dying_gives_up(supervised):
    """Rather than to let everybody wait who connects; the exit status is the last worker's."""
    process, file = supervised(1, "os._exit(1)", haste=0.01)
    assert process.wait(PATIENCE_S) == 7
    assert len(file.read_text().split()) == YOUNG_DEATHS_MAX


def test_a_server_that_cannot_start_does_not_go_on_trying(supervised):
    """Nobody has ever been ready, so the workers' status is the server's."""
    process, file = supervised(0, "pass")
    assert process.wait(PATIENCE_S) == 7
    assert len(file.read_text().split()) == 1


def test_a_server_stops_in_order_while_a_worker_is_only_starting(supervised):
    """It has no calls to end."""
    process, file = supervised(1, "os._exit(1)", haste=0.01, sick="time.sleep(60)")
    until(
        lambda: file.exists() and len(file.read_text().split()) == 2,
        "the dead worker was not replaced",
        within_s=PATIENCE_S,
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


def test_a_worker_that_does_not_end_is_killed(supervised):
    """When its time is over; the exit status tells."""
    process, _ = supervised(9, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 1


def test_a_worker_that_is_stuck_says_where_and_is_replaced(supervised, tmp_path):
    """Also while it starts; what it was doing is in the log."""
    process, file = supervised(1, "time.sleep(60)", haste=0.01, hung_s=0.4)
    assert process.stdout.readline() == b"ready\n"
    for event in (b"worker_hung", b"worker_killed", b"worker_died"):
        assert event in process.stdout.readline()
    assert "in work" in (tmp_path / "errors").read_text()
    until(lambda: len(file.read_text().split()) >= 2, "it was not replaced")


def test_a_machine_that_was_suspended_loses_no_worker(supervised):
    """The supervisor was stopped as long as they were, and gives them the time to go on."""
    process, file = supervised(2, BEATING, haste=0.01, hung_s=1.2)
    assert process.stdout.readline() == b"ready\n"
    [worker] = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGSTOP)
    worker.suspend()
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    worker.resume()
    assert worker.status() != psutil.STATUS_ZOMBIE
    stopped_at = time.monotonic()
    worker.suspend()
    until(lambda: len(file.read_text().split()) >= 2, "a hung worker was not replaced afterwards")
    assert time.monotonic() - stopped_at > 0.9


def test_pauses_are_bounded():
    """None for who has lived long, and half a minute at the most."""
    assert [pause_before(deaths) for deaths in (0, 1, 2, 3)] == [0, PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S]
    assert pause_before(10**6) == PAUSE_S_MAX


def test_a_server_with_notice_takes_calls_while_it_is_not_ready(tmp_path, upstream):
    """Who stands in front sees red before anybody is turned away; every answer then closes its connection."""
    config = CONFIG.replace("port = 0", "port = 0\nnotice_s = 1.5")
    with serving(tmp_path, "sqlite+aiosqlite:///notice.db", upstream.base_url, config) as server:
        key = server.customer("customer@example.com")
        with server.client(key) as http, closing(server.client(key)) as idle:
            assert idle.get("/health/ready").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            until(lambda: http.get("/health/ready").status_code == 503, "readiness stayed green", within_s=PATIENCE_S)
            answer = http.post("/v1/chat/completions", json={**body(), "stream": False})
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            answer = idle.post("/v1/chat/completions", json={**body(), "stream": False})
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert server.process.wait(PATIENCE_S) == 0
