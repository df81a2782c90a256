"""`tollgate`: serve, migrate, and the operator's commands, a module for each group of them.

Every command prints for people, or with `--json` one object for programs, with the fields of the HTTP API. What is
wrong is one line on standard error: exit status 2 for the configuration or the command's own words, 1 for everything
else. Changes go through the same functions as those by HTTP, and leave the same events.

What is slow to import, above all whatever reaches SQLAlchemy, is imported by the command that runs: whoever asks for
help does not wait for it. Everything else stands at the top of its module.
"""

import sqlite3
from typing import IO, Any

import click

from proxy import __version__
from proxy.cli import config, keys, markup, prices, providers, serve, upkeep, usage, users
from proxy.cli import credits as credits_commands
from proxy.cli.output import fail
from proxy.errors import TollgateError, reason_of


class _Misused(click.ClickException):
    """A command was called wrongly; said in one line."""

    exit_code = 2

    def __init__(self, error: click.UsageError) -> None:
        said = " ".join(error.format_message().split())
        hint = "" if error.ctx is None else f" (see `{error.ctx.command_path} --help`)"
        super().__init__(said.removesuffix(".") + hint)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        click.echo(f"tollgate: {self.message}", file=file, err=True)


class _Tollgate(click.Group):
    """All commands. What goes wrong in one of them is said here."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        """Read the options that stand before the command."""
        try:
            return super().make_context(*arguments, **more)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as exc:
            raise _Misused(exc) from exc

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as exc:
            raise _Misused(exc) from exc
        except TollgateError as exc:
            ctx.exit(fail(exc))
        except Exception as exc:
            if not _is_databases(exc):
                raise
            click.echo(f"tollgate: the database cannot be used: {reason_of(exc)}", err=True)
            ctx.exit(1)


def _is_databases(error: Exception) -> bool:
    """Whether an error is the database's: it is damaged, not ours, or refuses us."""
    if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
        return False
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, SQLAlchemyError | CommandError | sqlite3.Error)


@click.group(cls=_Tollgate)
@click.version_option(__version__)
def cli() -> None:
    """An OpenAI-compatible proxy that sells model access on prepaid credits.

    Commands may be used while the server runs, and read the same configuration: TOLLGATE_CONFIG, or config.toml here.
    """


for command in (
    serve.serve,
    serve.migrate,
    users.group,
    keys.group,
    credits_commands.group,
    prices.group,
    providers.group,
    markup.group,
    config.group,
    usage.usage,
    usage.margin,
    upkeep.events,
    upkeep.audit,
    upkeep.backup,
    upkeep.sweep,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit."""
    cli.main(prog_name="tollgate", standalone_mode=True)
