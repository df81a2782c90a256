"""The benchmark itself: it measures, the books of all variants add up, and a miss is told from a hit."""

import pytest

from tests.bench import ledger as bench
from tests.bench.ledger import BATCHED, DRIVER, HOT, ORM, Result, Round, Scale

TINY = Scale(rounds=1, window_s=0.05, callers=4, wallets=40, part=0.0)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_every_variant_is_measured_and_its_books_add_up(kind):
    """Each has finished calls in each of its scenarios, and passed the audit that would end the run."""
    result = bench.bench(kind, TINY)
    assert set(result.medians) == {(scenario, name) for scenario, names in bench.SCENARIOS.items() for name in names}
    assert all(one.pairs_per_s > 0 and 0 < one.p50_ms <= one.p99_ms for one in result.medians.values())
    assert bench.missed(result, TINY) == []
    assert bench.table(result, TINY).count("\n") == 2 + len(result.medians)


def test_a_missed_target_is_named():
    """With every variant as fast as any other, each gain asked for is missed, and a lone caller's is met."""
    same = Round(pairs_per_s=100, p50_ms=1, p99_ms=2)
    medians = {(scenario, name): same for scenario, names in bench.SCENARIOS.items() for name in names}
    assert bench.missed(Result("postgresql", "", medians), Scale()) == [
        "postgresql, hot: 1.00 times the ORM, less than 50.00",
        "postgresql, hot: 1.00 times the driver, less than 20.00",
        "postgresql, spread: 1.00 times the ORM, less than 30.00",
    ]
    medians[HOT, BATCHED] = Round(pairs_per_s=5000, p50_ms=1, p99_ms=2)
    result = Result("postgresql", "", medians)
    assert (result.ratio(HOT, ORM), result.ratio(HOT, DRIVER)) == (50, 50)
    assert len(bench.missed(result, Scale())) == 1


def test_a_server_that_may_lose_commits_is_not_measured():
    """Its figures would be of something else."""

    class Careless:
        def execute(self, sql):
            return [("off" if sql == "SHOW synchronous_commit" else "on",)]

    with pytest.raises(SystemExit, match="may lose"):
        bench.durable(Careless())
