"""The settings that an operator changes while calls go on: rows of `system_config` go before the configuration."""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from proxy.settings import Settings
from proxy.units import (
    AmountError,
    Nanos,
    format_credits,
    format_percent,
    parse_credits,
    parse_decimal,
    parse_percent,
)

Value = str | bool
"""As it is stored and shown: percentages and credits are decimal strings."""


class Policy(msgspec.Struct, frozen=True):
    """What counts just now."""

    markup_bps: int
    registration_open: bool
    starting_credits: Nanos
    give_to_strangers: bool
    expose: str

    @property
    def is_safe(self) -> bool:
        """Whether nobody who comes along is given credits, unless the operator insists."""
        return not (self.starting_credits and self.registration_open) or self.give_to_strangers

    @property
    def credits_given(self) -> Nanos:
        """What every new account gets: nothing where that is not safe."""
        return self.starting_credits if self.is_safe else 0


class Setting(msgspec.Struct, frozen=True):
    """One setting. `normalise` makes a value what is stored, and raises `AmountError` for what is none."""

    name: str
    type: str
    description: str
    configured: Callable[[Settings], Any]
    normalise: Callable[[Any], Value]


def _percent(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise AmountError('must be a percentage, such as "15"')
    return format_percent(parse_percent(parse_decimal(str(value))))


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise AmountError("must be true or false")
    return value


def _credits(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise AmountError('must be an amount of credits, such as "0.25"')
    nanos = parse_credits(value)
    if nanos < 0:
        raise AmountError("must not be below zero")
    return format_credits(nanos)


EXPOSED = ("listed", "priced")


def _exposed(value: Any) -> str:
    if value not in EXPOSED:
        raise AmountError(f"must be {' or '.join(EXPOSED)}")
    return str(value)


MARKUP_PERCENT = "markup_percent"

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            MARKUP_PERCENT,
            "percent",
            "The operator's markup on the provider's cost, in percent, where no rule says otherwise.",
            lambda settings: settings.credits.markup_percent,
            _percent,
        ),
        Setting(
            "registration_open",
            "boolean",
            "Whether anybody may make an account by POST /register.",
            lambda settings: settings.auth.registration_open,
            _boolean,
        ),
        Setting(
            "starting_credits",
            "credits",
            "The credits that everybody gets who registers or is provisioned.",
            lambda settings: str(settings.credits.starting_credits),
            _credits,
        ),
        Setting(
            "give_to_strangers",
            "boolean",
            "Insists on starting credits while anybody may register: free money for whoever writes a script.",
            lambda settings: settings.credits.give_to_strangers,
            _boolean,
        ),
        Setting(
            "expose",
            "choice",
            'What may be asked for: every model with a price ("priced"), or only the names of [models] ("listed").',
            lambda settings: settings.routing.expose,
            _exposed,
        ),
    )
}

STRANGERS = frozenset({"registration_open", "starting_credits", "give_to_strangers"})
"""The settings that are safe or unsafe together."""


def configured(setting: Setting, settings: Settings) -> Value:
    """What the configuration says."""
    return setting.normalise(setting.configured(settings))


def policy_of(settings: Settings, rows: Mapping[str, Any]) -> tuple[Policy, list[str]]:
    """What counts, and remarks for the operator: on rows that hold no value of theirs, which count for nothing."""
    values: dict[str, Any] = {}
    remarks: list[str] = []
    for name, setting in SETTINGS.items():
        values[name] = configured(setting, settings)
        if name in rows:
            try:
                values[name] = setting.normalise(rows[name])
            except AmountError as exc:
                remarks.append(f"system_config.{name}: {exc}; the configuration's value counts")
    policy = Policy(
        markup_bps=parse_percent(Decimal(values.pop(MARKUP_PERCENT))),
        **{**values, "starting_credits": parse_credits(values["starting_credits"])},
    )
    if not policy.is_safe:
        remarks.append(
            "starting_credits: nobody gets any, since anybody may register; close registration, or insist by"
            " give_to_strangers"
        )
    return policy, remarks
