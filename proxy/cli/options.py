"""Options that several commands have, and what they take."""

from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import click

from proxy.pages import PAGE_DEFAULT, PAGE_MAX
from proxy.units import AmountError, micros_of, parse_credits

_INSTANTS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S"]

Command = Callable[..., None]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
email_option = click.option("--email", required=True, help="The user's e-mail address, or id.")
config_option = click.option("--config", metavar="FILE", help="The configuration (default: config.toml here).")


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def page_options(command: Command) -> Command:
    """Which page of a list is wanted."""
    command = click.option("--cursor", help="Continue where the last page ended, as it said.")(command)
    return click.option(
        "--limit", type=click.IntRange(1, PAGE_MAX), default=PAGE_DEFAULT, show_default=True, help="How many to show."
    )(command)


def day_options(command: Command) -> Command:
    """Which days are wanted: `first` and `last`."""
    command = click.option("last", "--to", type=DAY, help="The last UTC day, itself included; today by default.")(
        command
    )
    return click.option("first", "--from", type=DAY, help="The first UTC day, such as 2026-11-01.")(command)


# ---- values


class Nothing(Enum):
    """`none`, where somebody typed it: no limit."""

    NONE = "none"


class OrNone(click.ParamType[Any]):
    """What another type takes, or `none`."""

    def __init__(self, type_: click.ParamType[Any]) -> None:
        self._type = type_
        self.name = f"{type_.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`Nothing.NONE`, or what the other type makes of it."""
        return Nothing.NONE if value == Nothing.NONE.value else self._type.convert(value, param, ctx)


class Amount(click.ParamType[int]):
    """Credits, in nano-credits."""

    name = "credits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Whole nano-credits; more than nine decimals are refused."""
        try:
            return parse_credits(value)
        except AmountError as exc:
            self.fail(str(exc), param, ctx)


class Instant(click.DateTime):
    """A date, or a date and a time, in UTC unless it says otherwise: microseconds since the epoch."""

    name = "instant"

    def __init__(self) -> None:
        super().__init__(_INSTANTS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The instant, in whole microseconds."""
        instant: datetime = super().convert(value, param, ctx)
        return micros_of(instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC))


class Day(click.DateTime):
    """A date, as it was typed."""

    name = "date"

    def __init__(self) -> None:
        super().__init__(["%Y-%m-%d"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The date in ISO 8601."""
        return super().convert(value, param, ctx).date().isoformat()


AMOUNT, INSTANT, DAY = Amount(), Instant(), Day()


def models_option(command: Command) -> Command:
    """Which models may be used."""
    return click.option(
        "--allowed-models",
        multiple=True,
        metavar="NAMES",
        help="Models, with * and ?; separated by commas, or repeated; none for all.",
    )(command)


def rate_options(command: Command) -> Command:
    """How much may be used at a time."""
    count = OrNone(click.IntRange(0))
    for option, what in (
        ("--concurrent-calls-max", "Calls at the same time"),
        ("--tokens-per-minute", "Tokens in a minute"),
        ("--requests-per-minute", "Calls in a minute"),
    ):
        command = click.option(option, type=count, metavar="N", help=f"{what}, or none for no limit.")(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; None is what was given as `none`."""
    found = {name: None if value is Nothing.NONE else value for name, value in options.items() if value is not None}
    names = found.pop("allowed_models", ())
    if names:
        models = [model.strip() for each in names for model in each.split(",") if model.strip()]
        found["allowed_models"] = None if models in ([], [Nothing.NONE.value]) else models
    return found
