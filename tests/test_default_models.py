"""What serves a simple call that names no model: what the operator says, else what can be meant."""

import re
from decimal import Decimal
from pathlib import Path

import pytest

from proxy.catalog import Loader, seed
from proxy.settings import PriceSettings, load
from proxy.storage import database
from tests.test_catalog import entry, put, row

DEFAULTS = """
[routing]
{overall}
expose = "{expose}"

[providers.one]
kind = "openai"
base_url = "https://one.test/v1"
{own}

[providers.two]
kind = "openai"
base_url = "https://two.test/v1"

[providers.three]
kind = "openai"
base_url = "https://three.test/v1"
enabled = false

{aliases}
"""
ALIASES = """
[models.sleeping]
candidates = ["three/m"]

[models.alias]
candidates = ["two/m"]
"""


@pytest.mark.parametrize(
    ("said", "defaults"),
    [
        ({}, {None: "only", "two": "only"}),
        ({"own": 'default_model = "b"'}, {None: "one/b", "one": "one/b", "two": "only"}),
        ({"own": 'default_model = "nowhere"'}, {None: "only", "two": "only"}),
        ({"aliases": ALIASES}, {None: "alias", "two": "alias"}),
        ({"overall": 'default_model = "a"', "aliases": ALIASES}, {None: "a", "two": "alias"}),
        ({"overall": 'default_model = "nowhere"', "aliases": ALIASES}, {None: "alias", "two": "alias"}),
        ({"expose": "listed", "aliases": ALIASES}, {None: "alias", "two": "alias"}),
        ({"expose": "listed", "aliases": ALIASES, "own": 'default_model = "b"'}, {None: "alias", "two": "alias"}),
        ({"expose": "listed"}, {}),
    ],
)
async def test_the_default_models(books, tmp_path, said, defaults):
    """What is said of a provider, else the first name of the list, else its only one; the operator hears of slips."""
    models = {"one": ("a", "b"), "two": ("only",) if "aliases" not in said else ("m", "n"), "three": ("m",)}
    await put(books, *(row(model, entry(1), provider) for provider, names in models.items() for model in names))
    file = tmp_path / "config.toml"
    file.write_text(DEFAULTS.format(**{"overall": "", "expose": "priced", "own": "", "aliases": "", **said}))
    configuration = load({"TOLLGATE_DATABASE_URL": books.url}, config=str(file))
    catalog = await Loader(configuration, books.engine, {}).load()
    assert catalog.default_models == defaults
    assert len(catalog.remarks) == ("nowhere" in str(said))


async def test_the_default_models_that_ship_are_on_offer(books):
    """Each provider of the shipped configuration has one, and the operator hears of nothing."""
    shipped = Path(__file__).parents[1] / "config.toml"
    variables = dict.fromkeys(re.findall(r'(?m)^api_key_env = "(\w+)"', shipped.read_text()), "a key")
    configuration = load({"TOLLGATE_DATABASE_URL": books.url, **variables}, config=str(shipped))
    async with database.writing(books.engine) as connection:
        await seed(connection, Decimal(15))
    demo = PriceSettings(input=Decimal(1), output=Decimal(1), context_tokens=1000)
    catalog = await Loader(configuration, books.engine, {"demo/demo-chat": demo}).load()
    assert set(catalog.default_models) == {None, *configuration.providers}
    assert catalog.default_models[None] == "gpt-4o-mini"
    assert not catalog.remarks
