"""Attempts are counted, in windows, for a bounded number of holders."""

import pytest

from proxy.errors import RateLimited
from proxy.identity import attempts
from proxy.identity.attempts import Attempts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_holder_has_so_many_attempts_in_a_window(clock):
    """The next one has to wait for the window's end, and others do not."""
    counted = Attempts(3, 60, clock)
    for _ in range(3):
        counted.take("a")
    clock.now = 20.5
    with pytest.raises(RateLimited) as raised:
        counted.take("a")
    assert raised.value.retry_after_s == 40
    counted.take("b")
    clock.now = 60
    counted.take("a")


def test_refused_attempts_do_not_lengthen_the_wait(clock):
    """Who keeps on trying waits no longer than who does not."""
    counted = Attempts(1, 60, clock)
    counted.take("a")
    for clock.now in range(1, 60):
        with pytest.raises(RateLimited):
            counted.take("a")
    clock.now = 60
    counted.take("a")


def test_good_attempts_do_not_count(clock):
    """Whoever logs in a hundred times an hour is no guesser; one given back was taken before."""
    counted = Attempts(2, 60, clock)
    for _ in range(100):
        counted.take("a")
        counted.give_back("a")
    counted.give_back("a")
    counted.give_back("nobody")
    counted.take("a")
    counted.take("a")
    with pytest.raises(RateLimited):
        counted.take("a")


def test_the_oldest_are_forgotten(clock, monkeypatch):
    """A million addresses do not fill the memory."""
    monkeypatch.setattr(attempts, "HOLDERS_MAX", 10)
    counted = Attempts(1, 60, clock)
    for number in range(1000):
        counted.take(f"a{number}")
    assert len(counted._counts) == 10
    with pytest.raises(RateLimited):
        counted.take("a999")
    counted.take("a0")
