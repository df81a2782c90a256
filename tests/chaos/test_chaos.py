"""The short form of `make chaos`, and the proof that it can fail."""

from collections import Counter
from typing import get_args

import pytest

from tests.chaos.evidence import logged_faults
from tests.chaos.faults import Deed
from tests.chaos.judge import Kind, Violation
from tests.chaos.run import BALANCED, Result, run, shortcomings, table
from tests.chaos.world import DatabaseKind, World

DURATION_S = 7.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", get_args(DatabaseKind))
def test_crashes_lose_nothing_and_charge_nobody_twice(tmp_path, kind):
    """Every promise holds while proxies and the database are killed under load."""
    result = run(tmp_path, kind, duration_s=DURATION_S, seed=1)
    assert result.is_proof, table(result)
    assert result.tally[Deed.KILL]
    if kind == "postgresql":
        assert result.tally[Deed.KILL_WORKER]


def acknowledge_too_early(world: World, tally: Counter[str]) -> None:
    """Make commits asynchronous and as late as can be, then crash the database, while calls go on.

    Twice: PostgreSQL writes every ten seconds at the latest, perhaps just before the first crash.
    """
    world.cluster.set(synchronous_commit="off", wal_writer_delay="10s", wal_writer_flush_after="1GB")
    for _ in range(2):
        world.wait_for_calls(40)
        world.cluster.restart("immediate")
        tally[Deed.CRASH_DATABASE] += 1


@pytest.mark.timeout(300)
def test_a_database_that_acknowledges_too_early_is_found_out(tmp_path):
    """A crash then loses what clients were told, and the judge sees it, though the books that are left add up.

    Nobody waits for the ends of calls: those that were booked and forgotten again are open for ever.
    """
    result = run(tmp_path, "postgresql", duration_s=1, seed=1, attack=acknowledge_too_early, quiet_s=0)
    assert result.shortcomings == []
    found = {violation.kind for violation in result.violations}
    assert {Kind.LOST, Kind.UNBOOKED, Kind.UNRESERVED} <= found
    assert Kind.AUDIT not in found


def test_a_run_in_which_nothing_happens_is_no_proof():
    """Nobody was killed, so nothing was shown."""
    lacking = list(shortcomings(Counter(), duration_s=300, is_embedded=False))
    assert "nothing was killed" in lacking
    assert {"no calls complete", "no markups set", "no workers whose memory was judged"} <= set(lacking)
    assert not Result(Counter(), Counter(), violations=[], shortcomings=lacking).is_proof


@pytest.mark.parametrize(("value", "counts"), [("true", True), ("", False)])
def test_a_run_without_nginx_says_so(monkeypatch, value, counts):
    """Where it can always be had it is no proof."""
    monkeypatch.setenv("CI", value)
    tally = Counter({BALANCED: 0})
    lacking = list(shortcomings(tally, duration_s=60, is_embedded=False))
    assert any("nginx" in each for each in lacking) == counts
    assert "WITHOUT NGINX" in table(Result(tally, Counter(), violations=[], shortcomings=lacking))


def test_one_violation_fails_a_run():
    """Whatever else went well; and the table shows it."""
    result = Result(Counter(), Counter(), violations=[Violation(Kind.LOST, "here")], shortcomings=[])
    assert not result.is_proof
    assert "BROKEN: acknowledged operations lost: here" in table(result)


def test_what_a_proxy_logs_is_read(tmp_path):
    """A fault of the ledger and a traceback are mishaps; warnings about the world are not."""
    log = tmp_path / "proxy-0.log"
    log.write_text(
        '{"event": "ledger_lost"}\n'
        '{"event": "ledger_fault", "request_id": "req_1", "exception": "Traceback\\n  line\\nLedgerFault: no"}\n'
        "Traceback (most recent call last):\n"
    )
    assert list(logged_faults(log)) == [
        "proxy-0: {'event': 'ledger_fault', 'request_id': 'req_1'} LedgerFault: no",
        "proxy-0: Traceback (most recent call last):",
    ]
