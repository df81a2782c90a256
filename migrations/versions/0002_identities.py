"""identities."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    with op.batch_alter_table("users") as users:
        users.alter_column("email", existing_type=sa.Text(), nullable=True)
        users.add_column(sa.Column("starting_credits", sa.BigInteger(), nullable=True))
        users.create_check_constraint(op.f("ck_users_starting_credits"), "starting_credits > 0")
    op.create_table(
        "identities",
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("issuer", "subject", name=op.f("pk_identities")),
    )
    op.create_index(op.f("ix_identities_user_id"), "identities", ["user_id"], unique=False)


def downgrade() -> None:
    """Take this revision back: who came by a token of somebody else's issuer is not recognised any more."""
    op.drop_table("identities")
    op.execute("UPDATE users SET email = id || '@nowhere.invalid' WHERE email IS NULL")
    with op.batch_alter_table("users") as users:
        users.drop_constraint(op.f("ck_users_starting_credits"), type_="check")
        users.drop_column("starting_credits")
        users.alter_column("email", existing_type=sa.Text(), nullable=False)
