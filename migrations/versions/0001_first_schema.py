"""first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("wallet_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.Text(), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("allowed_models", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("limit_amount", sa.BigInteger(), nullable=True),
        sa.Column("limit_period", sa.Text(), nullable=True),
        sa.Column("spent", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reserved", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("period_start", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("period_spent", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("concurrent_calls_max", sa.BigInteger(), nullable=True),
        sa.Column("window_start", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("window_requests", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("window_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("open_calls", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("last_used_at", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("limit_period IN ('day', 'month')", name=op.f("ck_api_keys_limit_period")),
        sa.CheckConstraint("scope IN ('inference', 'manage', 'admin')", name=op.f("ck_api_keys_scope")),
        sa.CheckConstraint("period_spent >= 0", name=op.f("ck_api_keys_period_spent")),
        sa.CheckConstraint("reserved >= 0", name=op.f("ck_api_keys_reserved")),
        sa.CheckConstraint("spent >= 0", name=op.f("ck_api_keys_spent")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("key_hash", name=op.f("uq_api_keys_key_hash")),
    )
    op.create_index(op.f("ix_api_keys_user_id"), "api_keys", ["user_id"], unique=False)

    op.create_table(
        "credit_transactions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("wallet_id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("balance_before", sa.BigInteger(), nullable=False),
        sa.Column("balance_after", sa.BigInteger(), nullable=False),
        sa.Column("reservation_id", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "(type = 'topup' AND amount > 0) OR (type = 'deduction' AND amount <= 0)"
            " OR (type = 'refund' AND amount >= 0) OR (type = 'adjustment' AND amount <> 0)",
            name=op.f("ck_credit_transactions_sign"),
        ),
        sa.CheckConstraint(
            "type <> 'deduction' OR reservation_id IS NOT NULL", name=op.f("ck_credit_transactions_deduction")
        ),
        sa.CheckConstraint("balance_after - balance_before = amount", name=op.f("ck_credit_transactions_chained")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credit_transactions")),
        sa.UniqueConstraint(
            "wallet_id", "idempotency_key", name=op.f("uq_credit_transactions_wallet_id_idempotency_key")
        ),
        sa.UniqueConstraint("wallet_id", "seq", name=op.f("uq_credit_transactions_wallet_id_seq")),
    )
    op.create_index(
        "uq_credit_transactions_deduction",
        "credit_transactions",
        ["reservation_id"],
        unique=True,
        postgresql_where=sa.text("type = 'deduction'"),
        sqlite_where=sa.text("type = 'deduction'"),
    )

    op.create_table(
        "instances",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.BigInteger(), nullable=False),
        sa.Column("is_fenced", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_instances")),
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("client_request_id", sa.Text(), nullable=True),
        sa.Column("wallet_id", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=True),
        sa.Column("window_tokens", sa.BigInteger(), nullable=False),
        sa.Column("original_model", sa.Text(), nullable=False),
        sa.Column("is_stream", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("cost", sa.BigInteger(), nullable=True),
        sa.Column("charged", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("shortfall", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("refunded", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("is_late", sa.Boolean(), nullable=True),
        sa.Column("provider", sa.Text(), nullable=True),
        sa.Column("request_model", sa.Text(), nullable=True),
        sa.Column("response_model", sa.Text(), nullable=True),
        sa.Column("usage", sa.JSON(), nullable=True),
        sa.Column("usage_source", sa.Text(), nullable=True),
        sa.Column("price", sa.JSON(), nullable=True),
        sa.Column("markup_bps", sa.BigInteger(), nullable=True),
        sa.Column("provider_cost", sa.BigInteger(), nullable=True),
        sa.Column("ttft_ms", sa.BigInteger(), nullable=True),
        sa.Column("duration_ms", sa.BigInteger(), nullable=True),
        sa.Column("settled_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("(state = 'settled') = (cost IS NOT NULL)", name=op.f("ck_reservations_settled")),
        sa.CheckConstraint("state IN ('open', 'settled', 'released', 'expired')", name=op.f("ck_reservations_state")),
        sa.CheckConstraint("amount >= 0 AND charged >= 0 AND shortfall >= 0", name=op.f("ck_reservations_amounts")),
        sa.CheckConstraint("cost IS NULL OR charged + shortfall = cost", name=op.f("ck_reservations_cost")),
        sa.CheckConstraint("refunded >= 0 AND refunded <= charged", name=op.f("ck_reservations_refunded")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reservations")),
    )
    op.create_index(
        "ix_reservations_open",
        "reservations",
        ["owner_id"],
        unique=False,
        postgresql_where=sa.text("state = 'open'"),
        sqlite_where=sa.text("state = 'open'"),
    )
    op.create_index("ix_reservations_wallet_id_id", "reservations", ["wallet_id", "id"], unique=False)

    op.create_table(
        "system_config",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_system_config")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=True),
        sa.Column("full_name", sa.Text(), nullable=True),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("is_admin", sa.Boolean(), nullable=False),
        sa.Column("email_verified", sa.Boolean(), nullable=False),
        sa.Column("token_version", sa.BigInteger(), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("concurrent_calls_max", sa.BigInteger(), nullable=True),
        sa.Column("allowed_models", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
    )
    op.create_table(
        "wallets",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.Text(), nullable=False),
        sa.Column("balance", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reserved", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("owed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("seq", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("window_start", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("window_requests", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("window_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("open_calls", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("balance - reserved >= 0", name=op.f("ck_wallets_covered")),
        sa.CheckConstraint("owed >= 0", name=op.f("ck_wallets_owed")),
        sa.CheckConstraint("reserved >= 0", name=op.f("ck_wallets_reserved")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_wallets")),
    )
    _keep_journal()
    if op.get_context().dialect.name == "postgresql":
        # Half-full pages leave room for a row's next version beside it, so that the hottest updates touch no index.
        for table in ("wallets", "api_keys"):
            op.execute(f"ALTER TABLE {table} SET (fillfactor = 50)")


def _keep_journal() -> None:
    """Refuse to change or remove what is in `credit_transactions`."""
    if op.get_context().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION credit_transactions_append_only() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'credit_transactions is append-only' USING ERRCODE = '23000'; END $$"
        )
        op.execute(
            "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_transactions"
            " FOR EACH STATEMENT EXECUTE FUNCTION credit_transactions_append_only()"
        )
        return
    for event in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER append_only_{event.lower()} BEFORE {event} ON credit_transactions"
            " BEGIN SELECT RAISE(ABORT, 'credit_transactions is append-only'); END"
        )


def downgrade() -> None:
    """Take this revision back: everything in the database is lost."""
    for table in (
        "api_keys",
        "credit_transactions",
        "instances",
        "reservations",
        "system_config",
        "users",
        "wallets",
    ):
        op.drop_table(table)
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP FUNCTION credit_transactions_append_only()")
