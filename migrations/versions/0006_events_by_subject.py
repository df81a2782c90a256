"""find what was done to a subject, and by an actor, among many events."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.create_index("ix_admin_events_subject_id", "admin_events", ["subject", "id"])
    op.create_index("ix_admin_events_actor_id", "admin_events", ["actor", "id"])


def downgrade() -> None:
    """Take this revision back."""
    op.drop_index("ix_admin_events_actor_id", "admin_events")
    op.drop_index("ix_admin_events_subject_id", "admin_events")
