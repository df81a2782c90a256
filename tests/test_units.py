import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.units import (
    NANOS_MAX,
    AmountError,
    Usage,
    format_credits,
    format_instant,
    format_percent,
    is_id,
    micros_of,
    new_id,
    parse_credits,
    parse_percent,
)


@pytest.mark.parametrize(
    ("text", "nanos"),
    [("0.115", 115_000_000), ("10", 10**10), ("-2.5", -2_500_000_000), ("1e-9", 1), (3, 3 * 10**9), ("0", 0)],
)
def test_an_amount_is_read_exactly(text, nanos):
    """Credits become whole nano-credits, with nothing rounded."""
    assert parse_credits(text) == nanos


@pytest.mark.parametrize(
    "text",
    [
        *("", "ten", "1,5", "NaN", "inf", "0.0000000001", "9223372036.854775808", "1e400", "1e-999999999"),
        *("1_000", " 1", "1\n", "٣", "１", "9.99999999999999999999999999999999", "1" + "0" * 5000),
    ],
)
def test_what_is_no_amount_is_refused(text):
    """Nothing is guessed, rounded or cut off."""
    with pytest.raises(AmountError):
        parse_credits(text)


@given(st.integers(-NANOS_MAX, NANOS_MAX))
def test_amounts_survive_the_way_out_and_back(nanos):
    """Formatting and parsing are inverses, for every amount a column can hold."""
    text = format_credits(nanos)
    assert parse_credits(text) == nanos
    assert "e" not in text.lower()
    assert not ("." in text and text.endswith("0"))


@pytest.mark.parametrize(
    ("percent", "bps", "text"), [("15", 1500, "15"), ("0", 0, "0"), ("15.5", 1550, "15.5"), ("0.05", 5, "0.05")]
)
def test_percents_are_basis_points(percent, bps, text):
    """A markup has two decimals, and reads back as it was written."""
    assert parse_percent(Decimal(percent)) == bps
    assert format_percent(bps) == text


@pytest.mark.parametrize("percent", ["-1", "0.005", "10000.01", "NaN", "Infinity"])
def test_a_markup_that_cannot_be_is_refused(percent):
    """Negative, too fine, too large and not finite are all refused."""
    with pytest.raises(AmountError):
        parse_percent(Decimal(percent))


def test_instants_are_utc_with_microseconds():
    """Instants are ISO 8601, in UTC, to the microsecond."""
    assert format_instant(1_795_426_620_000_001) == "2026-11-23T09:37:00.000001Z"


def test_ids_sort_by_time_and_differ():
    """A thousand ids are a thousand different ones of the same form."""
    ids = [new_id("req") for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(is_id(id_, "req") for id_ in ids)
    assert ids[0][:16] <= ids[-1][:16] <= new_id("req")[:16]


FORKING = """
import os
from proxy.units import new_id

new_id("req")
is_child = not os.fork()
for _ in range(300):
    os.write(1, f"{new_id('req')[-20:]}\\n".encode())
if not is_child:
    os.wait()
"""


def test_processes_share_no_ids():
    """One that was forked has random parts of its own."""
    made = subprocess.run([sys.executable, "-c", FORKING], check=True, capture_output=True, text=True, timeout=60)
    digits = made.stdout.split()
    assert len(digits) == len(set(digits)) == 600


def test_usage_adds_up_by_side():
    """Every class belongs to one side; reasoning is part of output already."""
    usage = Usage(input=1, cached_input=2, cache_write=4, audio_input=8, output=16, audio_output=32, reasoning=7)
    assert (usage.input_tokens, usage.output_tokens) == (15, 48)


@pytest.mark.parametrize(
    ("instant", "micros"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1970, 1, 1, 0, 0, 1, 7, tzinfo=UTC), 1_000_007),
        (datetime(1970, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), 0),
    ],
)
def test_an_instant_of_any_zone_in_microseconds(instant, micros):
    """Nothing is rounded, and the zone is taken into account."""
    assert micros_of(instant) == micros


@pytest.mark.parametrize(
    "text", ["", "req_", "req_0", "key_" + "0" * 32, "req_" + "0" * 33, "req_" + "G" * 32, "req_" + "0" * 31 + "\0"]
)
def test_what_is_no_id(text):
    """Only what `new_id` could have made is looked up."""
    assert is_id(new_id("req"), "req")
    assert not is_id(text, "req")
