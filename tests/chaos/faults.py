"""What is done to the world, and when: a schedule that follows from its seed, then its execution."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum

import msgspec

from tests.chaos.world import World

OUTAGE_S = 5.0
"""Longer than the end of an answer waits for its charge, so that answers are withheld and their charges taken back."""

_LONG_S_MIN = 40.0
"""Shorter runs go without what is slow: outages, and stops in order."""

_DISRUPTION_S_MAX = 8.0
"""Between two disruptions: time for a proxy to start, and for calls to begin that the next one can strike."""

_REPLICA_DISRUPTION_S_MAX = 4.5
"""Likewise, where there is more to strike, and others serve meanwhile."""

_ELDER_S_MIN = 120.0
"""In runs of at least this length one worker is left alive from a third on: what it needs then must not grow."""

_QUIET = 0.8
"""The part of a run that has faults; in the rest everybody has to recover."""


class Deed(StrEnum):
    """What can be done to the world, as the table counts it."""

    KILL = "kills (SIGKILL, then a new start)"
    KILL_WORKER = "kills of one worker (SIGKILL; its server replaces it)"
    TERMINATE = "orderly stops (SIGTERM, then a new start)"
    PAUSE = "pauses (SIGSTOP)"
    RESUME = "resumptions (SIGCONT)"
    CRASH_DATABASE = "database crashes (immediate restart)"
    CUT_DATABASE = "database outages"
    PAUSE_DATABASE = "database pauses (SIGSTOP)"
    CUT_PROVIDER = "provider outages"


class Fault(msgspec.Struct, frozen=True, order=True):
    """A deed at a moment, in seconds from the start; `replica` is the number of the proxy that it strikes.

    Of its workers the eldest is struck, or else the youngest.
    """

    at_s: float
    deed: Deed
    replica: int = 0
    is_eldest: bool = False


class _Pause(msgspec.Struct, frozen=True):
    start_s: float
    stop_s: float
    replica: int


def schedule(*, seed: int, duration_s: float, replicas: int, lease_s: float | None) -> list[Fault]:
    """The faults of a run, in their order. `lease_s` is None for an embedded database: no server, no lease.

    Disruptions follow each other through all proxies and the database; the first ones are those without which a run
    proves nothing. Where a run is long enough, proxies are also paused for twice their lease. Every other pause, the
    first one included, is left in peace, so that others fence the paused one and its calls settle late; during the rest
    of the pauses disruptions strike whoever is awake.
    """
    dice = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    end_s = duration_s * _QUIET
    interval_s = min(_DISRUPTION_S_MAX if lease_s is None else _REPLICA_DISRUPTION_S_MAX, duration_s / 4)
    pauses = [] if lease_s is None else _pauses(dice, end_s, replicas, 2 * lease_s)
    faults = [Fault(pause.start_s, Deed.PAUSE, pause.replica) for pause in pauses]
    faults += [Fault(pause.stop_s, Deed.RESUME, pause.replica) for pause in pauses]
    deeds = _disruptions(dice, duration_s, has_server=lease_s is not None)
    at_s = interval_s
    while at_s <= end_s:
        peaceful = next((pause for pause in pauses[::2] if _is_near(pause, at_s, lease_s or 0)), None)
        if peaceful is not None:
            at_s = peaceful.stop_s + 1
            continue
        paused = {pause.replica for pause in pauses if _is_near(pause, at_s, interval_s / 2)}
        awake = [replica for replica in range(replicas) if replica not in paused]
        has_elder = replicas > 1 and duration_s >= _ELDER_S_MIN and at_s >= duration_s / 3
        faults.append(_struck(dice, at_s, next(deeds), awake, has_elder=has_elder))
        at_s += interval_s
    return sorted(faults)


def _struck(dice: random.Random, at_s: float, deed: Deed, awake: list[int], *, has_elder: bool) -> Fault:
    """The deed at one of the proxies that are awake; where the first has an elder, nobody touches that."""
    replica = dice.choice(awake)
    if has_elder and deed in {Deed.KILL, Deed.TERMINATE}:
        others = [each for each in awake if each]
        if not others:
            return Fault(at_s, Deed.KILL_WORKER, replica)
        replica = dice.choice(others)
    is_eldest = deed is Deed.KILL_WORKER and dice.random() < 0.5 and not (has_elder and not replica)
    return Fault(at_s, deed, replica, is_eldest=is_eldest)


def _is_near(pause: _Pause, at_s: float, before_s: float) -> bool:
    return pause.start_s - before_s <= at_s <= pause.stop_s


def _disruptions(dice: random.Random, duration_s: float, *, has_server: bool) -> Iterator[Deed]:
    """One after the other, without end."""
    deeds = [Deed.CRASH_DATABASE, Deed.KILL, Deed.KILL_WORKER] if has_server else [Deed.KILL]
    if duration_s >= _LONG_S_MIN:
        outages = [Deed.CUT_DATABASE, Deed.PAUSE_DATABASE, Deed.CUT_PROVIDER] if has_server else []
        deeds += [Deed.TERMINATE, *outages]
    yield from deeds
    while True:
        yield dice.choice([Deed.KILL, *deeds])


def _pauses(dice: random.Random, end_s: float, replicas: int, length_s: float) -> list[_Pause]:
    """One at a time, with at least as much time between them as they take; none where they would leave no time."""
    pauses: list[_Pause] = []
    if end_s < 3 * length_s:
        return pauses
    start_s = length_s * 3 / 4
    while start_s + length_s <= end_s:
        pauses.append(_Pause(start_s, start_s + length_s, dice.randrange(replicas)))
        start_s += length_s * dice.uniform(2, 4)
    return pauses


def strike(world: World, faults: list[Fault], tally: Counter[str]) -> None:
    """Do to `world` what the schedule says, each deed at its time or as soon as the one before is done."""
    started_at = time.monotonic()
    for fault in faults:
        wait_until(world, started_at + fault.at_s)
        _do(world, fault)
        tally[fault.deed] += 1


def wait_until(world: World, moment: float) -> None:
    """Let the clients have their way until `moment` on the monotonic clock. Raises `WorldFailed` if they have died."""
    while (left_s := moment - time.monotonic()) > 0:
        world.check_clients()
        time.sleep(min(left_s, 0.2))


def _do(world: World, fault: Fault) -> None:
    proxy = world.proxies[fault.replica]
    match fault.deed:
        case Deed.KILL:
            world.kill(proxy)
        case Deed.KILL_WORKER:
            world.kill_worker(proxy, is_eldest=fault.is_eldest)
        case Deed.TERMINATE:
            world.renew(proxy)
        case Deed.PAUSE:
            world.pause(proxy)
        case Deed.RESUME:
            world.resume(proxy)
        case Deed.CRASH_DATABASE:
            with world.without_database():
                world.cluster.restart("immediate")
        case Deed.CUT_DATABASE:
            with world.without_database():
                world.cluster.halt("immediate")
                wait_until(world, time.monotonic() + OUTAGE_S)
                world.cluster.launch()
        case Deed.PAUSE_DATABASE:
            with world.without_database():
                world.cluster.pause()
                wait_until(world, time.monotonic() + OUTAGE_S)
                world.cluster.resume()
        case Deed.CUT_PROVIDER:
            world.providers[0].stop()
            wait_until(world, time.monotonic() + OUTAGE_S)
            world.providers[0].start()
