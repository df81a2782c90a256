"""what a call was reserved at: the prices and the markup of each who may serve it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply this revision."""
    op.add_column("reservations", sa.Column("offers", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    """Take this revision back: what calls were reserved at is lost, what they were charged at is not."""
    op.drop_column("reservations", "offers")
