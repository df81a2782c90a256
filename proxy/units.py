"""Money, usage and ids: the units everything else is counted in.

Money is an `int` of nano-credits (1 credit = 1 USD = 10⁹ nanos) wherever it is kept, added or compared.
`Decimal` and `str` exist only at the edges (JSON, command line, configuration), and floats nowhere.
Instants are an `int` of microseconds since the Unix epoch, UTC.
"""

import os
import re
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Final

import msgspec

Nanos = int
"""Nano-credits: 10⁻⁹ credit."""

Micros = int
"""Microseconds since the Unix epoch, UTC."""

NANOS_PER_CREDIT = 10**9
NANOS_MAX = 2**63 - 1
"""What both databases can hold in one column; about 9.2 thousand million credits."""

MICROS_PER_SECOND = 10**6
SECONDS_PER_DAY = 86_400
MICROS_PER_DAY = SECONDS_PER_DAY * MICROS_PER_SECOND

MARKUP_BPS_WHOLE = 10_000
"""Basis points in the whole: 15 % is 1,500."""

MARKUP_BPS_MAX = 1_000_000
"""10,000 %: more is a slip of the keyboard."""

_CREDIT_DECIMALS = 9

_DIGITS_MAX = 20
"""Before the point; of larger numbers nothing is computed, not even that they are too large."""


class AmountError(ValueError):
    """A text is not an amount of credits; the message says why, for people."""


def parse_decimal(text: str | float) -> Decimal:
    """The number in `text`, in ASCII. Raises `AmountError` for what is none, or too long to be computed exactly.

    `Decimal` itself also takes underscores, white space, and the digits of any script; and what it computes with more
    than 28 digits, or with exponents far below zero, it rounds without a word.
    """
    digits = str(text)
    if not _DECIMAL.fullmatch(digits):
        raise AmountError(f"{text!r} is not a decimal number")
    number = Decimal(digits)
    if number and number.adjusted() > _DIGITS_MAX:
        raise AmountError(f"{text!r} is too large")
    if len(digits) > _CHARACTERS_MAX or number.adjusted() < -_DIGITS_MAX:
        raise AmountError(f"{text!r} is too long")
    return number


_DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")
_CHARACTERS_MAX = 28


def parse_credits(text: str | int) -> Nanos:
    """The nano-credits in `text`, a decimal number of credits such as `"2.5"`.

    Raises `AmountError` when it is not a finite decimal, has more than nine decimals, or does not fit in
    64 bits: rounding money that somebody typed is never right.
    """
    amount = parse_decimal(text)
    if abs(amount) * NANOS_PER_CREDIT > NANOS_MAX:
        raise AmountError(f"{text!r} is too large")
    nanos = amount.scaleb(_CREDIT_DECIMALS)
    if nanos != nanos.to_integral_value():
        raise AmountError(f"{text!r} has more than {_CREDIT_DECIMALS} decimals")
    return int(nanos)


@lru_cache(maxsize=4096)
def format_credits(nanos: Nanos) -> str:
    """`nanos` as a decimal string of credits without exponent or trailing zeros: `115_000_000` is `"0.115"`."""
    if 0 < nanos < NANOS_PER_CREDIT:  # what most calls cost
        return ("0." + str(nanos).zfill(_CREDIT_DECIMALS)).rstrip("0")
    digits = str(abs(nanos)).zfill(_CREDIT_DECIMALS + 1)
    decimal = f"{digits[:-_CREDIT_DECIMALS]}.{digits[-_CREDIT_DECIMALS:]}".rstrip("0").rstrip(".")
    return decimal if nanos >= 0 else "-" + decimal


def parse_percent(percent: Decimal) -> int:
    """A markup in basis points. Raises `AmountError` beyond two decimals or outside of 0 to 10,000 %."""
    wrong = AmountError(f"must be from 0 to {MARKUP_BPS_MAX // 100} with at most two decimals")
    if not percent.is_finite() or percent.adjusted() > _DIGITS_MAX:
        raise wrong
    bps = percent * 100
    if bps != bps.to_integral_value() or not 0 <= bps <= MARKUP_BPS_MAX:
        raise wrong
    return int(bps)


def format_percent(markup_bps: int) -> str:
    """Basis points as a decimal string of percent: 1,550 is `"15.5"`."""
    whole, fraction = divmod(markup_bps, 100)
    return f"{whole}.{fraction:02d}".rstrip("0").rstrip(".") if fraction else str(whole)


def format_instant(instant: Micros) -> str:
    """An instant in ISO 8601 with microseconds, UTC: `"2026-11-23T09:37:00.000000Z"`."""
    seconds, micros = divmod(instant, MICROS_PER_SECOND)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{micros:06d}Z"


def micros_of(instant: datetime) -> Micros:
    """`instant`, which knows its time zone, in whole microseconds since the epoch."""
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


INPUT_CLASSES: Final = ("input", "cached_input", "cache_write", "cache_write_1h", "audio_input")
OUTPUT_CLASSES: Final = ("output", "audio_output")
TOKEN_CLASSES: Final = (*INPUT_CLASSES, *OUTPUT_CLASSES)
"""The classes of tokens in a `Usage`, disjoint, each with a price of its own."""


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one call consumed, in disjoint classes, each with a price of its own.

    OpenAI reports cached and audio tokens *inside* `prompt_tokens`; here `input` is what is left of them, so
    that a sum over all classes counts nothing twice. `cache_write_1h` are tokens written to a cache that lasts an hour,
    `cache_write` those to any other. `reasoning` is the part of `output` that was not shown: it is kept for the record
    and has no price of its own. `images` and `requests` are counted where they are priced, uses of tools that the
    provider runs (`web_search`, `file_search`, `code_interpreter`) where they were asked for.
    """

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    audio_input: int = 0
    output: int = 0
    audio_output: int = 0
    reasoning: int = 0
    images: int = 0
    requests: int = 0
    cache_write_1h: int = 0
    web_search: int = 0
    file_search: int = 0
    code_interpreter: int = 0

    @property
    def tool_uses(self) -> int:
        """All uses of tools that the provider runs."""
        return self.web_search + self.file_search + self.code_interpreter

    @property
    def input_tokens(self) -> int:
        """All tokens that went in, of every class."""
        return self.input + self.cached_input + self.cache_write + self.cache_write_1h + self.audio_input

    @property
    def output_tokens(self) -> int:
        """All tokens that came out, of every class."""
        return self.output + self.audio_output


def new_id(prefix: str) -> str:
    """A fresh unguessable id, `prefix_` and 32 hexadecimal digits, that sorts by the millisecond of its making.

    Sorting by time keeps the newest rows of an index together, as UUID version 7 does (RFC 9562, section 5.7).
    """
    try:
        random_digits = _RANDOM_DIGITS.pop()
    except IndexError:
        random_digits = _read_random_digits()
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{random_digits}"


_RANDOM_DIGITS_PER_ID = 20
_IDS_PER_READING = 256
_RANDOM_DIGITS: Final[list[str]] = []
"""The random parts of the next ids: asking the system for many at once takes a fraction of the time."""

os.register_at_fork(after_in_child=_RANDOM_DIGITS.clear)  # or two processes would make the same ids


def _read_random_digits() -> str:
    """A random part, and many more of them for the ids to come."""
    digits = os.urandom(_RANDOM_DIGITS_PER_ID // 2 * _IDS_PER_READING).hex()
    starts = range(0, len(digits), _RANDOM_DIGITS_PER_ID)
    first, *others = [digits[start : start + _RANDOM_DIGITS_PER_ID] for start in starts]
    _RANDOM_DIGITS.extend(others)
    return first


def is_id(text: str, prefix: str) -> bool:
    """Whether `text` has the form of `new_id(prefix)`; what has not is the id of nothing."""
    return re.fullmatch(rf"{prefix}_[0-9a-f]{{32}}", text) is not None


def now_micros() -> Micros:
    """This machine's clock. What the ledger decides by is the database's clock instead."""
    return time.time_ns() // 1000
