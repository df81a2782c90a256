"""`tollgate`: serve, migrate, and the operator's commands.

Every command prints for people, or with `--json` one object for programs. What is wrong is one line on standard
error: exit status 2 for the configuration or the command's own words, 1 for everything else.
"""

import gc
import json
import os
import select
import signal
import socket
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import UTC
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from proxy import __version__
from proxy.errors import SettingsError, TollgateError, Unavailable
from proxy.settings import Configuration, load

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

    from proxy.administration import Rule
    from proxy.catalog import Catalog
    from proxy.identity.users import User
    from proxy.ledger.ledger import Ledger
    from proxy.metrics import Metrics
    from proxy.pricelist import Converted
    from proxy.pricing import MarkupKind
    from proxy.supervisor import Lifeline

FIRST_ADMIN = "admin@example.com"
FIRST_CREDITS = "10"

_KEYS_SHOWN_MAX = 1000
_INSTANTS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
email_option = click.option("--email", required=True, help="The user's e-mail address, or id.")
config_option = click.option("--config", metavar="FILE", help="The configuration (default: config.toml here).")


def main() -> None:
    """Run the command line and exit."""
    try:
        cli.main(prog_name="tollgate", standalone_mode=True)
    except TollgateError as exc:
        sys.exit(_fail(exc))
    except Exception as exc:
        if not _is_databases(exc):
            raise
        click.echo(f"tollgate: the database cannot be used: {_reason(exc)}", err=True)
        sys.exit(1)


def _fail(error: TollgateError) -> int:
    """Say what is wrong, in one line; returns the exit status."""
    reason = ""
    if isinstance(error, Unavailable) and error.__cause__ is not None:
        reason = f" ({_reason(error.__cause__)})"
    click.echo(f"tollgate: {error}{reason}", err=True)
    return 2 if isinstance(error, SettingsError) else 1


def _is_databases(error: Exception) -> bool:
    """Whether an error is the database's: it is damaged, not ours, or refuses us."""
    from alembic.util import CommandError  # noqa: PLC0415 - only when something went wrong
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415 - likewise

    return isinstance(error, SQLAlchemyError | CommandError | sqlite3.Error)


def _reason(error: BaseException) -> str:
    """What a driver says, in one line."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """An OpenAI-compatible proxy that sells model access on prepaid credits."""


@cli.command()
@config_option
@click.option("--host", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on; 0 takes any free one.")
@click.option(
    "--workers", type=click.IntRange(1, 64), help="How many processes serve; more than one on PostgreSQL only."
)
@json_option
def serve(config: str | None, host: str | None, port: int | None, workers: int | None, *, as_json: bool) -> None:
    """Serve until SIGTERM or SIGINT."""
    from proxy.observability import configure_logs  # noqa: PLC0415 - commands start fast without the server's parts
    from proxy.storage.database import sole_process  # noqa: PLC0415 - likewise
    from proxy.supervisor import listen  # noqa: PLC0415 - likewise

    configuration = load(os.environ, config=config, host=host, port=port, workers=workers)
    configure_logs(configuration.settings.logs.format, configuration.settings.logs.level)
    server = configuration.settings.server
    with ExitStack() as stack:
        if configuration.is_embedded:
            stack.enter_context(sole_process(configuration.sqlite_file))
        sockets = [stack.enter_context(each) for each in listen(server.host, server.port, server.workers)]
        if server.workers == 1:
            _run(_serve(configuration, sockets, as_json=as_json))
        else:
            sys.exit(_supervise(configuration, sockets, as_json=as_json))


@cli.command()
@config_option
@json_option
def migrate(config: str | None, *, as_json: bool) -> None:
    """Create the schema, or bring it up to date."""
    from proxy.app import prepare  # noqa: PLC0415
    from proxy.observability import configure_logs  # noqa: PLC0415
    from proxy.storage.database import SCHEMA_HEAD, sole_process  # noqa: PLC0415

    configuration = load(os.environ, config=config)
    configure_logs(configuration.settings.logs.format, configuration.settings.logs.level)
    with ExitStack() as stack:
        if configuration.is_embedded:
            stack.enter_context(sole_process(configuration.sqlite_file))
        _run(prepare(configuration))
    _show({"revision": SCHEMA_HEAD}, f"The schema is at revision {SCHEMA_HEAD}.", as_json=as_json)


@cli.group()
def users() -> None:
    """Accounts."""


@users.command("create")
@email_option
@click.option("--password", help="Needed only to log in; API keys work without.")
@click.option("--admin", is_flag=True, help="May use the admin endpoints.")
@click.option("--issuer", help="An issuer of `[[auth.issuers]]` whose tokens are the user's; needs --subject.")
@click.option("--subject", help="The `sub` by which that issuer knows the user.")
@json_option
def users_create(  # noqa: PLR0913 - one parameter an option
    email: str, password: str | None, issuer: str | None, subject: str | None, *, admin: bool, as_json: bool
) -> None:
    """Add a user with an empty wallet."""
    from proxy.administration import COMMAND_LINE  # noqa: PLC0415
    from proxy.administration.users import create  # noqa: PLC0415
    from proxy.identity.passwords import Passwords  # noqa: PLC0415

    if (issuer is None) != (subject is None):
        raise click.UsageError("--issuer and --subject go together")

    async def work(books: "_Books") -> None:
        user = await create(
            books.engine,
            Passwords(),
            COMMAND_LINE,
            {"email": email, "is_admin": admin},
            password=password,
            identity=(issuer, subject) if issuer is not None and subject is not None else None,
        )
        _show(
            {"id": user.id, "email": user.email, "is_admin": user.is_admin},
            f"Created {user.email} ({user.id}).",
            as_json=as_json,
        )

    _with_books(work)


@users.command("password")
@email_option
@click.option("--password", required=True, help="The new one.")
@json_option
def users_password(email: str, password: str, *, as_json: bool) -> None:
    """Set a user's password; whoever is logged in has to do so again."""
    from proxy.administration import COMMAND_LINE  # noqa: PLC0415
    from proxy.administration.users import set_password  # noqa: PLC0415
    from proxy.identity.passwords import Passwords  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        user = await books.user(email)
        await set_password(books.engine, Passwords(), COMMAND_LINE, user, password)
        _show({"id": user.id, "email": user.email}, f"{user.shown_name} has another password.", as_json=as_json)

    _with_books(work)


@cli.group()
def keys() -> None:
    """API keys."""


@keys.command("create")
@email_option
@click.option("--name", default="", help="What the key is for.")
@click.option(
    "--scope",
    type=click.Choice(["inference", "manage", "admin"]),
    default="inference",
    show_default=True,
    help="What the key may be used for.",
)
@click.option("--limit-amount", help="Credits that it may spend, such as 2.5.")
@click.option(
    "--limit-period", type=click.Choice(["day", "month"]), help="By UTC day or month; without it the limit is for ever."
)
@click.option("--expires-at", type=click.DateTime(_INSTANTS), help="When it ends, in UTC unless it says otherwise.")
@click.option(
    "--allowed-models", multiple=True, metavar="NAMES", help="Models, with * and ?; separated by commas, or repeated."
)
@json_option
def keys_create(  # noqa: PLR0913 - one parameter an option
    *,
    email: str,
    name: str,
    scope: str,
    limit_amount: str | None,
    limit_period: str | None,
    expires_at: "datetime | None",
    allowed_models: tuple[str, ...],
    as_json: bool,
) -> None:
    """Make an API key and print it, this once."""
    from proxy.administration import COMMAND_LINE  # noqa: PLC0415
    from proxy.administration.keys import create  # noqa: PLC0415
    from proxy.identity.keys import KeyTerms, Scope  # noqa: PLC0415
    from proxy.units import AmountError, micros_of, parse_credits  # noqa: PLC0415

    try:
        limit = None if limit_amount is None else parse_credits(limit_amount)
    except AmountError as exc:
        raise click.BadParameter(str(exc), param_hint="--limit-amount") from exc
    if expires_at is not None and expires_at.tzinfo is None:
        expires_at = expires_at.replace(tzinfo=UTC)
    models = [model.strip() for names in allowed_models for model in names.split(",") if model.strip()]
    terms = KeyTerms(
        name=name,
        scope=Scope(scope),
        expires_at=None if expires_at is None else micros_of(expires_at),
        allowed_models=models or None,
        limit_amount=limit,
        limit_period=limit_period,
    )

    async def work(books: "_Books") -> None:
        user = await books.user(email)
        made, _ = await create(books.engine, COMMAND_LINE, user.id, terms)
        _show(
            {"key": made.secret, "id": made.id, "email": user.email, "name": name, "scope": scope},
            made.secret,
            as_json=as_json,
        )

    _with_books(work)


@keys.command("list")
@email_option
@json_option
def keys_list(email: str, *, as_json: bool) -> None:
    """Show a user's keys, newest first, by their ids and beginnings."""
    from proxy.edge.keys import shown  # noqa: PLC0415
    from proxy.identity.keys import list_keys  # noqa: PLC0415
    from proxy.identity.users import find_user  # noqa: PLC0415
    from proxy.storage.database import reading  # noqa: PLC0415
    from proxy.units import now_micros  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        async with reading(books.engine) as connection:
            user = await find_user(connection, email)
            found = await list_keys(connection, user.id, limit=_KEYS_SHOWN_MAX)
        items = [shown(key, now_micros()) for key in found]
        lines = [
            f"{item['id']}  {item['prefix']}…  {item['scope']:9}  {'active ' if item['is_active'] else 'revoked'}"
            f"  spent {item['spent']}  {item['name']}".rstrip()
            for item in items
        ]
        _show({"email": user.email, "items": items}, "\n".join(lines) or "no keys", as_json=as_json)

    _with_books(work)


@keys.command("revoke")
@email_option
@click.option("--id", "key_id", required=True, help="The key's id, as `keys list` shows it.")
@json_option
def keys_revoke(email: str, key_id: str, *, as_json: bool) -> None:
    """Close a key for good: its very next call is refused."""
    from proxy.administration import COMMAND_LINE  # noqa: PLC0415
    from proxy.administration.keys import revoke  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        user = await books.user(email)
        key = await revoke(books.engine, COMMAND_LINE, user.id, key_id)
        _show({"id": key.id, "email": user.email, "is_active": False}, f"Revoked {key.prefix}….", as_json=as_json)

    _with_books(work)


@cli.group()
def credits() -> None:  # noqa: A001 - the command's name
    """Balances and top-ups."""


@credits.command("grant")
@email_option
@click.option("--amount", required=True, help="Credits to add, such as 2.5.")
@click.option("--description", default="granted by the operator", show_default=True)
@click.option("--idempotency-key", help="Sent again with the same key, the grant is booked once.")
@json_option
def credits_grant(email: str, amount: str, description: str, idempotency_key: str | None, *, as_json: bool) -> None:
    """Top up a user's wallet."""
    from proxy.administration import COMMAND_LINE  # noqa: PLC0415
    from proxy.administration.credits import Order, book  # noqa: PLC0415
    from proxy.ledger.decide import CreditType  # noqa: PLC0415
    from proxy.units import AmountError, format_credits, new_id, parse_credits  # noqa: PLC0415

    try:
        nanos = parse_credits(amount)
    except AmountError as exc:
        raise click.BadParameter(str(exc), param_hint="--amount") from exc
    if nanos <= 0:
        raise click.BadParameter("must be above zero", param_hint="--amount")
    sent_key = idempotency_key or new_id("idem")
    order = Order(type=CreditType.TOPUP, amount=nanos, description=description, idempotency_key=sent_key)

    async def work(books: "_Books") -> None:
        user = await books.user(email)
        async with books.ledger() as ledger, _naming(sent_key):
            booked = await book(books.engine, ledger, COMMAND_LINE, user.id, order)
        balance = format_credits(booked.entry.balance_after)
        _show(
            {"email": user.email, "amount": format_credits(nanos), "balance": balance, "replayed": booked.is_replay},
            f"{user.email} has {balance} credits" + (" (booked before)." if booked.is_replay else "."),
            as_json=as_json,
        )

    _with_books(work)


@asynccontextmanager
async def _naming(idempotency_key: str) -> "AsyncIterator[None]":
    """Tell the operator, when the outcome is not known, with which key sending it again is safe."""
    try:
        yield
    except Unavailable as exc:
        raise Unavailable(f"{exc} It may yet be booked: repeat it with --idempotency-key {idempotency_key}") from exc


@credits.command("balance")
@email_option
@json_option
def credits_balance(email: str, *, as_json: bool) -> None:
    """Show what a user has."""
    from proxy.edge.credits import read_balance  # noqa: PLC0415
    from proxy.identity.users import find_user  # noqa: PLC0415
    from proxy.storage.database import reading  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        async with reading(books.engine) as connection:
            user = await find_user(connection, email)
            found = await read_balance(connection, user.wallet_id)
        _show(
            {
                "email": user.email,
                "balance": found.balance,
                "reserved": found.reserved,
                "available": found.available,
            },
            f"balance {found.balance}, reserved {found.reserved}, available {found.available}",
            as_json=as_json,
        )

    _with_books(work)


@cli.group()
def prices() -> None:
    """The price book: what models cost."""


@prices.command("sync")
@click.option("--file", metavar="FILE", help="Write the list into this file instead, as Tollgate ships it.")
@json_option
def prices_sync(file: str | None, *, as_json: bool) -> None:
    """Write what is new in the open price list (genai-prices) into the book; calls in flight keep their prices."""
    from proxy.administration import COMMAND_LINE, sync_prices  # noqa: PLC0415
    from proxy.pricebook import as_file  # noqa: PLC0415

    converted = _price_list()
    if file is not None:
        Path(file).write_bytes(as_file(converted.prices))
        _show(*_synced(converted, len(converted.prices.rows)), as_json=as_json)
        return

    async def work(books: "_Books") -> None:
        changes = await sync_prices(books.engine, COMMAND_LINE, converted.prices)
        _show(*_synced(converted, len(changes)), as_json=as_json)

    _with_books(work)


@prices.command("diff")
@json_option
def prices_diff(*, as_json: bool) -> None:
    """Show what a sync would change."""
    from proxy.pricebook import changes  # noqa: PLC0415
    from proxy.storage.database import database_now, reading  # noqa: PLC0415

    converted = _price_list()

    async def work(books: "_Books") -> None:
        async with reading(books.engine) as connection:
            found = await changes(connection, converted.prices, await database_now(connection))
        lines = [change.as_text() for change in found] or [f"The book is up to date with {converted.prices.version}."]
        shown = {"version": converted.prices.version, "changes": [change.as_object() for change in found]}
        _show(shown, "\n".join(lines), as_json=as_json)

    _with_books(work)


@prices.command("list")
@click.option("--provider", help="Only what this provider serves.")
@click.option("--model", help="Only this model, by its bare name or as PROVIDER/MODEL.")
@json_option
def prices_list(provider: str | None, model: str | None, *, as_json: bool) -> None:
    """Show what is on offer just now and what it costs the operator, in dollars per million tokens."""
    from proxy.edge.admin import price_list  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        items = price_list(await books.catalog(), provider, model).items
        lines = [
            f"{item.target}  input {item.prices['input']}, output {item.prices['output']},"
            f" context {item.context_tokens}, maximum {item.max_output_tokens}, markup {item.markup_percent} %"
            for item in items
        ]
        _show({"items": [_builtin(item) for item in items]}, "\n".join(lines) or "nothing", as_json=as_json)

    _with_books(work)


@prices.command("set")
@click.argument("target", metavar="PROVIDER/MODEL")
@click.argument("fields", nargs=-1, required=True, metavar="FIELD=VALUE…")
@json_option
def prices_set(target: str, fields: tuple[str, ...], *, as_json: bool) -> None:
    """Put a price of your own before that of the list, for new calls.

    The fields are those of `[prices]` in the configuration, in dollars per million tokens: at least `input` and
    `output`. Those that hold others are JSON.

    tollgate prices set openai/gpt-4o-mini input=0.15 output=0.60 web_search=0.01 tool_calls_max=5
    """
    from proxy.administration import COMMAND_LINE, entry_from, set_price  # noqa: PLC0415
    from proxy.errors import NotFound  # noqa: PLC0415

    entry = entry_from(_price_fields(fields))
    provider, model = _target(target)

    async def work(books: "_Books") -> None:
        if provider not in books.configuration.settings.providers:
            raise NotFound(f"There is no provider {provider!r} in the configuration.")
        await set_price(books.engine, COMMAND_LINE, provider, model, entry)
        text = f"{target} has a price of your own."
        if target in books.configuration.settings.prices:
            text += " The configuration has one too, which goes before it."
        _show({"target": target, "entry": _builtin(entry)}, text, as_json=as_json)

    _with_books(work)


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


def _target(target: str) -> tuple[str, str]:
    provider, _, model = target.partition("/")
    if not provider or not model:
        raise click.BadParameter(f"{target!r} is not of the form provider/model", param_hint="PROVIDER/MODEL")
    return provider, model


@prices.command("remove")
@click.argument("target", metavar="PROVIDER/MODEL")
@json_option
def prices_remove(target: str, *, as_json: bool) -> None:
    """Take a price of your own back: that of the list counts again."""
    from proxy.administration import COMMAND_LINE, set_price  # noqa: PLC0415

    provider, model = _target(target)

    async def work(books: "_Books") -> None:
        await set_price(books.engine, COMMAND_LINE, provider, model, None)
        _show({"target": target, "entry": None}, f"{target} has no price of your own any more.", as_json=as_json)

    _with_books(work)


@prices.command("history")
@click.argument("target", metavar="PROVIDER/MODEL")
@json_option
def prices_history(target: str, *, as_json: bool) -> None:
    """Show all that the book ever said of a model, the newest first; amounts are nano-dollars per million."""
    from proxy.administration import price_history  # noqa: PLC0415
    from proxy.units import format_instant  # noqa: PLC0415

    provider, model = _target(target)

    async def work(books: "_Books") -> None:
        past = await price_history(books.engine, provider, model)
        items = [
            {
                "source": row.source,
                "version": row.version,
                "valid_from": format_instant(row.valid_from),
                "entry": row.entry,
            }
            for row in past
        ]
        lines = [f"{item['valid_from']}  {item['source']} ({item['version']})  {item['entry']}" for item in items]
        text = "\n".join(lines) or f"The book says nothing of {target}."
        _show({"target": target, "items": items}, text, as_json=as_json)

    _with_books(work)


@cli.group()
def markup() -> None:
    """The operator's percentage on the provider's cost."""


@markup.command("show")
@json_option
def markup_show(*, as_json: bool) -> None:
    """Show the default rule and all others, the most specific kind first."""
    from proxy.administration import default_percent, rules  # noqa: PLC0415
    from proxy.storage.database import reading  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        async with reading(books.engine) as connection:
            default = await default_percent(connection)
        others = await rules(books.engine)
        lines = [f"default {default} %", *map(_rule_text, others)]
        _show({"percent": default, "rules": [_builtin(rule) for rule in others]}, "\n".join(lines), as_json=as_json)

    _with_books(work)


@markup.command("rules")
@json_option
def markup_rules(*, as_json: bool) -> None:
    """Show the rules beside the default one, the most specific kind first."""
    from proxy.administration import rules  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        found = await rules(books.engine)
        text = "\n".join(map(_rule_text, found)) or "no rules"
        _show({"items": [_builtin(rule) for rule in found]}, text, as_json=as_json)

    _with_books(work)


def _rule_text(rule: "Rule") -> str:
    return f"{rule.kind} {rule.subject} {rule.percent} %"


def _subject_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that say for what a rule is."""
    command = click.option("--provider", help="For this provider.")(command)
    command = click.option("--model", help="For this model: as clients name it, as PROVIDER/MODEL, or bare.")(command)
    return click.option("--user", help="For this user, by e-mail address or id.")(command)


async def _subject(
    books: "_Books", user: str | None, model: str | None, provider: str | None
) -> "tuple[MarkupKind, str] | None":
    """The kind and the subject of a rule; None for the default one. Raises `NotFound` for a user that is not there."""
    from proxy.identity.users import find_user  # noqa: PLC0415
    from proxy.pricing import MarkupKind  # noqa: PLC0415
    from proxy.storage.database import reading  # noqa: PLC0415

    if sum(subject is not None for subject in (user, model, provider)) > 1:
        raise click.UsageError("a rule is for a user, a model or a provider: name one of them")
    if user is not None:
        async with reading(books.engine) as connection:
            return MarkupKind.USER, (await find_user(connection, user)).id
    if model is not None:
        return MarkupKind.MODEL, model
    return None if provider is None else (MarkupKind.PROVIDER, provider)


@markup.command("set")
@click.argument("percent")
@_subject_options
@json_option
def markup_set(percent: str, user: str | None, model: str | None, provider: str | None, *, as_json: bool) -> None:
    """Set the default rule, or with an option the one for a user, a model or a provider; for new calls.

    The most specific rule counts: that of the user, else of the model, else of the provider, else the default one.
    """
    from proxy.administration import (  # noqa: PLC0415
        COMMAND_LINE,
        add_rule,
        change_rule,
        find_rule,
        set_default_markup,
    )

    async def work(books: "_Books") -> None:
        subject = await _subject(books, user, model, provider)
        if subject is None:
            after = await set_default_markup(books.engine, COMMAND_LINE, percent)
            _show({"percent": after}, f"The default markup is {after} %.", as_json=as_json)
            return
        found = await find_rule(books.engine, *subject)
        if found is None:
            rule = await add_rule(books.engine, COMMAND_LINE, *subject, percent)
        else:
            rule = await change_rule(books.engine, COMMAND_LINE, found.id, percent)
        _show(_builtin(rule), f"The markup of {_rule_text(rule)}.", as_json=as_json)

    _with_books(work)


@markup.command("remove")
@_subject_options
@json_option
def markup_remove(user: str | None, model: str | None, provider: str | None, *, as_json: bool) -> None:
    """Take the rule for a user, a model or a provider away."""
    from proxy.administration import COMMAND_LINE, find_rule, remove_rule  # noqa: PLC0415
    from proxy.errors import NotFound  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        subject = await _subject(books, user, model, provider)
        if subject is None:
            raise click.UsageError("name a user, a model or a provider; the default rule can only be set")
        rule = await find_rule(books.engine, *subject)
        if rule is None:
            raise NotFound(f"There is no rule for the {subject[0]} {subject[1]!r}.")
        await remove_rule(books.engine, COMMAND_LINE, rule.id)
        _show(_builtin(rule), f"There is no rule for the {rule.kind} {rule.subject} any more.", as_json=as_json)

    _with_books(work)


@markup.command("preview")
@click.argument("model")
@click.option("--user", help="Who would make the call, by e-mail address or id (default: somebody without a rule).")
@click.option("--provider", help="Only at this provider.")
@click.option("--service-tier", help="Such as flex.")
@click.option("--input-tokens", type=click.IntRange(0), default=1_000_000, show_default=True)
@click.option("--output-tokens", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "usage", "--usage", multiple=True, metavar="FIELD=NUMBER", help="More of it, such as cached_input_tokens=500."
)
@json_option
def markup_preview(*, model: str, user: str | None, usage: tuple[str, ...], as_json: bool, **more: Any) -> None:
    """Show what a call of MODEL would be charged, and by which rule; nothing is called."""
    import msgspec  # noqa: PLC0415

    from proxy.edge.admin import Hypothesis, quoted  # noqa: PLC0415
    from proxy.identity.users import find_user  # noqa: PLC0415
    from proxy.storage.database import reading  # noqa: PLC0415

    fields = {"model": model, "user": user, **more, **dict(field.split("=", 1) for field in usage if "=" in field)}
    try:
        hypothesis = msgspec.convert(fields, Hypothesis, strict=False)
    except msgspec.ValidationError as exc:
        raise click.BadParameter(str(exc), param_hint="--usage") from exc

    async def work(books: "_Books") -> None:
        user_id = None
        if user is not None:
            async with reading(books.engine) as connection:
                user_id = (await find_user(connection, user)).id
        shown = _builtin(quoted(await books.catalog(), user_id, hypothesis))
        lines = [
            f"{item['provider']}/{item['model']}: {item['charged']} credits ({item['provider_cost']} and"
            f" {item['rule']['percent']} % of the {item['rule']['kind']} rule)"
            for item in shown["items"]
        ]
        _show(shown, "\n".join(lines), as_json=as_json)

    _with_books(work)


@cli.group()
def providers() -> None:
    """Who serves: the providers of the configuration, seen with the environment of this command."""


@providers.command("list")
@json_option
def providers_list(*, as_json: bool) -> None:
    """Show every provider, whether it serves new calls, and its models.

    Which candidates a server leaves alone for a while, because they fail, only that server knows.
    """
    from proxy.edge.llm import provider_list  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        catalog = await books.catalog()
        items = [
            {**_builtin(item), "kind": state.kind, "ready": state.is_ready}
            for item in provider_list(catalog).items
            for state in (catalog.providers[item.name],)
        ]
        lines = [
            f"{item['name']}  {item['kind']}  {_provider_text(item)}  {len(item['models'])} models" for item in items
        ]
        _show({"items": items}, "\n".join(lines) or "no providers: name one in config.toml", as_json=as_json)

    _with_books(work)


def _provider_text(item: dict[str, Any]) -> str:
    if item["enabled"]:
        return "enabled"
    return "disabled" if item["ready"] else "disabled, and lacks its address or a variable of the environment"


@providers.command("enable")
@click.argument("name")
@json_option
def providers_enable(name: str, *, as_json: bool) -> None:
    """Let a provider serve new calls, on every server within a second."""
    _switch(name, is_enabled=True, as_json=as_json)


@providers.command("disable")
@click.argument("name")
@json_option
def providers_disable(name: str, *, as_json: bool) -> None:
    """Send a provider no new calls, on every server within a second; those in flight finish."""
    _switch(name, is_enabled=False, as_json=as_json)


def _switch(name: str, *, is_enabled: bool, as_json: bool) -> None:
    from proxy.administration import COMMAND_LINE, set_provider  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        known = (await books.catalog()).providers
        await set_provider(books.engine, COMMAND_LINE, known, name, is_enabled=is_enabled)
        text = f"{name} {'serves new calls' if is_enabled else 'gets no new calls'}."
        _show({"name": name, "enabled": is_enabled}, text, as_json=as_json)

    _with_books(work)


@cli.command()
@json_option
def sweep(*, as_json: bool) -> None:
    """Free what dead processes hold open, when no server is left to do it.

    On PostgreSQL whoever is past its lease is watched for one more before it is taken for dead, which takes 20
    seconds. On SQLite everything open is a dead process's, unless a server runs: then nothing is touched.
    """
    from proxy.ledger.recovery import Swept, sweep_by_hand  # noqa: PLC0415
    from proxy.storage.database import sole_process  # noqa: PLC0415

    async def work(books: "_Books") -> tuple[Swept, bool]:
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

    swept, is_served = _with_books(work)
    text = f"Dead processes fenced: {swept.fenced}. Reservations expired: {swept.expired}."
    if is_served:
        text = "Nothing was touched: a server runs, and what is open is its own (it swept when it started)."
    _show({"fenced": swept.fenced, "expired": swept.expired, "is_served": is_served}, text, as_json=as_json)


@cli.command()
@json_option
def audit(*, as_json: bool) -> None:
    """Check that the books add up; exit status 1 when they do not."""
    from proxy.ledger.audit import audit as check  # noqa: PLC0415

    async def work(books: "_Books") -> bool:
        report = await check(books.engine)
        _show(report.as_object(), report.as_text(), as_json=as_json)
        return report.is_clean

    if not _with_books(work):
        sys.exit(1)


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def backup(file: Path, *, as_json: bool) -> None:
    """Write the books of an embedded database into a new FILE, also while a server runs.

    PostgreSQL has its own means: pg_dump, or a base backup and its write-ahead log.
    """
    from proxy.storage.database import copy_sqlite  # noqa: PLC0415

    async def work(books: "_Books") -> None:
        if not books.configuration.is_embedded:
            raise SettingsError("the books are on PostgreSQL: use pg_dump, which needs no help of ours")
        copy_sqlite(books.configuration.sqlite_file, file)
        _show({"file": str(file)}, f"The books are in {file}.", as_json=as_json)

    _with_books(work)


# ---- the price list


def _price_list() -> "Converted":
    from datetime import UTC, datetime  # noqa: PLC0415

    from proxy.pricelist import convert  # noqa: PLC0415 - slow to import

    return convert(datetime.now(UTC).replace(microsecond=0))


def _synced(converted: "Converted", written: int) -> tuple[dict[str, Any], str]:
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
    lines += [f"rounded up  {target}: {reason}" for target, reason in converted.rounded_up.items()]
    lines += [f"left out    {target}: {reason}" for target, reason in converted.left_out.items()]
    lines += [
        f"unbounded   {target}: not on offer until a maximum or a context is said" for target in shown["unbounded"]
    ]
    return shown, "\n".join(lines)


# ---- serving


STOP_S_MAX = 45.0
"""How long a worker may take beyond the time for its calls: as long as the ledger waits for its database, and a bit."""

_DATABASE_AGAIN_S = 0.5
"""A worker that replaces another and finds the database away looks again after so long."""

_ENDING_S_MAX = 5.0
"""How long calls that were ended because the server stops may take for their last words."""


def _supervise(configuration: Configuration, sockets: list[socket.socket], *, as_json: bool) -> int:
    """Serve in as many processes as there are `sockets`; returns the exit status."""
    import proxy.app  # noqa: F401, PLC0415 - before the workers are forked, which share it then
    from proxy.edge import server  # noqa: F401, PLC0415 - likewise
    from proxy.metrics import DEATHS, Metrics, SharedMemory  # noqa: PLC0415
    from proxy.supervisor import Lifeline, Supervisor  # noqa: PLC0415

    settings = configuration.settings.server
    memory = SharedMemory(settings.workers + 1)  # with a region for the supervisor

    def work(lifeline: Lifeline) -> int:
        metrics = Metrics(memory, lifeline.number)
        serving = partial(_serve, configuration, sockets, as_json=as_json, lifeline=lifeline, metrics=metrics)
        try:
            return _serve_when_possible(serving, lifeline)
        except TollgateError as exc:
            return _fail(exc)

    _run(_check_schema(configuration))  # once and for all workers
    metrics = Metrics(memory, settings.workers)
    metrics.add(DEATHS, (), 0)
    announced = sockets[0].getsockname()[:2]
    gc.freeze()
    return Supervisor(
        work,
        settings.workers,
        sockets,
        stop_s_max=settings.notice_s + settings.drain_s + STOP_S_MAX,
        on_ready=lambda: _announce(configuration, announced, None, as_json=as_json),
        on_death=lambda: metrics.add(DEATHS),
    ).run()


def _serve_when_possible(serving: Callable[[], Coroutine[Any, Any, None]], lifeline: "Lifeline") -> int:
    """Serve as one worker of several; returns the exit status.

    Whoever replaces another waits for a database that is away, as its siblings do: dying of it again and again would
    only make the pauses longer after which it is replaced. Raises `Unavailable` in a server that has never been ready.
    """
    import structlog  # noqa: PLC0415

    is_waiting = False
    while True:
        try:
            _run(serving())
        except Unavailable as exc:
            if not lifeline.is_replacement:
                raise
            if not is_waiting:
                is_waiting = True
                reason = _reason(exc.__cause__ or exc)
                structlog.get_logger(__name__).warning("worker_waits", worker=lifeline.number, reason=reason)
        else:
            return 0
        is_orphan, _, _ = select.select([lifeline.fd], [], [], _DATABASE_AGAIN_S)
        if is_orphan:
            return 1


async def _check_schema(configuration: Configuration) -> None:
    from proxy.storage.database import check_schema, connect  # noqa: PLC0415

    engine = connect(configuration.database_url, pooled=False)
    try:
        await check_schema(engine)
    finally:
        await engine.dispose()


async def _serve(
    configuration: Configuration,
    sockets: list[socket.socket],
    *,
    as_json: bool,
    lifeline: "Lifeline | None" = None,
    metrics: "Metrics | None" = None,
) -> None:
    """Serve in this process until SIGTERM; of several `sockets` the one with the worker's number is its own."""
    from proxy.app import Tollgate, build, prepare  # noqa: PLC0415
    from proxy.edge.protocol import server_config  # noqa: PLC0415
    from proxy.edge.server import Server, Stopping  # noqa: PLC0415

    if configuration.is_embedded:
        await prepare(configuration)
    tollgate = Tollgate(configuration, metrics)
    async with tollgate.open():
        first_key = await _first_start(tollgate.engine, tollgate.ledger) if configuration.is_embedded else None
        own = sockets[0 if lifeline is None else lifeline.number]

        def on_ready() -> None:
            spare_the_collector()
            if lifeline is None:
                _announce(configuration, own.getsockname()[:2], first_key, as_json=as_json)
            else:
                lifeline.say_ready()

        settings = configuration.settings.server
        stopping = Stopping(
            notice_s=settings.notice_s,
            drain_s=settings.drain_s,
            on_stopping=tollgate.stop,
            end_calls=lambda: tollgate.exchange.end_calls(_ENDING_S_MAX),
        )
        config = server_config(build(tollgate), drain_s=settings.drain_s)
        server = Server(config, stopping, on_ready, lifeline_fd=None if lifeline is None else lifeline.fd)
        # uvicorn raises the signal that stopped it once more when it is done; being stopped is no failure.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        await server.serve(sockets=[own, *(each for each in sockets if each is not own)])


_GC_THRESHOLDS = (50_000, 20, 100)
"""CPython's own 700 would have the collector look at every call in flight several times; calls leave few cycles."""


def spare_the_collector() -> None:
    """Take what the start has made, which stays, out of the garbage collector's sight, and let it run less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


async def _first_start(engine: Any, ledger: "Ledger") -> str | None:
    """Make the first admin and its key; None when there are users already."""
    from proxy.administration.credits import FIRST_START_KEY  # noqa: PLC0415
    from proxy.identity.keys import KeyTerms, create_key  # noqa: PLC0415
    from proxy.identity.users import create_user, has_users  # noqa: PLC0415
    from proxy.ledger.decide import Credit, CreditType  # noqa: PLC0415
    from proxy.storage.database import writing  # noqa: PLC0415
    from proxy.units import parse_credits  # noqa: PLC0415

    async with writing(engine) as connection:
        if await has_users(connection):
            return None
        admin = await create_user(connection, FIRST_ADMIN, is_admin=True)
        key = await create_key(connection, admin, KeyTerms(name="first key"))
    await ledger.credit(
        Credit(
            wallet_id=admin.wallet_id,
            type=CreditType.TOPUP,
            amount=parse_credits(FIRST_CREDITS),
            description="first start",
            idempotency_key=FIRST_START_KEY,
        )
    )
    return key.secret


def _announce(configuration: Configuration, address: tuple[str, int], first_key: str | None, *, as_json: bool) -> None:
    host, port = address
    shown = f"[{host}]" if ":" in host else "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 - compared only
    base_url = f"http://{shown}:{port}/v1"
    if as_json:
        click.echo(json.dumps({"base_url": base_url, "host": host, "port": port, "key": first_key}))
        return
    click.echo(f"Tollgate {__version__} serves on {base_url}")
    click.echo(f"Database: {configuration.sqlite_file if configuration.is_embedded else 'PostgreSQL'}")
    enabled = [name for name in configuration.providers if name in configuration.enabled]
    click.echo(f"Providers: {', '.join(enabled) or 'none; name one in config.toml'}")
    if first_key is not None:
        click.echo(_FIRST_STEPS.format(key=first_key, base_url=base_url, credits=FIRST_CREDITS, email=FIRST_ADMIN))
    elif configuration.is_embedded:
        click.echo(f"New key: {_program()} keys create --email {FIRST_ADMIN}   (the first one is not shown again)")
    else:
        click.echo(f"New user: {_program()} users create --email …   New key: {_program()} keys create --email …")


def _program() -> str:
    """How this program was called, to be called so again."""
    return "python -m proxy" if sys.argv[0].endswith("__main__.py") else os.path.relpath(sys.argv[0])


# Not indented: pasted into a Python prompt, an indented line is an error.
_FIRST_STEPS = """
This first start made an admin, {email}, with {credits} credits and an API key.
It is shown this once:

{key}

Try it with curl:

curl -N {base_url}/chat/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "demo-chat", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'

or in Python, with `pip install openai`:

from openai import OpenAI
client = OpenAI(base_url="{base_url}", api_key="{key}")
print(client.chat.completions.create(model="demo-chat", messages=[{{"role": "user", "content": "Hello!"}}]).choices[0].message.content)
"""  # noqa: E501 - three lines of Python are three lines


# ---- the books, for commands


class _Books:
    """The database of a command, with the ledger when it is needed."""

    def __init__(self, configuration: Configuration) -> None:
        from proxy.storage.database import connect  # noqa: PLC0415

        self.configuration = configuration
        self.engine = connect(configuration.database_url, pooled=False)

    async def user(self, email: str) -> "User":
        """The user with this address or id. Raises `NotFound`."""
        from proxy.identity.users import find_user  # noqa: PLC0415
        from proxy.storage.database import reading  # noqa: PLC0415

        async with reading(self.engine) as connection:
            return await find_user(connection, email)

    async def catalog(self) -> "Catalog":
        """What is on offer just now, as a server on this database sees it."""
        from proxy.app import catalog_loader  # noqa: PLC0415

        return await catalog_loader(self.configuration, self.engine).load()

    @asynccontextmanager
    async def ledger(self) -> "AsyncIterator[Ledger]":
        from proxy.app import store  # noqa: PLC0415
        from proxy.ledger.ledger import Ledger  # noqa: PLC0415

        ledger = Ledger(store(self.configuration, self.engine, is_server=False))
        ledger.start()
        try:
            yield ledger
        finally:
            await ledger.aclose(wait_s=0)


def _builtin(struct: Any) -> Any:
    """A struct as plain objects."""
    import msgspec  # noqa: PLC0415

    return msgspec.to_builtins(struct)


def _with_books(work: Callable[[_Books], Awaitable[Any]]) -> Any:
    """Run `work` on the configured database, whose schema must be up to date."""
    from proxy.observability import configure_logs  # noqa: PLC0415
    from proxy.storage.database import check_schema  # noqa: PLC0415

    configuration = load(os.environ)
    configure_logs(configuration.settings.logs.format, configuration.settings.logs.level)
    if configuration.is_embedded and not configuration.sqlite_file.exists():
        raise SettingsError(f"there is no database {configuration.sqlite_file} yet: run `tollgate migrate` first")

    async def run() -> Any:
        books = _Books(configuration)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(books.engine.dispose)
            await check_schema(books.engine)
            return await work(books)

    return _run(run())


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    import uvloop  # noqa: PLC0415

    return uvloop.run(coroutine)


def _show(shown: dict[str, Any], text: str, *, as_json: bool) -> None:
    click.echo(json.dumps(shown) if as_json else text)
