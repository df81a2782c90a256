"""Numbers about the running server, in Prometheus' text format, right over all of its processes.

Each process writes into a region of its own of one piece of shared memory, which was there before the processes were
forked; whoever is asked reads all regions and adds them up. So there is no lock, no file and no message between
processes, and an addition costs about as much as one to a dictionary. A worker that takes a dead one's place goes on
in its region: counters never go back.

All values are whole numbers (of microseconds, nano-credits, …) and are divided when they are shown.
"""

import mmap
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from operator import attrgetter
from typing import Literal

import msgspec

from proxy.units import TOKEN_CLASSES, Usage

REGION_BYTES = 2_000_000
"""Of one process: room for some ten thousand series. The pages are only there once they are written to."""

MICROS = 1_000_000
NANOS = 1_000_000_000

_WORD = 8
_DURATIONS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_OVERHEADS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 30)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Labels = tuple[str, ...]


class Family(msgspec.Struct, frozen=True):
    """All series of one name. What is stored is `divisor` times what is shown; `bounds` are those of a histogram."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: Labels = ()
    divisor: int = 1
    bounds: tuple[int, ...] = ()

    def series(self, labels: Labels) -> str:
        """The name of one series, as it is shown."""
        pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(self.labels, labels, strict=True))
        return f"{self.name}{{{pairs}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _seconds(name: str, text: str, labels: Labels, bounds_s: tuple[float, ...]) -> Family:
    return Family(name, "histogram", text, labels, MICROS, tuple(round(bound * MICROS) for bound in bounds_s))


class Region:
    """What one process may write: series, each with a number of values, one after the other.

    Word 0 is the number of words in use. A series is: the length of its name in bytes, the number of its values, its
    name, its values.
    """

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self.values = memory.cast("q")
        self.values[0] = max(self.values[0], 1)
        self.places = {series: first for series, first, _ in _series_in(memory)}
        """The place of the first value of each series."""
        self._scrap = self.place("", _VALUES_MAX)

    def place(self, series: str, count: int) -> int:
        """The place of the first of `count` values of `series`; without room for a new one, one that nobody reads."""
        found = self.places.get(series)
        if found is not None:
            return found
        name = series.encode()
        used = self.values[0]
        first = used + 2 + _words(len(name))
        if first + count > len(self.values):
            return self._scrap
        start = (used + 2) * _WORD
        self._bytes[start : start + len(name)] = name
        self.values[used], self.values[used + 1] = len(name), count
        self.values[0] = first + count  # last: from here on others read it
        self.places[series] = first
        return first


_VALUES_MAX = 32
"""Of one series; no histogram has more bounds."""


def _words(length: int) -> int:
    return -(-length // _WORD)


def _series_in(memory: memoryview) -> Iterator[tuple[str, int, int]]:
    """The name of each series in a region, the place of its first value, and their number."""
    values = memory.cast("q")
    at, end = 1, values[0]
    while at < end:
        length, count = values[at], values[at + 1]
        first = at + 2 + _words(length)
        yield str(memory[(at + 2) * _WORD : (at + 2) * _WORD + length], "utf-8"), first, count
        at = first + count


class SharedMemory:
    """The regions of all processes of one server. To be made before they are forked."""

    def __init__(self, processes: int = 1) -> None:
        self._memory = memoryview(mmap.mmap(-1, processes * REGION_BYTES))
        self._processes = processes

    def region(self, number: int) -> Region:
        """That of one process; there must never be two writers."""
        return Region(self._slice(number))

    def _slice(self, number: int) -> memoryview:
        return self._memory[number * REGION_BYTES : (number + 1) * REGION_BYTES]

    def sums(self) -> dict[str, list[int]]:
        """The values of every series, added up over all processes."""
        found: dict[str, list[int]] = {}
        for number in range(self._processes):
            memory = self._slice(number)
            words = memory.cast("q")
            for series, first, count in _series_in(memory):
                values = words[first : first + count].tolist()
                known = found.get(series)
                found[series] = values if known is None else [a + b for a, b in zip(known, values, strict=True)]
        return found

    def text(self) -> str:
        """All of it in Prometheus' text format, version 0.0.4."""
        by_family: dict[str, list[tuple[str, list[int]]]] = {}
        for series, values in sorted(self.sums().items()):
            name, _, labels = series.partition("{")
            by_family.setdefault(name, []).append((labels.removesuffix("}"), values))
        lines: list[str] = []
        for family in FAMILIES:
            lines += (f"# HELP {family.name} {family.text}", f"# TYPE {family.name} {family.kind}")
            for labels, values in by_family.get(family.name, []):
                lines += _shown(family, labels, values)
        return "\n".join(lines) + "\n"


def _shown(family: Family, labels: str, values: list[int]) -> Iterator[str]:
    if family.kind != "histogram":
        yield f"{family.name}{_braced(labels)} {_decimal(values[0], family.divisor)}"
        return
    *counts, total = values
    bounds = [*(_decimal(bound, family.divisor) for bound in family.bounds), "+Inf"]
    at_most = list(accumulate(counts))
    for bound, count in zip(bounds, at_most, strict=True):
        limit = f'le="{bound}"'
        yield f"{family.name}_bucket{_braced(labels, limit)} {count}"
    yield f"{family.name}_sum{_braced(labels)} {_decimal(total, family.divisor)}"
    yield f"{family.name}_count{_braced(labels)} {at_most[-1]}"


def _braced(*labels: str) -> str:
    shown = ",".join(filter(None, labels))
    return f"{{{shown}}}" if shown else ""


def _decimal(value: int, divisor: int) -> str:
    """`value / divisor`, a power of ten, exactly."""
    if divisor == 1:
        return str(value)
    digits = len(str(divisor)) - 1
    whole, rest = divmod(abs(value), divisor)
    shown = f"{whole}.{rest:0{digits}}".rstrip("0").rstrip(".")
    return f"-{shown}" if value < 0 else shown


# ---- what is counted

CALLS = Family(
    "tollgate_calls_total",
    "counter",
    "Paid calls that held a reservation, by how they ended.",
    ("endpoint", "provider", "model", "outcome"),
)
REFUSED = Family(
    "tollgate_refused_calls_total", "counter", "Paid calls that were answered with an error.", ("status", "code")
)
DURATION = _seconds(
    "tollgate_call_duration_seconds",
    "From the reservation of a call to its charge.",
    ("endpoint", "stream"),
    _DURATIONS_S,
)
OVERHEAD = _seconds(
    "tollgate_call_overhead_seconds",
    "Of that, what was not spent waiting for the provider or passing its answer on.",
    ("endpoint", "stream"),
    _OVERHEADS_S,
)
FIRST_BYTE = _seconds(
    "tollgate_call_first_byte_seconds",
    "From the reservation of a call to the first byte of its answer.",
    ("endpoint", "stream"),
    _DURATIONS_S,
)
TOKENS = Family("tollgate_tokens_total", "counter", "Tokens charged for.", ("provider", "model", "class"))
CHARGED = Family(
    "tollgate_charged_credits_total", "counter", "Credits charged to callers.", ("provider", "model"), NANOS
)
COST = Family(
    "tollgate_provider_cost_credits_total", "counter", "What the providers charge for it.", ("provider", "model"), NANOS
)
SHORTFALL = Family(
    "tollgate_shortfall_credits_total", "counter", "Credits that nobody could pay.", ("provider", "model"), NANOS
)
USAGE = Family("tollgate_usage_total", "counter", "Charged calls, by where their usage is from.", ("source",))
IMPLAUSIBLE = Family(
    "tollgate_implausible_usage_total", "counter", "Calls whose reported usage cannot be.", ("provider",)
)
DEFERRED = Family("tollgate_deferred_settles_total", "counter", "Ends of calls that the ledger could not book in time.")
OPEN = Family("tollgate_open_reservations", "gauge", "Reservations of this server's calls.")
PROVIDER_CALLS = Family("tollgate_provider_calls", "gauge", "Calls in flight at a provider.", ("provider",))
PROVIDER_ERRORS = Family(
    "tollgate_provider_errors_total", "counter", "Failures of providers.", ("provider", "model", "reason")
)
COOL_DOWNS = Family(
    "tollgate_provider_cool_downs_total", "counter", "How often a candidate was left alone.", ("provider", "model")
)
COOLING = Family(
    "tollgate_provider_cooling_workers", "gauge", "Workers that leave a candidate alone.", ("provider", "model")
)
REFUSED_OPERATOR = Family(
    "tollgate_provider_refused_operator_total",
    "counter",
    "Answers by which a provider refused the operator's account.",
    ("provider",),
)
BATCH_OPERATIONS = Family(
    "tollgate_ledger_batch_operations", "histogram", "Operations of one ledger transaction.", bounds=_BATCH_SIZES
)
BATCH_TIME = _seconds("tollgate_ledger_batch_seconds", "Duration of one ledger transaction.", (), _OVERHEADS_S)
LEDGER_WAITING = Family("tollgate_ledger_waiting_operations", "gauge", "Operations that wait for the ledger.")
LEDGER_LOST = Family("tollgate_ledger_lost_workers", "gauge", "Workers whose ledger does not reach the database.")
DATABASE_LOST = Family("tollgate_database_lost_workers", "gauge", "Workers that do not reach the database.")
LEASES = Family("tollgate_leases", "gauge", "Workers that hold a lease.")
CONNECTIONS = Family(
    "tollgate_database_connections", "gauge", "Connections of the pools, the ledger's own included.", ("state",)
)
MEMORY = Family("tollgate_worker_memory_bytes", "gauge", "Resident memory.", ("worker",))
FILES = Family("tollgate_worker_open_files", "gauge", "Open file descriptors.", ("worker",))
LAG = Family(
    "tollgate_worker_lag_seconds", "gauge", "How late the event loop was with its last tick.", ("worker",), MICROS
)
DEATHS = Family("tollgate_worker_deaths_total", "counter", "Workers that ended and were replaced.")
HANGS = Family("tollgate_worker_hangs_total", "counter", "Of these, workers that hung and were killed.")
BUILD = Family("tollgate_build_workers", "gauge", "Workers of this version.", ("version",))

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))
"""All that can be on the page, in its order."""

_TOKENS = (*TOKEN_CLASSES, "reasoning")
_token_counts = attrgetter(*_TOKENS)
_NO_LABELS: frozenset[Labels] = frozenset()


class CallEnd(msgspec.Struct, frozen=True, gc=False):
    """A paid call at its end; times in seconds, amounts in nano-credits."""

    endpoint: str
    provider: str
    model: str
    outcome: str
    is_stream: bool
    duration_s: float
    overhead_s: float
    first_byte_s: float | None


class Charge(msgspec.Struct, frozen=True, gc=False):
    """What a call was charged, in nano-credits, and for what."""

    usage: Usage
    source: str
    charged: int
    provider_cost: int
    shortfall: int


class _EndPlaces(msgspec.Struct):
    """Where what calls of one kind count is: the places of their series. Of a charge only where there is one."""

    kind: Labels
    calls: int
    duration: int
    overhead: int
    first_byte: int = -1
    charged: int = -1
    cost: int = -1
    shortfall: int = -1
    usage: int = -1
    tokens: list[int] = []
    """By the classes of `_TOKENS`; -1 where none were ever counted."""


class Metrics:
    """What one process counts, each method in a few microseconds."""

    def __init__(self, shared: SharedMemory | None = None, number: int = 0) -> None:
        self.shared = shared or SharedMemory()
        self.worker = str(number)
        self._region = self.shared.region(number)
        self._values = self._region.values
        self._places: dict[tuple[str, Labels], int] = {}
        self._ends: dict[tuple[object, ...], _EndPlaces] = {}
        self._measured: dict[str, frozenset[Labels]] = {}
        """The labels with which each gauge was set last."""
        for series, first in self._region.places.items():
            if series.partition("{")[0] in _GAUGES:
                self._values[first] = 0  # those of whoever had this region before

    def _place(self, family: Family, labels: Labels) -> int:
        found = self._places.get((family.name, labels))
        if found is None:
            count = len(family.bounds) + 2 if family.bounds else 1
            found = self._places[family.name, labels] = self._region.place(family.series(labels), count)
        return found

    def add(self, family: Family, labels: Labels = (), amount: int = 1) -> None:
        """Count up by `amount`."""
        self._values[self._place(family, labels)] += amount

    def observe(self, family: Family, labels: Labels, value: int) -> None:
        """Note one value in a histogram."""
        self._note(self._place(family, labels), family.bounds, value)

    def _note(self, first: int, bounds: tuple[int, ...], value: int) -> None:
        values = self._values
        values[first + bisect_left(bounds, value)] += 1
        values[first + len(bounds) + 1] += value

    def set(self, family: Family, found: Mapping[Labels, int]) -> None:
        """Let a gauge be what was `found`, and zero where nothing was."""
        for labels in self._measured.get(family.name, _NO_LABELS) - found.keys():
            self._values[self._place(family, labels)] = 0
        self._measured[family.name] = frozenset(found)
        for labels, value in found.items():
            self._values[self._place(family, labels)] = value

    def show_zeros(self, providers: Iterable[str]) -> None:
        """Show that what should never happen has not: in a series that begins with 1 nobody sees an increase."""
        self.add(DEFERRED, amount=0)
        for code in ("internal_error", "ledger_fault"):
            self.add(REFUSED, ("500", code), 0)
        for provider in providers:
            for family in (REFUSED_OPERATOR, IMPLAUSIBLE):
                self.add(family, (provider,), 0)

    def ended(self, call: CallEnd, charge: Charge | None) -> None:
        """A call that held a reservation has ended, with a charge or without."""
        source = None if charge is None else charge.source
        key = (call.endpoint, call.provider, call.model, call.outcome, call.is_stream, source)
        places = self._ends.get(key)
        if places is None:
            places = self._ends[key] = self._end_places(call, source)
        values = self._values
        values[places.calls] += 1
        self._note(places.duration, DURATION.bounds, int(call.duration_s * MICROS))
        self._note(places.overhead, OVERHEAD.bounds, int(call.overhead_s * MICROS))
        if call.first_byte_s is not None:
            if places.first_byte < 0:
                places.first_byte = self._place(FIRST_BYTE, places.kind)
            self._note(places.first_byte, FIRST_BYTE.bounds, int(call.first_byte_s * MICROS))
        if charge is None:
            return
        values[places.charged] += charge.charged
        values[places.cost] += charge.provider_cost
        values[places.shortfall] += charge.shortfall
        values[places.usage] += 1
        for number, tokens in enumerate(_token_counts(charge.usage)):
            if tokens:
                if places.tokens[number] < 0:
                    places.tokens[number] = self._place(TOKENS, (call.provider, call.model, _TOKENS[number]))
                values[places.tokens[number]] += tokens

    def _end_places(self, call: CallEnd, source: str | None) -> "_EndPlaces":
        kind = (call.endpoint, "true" if call.is_stream else "false")
        place = (call.provider, call.model)
        places = _EndPlaces(
            kind,
            self._place(CALLS, (call.endpoint, *place, call.outcome)),
            self._place(DURATION, kind),
            self._place(OVERHEAD, kind),
        )
        if source is not None:
            places.charged = self._place(CHARGED, place)
            places.cost = self._place(COST, place)
            places.shortfall = self._place(SHORTFALL, place)
            places.usage = self._place(USAGE, (source,))
            places.tokens = [-1] * len(_TOKENS)
        return places

    def batch(self, operations: int, duration_s: float) -> None:
        """The ledger has written one transaction."""
        self.observe(BATCH_OPERATIONS, (), operations)
        self.observe(BATCH_TIME, (), int(duration_s * MICROS))


_GAUGES = frozenset(family.name for family in FAMILIES if family.kind == "gauge")
