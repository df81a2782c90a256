"""The soak itself: what grows is told from what does not, and a short one passes."""

import pytest

from tests.bench.soak import Sample, courses, run


def samples(*, memory_mb: float = 0.0, handles: float = 0.0) -> list[Sample]:
    """A sample a second for ten minutes, of a server that gains that much a minute."""
    return [Sample(at, 100 + memory_mb * at / 60, round(40 + handles * at / 60), 20) for at in range(600)]


@pytest.mark.parametrize(
    ("seen", "growing"),
    [
        (samples(), set()),
        (samples(memory_mb=0.2), set()),
        (samples(memory_mb=5), {"memory_mb"}),
        (samples(handles=10), {"handles"}),
    ],
    ids=["flat", "noise", "memory", "handles"],
)
def test_what_grows_is_found(seen, growing):
    """By the medians of its quarters, and with its slope."""
    assert {course.name for course in courses(seen) if not course.is_flat} == growing


def test_the_slope_is_a_minutes():
    """It is what people read."""
    memory = courses(samples(memory_mb=5))[0]
    assert memory.per_minute == pytest.approx(5)


def test_a_warm_up_is_no_growth():
    """The first quarter does not count."""
    seen = [Sample(at, min(100, at), 40, 20) for at in range(600)]
    assert all(course.is_flat for course in courses(seen))


def test_a_short_one():
    """Everything is whole, and nothing is left open."""
    assert run("sqlite", 2, 40) == []
