"""`tollgate config`: the settings that change while calls go on."""

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import examples, json_option
from proxy.cli.output import cell, plain, show, table, words

_BOOLEANS = {"true": True, "false": False}


@click.group("config")
def group() -> None:
    """Settings that change while calls go on.

    They go before those of the configuration.
    """


@group.command("list", epilog=examples("tollgate config list"))
@json_option
def config_list(*, as_json: bool) -> None:
    """Show every such setting, and what counts.

    The default is what the configuration says.
    """
    from proxy.shown.config import setting_list

    async def work(books: Books) -> None:
        shown = plain(await setting_list(books.engine, books.configuration.settings))
        columns = words("name", "value", "default", "type", "changed=updated_at", "description")
        show(shown, table(shown["items"], columns, nothing="No settings."), as_json=as_json)

    with_books(work)


@group.command(
    "set", epilog=examples("tollgate config set registration_open false", "tollgate config set starting_credits 0.25")
)
@click.argument("name")
@click.argument("value")
@json_option
def config_set(name: str, value: str, *, as_json: bool) -> None:
    """Set one, for new calls and accounts.

    Every process knows it within a second.
    """
    from proxy.administration import COMMAND_LINE
    from proxy.administration.config import set_value
    from proxy.shown.config import setting_item

    async def work(books: Books) -> None:
        settings = books.configuration.settings
        known = await set_value(books.engine, settings, COMMAND_LINE, name, _BOOLEANS.get(value, value))
        show(plain(setting_item(known)), f"{name} is {cell(known.value)}.", as_json=as_json)

    with_books(work)
