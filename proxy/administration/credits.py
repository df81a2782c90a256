"""Credits that an operator books by hand."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.errors import BadRequest, NotFound, Unavailable
from proxy.identity.accounts import STARTING_CREDITS_KEY
from proxy.identity.users import read_user
from proxy.journal import Entry, Filter, Span, read_page
from proxy.ledger.decide import Credit, CreditType
from proxy.ledger.ledger import Ledger
from proxy.storage.database import reading
from proxy.units import Nanos, is_id, new_id

DESCRIPTION_CHARACTERS_MAX = 500
IDEMPOTENCY_KEY_CHARACTERS_MAX = 255

FIRST_START_KEY = "first-start"
"""The idempotency key of what the first admin begins with."""

_OWN_KEYS = frozenset({FIRST_START_KEY, STARTING_CREDITS_KEY})
"""What Tollgate books by itself: whoever took such a key would keep that from being booked."""

_IDEMPOTENCY_KEY = re.compile(rf"[!-~]{{1,{IDEMPOTENCY_KEY_CHARACTERS_MAX}}}")


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to book: a top-up (above zero), an adjustment (either way), or a refund.

    A refund is of the charge of `request_id`, of `amount` or of all that is left of it.
    """

    type: CreditType
    amount: Nanos | None = None
    description: str = ""
    request_id: str | None = None
    idempotency_key: str | None = None


class Booked(msgspec.Struct, frozen=True):
    """The row of the journal, now or by an earlier order under the same idempotency key."""

    entry: Entry
    is_replay: bool


async def book(engine: AsyncEngine, ledger: Ledger, actor: str, user_id: str, order: Order) -> Booked:
    """Book `order` into the wallet of a user, once for each idempotency key; without one it is given one.

    Raises `NotFound` for a user or charge that is not there, `BadRequest` for what cannot be booked, `Conflict` when
    the key was used for something else, `Unavailable` when the outcome is not known: then it names the key with which
    the order may be repeated.
    """
    _check(order)
    idempotency_key = order.idempotency_key or new_id("idem")
    async with reading(engine) as connection:
        user = await read_user(connection, user_id)
    with _naming(idempotency_key):
        credited = await ledger.credit(
            Credit(
                wallet_id=user.wallet_id,
                type=order.type,
                amount=order.amount,
                description=order.description,
                idempotency_key=idempotency_key,
                reservation_id=order.request_id,
                actor=actor,
            )
        )
        seq = credited.transaction.seq
        async with reading(engine) as connection:
            page = await read_page(connection, user.wallet_id, Filter(), Span(seq, seq + 1), limit=1)
        return Booked(page.entries[0], credited.is_replay)


@contextmanager
def _naming(idempotency_key: str) -> Iterator[None]:
    """Say, when the outcome is not known, with which key sending the order again is safe."""
    try:
        yield
    except Unavailable as exc:
        message = f"{exc} It may yet be booked: repeat it with the idempotency key {idempotency_key}"
        raise Unavailable(message, retry_after_s=exc.retry_after_s) from exc


def _check(order: Order) -> None:
    _check_texts(order)
    amount = order.amount
    match order.type:
        case CreditType.REFUND:
            if order.request_id is None:
                raise _wrong("request_id", "A refund names the request_id of its charge.")
            if not is_id(order.request_id, "req"):
                raise NotFound(f"There is no charge {order.request_id!r}.")
            if amount is not None and amount <= 0:
                raise _wrong("amount", "A refund must be above zero; without an amount it is all that is left.")
        case CreditType.TOPUP if amount is None or amount <= 0:
            raise _wrong("amount", "A top-up must be above zero.")
        case CreditType.ADJUSTMENT if not amount:
            raise _wrong("amount", "An adjustment must not be zero.")
        case CreditType.DEDUCTION:
            raise _wrong("type", "Deductions are made by calls alone.")
        case _ if order.request_id is not None:
            raise _wrong("request_id", "Only a refund is of a charge.")
        case _:
            pass


def _check_texts(order: Order) -> None:
    if len(order.description) > DESCRIPTION_CHARACTERS_MAX or not order.description.isprintable():
        message = f"A description has at most {DESCRIPTION_CHARACTERS_MAX} printable characters."
        raise _wrong("description", message)
    key = order.idempotency_key
    if key is None:
        return
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise _wrong(
            "Idempotency-Key",
            f"An idempotency key has from 1 to {IDEMPOTENCY_KEY_CHARACTERS_MAX} printable ASCII characters, no spaces.",
        )
    if key in _OWN_KEYS:
        raise _wrong("Idempotency-Key", "This idempotency key is one of Tollgate's own.")


def _wrong(param: str, message: str) -> BadRequest:
    return BadRequest(message, param=param, code="invalid_value")
