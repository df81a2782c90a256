"""`tollgate providers`: who serves new calls."""

from typing import Any

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import examples, json_option
from proxy.cli.output import numbers, plain, show, table, words


@click.group("providers")
def group() -> None:
    """Who serves new calls, and who does not.

    The providers are those of the configuration, seen with the environment of this command.
    """


@group.command("list", epilog=examples("tollgate providers list"))
@json_option
def providers_list(*, as_json: bool) -> None:
    """Show every provider, and whether it serves.

    Which candidates a server leaves alone for a while, because they fail, only that server knows.
    """
    from proxy.shown.providers import provider_list

    async def work(books: Books) -> None:
        catalog = await books.catalog()
        items = [
            {**plain(item), "kind": state.kind, "ready": state.is_ready}
            for item in provider_list(catalog).items
            for state in (catalog.providers[item.name],)
        ]
        rows = [{**item, "state": _state(item), "models": len(item["models"])} for item in items]
        columns = [*words("name", "kind"), *numbers("models"), *words("state")]
        said = table(rows, columns, nothing="No providers: name one in config.toml.")
        show({"items": items}, said, as_json=as_json)

    with_books(work)


def _state(item: dict[str, Any]) -> str:
    if item["enabled"]:
        return "enabled"
    return "disabled" if item["ready"] else "disabled, and lacks its address or a variable of the environment"


@group.command("enable", epilog=examples("tollgate providers enable openai"))
@click.argument("name")
@json_option
def providers_enable(name: str, *, as_json: bool) -> None:
    """Let a provider serve new calls.

    Every server knows it within a second.
    """
    _switch(name, is_enabled=True, as_json=as_json)


@group.command("disable", epilog=examples("tollgate providers disable openai"))
@click.argument("name")
@json_option
def providers_disable(name: str, *, as_json: bool) -> None:
    """Send a provider no new calls.

    Every server knows it within a second; calls in flight finish.
    """
    _switch(name, is_enabled=False, as_json=as_json)


def _switch(name: str, *, is_enabled: bool, as_json: bool) -> None:
    from proxy.administration import COMMAND_LINE, set_provider

    async def work(books: Books) -> None:
        known = (await books.catalog()).providers
        await set_provider(books.engine, COMMAND_LINE, known, name, is_enabled=is_enabled)
        said = f"{name} {'serves new calls' if is_enabled else 'gets no new calls'}."
        show({"name": name, "enabled": is_enabled}, said, as_json=as_json)

    with_books(work)
