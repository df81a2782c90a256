"""`tollgate prices`: what models cost the operator."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy.cli.books import Books, with_books
from proxy.cli.options import examples, json_option
from proxy.cli.output import numbers, plain, progress, show, table, words
from proxy.errors import BadRequest, SettingsError

if TYPE_CHECKING:
    from proxy.pricelist import Converted


@click.group("prices")
def group() -> None:
    """The price book: what models cost."""


@group.command("sync", epilog=examples("tollgate prices diff", "tollgate prices sync"))
@click.option("--file", metavar="FILE", help="Write the list into this file instead, as Tollgate ships it.")
@click.option("--verbose", is_flag=True, help="Name every model that has no price of its own in the book, and why.")
@json_option
def prices_sync(file: str | None, *, verbose: bool, as_json: bool) -> None:
    """Write what is new in the open price list into the book.

    The list is that of the installed package genai-prices. Calls in flight keep their prices.
    """
    from proxy.administration import COMMAND_LINE, sync_prices
    from proxy.pricebook import as_file

    async def work(books: Books) -> int:
        return len(await sync_prices(books.engine, COMMAND_LINE, converted.prices))

    with progress("The price list") as advance:
        converted = _price_list()
        advance(0.5)
        if file is None:
            written = with_books(work)
        else:
            _write(Path(file), as_file(converted.prices))
            written = len(converted.prices.rows)
        advance(1)
    show(*_synced(converted, written, is_verbose=verbose), as_json=as_json)


@group.command("diff", epilog=examples("tollgate prices diff"))
@json_option
def prices_diff(*, as_json: bool) -> None:
    """Show what a sync would change."""
    from proxy.pricebook import changes
    from proxy.storage.database import database_now, reading

    converted = _price_list()

    async def work(books: Books) -> None:
        async with reading(books.engine) as connection:
            found = await changes(connection, converted.prices, await database_now(connection))
        lines = [change.as_text() for change in found] or [f"The book is up to date with {converted.prices.version}."]
        shown = {"version": converted.prices.version, "changes": [change.as_object() for change in found]}
        show(shown, "\n".join(lines), as_json=as_json)

    with_books(work)


@group.command("list", epilog=examples("tollgate prices list --provider openai", "tollgate prices list --model gpt-4o"))
@click.option("--provider", help="Only what this provider serves.")
@click.option("--model", help="Only this model, by its bare name or as PROVIDER/MODEL.")
@json_option
def prices_list(provider: str | None, model: str | None, *, as_json: bool) -> None:
    """Show what is on offer, and what it costs the operator.

    In dollars per million tokens.
    """
    from proxy.shown.prices import price_list

    async def work(books: Books) -> None:
        shown = plain(price_list(await books.catalog(), provider, model))
        columns = [
            *words("target"),
            *numbers(
                "prices.input",
                "cached_input=prices.cached_input",
                "prices.output",
                "context=context_tokens",
                "maximum=max_output_tokens",
                "markup_%=markup_percent",
            ),
        ]
        show(shown, table(shown["items"], columns, nothing="Nothing is on offer."), as_json=as_json)

    with_books(work)


@group.command(
    "set",
    epilog=examples("tollgate prices set openai/gpt-4o-mini input=0.15 output=0.60 web_search=0.01 tool_calls_max=5"),
)
@click.argument("target", metavar="PROVIDER/MODEL")
@click.argument("fields", nargs=-1, required=True, metavar="FIELD=VALUE…")
@json_option
def prices_set(target: str, fields: tuple[str, ...], *, as_json: bool) -> None:
    """Put a price of your own before that of the list.

    It counts for new calls. The fields are those of `[prices]` in the configuration, in dollars per million tokens: at
    least `input` and `output`. Those that hold others are JSON.
    """
    from proxy.administration import COMMAND_LINE, entry_from, set_price

    entry, parts = entry_from(_price_fields(fields)), _parts(target)

    async def work(books: Books) -> None:
        await set_price(books.engine, COMMAND_LINE, books.configuration.settings.providers, parts, entry)
        text = f"{target} has a price of your own."
        if target in books.configuration.settings.prices:
            text += " The configuration has one too, which goes before it."
        show({"target": target, "entry": plain(entry)}, text, as_json=as_json)

    with_books(work)


def _price_fields(fields: tuple[str, ...]) -> dict[str, Any]:
    price: dict[str, Any] = {}
    for field in fields:
        name, is_there, value = field.partition("=")
        if not is_there or not name or name in price:
            raise click.BadParameter(f"{field!r} is not FIELD=VALUE, each field once", param_hint="FIELD=VALUE")
        try:
            price[name] = json.loads(value) if value[:1] in {"{", "["} else value
        except ValueError as exc:
            raise click.BadParameter(f"the value of {name} is no JSON: {exc}", param_hint="FIELD=VALUE") from exc
    return price


def _parts(target: str) -> tuple[str, str]:
    from proxy.administration import parts_of

    try:
        return parts_of(target)
    except BadRequest as exc:
        raise click.BadParameter(str(exc), param_hint="PROVIDER/MODEL") from exc


@group.command("remove", epilog=examples("tollgate prices remove openai/gpt-4o-mini"))
@click.argument("target", metavar="PROVIDER/MODEL")
@json_option
def prices_remove(target: str, *, as_json: bool) -> None:
    """Take a price of your own back: that of the list counts again."""
    from proxy.administration import COMMAND_LINE, set_price

    parts = _parts(target)

    async def work(books: Books) -> None:
        await set_price(books.engine, COMMAND_LINE, books.configuration.settings.providers, parts, None)
        show({"target": target, "entry": None}, f"{target} has no price of your own any more.", as_json=as_json)

    with_books(work)


@group.command("history", epilog=examples("tollgate prices history openai/gpt-4o"))
@click.argument("target", metavar="PROVIDER/MODEL")
@json_option
def prices_history(target: str, *, as_json: bool) -> None:
    """Show all that the book ever said of a model.

    The newest first; amounts are nano-dollars per million.
    """
    from proxy.administration import price_history
    from proxy.shown.prices import past_of

    parts = _parts(target)

    async def work(books: Books) -> None:
        items = [plain(past_of(row)) for row in await price_history(books.engine, parts)]
        columns = words("valid_from", "source", "version", "entry")
        said = table(items, columns, nothing=f"The book says nothing of {target}.")
        show({"target": target, "items": items}, said, as_json=as_json)

    with_books(work)


# ---- the price list


def _write(file: Path, content: bytes) -> None:
    """Raises `SettingsError` when it cannot be."""
    try:
        file.write_bytes(content)
    except OSError as exc:
        raise SettingsError(f"{file} cannot be written: {exc.strerror}") from exc


def _price_list() -> "Converted":
    from proxy.pricelist import convert

    return convert(datetime.now(UTC).replace(microsecond=0))


def _synced(converted: "Converted", written: int, *, is_verbose: bool) -> tuple[dict[str, Any], str]:
    """What a sync has to say: for programs, and for people."""
    unbounded = converted.unbounded
    shown: dict[str, Any] = {
        "version": converted.prices.version,
        "written": written,
        "unbounded": unbounded,
        "rounded_up": converted.rounded_up,
        "left_out": converted.left_out,
    }
    lines = [f"{written} rows written from {converted.prices.version}."]
    if is_verbose:
        lines += [f"rounded up  {target}: {reason}" for target, reason in converted.rounded_up.items()]
        lines += [f"left out    {target}: {reason}" for target, reason in converted.left_out.items()]
        lines += [f"unbounded   {target}: not on offer until a maximum or a context is said" for target in unbounded]
    else:
        lines.append(
            f"{len(converted.rounded_up)} models are rounded up, {len(converted.left_out)} left out, {len(unbounded)}"
            " not on offer until a maximum or a context is said: --verbose names them."
        )
    return shown, "\n".join(lines)
