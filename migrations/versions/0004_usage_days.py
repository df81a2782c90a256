"""what calls add up to by day, and what was booked by hand."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_COUNTERS = (
    "calls",
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "charged",
    "provider_cost",
    "shortfall",
    "refunded",
    "released",
    "perhaps_billed",
    "perhaps_billed_amount",
)


def upgrade() -> None:
    """Apply this revision."""
    for table in ("usage_days", "usage_months"):
        op.create_table(
            table,
            sa.Column("wallet_id", sa.Text(), nullable=False),
            sa.Column("day", sa.BigInteger(), nullable=False),
            sa.Column("user_id", sa.Text(), nullable=False),
            sa.Column("key_id", sa.Text(), nullable=False),
            sa.Column("model", sa.Text(), nullable=False),
            sa.Column("provider", sa.Text(), nullable=False),
            *(sa.Column(name, sa.BigInteger(), server_default="0", nullable=False) for name in _COUNTERS),
            sa.PrimaryKeyConstraint(
                "wallet_id", "day", "user_id", "key_id", "model", "provider", name=op.f(f"pk_{table}")
            ),
        )
        if op.get_context().dialect.name == "postgresql":
            # Room for a row's next version beside it, as for the other counters: it is written for a while, then never.
            op.execute(f"ALTER TABLE {table} SET (fillfactor = 70)")
    _fill_days()
    _fill_months()
    for table in ("usage_days", "usage_months"):
        op.create_index(f"ix_{table}_day", table, ["day"], unique=False)
    # Finds what is rare in a long journal, and is not written by charges.
    op.create_index(
        "ix_credit_transactions_by_hand",
        "credit_transactions",
        ["wallet_id", "seq"],
        unique=False,
        postgresql_where=sa.text("type <> 'deduction'"),
        sqlite_where=sa.text("type <> 'deduction'"),
    )


def _fill_days() -> None:
    """Count the calls that have ended until now."""
    is_settled = "state = 'settled'"
    perhaps_billed = "(state = 'expired' OR (state = 'released' AND outcome = 'undelivered'))"
    inputs = [_tokens(name) for name in ("input", "cached_input", "cache_write", "audio_input")]
    outputs = [_tokens(name) for name in ("output", "audio_output")]
    sums = (
        f"SUM(CASE WHEN {is_settled} THEN 1 ELSE 0 END)",
        _sum_bounded(" + ".join(inputs)),
        _sum_bounded(_tokens("cached_input")),
        _sum_bounded(" + ".join(outputs)),
        "SUM(charged)",
        _sum_bounded("COALESCE(provider_cost, 0)"),
        _sum_bounded("shortfall"),
        "SUM(refunded)",
        f"SUM(CASE WHEN {is_settled} THEN 0 ELSE 1 END)",
        f"SUM(CASE WHEN {perhaps_billed} THEN 1 ELSE 0 END)",
        f"SUM(CASE WHEN {perhaps_billed} THEN amount ELSE 0 END)",
    )
    key = "wallet_id, settled_at / 86400000000, user_id, COALESCE(key_id, ''), original_model, COALESCE(provider, '')"
    op.execute(
        f"INSERT INTO usage_days (wallet_id, day, user_id, key_id, model, provider, {', '.join(_COUNTERS)})"  # noqa: S608 - made of our own constants
        f" SELECT {key}, {', '.join(sums)} FROM reservations WHERE state <> 'open' GROUP BY 1, 2, 3, 4, 5, 6"
    )


def _fill_months() -> None:
    """Add the days up under the first of their months."""
    first = "CAST(strftime('%s', day * 86400, 'unixepoch', 'start of month') AS INTEGER) / 86400"
    if op.get_context().dialect.name == "postgresql":
        first = "date_trunc('month', date '1970-01-01' + day::int)::date - date '1970-01-01'"
    sums = ", ".join(f"SUM({name})" for name in _COUNTERS)
    op.execute(
        f"INSERT INTO usage_months (wallet_id, day, user_id, key_id, model, provider, {', '.join(_COUNTERS)})"  # noqa: S608 - likewise
        f" SELECT wallet_id, {first}, user_id, key_id, model, provider, {sums} FROM usage_days"
        " GROUP BY 1, 2, 3, 4, 5, 6"
    )


def _tokens(name: str) -> str:
    if op.get_context().dialect.name == "postgresql":
        return f"COALESCE((usage->>'{name}')::bigint, 0)"
    return f"COALESCE(json_extract(usage, '$.{name}'), 0)"


def _sum_bounded(figure: str) -> str:
    """A sum over settled calls, each of which adds at most what the ledger lets it add."""
    return f"SUM(CASE WHEN state <> 'settled' THEN 0 WHEN {figure} > {10**15} THEN {10**15} ELSE {figure} END)"


def downgrade() -> None:
    """Take this revision back: the sums are lost, and are made anew from the calls when it is applied again."""
    op.drop_index("ix_credit_transactions_by_hand", "credit_transactions")
    op.drop_table("usage_months")
    op.drop_table("usage_days")
