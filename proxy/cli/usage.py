"""`tollgate usage` and `tollgate margin`: what all calls add up to."""

from collections.abc import Awaitable, Callable
from typing import Any

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import Command, day_options, examples, json_option
from proxy.cli.output import Column, numbers, plain, show, table, words
from proxy.pages import GROUPS_MAX


def _group_options(default: str) -> Callable[[Command], Command]:
    def decorated(command: Command) -> Command:
        command = click.option("--cursor", help="Continue where the last page ended, as it said.")(command)
        command = click.option("--limit", type=click.IntRange(1, GROUPS_MAX), default=GROUPS_MAX, show_default=True)(
            command
        )
        return click.option(
            "--group-by",
            type=click.Choice(["day", "month", "model", "provider", "user", "key"]),
            default=default,
            show_default=True,
            help="What each line adds up.",
        )(command)

    return decorated


@click.command(
    "usage",
    epilog=examples(
        "tollgate usage", "tollgate usage --group-by user --from 2026-11-01", "tollgate usage --group-by month --json"
    ),
)
@_group_options("day")
@day_options
@json_option
def usage(**options: Any) -> None:
    """Show what all users' calls add up to.

    The last 30 days, or 12 months, unless others are named.
    """
    from proxy.shown.usage import usage_page

    columns = numbers(
        "calls",
        "input=input_tokens",
        "cached=cached_input_tokens",
        "output=output_tokens",
        "charged",
        "refunded",
        "average=average_charged",
        "provider_cost",
        "shortfall",
        "released",
    )
    _report(usage_page, columns, **options)


@click.command(
    "margin", epilog=examples("tollgate margin", "tollgate margin --group-by model --from 2026-11-01 --to 2026-11-30")
)
@_group_options("provider")
@day_options
@json_option
def margin(**options: Any) -> None:
    """Show what is left for the operator.

    The margin is what was charged less refunds and the providers' cost. Of the released calls, providers may have
    billed some, with at most so much.
    """
    from proxy.shown.usage import margin_page

    columns = numbers(
        "calls",
        "charged",
        "refunded",
        "provider_cost",
        "markup",
        "shortfall",
        "margin",
        "released",
        "perhaps_billed",
        "at_most=perhaps_billed_at_most",
    )
    _report(margin_page, columns, **options)


def _report(  # noqa: PLR0913 - what is asked for
    read: Callable[..., Awaitable[Any]],
    columns: list[Column],
    *,
    group_by: str,
    first: str | None,
    last: str | None,
    limit: int,
    cursor: str | None,
    as_json: bool,
) -> None:
    from proxy.reports import GroupBy

    async def work(books: Books) -> None:
        shown = plain(await read(books.engine, (first, last), GroupBy(group_by), limit, cursor))
        heads = words(f"{group_by}=group", *(["name"] if group_by in {"user", "key"} else []))
        rows = [*shown["items"], {"group": "total", "name": None, **shown["total"]}]
        lines = [
            f"From {shown['from']} to {shown['to']} ({shown['time_zone']})",
            table(rows, [*heads, *columns], nothing=""),
        ]
        if shown["next_cursor"] is not None:
            lines.append(f"There are more: --cursor {shown['next_cursor']}")
        show(shown, "\n".join(lines), as_json=as_json)

    with_books(work)
