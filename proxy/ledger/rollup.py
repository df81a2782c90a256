"""What ended calls add up to, by day: the sums that reports are read from, so that none has to read the book.

The ledger adds to them in the transaction that ends a call or refunds one. A row belongs to one wallet, and so is under
its lock; its day is the UTC day in which the call ended. A refund counts on the day of its charge, and a late settle
takes back what the expiry before it had counted. The same sums are kept by month, which is what makes a report over a
year and everybody short.
"""

from collections.abc import Iterable
from datetime import date, timedelta
from functools import lru_cache

import msgspec

from proxy.units import MICROS_PER_DAY, Micros, Nanos, Usage

FIGURE_MAX = 10**15
"""What one call adds at most of anything that a provider's word decides, and nobody's credits bound.

More is nonsense, and nonsense must not add up to what a column cannot hold: that would refuse the charge beside it.
"""

PERHAPS_BILLED = frozenset({"perhaps_billed", "undelivered", "expired"})
"""The outcomes of calls that were released although their provider may have billed them."""

_EPOCH = date(1970, 1, 1)

DayKey = tuple[str, int, str, str, str, str]


class UsageDay(msgspec.Struct, gc=False):
    """A row of `usage_days` or `usage_months`, or what is to be added to it.

    Texts are empty where there is no key, or no provider.
    `calls` and what follows are those of settled calls; tokens are counted once, so `cached_input_tokens` is a part of
    `input_tokens`. `released` counts the calls that were released or have expired. Of `perhaps_billed` of them the
    provider may have billed the operator; they had `perhaps_billed_amount` reserved, which bounds what they cost.
    """

    wallet_id: str
    day: int
    user_id: str
    key_id: str
    model: str
    provider: str
    calls: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    charged: Nanos = 0
    provider_cost: Nanos = 0
    shortfall: Nanos = 0
    refunded: Nanos = 0
    released: int = 0
    perhaps_billed: int = 0
    perhaps_billed_amount: Nanos = 0

    def add_tokens(self, usage: str | None) -> None:
        """Count the tokens of a receipt; none where it cannot be read."""
        input_tokens, cached_input_tokens, output_tokens = tokens_of(usage)
        self.input_tokens += input_tokens
        self.cached_input_tokens += cached_input_tokens
        self.output_tokens += output_tokens


COUNTERS = UsageDay.__struct_fields__[6:]
"""What is summed."""


def day_of(instant: Micros) -> int:
    """The UTC day that holds `instant`, in days since the epoch."""
    return instant // MICROS_PER_DAY


def day_of_date(day: date) -> int:
    """Likewise, of a date."""
    return (day - _EPOCH).days


def date_of_day(day: int) -> date:
    """The date of a day since the epoch."""
    return _EPOCH + timedelta(days=day)


@lru_cache(maxsize=64)
def month_of(day: int) -> int:
    """The first day of the month that holds `day`, in days since the epoch too."""
    return day_of_date(date_of_day(day).replace(day=1))


def by_month(days: Iterable[UsageDay]) -> list[UsageDay]:
    """The same sums under the first days of their months."""
    months: dict[DayKey, UsageDay] = {}
    for one in days:
        month = month_of(one.day)
        key = (one.wallet_id, month, one.user_id, one.key_id, one.model, one.provider)
        row = months.get(key)
        if row is None:
            months[key] = msgspec.structs.replace(one, day=month)
            continue
        for name in COUNTERS:
            setattr(row, name, getattr(row, name) + getattr(one, name))
    return list(months.values())


def bounded(figure: int) -> int:
    """What `figure` of one call adds to a sum."""
    if figure > FIGURE_MAX:
        return FIGURE_MAX
    return figure


def tokens_of(usage: str | None) -> tuple[int, int, int]:
    """The tokens of a receipt's usage (JSON) that went in, of those the cached ones, and those that came out."""
    if usage is None:
        return 0, 0, 0
    try:
        used = _USAGE.decode(usage)
    except msgspec.MsgspecError:
        return 0, 0, 0
    return bounded(used.input_tokens), bounded(used.cached_input), bounded(used.output_tokens)


_USAGE = msgspec.json.Decoder(Usage)
