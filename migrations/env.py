"""Run by Alembic: applies the revisions over the connection and in the transaction that `database.migrate` opened."""

from alembic import context

from proxy.storage.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=False,
)
context.run_migrations()
