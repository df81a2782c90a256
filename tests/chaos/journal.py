"""What clients and admins were told, written down outside of the database: a JSON line for each thing they did.

A line is handed to the kernel when its entry is complete, so that it outlives the process that wrote it.
"""

from decimal import Decimal
from enum import StrEnum
from pathlib import Path

import msgspec


class End(StrEnum):
    """How a call ended, as its client saw it."""

    COMPLETE = "complete"
    """The whole answer came. A stream is whole without its end marker too, if its HTTP body ended as it should."""
    REFUSED = "refused"
    """A whole answer, whose status is an error."""
    CUT_OFF = "cut off"
    """An answer began and broke, or ended with an error event."""
    UNANSWERED = "unanswered"
    """No answer began: the connection was refused, or lost."""
    HUNG_UP = "hung up"
    """The client left, because it meant to or because it had waited long enough."""


class Call(msgspec.Struct, frozen=True, tag="call", kw_only=True):
    """One call by its client, which knows it by `token`. Amounts are as the proxy wrote them: decimals, in credits."""

    token: str
    wallet_id: str
    base_url: str
    """Which proxy it was sent to."""
    is_stream: bool
    end: End
    started_at: float
    ended_at: float
    """Unix seconds, both."""
    status: int | None = None
    code: str | None = None
    """What the error of a refusal says for programs."""
    request_id: str | None = None
    has_end_marker: bool = False
    credits_charged: str | None = None
    """The header `x-credits-charged`."""
    usage_cost: str | None = None
    """`usage.cost` in the last chunk of a stream."""

    @property
    def acknowledged(self) -> int | None:
        """The charge that the client was told, in nano-credits; None when it was told none."""
        told = self.credits_charged or self.usage_cost
        return None if told is None else nanos(told)

    @property
    def is_whole(self) -> bool:
        """Whether the client has all that it paid for."""
        return self.end is End.COMPLETE or self.has_end_marker


class Grant(msgspec.Struct, frozen=True, tag="grant", kw_only=True):
    """One attempt at a top-up of `amount` nano-credits; several may share an idempotency key."""

    wallet_id: str
    idempotency_key: str
    amount: int
    is_acknowledged: bool
    is_replay: bool = False
    """Whether the ledger said that it had booked it before."""
    is_http: bool = False
    """Whether an admin sent it over HTTP, where nobody is told that."""


class Said(msgspec.Struct, frozen=True, tag="said", kw_only=True):
    """What an SDK made of one call, its own retries included; each of its attempts is a `Call` beside it.

    `raised` is the name of its exception's class, None when it had none; `status` and `code` are what that carries.
    """

    ended_at: float
    attempts: int
    raised: str | None = None
    status: int | None = None
    code: str | None = None


class Markup(msgspec.Struct, frozen=True, tag="markup", kw_only=True):
    """A default markup that an admin set, sent again until it was acknowledged; no other has its `bps`.

    `is_unsure` when one of the attempts had no clear answer: it may be carried out at any later time.
    """

    bps: int
    sent_at: float
    acknowledged_at: float | None
    is_unsure: bool = False


class Switch(msgspec.Struct, frozen=True, tag="switch", kw_only=True):
    """A provider that an admin has enabled or disabled."""

    provider: str
    is_enabled: bool


class AdminError(msgspec.Struct, frozen=True, tag="admin_error", kw_only=True):
    """What an admin was answered in place of what was asked for; None where there was no answer."""

    path: str
    status: int | None
    code: str | None


Entry = Call | Grant | Said | Markup | Switch | AdminError


class Journal:
    """A file to which entries are appended, unbuffered."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def append(self, entry: Entry) -> None:
        """Write `entry` down."""
        self._file.write(msgspec.json.encode(entry) + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> list[Entry]:
    """All entries of a journal, in their order."""
    return [msgspec.json.decode(line, type=Entry) for line in path.read_bytes().splitlines()]


def nanos(credits: str) -> int:  # noqa: A002 - that is what they are
    """Decimal credits in nano-credits, by a reckoning of our own: the judge does not lean on the code it judges."""
    return int(Decimal(credits).scaleb(9))
