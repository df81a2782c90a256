"""A copy of the books, taken while calls are served, and brought back to life elsewhere."""

import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

from proxy.units import new_id
from tests.postgres import program
from tests.serving import CONFIG, Served, environment, serving
from tests.waiting import until

CONFIGURATION = CONFIG + "\n[database]\nlease_s = 1\n"
NOWHERE = "http://127.0.0.1:9/v1"
BODY = {"model": "demo-chat", "messages": [{"role": "user", "content": "hi"}]}


def test_a_copy_taken_under_load_is_whole(database, tmp_path, request):
    """It audits clean, holds every charge that was booked before, and serves; what was open in it is given back."""
    (tmp_path / "copy").mkdir()
    with serving(tmp_path, database, NOWHERE, CONFIGURATION) as served:
        key = served.customer("customer@example.com")
        with served.client(key) as http:
            before = paid(http)
        with calling(served, key):
            copied = copy(served, database, tmp_path, request)
    restored = Served(environment(tmp_path / "copy", copied, NOWHERE, CONFIGURATION))
    assert restored.command("audit")["clean"]
    restored.start()
    try:
        assert restored.charge(key, before)["state"] == "settled"
        with restored.client(key) as http:
            paid(http)
        until(lambda: restored.holds_nothing(key), "something stayed held", within_s=20)
    finally:
        assert restored.stop() == 0
        restored.errors.close()
    assert restored.command("audit")["clean"]


def test_a_backup_overwrites_nothing(tmp_path):
    """Neither a file that is there nor, half-way, the one before."""
    there = tmp_path / "there.db"
    there.write_text("dear to somebody")
    operator = Served(environment(tmp_path, "sqlite+aiosqlite:///books.db"))
    operator.command("migrate")
    refused = operator.run("backup", str(there))
    assert refused.returncode == 2
    assert refused.stderr.startswith("tollgate: ")
    assert operator.run("backup", str(tmp_path / "no" / "where.db")).returncode == 2
    assert there.read_text() == "dear to somebody"
    assert [file.name for file in tmp_path.glob("*.unfinished")] == []
    operator.errors.close()


def paid(http: httpx2.Client) -> str:
    """The request id of a call that was paid for."""
    answer = http.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-request-id"]


class calling:  # noqa: N801 - used like a function
    """Calls one after the other, in four threads, for as long as the block runs; at least one each has ended before."""

    def __init__(self, served: Served, key: str) -> None:
        self._served, self._key = served, key
        self._is_over = threading.Event()
        self._begun = threading.Barrier(5)
        self._threads = ThreadPoolExecutor(4)

    def __enter__(self) -> None:
        self._running = [self._threads.submit(self._call) for _ in range(4)]
        self._begun.wait(30)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._running:
            thread.result(30)
        self._threads.shutdown()

    def _call(self) -> None:
        with self._served.client(self._key) as http:
            paid(http)
            self._begun.wait(30)
            while not self._is_over.is_set():
                paid(http)


def copy(served: Served, database: str, folder: Path, request) -> str:
    """The URL of a copy, made as the README says."""
    if database.startswith("sqlite"):
        file = folder / "copy.db"
        served.command("backup", str(file))
        (folder / "copy" / "data").mkdir()
        shutil.copy(file, folder / "copy" / "data" / "served.db")
        return database
    postgres = request.getfixturevalue("postgres")
    source, target = database.rpartition("/")[2], new_id("restored")
    dump = folder / "books.dump"
    run_program("pg_dump", "--format=custom", "--dbname", plain(database), "--file", dump)
    postgres.create_database(target)
    request.addfinalizer(lambda: postgres.drop_database(target))
    run_program("pg_restore", "--exit-on-error", "--dbname", plain(database).replace(source, target), dump)
    return postgres.url(target)


def plain(url: str) -> str:
    """As PostgreSQL's own programs write it."""
    return url.replace("postgresql+asyncpg", "postgresql")


def run_program(name: str, *words: str | Path) -> None:
    done = subprocess.run([program(name), *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
