"""The benchmark of a long book itself, on a short one: its plans are those of a long one, a miss is told from a hit."""

import pytest

from tests.bench import book
from tests.bench.book import Answered
from tests.postgres import Server

CHARGES = 10_000


@pytest.fixture(scope="module")
def answers(postgres: Server) -> list[Answered]:
    """What a book of ten thousand charges answers; its books add up."""
    return book.run(postgres, CHARGES, audits=True)


def test_nothing_reads_the_book(answers):
    """Every question is answered by indexes and sums, whatever PostgreSQL knows of the tables."""
    assert len(answers) == len(book.asked(CHARGES))
    assert book.missed(answers, time_ms_max=10_000) == []
    assert all(one.plans and 0 < one.min_ms <= one.median_ms for one in answers)
    assert book.table(answers, plans=True).count("Index Scan credit_transactions by ") >= 10


def test_what_is_rare_is_found_by_its_own_index(answers):
    """Top-ups and refunds are not looked for among the charges."""
    plans = {one.name: one.plans[-1] for one in answers}
    for name in ("top-ups", "refunds of a month"):
        assert "credit_transactions by ix_credit_transactions_by_hand" in plans[f"transactions, {name}"]


@pytest.mark.parametrize(
    ("node", "is_wide"),
    [
        ({"Node Type": "Seq Scan", "Actual Rows": 1, "Actual Loops": 1}, True),
        ({"Node Type": "Index Scan", "Actual Rows": 51, "Actual Loops": 1}, False),
        ({"Node Type": "Index Scan", "Actual Rows": 1, "Actual Loops": 5001}, True),
        ({"Node Type": "Index Scan", "Actual Rows": 1, "Actual Loops": 1, "Rows Removed by Filter": 5000}, True),
    ],
)
def test_a_plan_that_reads_too_much_is_told_from_others(node, is_wide):
    """By how many rows it looked at, whether they were wanted or not."""
    assert book.is_wide(node) == is_wide


def test_a_miss_is_named():
    """Both what takes too long and what reads too much."""
    quick = Answered("quick", 199.9, 500.0, [], [])
    slow = Answered("slow", 200.0, 200.0, [], [])
    wide = Answered("wide", 1.0, 1.0, [], ["Seq Scan reservations (9 rows)"])
    assert book.missed([quick, slow, wide]) == ["slow: 200 ms", "wide: Seq Scan reservations (9 rows)"]
