"""One server of several worker processes: starts them, replaces those that die, and ends them together.

Every worker has a listening socket of its own, and the kernel spreads new connections evenly over these. The
supervisor holds them all, and so does every worker: what waits on the socket of a worker that is gone, or stuck, is
taken by its siblings (see `proxy.edge.server`). So nobody who has connected is lost with a worker, save for the calls
that it was serving.

There are never more processes than workers were asked for. One that dies is replaced at once; if it keeps dying young,
with a pause that doubles each time. One that ends in order, by a SIGTERM to it alone, is replaced as well.

Each worker's event loop beats, by counting up in memory that it shares with the supervisor. One that falls silent is
hung, as in a call that never returns or by a SIGSTOP: it says where it is, is killed, and is replaced like the dead.
"""

import faulthandler
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from proxy.errors import SettingsError

log = structlog.get_logger(__name__)

YOUNG_S = 10.0
"""A worker that dies before it has lived so long is replaced after a pause."""

PAUSE_S = 0.5
"""The first one; each further young death doubles it."""

PAUSE_S_MAX = 30.0

YOUNG_DEATHS_MAX = 6
"""When all workers are dead and each has died so often young, in half a minute or so, the server gives up.

Whoever has connected would wait for nobody otherwise; and whoever watches the server sees that it has ended.
"""

HUNG_S = 30.0
"""A worker that does not beat for so long is killed. Nothing that it does in its event loop takes a tenth of that."""

BEAT_S = 1.0
"""How often it beats, and is looked at."""

_WHERE = signal.SIGUSR1
"""Lets a worker write the stacks of its threads to standard error, however stuck it is; for operators as well."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_READY = b"r"
_BEATS_BYTES = 8


class Lifeline(msgspec.Struct, frozen=True):
    """What a worker has of its supervisor."""

    number: int
    """The worker's place, from 0; whoever replaces it has the same."""
    is_replacement: bool
    """Whether all workers have been ready before, so that others may serve meanwhile."""
    fd: int
    """Readable once the supervisor is gone, whatever has happened to it."""
    say_ready: Callable[[], None]
    """To be called when the worker takes calls."""
    beat: Callable[[], None]
    """To be called every `BEAT_S` from the start, by what must not get stuck."""


class _Place(msgspec.Struct):
    number: int
    pid: int | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    young_deaths: int = 0
    ready_fd: int | None = None
    is_ready: bool = False
    beats: int = 0
    """As last seen."""
    silent_s: float = 0.0
    """For how long they have not changed."""


class Supervisor:
    """Runs `work` in `workers` processes of its own and returns when all have ended.

    `work` serves until SIGTERM and returns the exit status. `on_ready` is called once, when all workers take calls for
    the first time, `on_death` whenever one has died, `on_hang` before one is killed because it was silent for `hung_s`
    seconds. `sockets` are what the workers listen on; they are closed here when the server stops, so that the last
    worker to close them closes the port. After `stop_s_max` seconds of stopping, what still runs is killed.
    """

    def __init__(  # noqa: PLR0913 - the parts of one server
        self,
        work: Callable[[Lifeline], int],
        workers: int,
        sockets: Sequence[socket.socket],
        *,
        stop_s_max: float,
        on_ready: Callable[[], None],
        on_death: Callable[[], None] = lambda: None,
        on_hang: Callable[[], None] = lambda: None,
        hung_s: float = HUNG_S,
    ) -> None:
        self._work = work
        self._places = [_Place(number) for number in range(workers)]
        self._sockets = sockets
        self._stop_s_max = stop_s_max
        self._on_ready = on_ready
        self._on_death = on_death
        self._on_hang = on_hang
        self._hung_s = hung_s
        self._look_s = min(BEAT_S, hung_s / 4)
        self._looked_at = time.monotonic()
        self._beats = memoryview(mmap.mmap(-1, workers * _BEATS_BYTES)).cast("q")
        self._has_been_ready = False
        self._kill_at: float | None = None
        self._status = 0
        self._lifeline, self._held = os.pipe()
        self._wakening, self._waking = os.pipe()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or until the workers cannot be started; returns the exit status."""
        os.set_blocking(self._waking, False)
        signal.set_wakeup_fd(self._waking)
        for number in _SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        while True:
            if self._kill_at is None:
                self._start_due()
            elif all(place.pid is None for place in self._places):
                return self._status
            self._wait()
            self._reap()
            self._look()
            self._kill_late()

    # ---- waiting

    def _wait(self) -> None:
        fds = [self._wakening, *(place.ready_fd for place in self._places if place.ready_fd is not None)]
        readable, _, _ = select.select(fds, [], [], self._patience_s())
        for place in self._places:
            if place.ready_fd in readable:
                self._hear(place)
        if self._wakening in readable:
            for number in os.read(self._wakening, 512):
                if number != signal.SIGCHLD:
                    self._stop(signal.Signals(number))

    def _patience_s(self) -> float | None:
        due = [place.start_at for place in self._places if place.pid is None] if self._kill_at is None else []
        if self._kill_at is not None:
            due.append(self._kill_at)
        elif any(place.pid is not None for place in self._places):
            due.append(self._looked_at + self._look_s)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _hear(self, place: _Place) -> None:
        is_ready = os.read(place.ready_fd or 0, 1) == _READY
        os.close(place.ready_fd or 0)
        place.ready_fd = None
        place.is_ready = is_ready
        if is_ready and self._has_been_ready:
            log.info("worker_ready", worker=place.number, pid=place.pid)
        elif all(each.is_ready for each in self._places):
            self._has_been_ready = True
            self._on_ready()

    # ---- starting

    def _start_due(self) -> None:
        now = time.monotonic()
        for place in self._places:
            if place.pid is None and place.start_at <= now:
                self._start(place)

    def _start(self, place: _Place) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # Until the worker has handlers of its own, a signal to it would be taken for one to us, and lost on it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._be_worker(place, writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(writing)
        place.pid, place.ready_fd, place.started_at = pid, reading, time.monotonic()
        place.is_ready = False
        place.silent_s = 0.0

    def _be_worker(self, place: _Place, ready_fd: int) -> None:
        """Work, and end this process, which was forked for it."""
        status = 1
        try:
            os.setsid()  # a Ctrl-C at the terminal is for the supervisor, which passes it on
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            for fd in (self._held, self._wakening, self._waking):
                os.close(fd)
            faulthandler.register(_WHERE)

            def beat() -> None:
                self._beats[place.number] += 1

            def say_ready() -> None:
                os.write(ready_fd, _READY)
                os.close(ready_fd)

            status = self._work(Lifeline(place.number, self._has_been_ready, self._lifeline, say_ready, beat))
        except Exception:
            log.exception("worker_failed", worker=place.number)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    # ---- looking after them

    def _look(self) -> None:
        """Kill who has been silent for too long.

        Of a long time between two looks only as much counts as two looks take: where we were stopped ourselves, or the
        whole machine was, so were the workers, and nobody knows yet which of them hangs.
        """
        passed_s = time.monotonic() - self._looked_at
        if self._kill_at is not None or passed_s < self._look_s:
            return
        self._looked_at += passed_s
        for place in self._places:
            if place.pid is None:
                continue
            beats = self._beats[place.number]
            if beats != place.beats:
                place.beats, place.silent_s = beats, 0.0
                continue
            was_hung = place.silent_s >= self._hung_s
            place.silent_s += min(passed_s, 2 * self._look_s)
            if was_hung:
                log.error("worker_killed", worker=place.number, pid=place.pid)
                self._on_hang()
                os.kill(place.pid, signal.SIGKILL)
                place.silent_s = 0.0  # where the kernel itself is stuck on it, that takes its time
            elif place.silent_s >= self._hung_s:
                log.error("worker_hung", worker=place.number, pid=place.pid, silent_s=round(place.silent_s, 1))
                os.kill(place.pid, _WHERE)  # it has until the next look to say where it is

    # ---- ending

    def _reap(self) -> None:
        for place in self._places:
            if place.pid is None:
                continue
            pid, status = os.waitpid(place.pid, os.WNOHANG)
            if pid:
                self._bury(place, os.waitstatus_to_exitcode(status))

    def _bury(self, place: _Place, status: int) -> None:
        """Take note of a worker's end; `status` is below zero for the signal that killed it."""
        pid, place.pid = place.pid, None
        if place.ready_fd is not None:
            os.close(place.ready_fd)
            place.ready_fd = None
        if self._kill_at is not None:
            # Who has not begun to serve has no calls to end, and just dies of the signal.
            if status and (place.is_ready or -status not in {signal.SIGTERM, signal.SIGINT}):
                log.error("worker_ended", worker=place.number, pid=pid, status=status)
                self._status = self._status or 1
            return
        if not self._has_been_ready:
            self._give_up(status)
            return
        now = time.monotonic()
        if status == 0:
            log.info("worker_ended", worker=place.number, pid=pid)
            place.start_at = now
            return
        is_young = now - place.started_at < YOUNG_S
        place.young_deaths = place.young_deaths + 1 if is_young else 0
        pause_s = pause_before(place.young_deaths)
        place.start_at = now + pause_s
        log.error("worker_died", worker=place.number, pid=pid, status=status, replaced_in_s=pause_s)
        self._on_death()
        if all(each.pid is None and each.young_deaths >= YOUNG_DEATHS_MAX for each in self._places):
            log.error("workers_given_up", workers=len(self._places))
            self._give_up(status)

    def _give_up(self, status: int) -> None:
        self._status = status if status > 0 else 1
        self._stop(signal.SIGTERM)

    def _stop(self, number: signal.Signals) -> None:
        """End all workers in order: each finishes its calls."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._stop_s_max
            for each in self._sockets:
                each.close()
        for place in self._places:
            if place.pid is not None:
                os.kill(place.pid, number)

    def _kill_late(self) -> None:
        if self._kill_at is None or time.monotonic() < self._kill_at:
            return
        for place in self._places:
            if place.pid is not None:
                log.error("worker_killed", worker=place.number, pid=place.pid)
                os.kill(place.pid, signal.SIGKILL)
        self._kill_at = time.monotonic() + self._stop_s_max


def pause_before(young_deaths: int) -> float:
    """How long to wait, in seconds, before replacing a worker after so many young deaths of its place in a row."""
    if not young_deaths:
        return 0.0
    return min(PAUSE_S * 2.0 ** min(young_deaths - 1, 10), PAUSE_S_MAX)


def listen(host: str, port: int, workers: int) -> list[socket.socket]:
    """The sockets of a server on `host` and `port` (0: any free one), one for each of its workers, not listening yet.

    Raises `SettingsError` when somebody else has the port.
    """
    first = _bound(host, port)
    if workers == 1:
        return [first]
    # Those that share a port would share it with another server's as well: so it had to be free before.
    taken = first.getsockname()[1]
    first.close()
    return [_bound(host, taken, is_shared=True) for _ in range(workers)]


def _bound(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as exc:
        bound.close()
        raise SettingsError(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    return bound
