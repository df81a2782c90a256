"""What an operator may change while calls go on: what counts, and what counts for nothing."""

from decimal import Decimal

import msgspec
import pytest

from proxy.policy import SETTINGS, Policy, configured, policy_of
from proxy.settings import AuthSettings, CreditsSettings, Settings
from proxy.units import NANOS_PER_CREDIT, AmountError

DEFAULT = Policy(markup_bps=1500, registration_open=True, starting_credits=0, give_to_strangers=False, expose="priced")


def test_without_rows_the_configuration_counts():
    """Every setting has its value there."""
    assert policy_of(Settings(), {}) == (DEFAULT, [])
    settings = Settings(
        credits=CreditsSettings(markup_percent=Decimal("7.5"), starting_credits=Decimal("0.25")),
        auth=AuthSettings(registration_open=False),
    )
    policy, remarks = policy_of(settings, {})
    assert (policy.markup_bps, policy.starting_credits, policy.registration_open) == (750, NANOS_PER_CREDIT // 4, False)
    assert not remarks
    assert configured(SETTINGS["markup_percent"], settings) == "7.5"


def test_rows_go_before_the_configuration():
    """What an operator said at run time stands."""
    rows = {"markup_percent": "20", "expose": "listed", "registration_open": False, "catalog_version": "x"}
    policy, _ = policy_of(Settings(), rows)
    assert policy == msgspec.structs.replace(DEFAULT, markup_bps=2000, expose="listed", registration_open=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("markup_percent", "many"),
        ("markup_percent", None),
        ("markup_percent", "NaN"),
        ("starting_credits", 0.5),
        ("starting_credits", "-1"),
        ("registration_open", 1),
        ("give_to_strangers", "yes"),
        ("expose", ["listed"]),
    ],
)
def test_a_row_that_somebody_wrote_by_hand_counts_for_nothing(name, value):
    """The configuration's value does, and the operator is told; it is no value to be set either."""
    policy, remarks = policy_of(Settings(), {name: value})
    assert policy == DEFAULT
    assert [remark.startswith(f"system_config.{name}: ") for remark in remarks] == [True]
    with pytest.raises(AmountError):
        SETTINGS[name].normalise(value)


@pytest.mark.parametrize(
    ("rows", "given"),
    [
        ({"starting_credits": "1"}, 0),
        ({"starting_credits": "1", "give_to_strangers": True}, NANOS_PER_CREDIT),
        ({"starting_credits": "1", "registration_open": False}, NANOS_PER_CREDIT),
        ({"registration_open": True}, 0),
    ],
)
def test_strangers_are_given_nothing_by_accident(rows, given):
    """What was safe when it was set may not be with another configuration: then nobody gets any, with a remark."""
    policy, remarks = policy_of(Settings(), rows)
    assert policy.credits_given == given
    assert bool(remarks) is (not policy.is_safe) is (rows == {"starting_credits": "1"})
