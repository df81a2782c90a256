"""The schedule: what every run has, and what it never has."""

import pytest

from tests.chaos.faults import Deed, Fault, schedule

LEASE_S = 4.0
DURATIONS_S = (6, 15, 30, 60, 300)
SEEDS = range(20)


def cluster_schedule(seed: int, duration_s: float) -> list[Fault]:
    return schedule(seed=seed, duration_s=duration_s, replicas=2, lease_s=LEASE_S)


@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_every_run_kills_a_proxy_and_a_worker_and_crashes_the_database(duration_s):
    """However short it is."""
    for seed in SEEDS:
        assert {Deed.KILL, Deed.KILL_WORKER, Deed.CRASH_DATABASE} <= {
            fault.deed for fault in cluster_schedule(seed, duration_s)
        }


def test_an_embedded_database_is_crashed_with_its_process():
    """There is no server to strike, and no lease to outlast."""
    for duration_s in DURATIONS_S:
        deeds = {fault.deed for fault in schedule(seed=1, duration_s=duration_s, replicas=1, lease_s=None)}
        assert Deed.KILL in deeds
        assert deeds <= {Deed.KILL, Deed.TERMINATE}


def test_a_minute_has_every_deed():
    """This is what continuous integration runs."""
    for seed in SEEDS:
        assert {fault.deed for fault in cluster_schedule(seed, 60)} == set(Deed)


def test_the_same_seed_makes_the_same_schedule():
    """So that what one run found can be looked for again."""
    assert cluster_schedule(7, 300) == cluster_schedule(7, 300) != cluster_schedule(8, 300)


@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_the_last_fifth_is_quiet(duration_s):
    """Everybody has to recover in it."""
    for seed in SEEDS:
        assert max(cluster_schedule(seed, duration_s)).at_s <= duration_s * 0.8


def test_pauses_outlast_the_lease_and_end():
    """One after the other, each resumed, and nobody strikes at who is paused."""
    for seed in SEEDS:
        paused: Fault | None = None
        for fault in cluster_schedule(seed, 300):
            if fault.deed is Deed.PAUSE:
                assert paused is None
                paused = fault
            elif fault.deed is Deed.RESUME:
                assert paused is not None
                assert (fault.replica, fault.at_s) == (paused.replica, paused.at_s + 2 * LEASE_S)
                paused = None
            elif fault.deed in {Deed.KILL, Deed.TERMINATE}:
                assert paused is None or paused.replica != fault.replica
        assert paused is None


def test_the_first_pause_is_left_in_peace():
    """Only others whose own leases are steady fence the paused proxy, so that its calls settle late."""
    for seed in SEEDS:
        faults = cluster_schedule(seed, 60)
        first = next(fault.at_s for fault in faults if fault.deed is Deed.PAUSE)
        disruptions = [fault.at_s for fault in faults if fault.deed not in {Deed.PAUSE, Deed.RESUME}]
        assert not [at_s for at_s in disruptions if first - LEASE_S <= at_s <= first + 2 * LEASE_S]


def test_a_long_run_leaves_one_worker_alive():
    """From a third on; how much memory it needs is looked at."""
    for seed in SEEDS:
        for fault in cluster_schedule(seed, 300):
            if fault.at_s >= 100 and not fault.replica:
                assert fault.deed not in {Deed.KILL, Deed.TERMINATE}
                assert not (fault.deed is Deed.KILL_WORKER and fault.is_eldest)
