"""`tollgate markup`: the operator's percentage on the provider's cost."""

from typing import TYPE_CHECKING, Any

import click
import msgspec

from proxy.cli.books import Books, with_books
from proxy.cli.options import Command, examples, json_option
from proxy.cli.output import numbers, plain, show, table, words
from proxy.errors import NotFound
from proxy.pricing import MarkupKind
from proxy.units import format_percent

if TYPE_CHECKING:
    from proxy.administration import Rule

_RULES = [*words("kind", "subject", "id"), *numbers("percent")]


@click.group("markup")
def group() -> None:
    """The operator's percentage on the provider's cost."""


@group.command("show", epilog=examples("tollgate markup show"))
@json_option
def markup_show(*, as_json: bool) -> None:
    """Show the default rule and all others.

    The most specific kind first: of users, of models, of providers.
    """
    from proxy.administration import rules

    async def work(books: Books) -> None:
        default = format_percent((await books.catalog()).rules.default_bps)
        others = await rules(books.engine)
        items = [plain(rule) for rule in others]
        rows = [{"kind": "default", "percent": default}, *items]
        show({"percent": default, "rules": items}, table(rows, _RULES, nothing=""), as_json=as_json)

    with_books(work)


@group.command("rules", epilog=examples("tollgate markup rules --json"))
@json_option
def markup_rules(*, as_json: bool) -> None:
    """Show the rules beside the default one.

    The most specific kind first: of users, of models, of providers.
    """
    from proxy.administration import rules

    async def work(books: Books) -> None:
        found = await rules(books.engine)
        items = [plain(rule) for rule in found]
        show({"items": items}, table(items, _RULES, nothing="No rules beside the default one."), as_json=as_json)

    with_books(work)


def _rule_text(rule: "Rule") -> str:
    return f"{rule.kind} {rule.subject} {rule.percent} %"


def _subject_options(command: Command) -> Command:
    """The options of a command that say for what a rule is."""
    command = click.option("--provider", help="For this provider.")(command)
    command = click.option("--model", help="For this model: as clients name it, as PROVIDER/MODEL, or bare.")(command)
    return click.option("--user", help="For this user, by e-mail address or id.")(command)


async def _subject(
    books: Books, user: str | None, model: str | None, provider: str | None
) -> tuple[MarkupKind, str] | None:
    """The kind and the subject of a rule; None for the default one. Raises `NotFound` for a user that is not there."""
    if sum(subject is not None for subject in (user, model, provider)) > 1:
        raise click.UsageError("a rule is for a user, a model or a provider: name one of them")
    if user is not None:
        return MarkupKind.USER, (await books.user(user)).id
    if model is not None:
        return MarkupKind.MODEL, model
    return None if provider is None else (MarkupKind.PROVIDER, provider)


@group.command(
    "set",
    epilog=examples(
        "tollgate markup set 15",
        "tollgate markup set 5 --user ann@example.com",
        "tollgate markup set 20 --model openai/gpt-4o",
    ),
)
@click.argument("percent")
@_subject_options
@json_option
def markup_set(percent: str, user: str | None, model: str | None, provider: str | None, *, as_json: bool) -> None:
    """Set the default rule, or another one for new calls.

    With an option it is the one for a user, a model or a provider. The most specific rule counts: that of the user,
    else of the model, else of the provider, else the default one.
    """
    from proxy.administration import COMMAND_LINE, add_rule, change_rule, find_rule
    from proxy.administration.config import set_default_markup

    async def work(books: Books) -> None:
        subject = await _subject(books, user, model, provider)
        if subject is None:
            after = await set_default_markup(books.engine, books.configuration.settings, COMMAND_LINE, percent)
            show({"percent": after}, f"The default markup is {after} %.", as_json=as_json)
            return
        found = await find_rule(books.engine, *subject)
        if found is None:
            known = books.configuration.settings.providers
            rule = await add_rule(books.engine, COMMAND_LINE, known, *subject, percent)
        else:
            rule = await change_rule(books.engine, COMMAND_LINE, found.id, percent)
        show(plain(rule), f"The markup of {_rule_text(rule)}.", as_json=as_json)

    with_books(work)


@group.command("remove", epilog=examples("tollgate markup remove --user ann@example.com"))
@_subject_options
@json_option
def markup_remove(user: str | None, model: str | None, provider: str | None, *, as_json: bool) -> None:
    """Take the rule for a user, a model or a provider away."""
    from proxy.administration import COMMAND_LINE, find_rule, remove_rule

    async def work(books: Books) -> None:
        subject = await _subject(books, user, model, provider)
        if subject is None:
            raise click.UsageError("name a user, a model or a provider; the default rule can only be set")
        rule = await find_rule(books.engine, *subject)
        if rule is None:
            raise NotFound(f"There is no rule for the {subject[0]} {subject[1]!r}.")
        await remove_rule(books.engine, COMMAND_LINE, rule.id)
        show(plain(rule), f"There is no rule for the {rule.kind} {rule.subject} any more.", as_json=as_json)

    with_books(work)


@group.command(
    "preview",
    epilog=examples(
        "tollgate markup preview demo-chat --user ann@example.com --input-tokens 1000 --output-tokens 500",
        "tollgate markup preview demo-chat --usage cached_input_tokens=500",
    ),
)
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
    """Show what a call of MODEL would be charged, and why.

    Nothing is called. Of several candidates the first one is preferred.
    """
    from proxy.shown.markup import Hypothesis, quoted

    fields = {"model": model, "user": user, **more, **_fields(usage)}
    try:
        hypothesis = msgspec.convert(fields, Hypothesis, strict=False)
    except msgspec.ValidationError as exc:
        raise click.BadParameter(str(exc), param_hint="--usage") from exc

    async def work(books: Books) -> None:
        user_id = None if user is None else (await books.user(user)).id
        shown = plain(quoted(await books.catalog(), user_id, hypothesis))
        columns = [
            *words("provider", "model", "rule=rule.kind"),
            *numbers("markup_%=rule.percent", "provider_cost", "markup", "charged"),
        ]
        show(shown, table(shown["items"], columns, nothing=""), as_json=as_json)

    with_books(work)


def _fields(usage: tuple[str, ...]) -> dict[str, str]:
    found = [field.partition("=") for field in usage]
    if any(not number for _, _, number in found):
        raise click.BadParameter("must be FIELD=NUMBER", param_hint="--usage")
    return {name: number for name, _, number in found}
