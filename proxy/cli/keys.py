"""`tollgate keys`: anybody's API keys."""

from typing import Any

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import (
    AMOUNT,
    INSTANT,
    Command,
    OrNone,
    email_option,
    examples,
    given,
    json_option,
    models_option,
    page_options,
    rate_options,
)
from proxy.cli.output import numbers, page_text, plain, show, words
from proxy.units import now_micros

key_option = click.option("--id", "key_id", required=True, help="The key's id, as `keys list` shows it.")


@click.group("keys")
def group() -> None:
    """API keys: what they may be used for, and how much."""


def _terms_options(command: Command) -> Command:
    """The terms of a key that can be changed."""
    period = OrNone(click.Choice(["day", "month"]))
    for option in (
        models_option,
        rate_options,
        click.option(
            "--expires-at",
            type=OrNone(INSTANT),
            metavar="T",
            help="When it ends, in UTC unless it says otherwise, or none.",
        ),
        click.option(
            "--limit-period",
            type=period,
            metavar="day|month|none",
            help="By UTC day or month; with none, or without it, the limit is for ever.",
        ),
        click.option(
            "--limit-amount",
            type=OrNone(AMOUNT),
            metavar="CREDITS",
            help="Credits that it may spend, such as 2.5, or none.",
        ),
    ):
        command = option(command)
    return command


@group.command(
    "create",
    epilog=examples(
        "tollgate keys create --email ann@example.com --name laptop",
        "tollgate keys create --email ann@example.com --limit-amount 5 --limit-period month --expires-at 2027-01-01",
        "tollgate keys create --email boss@example.com --scope admin",
    ),
)
@email_option
@click.option("--name", default="", help="What the key is for.")
@click.option(
    "--scope",
    type=click.Choice(["inference", "manage", "admin"]),
    default="inference",
    show_default=True,
    help="What the key may be used for.",
)
@_terms_options
@json_option
def keys_create(*, email: str, name: str, scope: str, as_json: bool, **terms: Any) -> None:
    """Make an API key and print it, this once."""
    from proxy.administration import COMMAND_LINE
    from proxy.administration.keys import create
    from proxy.identity.keys import KeyTerms, Scope
    from proxy.shown.keys import key_item

    wanted = KeyTerms(name=name, scope=Scope(scope), **given(terms))

    async def work(books: Books) -> None:
        user = await books.user(email)
        made, key = await create(books.engine, COMMAND_LINE, user.id, wanted)
        show(
            {"key": made.secret, "email": user.email, **plain(key_item(key, now_micros()))},
            made.secret,
            as_json=as_json,
        )

    with_books(work)


@group.command("list", epilog=examples("tollgate keys list --email ann@example.com"))
@email_option
@page_options
@json_option
def keys_list(email: str, limit: int, cursor: str | None, *, as_json: bool) -> None:
    """Show a user's keys, newest first, by their ids and beginnings."""
    from proxy.shown.keys import key_page

    async def work(books: Books) -> None:
        user = await books.user(email)
        shown = {"email": user.email, **plain(await key_page(books.engine, user.id, limit, cursor))}
        columns = [
            *words("id", "prefix", "name", "scope", "active=is_active"),
            *numbers("spent", "limit=limit_amount"),
            *words("per=limit_period", "last_used=last_used_at", "expires=expires_at", "models=allowed_models"),
        ]
        show(shown, page_text(shown, columns, nothing="No keys."), as_json=as_json)

    with_books(work)


@group.command(
    "edit",
    epilog=examples(
        "tollgate keys edit --email ann@example.com --id key_… --limit-amount 10 --limit-period day",
        "tollgate keys edit --email ann@example.com --id key_… --limit-amount none --expires-at none",
    ),
)
@email_option
@key_option
@click.option("--name", help="What the key is for.")
@_terms_options
@json_option
def keys_edit(*, email: str, key_id: str, as_json: bool, **changes: Any) -> None:
    """Give a key other terms.

    They hold for its very next call; what is left out stays.
    """
    from proxy.administration import COMMAND_LINE
    from proxy.administration.keys import change
    from proxy.shown.keys import key_item

    wanted = given(changes)
    if not wanted:
        raise click.UsageError("say what is to be another way")

    async def work(books: Books) -> None:
        user = await books.user(email)
        key = await change(books.engine, COMMAND_LINE, user.id, key_id, wanted)
        show({"email": user.email, **plain(key_item(key, now_micros()))}, f"Changed {key.prefix}….", as_json=as_json)

    with_books(work)


@group.command("revoke", epilog=examples("tollgate keys revoke --email ann@example.com --id key_…"))
@email_option
@key_option
@json_option
def keys_revoke(email: str, key_id: str, *, as_json: bool) -> None:
    """Close a key for good: its very next call is refused."""
    from proxy.administration import COMMAND_LINE
    from proxy.administration.keys import revoke

    async def work(books: Books) -> None:
        user = await books.user(email)
        key = await revoke(books.engine, COMMAND_LINE, user.id, key_id)
        show({"id": key.id, "email": user.email, "is_active": False}, f"Revoked {key.prefix}….", as_json=as_json)

    with_books(work)
