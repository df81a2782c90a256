"""`tollgate audit`, `events`, `backup` and `sweep`: the books as a whole."""

import sys
from contextlib import ExitStack
from pathlib import Path

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import INSTANT, examples, json_option, page_options
from proxy.cli.output import page_text, plain, progress, show, words
from proxy.errors import SettingsError


@click.command("sweep", epilog=examples("tollgate sweep"))
@json_option
def sweep(*, as_json: bool) -> None:
    """Free what dead processes hold open.

    For when no server is left to do it. On PostgreSQL whoever is past its lease is watched for one more before it is
    taken for dead, which takes 20 seconds. On SQLite everything open is a dead process's, unless a server runs: then
    nothing is touched.
    """
    from proxy.ledger.recovery import Swept, sweep_by_hand
    from proxy.storage.database import sole_process

    async def work(books: Books) -> tuple[Swept, bool]:
        with ExitStack() as stack:
            if books.configuration.is_embedded:
                try:
                    stack.enter_context(sole_process(books.configuration.sqlite_file))
                except SettingsError:
                    return Swept(fenced=0, expired=0), True
            async with books.ledger() as ledger:
                swept = await sweep_by_hand(
                    books.engine,
                    ledger,
                    is_sole=books.configuration.is_embedded,
                    lease_s=books.configuration.settings.database.lease_s,
                )
                return swept, False

    swept, is_served = with_books(work)
    said = f"Dead processes fenced: {swept.fenced}. Reservations expired: {swept.expired}."
    if is_served:
        said = "Nothing was touched: a server runs, and what is open is its own (it swept when it started)."
    show({"fenced": swept.fenced, "expired": swept.expired, "is_served": is_served}, said, as_json=as_json)


@click.command("audit", epilog=examples("tollgate audit", "tollgate audit --json > audit.json"))
@json_option
def audit(*, as_json: bool) -> None:
    """Check that the books add up; exit status 1 when they do not."""
    from proxy.ledger.audit import audit as check

    async def work(books: Books) -> bool:
        with progress("Checking the books") as advance:
            report = await check(books.engine, advance)
        show(report.as_object(), report.as_text(), as_json=as_json)
        return report.is_clean

    if not with_books(work):
        sys.exit(1)


@click.command("backup", epilog=examples("tollgate backup books-today.db"))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def backup(file: Path, *, as_json: bool) -> None:
    """Copy the books of an embedded database into a new FILE.

    A server may run meanwhile. PostgreSQL has its own means: pg_dump, or a base backup and its write-ahead log.
    """
    from proxy.storage.database import copy_sqlite

    async def work(books: Books) -> None:
        if not books.configuration.is_embedded:
            raise SettingsError("the books are on PostgreSQL: use pg_dump, which needs no help of ours")
        copy_sqlite(books.configuration.sqlite_file, file)
        show({"file": str(file)}, f"The books are in {file}.", as_json=as_json)

    with_books(work)


@click.command(
    "events",
    epilog=examples(
        "tollgate events --limit 20",
        "tollgate events --actor 'command line' --since 2026-11-01",
        "tollgate events --action config.set --json",
    ),
)
@click.option("--actor", help="Only those of this user, by id, or of 'command line'.")
@click.option("--action", help="Only those of a kind, such as user.change.")
@click.option("--subject", help="Only those about this id or name.")
@click.option("--since", type=INSTANT, metavar="T", help="Only those from then on, in UTC unless it says otherwise.")
@click.option("--until", type=INSTANT, metavar="T", help="Only those before then.")
@page_options
@json_option
def events(  # noqa: PLR0913 - one parameter an option
    *,
    actor: str | None,
    action: str | None,
    subject: str | None,
    since: int | None,
    until: int | None,
    limit: int,
    cursor: str | None,
    as_json: bool,
) -> None:
    """Show who changed what, newest first.

    Every change by an admin or by a command is an event, with what was another way before.
    """
    from proxy.administration.events import Filter
    from proxy.shown.records import event_page

    wanted = Filter(actor=actor, action=action, subject=subject, since=since, until=until)

    async def work(books: Books) -> None:
        shown = plain(await event_page(books.engine, wanted, limit, cursor))
        columns = words("created_at", "actor", "action", "subject", "before", "after")
        show(shown, page_text(shown, columns, nothing="No events."), as_json=as_json)

    with_books(work)
