"""The tables, the same on SQLite and PostgreSQL.

Amounts are nano-credits and instants are microseconds since the epoch (UTC), both in 64-bit integers: SQLite
would turn NUMERIC into a float and has no type for instants. In PostgreSQL `to_timestamp(created_at / 1e6)`
shows an instant to people.
"""

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _counter(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _limits() -> list[sa.Column[int]]:
    """What may be asked of us in a minute, and at once; NULL is no limit."""
    return [
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("concurrent_calls_max", sa.BigInteger),
    ]


def _window() -> list[sa.Column[int]]:
    """How much of those limits is used: the minute that began at `window_start`, and the calls now open."""
    return [_counter("window_start"), _counter("window_requests"), _counter("window_tokens"), _counter("open_calls")]


def _usage(name: str) -> sa.Table:
    """Sums over calls, each row of one wallet; `day` is in days since the epoch."""
    return sa.Table(
        name,
        metadata,
        sa.Column("wallet_id", sa.Text, primary_key=True),
        sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("user_id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("provider", sa.Text, primary_key=True),
        _counter("calls"),
        _counter("input_tokens"),
        _counter("cached_input_tokens"),
        _counter("output_tokens"),
        _counter("charged"),
        _counter("provider_cost"),
        _counter("shortfall"),
        _counter("refunded"),
        _counter("released"),
        _counter("perhaps_billed"),
        _counter("perhaps_billed_amount"),
        sa.Index(f"ix_{name}_day", "day"),
    )


users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("email", sa.Text, unique=True),
    sa.Column("password_hash", sa.Text),
    sa.Column("full_name", sa.Text),
    sa.Column("is_active", sa.Boolean, nullable=False),
    sa.Column("is_admin", sa.Boolean, nullable=False),
    sa.Column("email_verified", sa.Boolean, nullable=False),
    sa.Column("token_version", sa.BigInteger, nullable=False),
    *_limits(),
    sa.Column("allowed_models", sa.JSON(none_as_null=True)),
    sa.Column("starting_credits", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.CheckConstraint("starting_credits > 0", name="starting_credits"),
)

identities = sa.Table(
    "identities",
    metadata,
    sa.Column("issuer", sa.Text, primary_key=True),
    sa.Column("subject", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, nullable=False, index=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)

wallets = sa.Table(
    "wallets",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("owner_id", sa.Text, nullable=False),
    _counter("balance"),
    _counter("reserved"),
    _counter("owed"),
    _counter("seq"),
    *_window(),
    sa.CheckConstraint("reserved >= 0", name="reserved"),
    sa.CheckConstraint("owed >= 0", name="owed"),
    sa.CheckConstraint("balance - reserved >= 0", name="covered"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, nullable=False, index=True),
    sa.Column("wallet_id", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("key_hash", sa.Text, nullable=False, unique=True),
    sa.Column("is_active", sa.Boolean, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("allowed_models", sa.JSON(none_as_null=True)),
    sa.Column("limit_amount", sa.BigInteger),
    sa.Column("limit_period", sa.Text),
    _counter("spent"),
    _counter("reserved"),
    _counter("period_start"),
    _counter("period_spent"),
    *_limits(),
    *_window(),
    sa.Column("last_used_at", sa.BigInteger),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.CheckConstraint("scope IN ('inference', 'manage', 'admin')", name="scope"),
    sa.CheckConstraint("limit_period IN ('day', 'month')", name="limit_period"),
    sa.CheckConstraint("spent >= 0", name="spent"),
    sa.CheckConstraint("period_spent >= 0", name="period_spent"),
    sa.CheckConstraint("reserved >= 0", name="reserved"),
)

reservations = sa.Table(
    "reservations",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("client_request_id", sa.Text),
    sa.Column("wallet_id", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("owner_id", sa.Text),
    sa.Column("window_tokens", sa.BigInteger, nullable=False),
    sa.Column("original_model", sa.Text, nullable=False),
    sa.Column("is_stream", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("outcome", sa.Text),
    sa.Column("cost", sa.BigInteger),
    _counter("charged"),
    _counter("shortfall"),
    _counter("refunded"),
    sa.Column("is_late", sa.Boolean),
    sa.Column("provider", sa.Text),
    sa.Column("request_model", sa.Text),
    sa.Column("response_model", sa.Text),
    sa.Column("usage", sa.JSON),
    sa.Column("usage_source", sa.Text),
    sa.Column("price", sa.JSON),
    sa.Column("markup_bps", sa.BigInteger),
    sa.Column("provider_cost", sa.BigInteger),
    sa.Column("ttft_ms", sa.BigInteger),
    sa.Column("duration_ms", sa.BigInteger),
    sa.Column("settled_at", sa.BigInteger),
    sa.Column("offers", sa.JSON(none_as_null=True)),
    sa.CheckConstraint("state IN ('open', 'settled', 'released', 'expired')", name="state"),
    sa.CheckConstraint("amount >= 0 AND charged >= 0 AND shortfall >= 0", name="amounts"),
    sa.CheckConstraint("refunded >= 0 AND refunded <= charged", name="refunded"),
    sa.CheckConstraint("(state = 'settled') = (cost IS NOT NULL)", name="settled"),
    sa.CheckConstraint("cost IS NULL OR charged + shortfall = cost", name="cost"),
    sa.Index("ix_reservations_wallet_id_id", "wallet_id", "id"),
    sa.Index(
        "ix_reservations_open",
        "owner_id",
        postgresql_where=sa.text("state = 'open'"),
        sqlite_where=sa.text("state = 'open'"),
    ),
)

credit_transactions = sa.Table(
    "credit_transactions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("wallet_id", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("balance_before", sa.BigInteger, nullable=False),
    sa.Column("balance_after", sa.BigInteger, nullable=False),
    sa.Column("reservation_id", sa.Text),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("metadata", sa.JSON),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("wallet_id", "seq"),
    sa.UniqueConstraint("wallet_id", "idempotency_key"),
    sa.CheckConstraint("balance_after - balance_before = amount", name="chained"),
    sa.CheckConstraint(
        "(type = 'topup' AND amount > 0) OR (type = 'deduction' AND amount <= 0)"
        " OR (type = 'refund' AND amount >= 0) OR (type = 'adjustment' AND amount <> 0)",
        name="sign",
    ),
    sa.CheckConstraint("type <> 'deduction' OR reservation_id IS NOT NULL", name="deduction"),
    sa.Index(
        "uq_credit_transactions_deduction",
        "reservation_id",
        unique=True,
        postgresql_where=sa.text("type = 'deduction'"),
        sqlite_where=sa.text("type = 'deduction'"),
    ),
    sa.Index(
        "ix_credit_transactions_by_hand",
        "wallet_id",
        "seq",
        postgresql_where=sa.text("type <> 'deduction'"),
        sqlite_where=sa.text("type <> 'deduction'"),
    ),
)

usage_days = _usage("usage_days")
"""What ended calls add up to, by UTC day: see `ledger.rollup`. No CHECK: a sum must never refuse a charge."""

usage_months = _usage("usage_months")
"""The same by month, under the first day of each, for reports over many wallets and much time."""

system_config = sa.Table(
    "system_config",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.JSON, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
)

instances = sa.Table(
    "instances",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("started_at", sa.BigInteger, nullable=False),
    sa.Column("lease_until", sa.BigInteger, nullable=False),
    sa.Column("is_fenced", sa.Boolean, nullable=False),
)

markup_rules = sa.Table(
    "markup_rules",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("markup_bps", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("kind", "subject"),
    sa.CheckConstraint("kind IN ('user', 'model', 'provider')", name="kind"),
    sa.CheckConstraint("markup_bps >= 0", name="markup_bps"),
)

providers = sa.Table(
    "providers",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("is_enabled", sa.Boolean, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
)

prices = sa.Table(
    "prices",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("valid_from", sa.BigInteger, nullable=False),
    sa.Column("entry", sa.JSON(none_as_null=True)),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.CheckConstraint("source IN ('list', 'admin')", name="source"),
    sa.Index("ix_prices_provider_model_valid_from", "provider", "model", "valid_from"),
)

admin_events = sa.Table(
    "admin_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("before", sa.JSON(none_as_null=True)),
    sa.Column("after", sa.JSON(none_as_null=True)),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Index("ix_admin_events_subject_id", "subject", "id"),
    sa.Index("ix_admin_events_actor_id", "actor", "id"),
)
