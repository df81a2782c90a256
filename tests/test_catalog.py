"""The snapshot of what is on offer, made of a configuration and of a database of either kind."""

from decimal import Decimal

import msgspec
import pytest

from proxy import administration, pricebook
from proxy.administration.config import set_default_markup
from proxy.catalog import Loader, seed
from proxy.errors import BadRequest, Conflict, NotFound
from proxy.identity.keys import allowed_models, find_key, hash_key
from proxy.pricebook import ADMIN, LIST, Entry, PriceList, Row, entry_of
from proxy.pricing import MarkupKind, Price
from proxy.settings import PriceSettings, Settings, load
from proxy.storage import database
from proxy.units import MICROS_PER_DAY, now_micros

CONFIG = """
[routing]
expose = "{expose}"

[providers.one]
kind = "openai"
base_url = "https://one.test/v1"
price_list = "listed"
maximum_field = "max_completion_tokens"

[providers.two]
kind = "openai"
base_url = "http://10.0.0.1/v1"

[models.alias]
candidates = [{{ target = "two/m", priority = 5 }}, {{ target = "one/m", priority = 1, weight = 3 }}, "one/nowhere"]

[prices."two/m"]
input = "0.0000000001"
output = "2"
max_output_tokens = 10
"""

PRICE = Price(input=1, cached_input=1, cache_write=1, audio_input=1, output=1, audio_output=1)


def entry(tokens: int, **more) -> Entry:
    """A model that costs so many nano-dollars a token, in millions."""
    return Entry(price=Price(*[tokens * 10**6] * 6), context_tokens=1000, **more)


def loader_of(books, tmp_path, expose="priced") -> Loader:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(expose=expose))
    return Loader(load({"TOLLGATE_DATABASE_URL": books.url}, config=str(file)), books.engine, {})


async def put(books, *rows, source=LIST, version="test 1") -> None:
    """Write rows of the list."""
    async with database.writing(books.engine) as connection:
        await pricebook.add(connection, rows, source=source, version=version, now=now_micros())


def row(model, found, provider="listed", **more) -> Row:
    return Row(provider=provider, model=model, entry=found, **more)


async def events(books) -> list[tuple]:
    """Who did what to what, before and after, the oldest first."""
    async with database.reading(books.engine) as connection:
        rows = await connection.execute(administration.admin_events.select().order_by(administration.admin_events.c.id))
        return [(row.actor, row.action, row.subject, row.before, row.after) for row in rows]


async def test_the_names_of_what_is_on_offer(books, tmp_path):
    """Full names, bare names and aliases; a list is known by the name that the provider gives it."""
    await put(books, row("m", entry(1)), row("only", entry(1)), row("boundless", Entry(price=PRICE)))
    catalog = await loader_of(books, tmp_path).load()
    assert set(catalog.models) == {"alias", "m", "one/m", "one/only", "only", "two/m"}
    assert [candidate.target for candidate in catalog.models["alias"]] == ["one/m", "two/m"]
    assert [candidate.weight for candidate in catalog.models["alias"]] == [3, 1]
    assert [candidate.is_local for candidate in catalog.models["alias"]] == [False, True]
    assert [(each.target, each.priority) for each in catalog.models["m"]] == [("one/m", 0), ("two/m", 1)]
    assert catalog.models["one/m"][0].maximum_field == "max_completion_tokens"
    assert catalog.remarks == (
        "two/m: a price is no whole number of nano-dollars and was rounded up",
        'models."alias": one/nowhere has no price, or no bound, so it serves nothing',
    )


async def test_only_what_is_listed_if_the_operator_says_so(books, tmp_path):
    """The names of the configuration, and no others."""
    await put(books, row("m", entry(1)))
    catalog = await loader_of(books, tmp_path, "listed").load()
    assert set(catalog.models) == {"alias"}


async def test_a_candidate_that_cannot_serve_is_said(books, tmp_path):
    """A name may be misspelt, or its price missing: the operator reads it at the start."""
    await put(books, row("only", entry(1)))
    catalog = await loader_of(books, tmp_path).load()
    assert [candidate.target for candidate in catalog.models["alias"]] == ["two/m"]
    assert 'models."alias": one/m has no price, or no bound, so it serves nothing' in catalog.remarks
    await administration.set_provider(books.engine, "usr_1", catalog.providers, "one", is_enabled=False)
    remarks = (await loader_of(books, tmp_path).load()).remarks
    assert not any("alias" in remark for remark in remarks), "a provider that is off is no mistake"


async def test_a_name_that_holds_a_slash_is_not_taken_for_anothers_model(books, tmp_path):
    """`two/m` at `one` is `one/two/m`: its bare name is that of somebody else."""
    await put(books, row("two/m", entry(1)))
    catalog = await loader_of(books, tmp_path).load()
    assert [candidate.target for candidate in catalog.models["two/m"]] == ["two/m"]
    assert catalog.models["one/two/m"][0].model == "two/m"


async def test_who_says_what_a_model_costs(books, tmp_path):
    """An admin before the list, the configuration before both; limits that one does not say are the next one's."""
    listed = entry(1, output_tokens_max=77, tokenizer="o200k_base", is_reasoning=True)
    await put(books, row("m", listed), row("m", entry(9), provider="two"))
    loader = loader_of(books, tmp_path)
    known = await loader.load()
    assert known.models["one/m"][0].price.input == 10**6
    await administration.set_price(books.engine, "usr_1", {"one"}, ("one", "m"), Entry(price=PRICE))
    catalog = await loader.load(known)
    found = catalog.models["one/m"][0]
    assert (found.price, found.output_tokens_max, found.context_tokens) == (PRICE, 77, 1000)
    assert (found.tokenizer, found.is_reasoning) == ("o200k_base", True)
    assert known.models["one/m"][0].price.input == 10**6, "calls in flight keep what they began with"
    two = catalog.models["two/m"][0]
    assert (two.price.input, two.output_tokens_max, two.context_tokens) == (1, 10, 1000)
    await administration.set_price(books.engine, "usr_1", {"one"}, ("one", "m"), None)
    assert (await loader.load(catalog)).models["one/m"][0].price.input == 10**6
    with pytest.raises(NotFound):
        await administration.set_price(books.engine, "usr_1", {"one"}, ("one", "m"), None)
    assert [event[:3] for event in await events(books)] == [
        ("usr_1", "price.set", "one/m"),
        ("usr_1", "price.remove", "one/m"),
    ]


async def test_a_price_becomes_valid_by_itself(books, tmp_path):
    """At its time and not before, without anybody's doing; until then the snapshot stays the same one."""
    now = now_micros()
    await put(books, row("m", entry(1)), row("m", entry(2), valid_from=now + MICROS_PER_DAY))
    loader = loader_of(books, tmp_path)
    catalog = await loader.load()
    assert catalog.changes_at == now + MICROS_PER_DAY
    assert await loader.load(catalog) is catalog
    now = now_micros()
    await books.execute("UPDATE prices SET valid_from = :now WHERE valid_from > :now", now=now)
    assert await loader.load(catalog) is catalog, "nobody said that anything changed"
    due = msgspec.structs.replace(catalog, changes_at=now)
    assert (await loader.load(due)).models["one/m"][0].price.input == 2 * 10**6


async def test_markups_are_of_names_and_of_users(books, tmp_path):
    """The most specific rule for each name that a candidate is asked for by."""
    await put(books, row("m", entry(1)))
    loader = loader_of(books, tmp_path)
    async with database.writing(books.engine) as connection:
        await seed(connection, Decimal(15))
    for kind, subject, percent in (("model", "alias", "7"), ("provider", "two", "8"), ("user", "usr_9", "9")):
        await administration.add_rule(books.engine, "usr_1", {"one", "two"}, MarkupKind(kind), subject, percent)
    with pytest.raises(Conflict):
        await administration.add_rule(books.engine, "usr_1", {"one", "two"}, MarkupKind.MODEL, "alias", "1")
    catalog = await loader.load()
    shown = {name: [each.markup_bps for each in found] for name, found in catalog.models.items() if "m" in name}
    assert {name: shown[name] for name in ("m", "one/m", "two/m")} == {
        "m": [1500, 800],
        "one/m": [1500],
        "two/m": [800],
    }
    assert [each.markup_bps for each in catalog.models["alias"]] == [700, 700]
    assert catalog.user_markups == {"usr_9": 900}
    await set_default_markup(books.engine, Settings(), "usr_1", "0.01")
    assert (await loader.load(catalog)).models["one/m"][0].markup_bps == 1
    assert (await events(books))[-1] == ("usr_1", "config.set", "markup_percent", "15", "0.01")


async def test_providers_are_switched_on_and_off(books, tmp_path):
    """What an admin says goes before the configuration; only what is ready can be switched on."""
    await put(books, row("m", entry(1)))
    loader = loader_of(books, tmp_path)
    catalog = await loader.load()
    await administration.set_provider(books.engine, "usr_1", catalog.providers, "one", is_enabled=False)
    off = await loader.load(catalog)
    assert not off.providers["one"].is_enabled
    assert set(off.models) == {"alias", "m", "two/m"}
    assert "one/m" in catalog.models, "calls in flight keep what they began with"
    await administration.set_provider(books.engine, "usr_1", off.providers, "one", is_enabled=True)
    assert set((await loader.load(off)).models) == set(catalog.models)
    lacking = {"one": msgspec.structs.replace(off.providers["one"], is_ready=False)}
    with pytest.raises(Conflict):
        await administration.set_provider(books.engine, "usr_1", lacking, "one", is_enabled=True)
    with pytest.raises(NotFound):
        await administration.set_provider(books.engine, "usr_1", off.providers, "nobody", is_enabled=True)
    assert await events(books) == [
        ("usr_1", "provider.disable", "one", {"enabled": True}, {"enabled": False}),
        ("usr_1", "provider.enable", "one", {"enabled": False}, {"enabled": True}),
    ]


async def test_what_is_for_a_provider_that_is_not_configured(books):
    """A rule or a price of it would never count: it is refused, and so is a name that nothing has."""
    with pytest.raises(NotFound, match="'opnai'"):
        await administration.add_rule(books.engine, "usr_1", {"openai"}, MarkupKind.PROVIDER, "opnai", "20")
    with pytest.raises(NotFound, match="'opnai'"):
        await administration.set_price(books.engine, "usr_1", {"openai"}, ("opnai", "m"), Entry(price=PRICE))
    for subject in ("", " ", "a\nb", "x" * 301):
        with pytest.raises(BadRequest, match="subject"):
            await administration.add_rule(books.engine, "usr_1", {"openai"}, MarkupKind.MODEL, subject, "20")
    assert await administration.rules(books.engine) == []
    assert await events(books) == []


async def test_a_rule_is_changed_and_removed(books):
    """Each time with what it was before."""
    rule = await administration.add_rule(books.engine, "usr_1", {"one", "two"}, MarkupKind.PROVIDER, "one", "7")
    await administration.change_rule(books.engine, "usr_2", rule.id, "8.5")
    assert [each.percent for each in await administration.rules(books.engine)] == ["8.5"]
    await administration.remove_rule(books.engine, "usr_3", rule.id)
    assert await administration.rules(books.engine) == []
    with pytest.raises(NotFound):
        await administration.change_rule(books.engine, "usr_1", rule.id, "1")
    assert await events(books) == [
        ("usr_1", "markup.add", "provider one", None, "7"),
        ("usr_2", "markup.change", "provider one", "7", "8.5"),
        ("usr_3", "markup.remove", "provider one", "8.5", None),
    ]


async def test_a_new_database_is_filled_with_the_list_that_ships(books, tmp_path):
    """Once: what an operator did to it stays."""
    async with database.writing(books.engine) as connection:
        await seed(connection, Decimal(15))
    async with database.reading(books.engine) as connection:
        known = (await pricebook.current(connection, now_micros()))[LIST]
    assert known["openai", "gpt-4o"].price.input == 2_500_000_000
    assert (known["openai", "gpt-5"].context_tokens, known["openai", "gpt-5"].output_tokens_max) == (400_000, 128_000)
    assert known["google", "gemini-2.5-pro"].price.long_context[0].above_tokens == 200_000
    await administration.sync_prices(
        books.engine, "usr_1", PriceList(version="newer", rows=[row("gpt-4o", entry(1), provider="openai")])
    )
    async with database.writing(books.engine) as connection:
        await seed(connection, Decimal(15))
    async with database.reading(books.engine) as connection:
        known = (await pricebook.current(connection, now_micros()))[LIST]
    assert known["openai", "gpt-4o"] == entry(1)


async def test_a_sync_writes_what_is_new_and_keeps_what_was(books):
    """Nothing twice, prices of later days included; the history has every version."""
    later = now_micros() + MICROS_PER_DAY
    listed = [row("a", entry(1)), row("b", entry(2)), row("b", entry(3), valid_from=later)]
    first = PriceList(version="v1", rows=listed)
    assert len(await administration.sync_prices(books.engine, "me", first)) == 3
    assert not await administration.sync_prices(books.engine, "me", first)
    second = PriceList(version="v2", rows=[row("a", entry(5)), *listed[1:]])
    async with database.reading(books.engine) as connection:
        found = await pricebook.changes(connection, second, now_micros())
    assert [(change.row.target, change.before) for change in found] == [("listed/a", entry(1))]
    await administration.sync_prices(books.engine, "me", second)
    past = await administration.price_history(books.engine, ("listed", "a"))
    assert [(each.version, each.entry["price"]["input"]) for each in past] == [("v2", 5 * 10**6), ("v1", 10**6)]


async def test_a_price_that_is_set_is_the_one_that_is_shown(books):
    """Not that of a list, which is to be valid later; the history has it as it was answered."""
    later = now_micros() + MICROS_PER_DAY
    await put(books, row("m", entry(1), valid_from=later, provider="one"))
    for price in (Entry(price=PRICE), None):
        written = await administration.set_price(books.engine, "usr_1", {"one"}, ("one", "m"), price)
        assert (written.target, written.source, written.entry is None) == ("one/m", "admin", price is None)
        assert written == (await administration.price_history(books.engine, ("one", "m")))[1]


async def test_what_a_caller_is_restricted_to(books):
    """The patterns of its user and of its key."""
    person = await books.person()
    async with database.reading(books.engine) as connection:
        caller = (await find_key(connection, hash_key(person.key))).caller
        assert await allowed_models(connection, caller) == [None, None]
    await books.execute("UPDATE api_keys SET allowed_models = '[\"one/*\"]'")
    async with database.reading(books.engine) as connection:
        assert await allowed_models(connection, caller) == [None, ["one/*"]]


def test_dollars_become_an_entry():
    """Of every class, tier and threshold; a class without a price costs what its side does."""
    settings = PriceSettings(
        input=Decimal("1.5"), output=Decimal(6), cached_input=Decimal("0.15"), request=Decimal("0.01")
    )
    found, is_exact = entry_of(settings)
    assert found.price == Price(
        input=1_500_000_000,
        cached_input=150_000_000,
        cache_write=1_500_000_000,
        audio_input=1_500_000_000,
        output=6_000_000_000,
        audio_output=6_000_000_000,
        request=10_000_000 * 10**6,
    )
    assert is_exact
    settings = PriceSettings(input=Decimal(1), output=Decimal(4), cache_write=Decimal(2), cache_write_1h=Decimal(3))
    assert entry_of(settings)[0].price.cache_write_1h == 3 * 10**9


async def test_anthropic_has_its_own_list(books, tmp_path):
    """Whatever the provider is called; a prompt with tools there has what explains them on top."""
    file = tmp_path / "config.toml"
    file.write_text('[providers.claude]\nkind = "anthropic"\napi_key_env = "KEY"\n[providers.one]\nkind = "demo"\n')
    shipped = pricebook.shipped()
    await put(books, *shipped.rows, row("m", entry(1), provider="one"))
    configuration = load({"TOLLGATE_DATABASE_URL": books.url, "KEY": "k"}, config=str(file))
    models = (await Loader(configuration, books.engine, {}).load()).models
    assert (models["one/m"][0].added_tokens, models["one/m"][0].caches_unasked) == (0, True)
    (opus,) = models["claude/claude-opus-5"]
    assert (opus.context_tokens, opus.output_tokens_max, opus.is_reasoning) == (1_000_000, 128_000, True)
    (haiku,) = models["claude-haiku-4-5"]
    assert (haiku.context_tokens, haiku.output_tokens_max, haiku.is_reasoning) == (200_000, 64_000, False)
    assert haiku.price.cache_write * 4 == haiku.price.input * 5
    assert haiku.added_tokens > 804
    assert not haiku.caches_unasked
    claudes = [model for name, (model, *_) in models.items() if name.startswith("claude/")]
    assert len([model for model in claudes if model.output_tokens_max is None]) <= 2


def test_the_list_that_ships_can_be_booked():
    """Every row of it: no step down, within 64 bits, and the models that matter are there."""
    rows = pricebook.shipped().rows
    assert all(pricebook.is_payable(each.entry) for each in rows)
    bounded = {each.target for each in rows if each.entry.is_bounded}
    assert {
        "openai/gpt-4o-mini",
        "openai/o3",
        "anthropic/claude-sonnet-4-5",
        "google/gemini-2.5-flash",
        "deepseek/deepseek-chat",
        "groq/llama-3.3-70b-versatile",
        "x-ai/grok-4-0709",
        "mistral/codestral-2508",
        "together/meta-llama/Llama-3.3-70B-Instruct-Turbo",
    } <= bounded
    assert ADMIN not in {each.provider for each in rows}
    claude = next(each.entry.price for each in rows if each.target == "anthropic/claude-sonnet-4-5")
    assert (claude.cache_write_1h, claude.cache_write) == (2 * claude.input, claude.input * 5 // 4)
