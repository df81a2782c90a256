"""`tollgate audit`: whether the books add up, seen in one read-only snapshot."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy.ledger.rollup import COUNTERS, FIGURE_MAX, PERHAPS_BILLED, bounded, month_of
from proxy.pricing import Price, cost, is_no_dearer, provider_cost
from proxy.routing import Terms
from proxy.storage.database import database_now, patient, reading
from proxy.units import MICROS_PER_DAY, MICROS_PER_SECOND, Usage

ROWS_MAX = 20
"""How many violating rows of each check are shown."""

Row = dict[str, Any]
Tokens = tuple[int, int, int]
"""In, of those from a cache, and out."""

_NO_TOKENS: Tokens = (0, 0, 0)
T = TypeVar("T")


class Check(msgspec.Struct, frozen=True):
    """One invariant; `sql` selects the rows that violate it."""

    name: str
    says: str
    sql: str


def _bounded_sql(figure: str) -> str:
    return f"CASE WHEN {figure} > {FIGURE_MAX} THEN {FIGURE_MAX} ELSE COALESCE({figure}, 0) END"


_IS_PERHAPS_BILLED = f"outcome IN ({', '.join(repr(outcome) for outcome in sorted(PERHAPS_BILLED))})"

_COUNTED = {
    "calls": "CASE WHEN state = 'settled' THEN 1 ELSE 0 END",
    "charged": "charged",
    "provider_cost": f"CASE WHEN state = 'settled' THEN {_bounded_sql('provider_cost')} ELSE 0 END",
    "shortfall": _bounded_sql("shortfall"),
    "refunded": "refunded",
    "released": "CASE WHEN state = 'settled' THEN 0 ELSE 1 END",
    "perhaps_billed": f"CASE WHEN state <> 'settled' AND {_IS_PERHAPS_BILLED} THEN 1 ELSE 0 END",
    "perhaps_billed_amount": f"CASE WHEN state <> 'settled' AND {_IS_PERHAPS_BILLED} THEN amount ELSE 0 END",
}
"""What a call that has ended adds to each sum of its row in `usage_days`; tokens are held against calls elsewhere."""

_DAYS = Check(
    "I10",
    "the sums by day are those of the calls that ended on them",
    "SELECT wallet_id, day, user_id, key_id, model, provider,"
    f" {', '.join(f'CAST(SUM({sum_}) AS BIGINT) AS {sum_}' for sum_ in _COUNTED)}"
    f" FROM (SELECT wallet_id, day, user_id, key_id, model, provider, {', '.join(_COUNTED)} FROM usage_days UNION ALL"
    f" SELECT wallet_id, settled_at / {MICROS_PER_DAY}, user_id, COALESCE(key_id, ''), original_model,"
    f" COALESCE(provider, ''), {', '.join(f'-({figure})' for figure in _COUNTED.values())}"
    " FROM reservations WHERE state <> 'open') rows GROUP BY wallet_id, day, user_id, key_id, model, provider"
    f" HAVING {' OR '.join(f'SUM({sum_}) <> 0' for sum_ in _COUNTED)}",
)
"""Its rows show what the sums have too much, or where negative too little."""

_MONTHS = Check(
    "I10",
    "the sums by month are those of the days",
    "SELECT wallet_id, user_id, key_id, model, provider,"
    f" {', '.join(f'CAST(SUM({sum_}) AS BIGINT) AS {sum_}' for sum_ in COUNTERS)} FROM ("
    f" SELECT wallet_id, user_id, key_id, model, provider, {', '.join(COUNTERS)} FROM usage_months UNION ALL"
    f" SELECT wallet_id, user_id, key_id, model, provider, {', '.join(f'-{sum_}' for sum_ in COUNTERS)} FROM usage_days"
    ") rows GROUP BY wallet_id, user_id, key_id, model, provider"
    f" HAVING {' OR '.join(f'SUM({sum_}) <> 0' for sum_ in COUNTERS)}",
)

CHECKS = (
    Check(
        "I1",
        "a wallet's balance is the sum of its transactions",
        "SELECT w.id AS wallet_id, w.balance, COALESCE(t.total, 0) AS transactions"
        " FROM wallets w LEFT JOIN (SELECT wallet_id, CAST(SUM(amount) AS BIGINT) AS total"
        " FROM credit_transactions GROUP BY wallet_id) t ON t.wallet_id = w.id"
        " WHERE w.balance <> COALESCE(t.total, 0)",
    ),
    Check(
        "I1",
        "a wallet's transactions are chained by seq, without gaps, from zero to its balance",
        "SELECT wallet_id, seq, balance_before, previous_seq, previous_after FROM ("
        " SELECT wallet_id, seq, balance_before, LAG(seq, 1, 0) OVER chain AS previous_seq,"
        " LAG(balance_after, 1, 0) OVER chain AS previous_after FROM credit_transactions"
        " WINDOW chain AS (PARTITION BY wallet_id ORDER BY seq)) rows"
        " WHERE seq <> previous_seq + 1 OR balance_before <> previous_after",
    ),
    Check(
        "I1",
        "a wallet's seq is that of its last transaction",
        "SELECT w.id AS wallet_id, w.seq, t.last FROM wallets w"
        " LEFT JOIN (SELECT wallet_id, MAX(seq) AS last FROM credit_transactions GROUP BY wallet_id) t"
        " ON t.wallet_id = w.id WHERE w.seq <> COALESCE(t.last, 0)",
    ),
    Check(
        "I1",
        "every transaction and every reservation has a wallet",
        "SELECT t.id, t.wallet_id FROM credit_transactions t LEFT JOIN wallets w ON w.id = t.wallet_id"
        " WHERE w.id IS NULL UNION ALL"
        " SELECT r.id, r.wallet_id FROM reservations r LEFT JOIN wallets w ON w.id = r.wallet_id WHERE w.id IS NULL",
    ),
    Check(
        "I1",
        "each transaction changes the balance by its amount",
        "SELECT id, wallet_id, seq FROM credit_transactions WHERE balance_after - balance_before <> amount",
    ),
    Check(
        "I2",
        "a wallet's reserved credits and open calls are those of its open reservations",
        "SELECT w.id AS wallet_id, w.reserved, w.open_calls, COALESCE(r.total, 0) AS open_amount,"
        " COALESCE(r.calls, 0) AS open_reservations FROM wallets w LEFT JOIN (SELECT wallet_id,"
        " CAST(SUM(amount) AS BIGINT) AS total, COUNT(*) AS calls FROM reservations WHERE state = 'open'"
        " GROUP BY wallet_id) r ON r.wallet_id = w.id"
        " WHERE w.reserved <> COALESCE(r.total, 0) OR w.open_calls <> COALESCE(r.calls, 0)",
    ),
    Check(
        "I3",
        "nobody has reserved more than there is",
        "SELECT id AS wallet_id, balance, reserved FROM wallets WHERE reserved < 0 OR balance - reserved < 0",
    ),
    Check(
        "I4",
        "a key's counters are those of its reservations",
        "SELECT k.id AS key_id, k.spent, k.reserved, k.open_calls, COALESCE(r.charged, 0) AS charged,"
        " COALESCE(r.held, 0) AS held, COALESCE(r.calls, 0) AS calls FROM api_keys k LEFT JOIN (SELECT key_id,"
        " CAST(SUM(charged) AS BIGINT) AS charged,"
        " CAST(SUM(CASE WHEN state = 'open' THEN amount ELSE 0 END) AS BIGINT) AS held,"
        " SUM(CASE WHEN state = 'open' THEN 1 ELSE 0 END) AS calls FROM reservations GROUP BY key_id) r"
        " ON r.key_id = k.id WHERE k.spent <> COALESCE(r.charged, 0) OR k.reserved <> COALESCE(r.held, 0)"
        " OR k.open_calls <> COALESCE(r.calls, 0)",
    ),
    Check(
        "I4",
        "a key's spending in its period is that of the calls settled in it",
        "SELECT k.id AS key_id, k.period_spent, k.period_start, COALESCE(r.charged, 0) AS charged FROM api_keys k"
        " LEFT JOIN (SELECT k2.id AS key_id, CAST(SUM(r2.charged) AS BIGINT) AS charged FROM api_keys k2"
        " JOIN reservations r2 ON r2.key_id = k2.id AND r2.settled_at >= k2.period_start GROUP BY k2.id) r"
        " ON r.key_id = k.id WHERE k.period_spent <> COALESCE(r.charged, 0)",
    ),
    Check(
        "I6",
        "every deduction has a settled reservation of its amount",
        "SELECT t.id AS transaction_id, t.reservation_id, t.amount, r.charged, r.state FROM credit_transactions t"
        " LEFT JOIN reservations r ON r.id = t.reservation_id AND r.wallet_id = t.wallet_id AND r.state = 'settled'"
        " WHERE t.type = 'deduction' AND (r.id IS NULL OR t.amount <> -r.charged)",
    ),
    Check(
        "I6",
        "every settled reservation has one deduction",
        "SELECT r.id AS reservation_id, r.charged, COUNT(t.id) AS deductions FROM reservations r"
        " LEFT JOIN credit_transactions t ON t.reservation_id = r.id AND t.type = 'deduction'"
        " WHERE r.state = 'settled' GROUP BY r.id, r.charged HAVING COUNT(t.id) <> 1",
    ),
    Check(
        "I6",
        "what a call gave back is the sum of its refunds",
        "SELECT r.id AS reservation_id, r.refunded, COALESCE(t.total, 0) AS refunds FROM reservations r"
        " LEFT JOIN (SELECT reservation_id, CAST(SUM(amount) AS BIGINT) AS total FROM credit_transactions"
        " WHERE type = 'refund' GROUP BY reservation_id) t ON t.reservation_id = r.id"
        " WHERE r.refunded <> COALESCE(t.total, 0)",
    ),
    Check(
        "I7",
        "nothing is open of an instance whose lease ended over a minute ago",
        "SELECT r.id AS reservation_id, r.owner_id, i.lease_until FROM reservations r"
        " LEFT JOIN instances i ON i.id = r.owner_id WHERE r.state = 'open'"
        f" AND (i.id IS NULL OR i.lease_until < :now - {60 * MICROS_PER_SECOND})",
    ),
    _DAYS,
    _MONTHS,
)

LIMITS = Check(
    "I5",
    "a key's spending is within its limit (for the operator's eyes: a limit may have been lowered)",
    "SELECT id AS key_id, limit_amount, limit_period, spent, period_spent, reserved FROM api_keys"
    " WHERE limit_amount IS NOT NULL"
    " AND reserved + (CASE WHEN limit_period IS NULL THEN spent ELSE period_spent END) > limit_amount",
)

_DEDUCTED = (
    "SELECT CAST(COALESCE(SUM(-amount), 0) AS BIGINT) AS deducted FROM credit_transactions WHERE type = 'deduction'"
)

_COUNTED_TOKENS = (
    "SELECT wallet_id, CAST(SUM(input_tokens) AS BIGINT) AS input_tokens,"
    " CAST(SUM(cached_input_tokens) AS BIGINT) AS cached_input_tokens,"
    " CAST(SUM(output_tokens) AS BIGINT) AS output_tokens FROM usage_days GROUP BY wallet_id"
)

_CHARGES = (
    "SELECT id, wallet_id, usage, price, markup_bps, cost, charged, shortfall, provider_cost, provider, request_model,"
    " offers FROM reservations WHERE state = 'settled'"
)


_CALLS = "SELECT COUNT(*) FROM reservations WHERE state = 'settled'"

_CHECKS_SHARE = 0.3
"""What of the time the checks in SQL take; the rest goes into computing every charge anew."""


class Finding(msgspec.Struct):
    """A check with the rows that violate it, at most `ROWS_MAX` of `count`."""

    name: str
    says: str
    count: int
    rows: list[Row]


class Totals(msgspec.Struct):
    """Sums over all settled calls, in nano-credits, from sources that know nothing of each other.

    `charged`, `shortfall` and `provider_cost` are what was booked call by call, `deducted` is what the journal took
    from wallets, and `markup` is computed anew from each call's usage, prices and markup. I9 says that `charged +
    shortfall = provider_cost + markup`, and `charged = deducted`.
    """

    calls: int = 0
    charged: int = 0
    shortfall: int = 0
    provider_cost: int = 0
    markup: int = 0
    deducted: int = 0


class Report(msgspec.Struct):
    """What an audit found. `notes` are no violations."""

    violations: list[Finding]
    notes: list[Finding]
    totals: Totals

    @property
    def is_clean(self) -> bool:
        """Whether every invariant holds."""
        return not self.violations

    def as_object(self) -> Row:
        """For `--json`; amounts in nano-credits."""
        return {"clean": self.is_clean, **msgspec.to_builtins(self)}

    def as_text(self) -> str:
        """For people."""
        lines = [f"{self.totals.calls} settled calls; the books {'add up' if self.is_clean else 'DO NOT ADD UP'}."]
        for title, findings in (("VIOLATED", self.violations), ("note", self.notes)):
            for finding in findings:
                lines.append(f"{title} {finding.name}: {finding.says}: {finding.count} rows")
                lines += [f"    {row}" for row in finding.rows]
        return "\n".join(lines)


async def audit(engine: AsyncEngine, advance: Callable[[float], None] = lambda _share: None) -> Report:
    """Check every invariant in one read-only snapshot, while everything else goes on.

    `advance` is told what share of the work is done, from 0 to 1.

    Raises `Unavailable` when the database is out of reach.
    """
    report = Report(violations=[], notes=[], totals=Totals())
    async with patient(engine) as patient_engine, reading(patient_engine, is_snapshot=True) as connection:
        for number, check in enumerate(CHECKS):
            advance(_CHECKS_SHARE * number / len(CHECKS))
            await _run(connection, check, report.violations)
        await _run(connection, LIMITS, report.notes)
        await _reproduce(connection, report, advance)
    advance(1)
    return report


async def _run(connection: AsyncConnection, check: Check, findings: list[Finding]) -> None:
    statement = sa.text(check.sql)
    if ":now" in check.sql:
        statement = statement.bindparams(now=await database_now(connection))
    rows = (await connection.execute(statement)).mappings().all()
    if rows:
        findings.append(Finding(check.name, check.says, len(rows), [dict(row) for row in rows[:ROWS_MAX]]))


async def _reproduce(connection: AsyncConnection, report: Report, advance: Callable[[float], None]) -> None:
    """I8: each charge follows from its stored usage, prices and markup. I9: the sums of all charges agree.

    And of I10, what only those who read each call's usage can tell.
    """
    tokens: dict[str, Tokens] = {}
    wrong = Finding("I8", "each charge follows from its stored usage, prices and markup", 0, [])
    changed = Finding("I8", "each charge is at the markup, and within the prices, that its call was reserved at", 0, [])
    totals = report.totals
    calls = (await connection.execute(sa.text(_CALLS))).scalar_one()
    async for row in await connection.stream(sa.text(_CHARGES)):
        expected = _expected(row)
        if (row.cost, row.provider_cost, row.charged + row.shortfall) != expected:
            _note(wrong, {"reservation_id": row.id, "cost": row.cost, "expected": expected and expected[0]})
        if row.offers is not None and not _is_as_reserved(row):
            _note(changed, {"reservation_id": row.id, "provider": row.provider, "markup_bps": row.markup_bps})
        tokens[row.wallet_id] = _with(tokens.get(row.wallet_id, _NO_TOKENS), row.usage)
        totals.calls += 1
        advance(_CHECKS_SHARE + (1 - _CHECKS_SHARE) * totals.calls / calls)
        totals.charged += row.charged
        totals.shortfall += row.shortfall
        totals.provider_cost += row.provider_cost or 0
        if expected is not None:
            totals.markup += expected[0] - expected[1]
    totals.deducted = (await connection.execute(sa.text(_DEDUCTED))).scalar_one()
    report.violations += [finding for finding in (wrong, changed) if finding.count]
    for says, is_true in (
        (
            "all charges and shortfalls are the providers' cost and the markup",
            totals.charged + totals.shortfall == totals.provider_cost + totals.markup,
        ),
        ("all charges are what the journal deducted", totals.charged == totals.deducted),
    ):
        if not is_true:
            report.violations.append(Finding("I9", says, 1, [msgspec.to_builtins(totals)]))
    await _compare_tokens(connection, report, tokens)
    await _compare_months(connection, report)


async def _compare_tokens(connection: AsyncConnection, report: Report, tokens: dict[str, Tokens]) -> None:
    counted = {
        row.wallet_id: (row.input_tokens, row.cached_input_tokens, row.output_tokens)
        for row in await connection.execute(sa.text(_COUNTED_TOKENS))
    }
    wrong = [
        {"wallet_id": wallet_id, "counted": counted.get(wallet_id), "used": tokens.get(wallet_id)}
        for wallet_id in sorted(tokens.keys() | counted.keys())
        if tokens.get(wallet_id, _NO_TOKENS) != counted.get(wallet_id, _NO_TOKENS)
    ]
    if wrong:
        says = "the tokens in the sums of a wallet are those of its calls"
        report.violations.append(Finding("I10", says, len(wrong), wrong[:ROWS_MAX]))


async def _compare_months(connection: AsyncConnection, report: Report) -> None:
    """Of I10, that what a month has is what its own days have."""
    by_month: dict[int, list[int]] = {}
    for table, sign in (("usage_months", 1), ("usage_days", -1)):
        sums = ", ".join(f"SUM({sum_})" for sum_ in COUNTERS)
        for day, *found in await connection.execute(sa.text(f"SELECT day, {sums} FROM {table} GROUP BY day")):
            row = by_month.setdefault(month_of(day), [0] * len(COUNTERS))
            row[:] = [has + sign * int(more) for has, more in zip(row, found, strict=True)]
    wrong: list[Row] = [
        {"day": month, **dict(zip(COUNTERS, sums, strict=True))} for month, sums in by_month.items() if any(sums)
    ]
    if wrong:
        report.violations.append(Finding("I10", "a month's sums are those of its days", len(wrong), wrong[:ROWS_MAX]))


def _with(tokens: Tokens, usage: Any) -> Tokens:
    """`tokens` and those of one call."""
    try:
        used = _decode(usage, Usage)
    except msgspec.MsgspecError:
        return tokens
    return (
        tokens[0] + bounded(used.input_tokens),
        tokens[1] + bounded(used.cached_input),
        tokens[2] + bounded(used.output_tokens),
    )


def _expected(row: Any) -> tuple[int, int, int] | None:
    """What a settled call must have cost, cost the operator, and been charged; None when its receipt is unreadable."""
    try:
        usage, price = _decode(row.usage, Usage), _decode(row.price, Price)
        total = cost(usage, price, row.markup_bps)
    except (msgspec.MsgspecError, TypeError):
        return None
    return total, provider_cost(usage, price), total


def _note(finding: Finding, row: Row) -> None:
    finding.count += 1
    if finding.count <= ROWS_MAX:
        finding.rows.append(row)


def _is_as_reserved(row: Any) -> bool:
    """Whether a settled call was charged at the terms of one of the offers that it was reserved for."""
    try:
        offers, price = _decode(row.offers, list[Terms]), _decode(row.price, Price)
    except (msgspec.MsgspecError, TypeError):
        return False
    return any(
        (each.provider, each.model, each.markup_bps) == (row.provider, row.request_model, row.markup_bps)
        and (price == each.price or is_no_dearer(price, each.price))
        for each in offers
    )


def _decode(value: Any, type_: type[T]) -> T:
    """A JSON column's value, which one driver gives as text and the other may give decoded."""
    return msgspec.json.decode(value, type=type_) if isinstance(value, str) else msgspec.convert(value, type_)
