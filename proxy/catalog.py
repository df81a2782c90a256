"""Prices, markup, providers and models as one immutable snapshot that a call keeps from its start to its end.

Every process looks once in a second whether anything has changed, and makes a new snapshot if so; calls in flight
keep the one that they began with.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from proxy import pricebook
from proxy.policy import MARKUP_PERCENT, SETTINGS, Policy, policy_of
from proxy.pricebook import ADMIN, LIST, Entry, Targets, entry_of, is_payable
from proxy.pricing import Markup, MarkupKind, MarkupRules, dearest_price
from proxy.routing import Candidate, Models
from proxy.settings import CandidateSettings, Configuration, PriceSettings, ProviderSettings, Settings
from proxy.storage.database import database_now, reading
from proxy.storage.tables import markup_rules, system_config
from proxy.storage.tables import providers as provider_rows
from proxy.units import Micros, new_id, now_micros
from proxy.wire.media import host_of, is_private_name

VERSION = "catalog_version"
"""The row of `system_config` that is another one after each change of prices, rules or providers."""


ANTHROPIC_ADDED_TOKENS = 2_048
"""More than what Anthropic puts into a prompt to explain tools, at most 804 tokens for Claude Opus 4.7
(https://platform.claude.com/docs/en/about-claude/pricing#tool-use-pricing), and the format of an answer."""


class ProviderState(msgspec.Struct, frozen=True):
    """A provider of the configuration, and whether it serves; `is_ready` when it has all that it needs to."""

    name: str
    kind: str
    is_enabled: bool
    is_ready: bool
    is_local: bool


class Catalog(msgspec.Struct, frozen=True):
    """What may be sold just now, and at what price.

    `policy` holds the settings that operators change. `default_models` are the names that serve simple calls which name
    none, by the provider that they name; None is for those that name neither. `rules` are for previews and people: each
    candidate has its markup, and `user_markups` are those of users who have a rule of their own. `stamp` is what the
    snapshot was made of, `changes_at` when a price becomes valid by itself. `remarks` tell the operator what is not on
    offer, and why.
    """

    models: Models
    policy: Policy
    rules: MarkupRules
    providers: Mapping[str, ProviderState]
    stamp: Mapping[str, object]
    changes_at: Micros | None
    default_models: Mapping[str | None, str] = {}
    remarks: tuple[str, ...] = ()

    @property
    def user_markups(self) -> Mapping[str, int]:
        """Basis points by the ids of users."""
        return self.rules.users

    def markup(self, user_id: str | None, asked: str, candidate: Candidate) -> Markup:
        """The rule for a call of the user at this candidate of the name `asked`."""
        return self.rules.of_call(user_id, asked, candidate.provider, candidate.model)


class Loader:
    """Makes snapshots of one configuration and what its database says.

    `built_in` are prices of providers that come with Tollgate; the configuration's own go before them.
    """

    def __init__(self, configuration: Configuration, engine: AsyncEngine, built_in: dict[str, PriceSettings]) -> None:
        self._configuration = configuration
        self._engine = engine
        self._remarks: list[str] = []
        self._configured: dict[tuple[str, str], Entry] = {}
        for target, price in {**built_in, **configuration.settings.prices}.items():
            provider, _, model = target.partition("/")
            self._configured[provider, model], is_exact = entry_of(price)
            if not is_exact:
                self._remarks.append(f"{target}: a price is no whole number of nano-dollars and was rounded up")

    async def load(self, known: Catalog | None = None) -> Catalog:
        """The snapshot of now: `known` itself where nothing has changed. Raises `Unavailable`."""
        async with reading(self._engine) as connection:
            stamp = await _stamp(connection)
            now = await database_now(connection)
            if known is not None and known.stamp == stamp and (known.changes_at is None or now < known.changes_at):
                return known
            policy, remarks = policy_of(self._configuration.settings, stamp)
            rules = await _rules(connection, policy)
            providers = await self._providers(connection)
            names = {*providers, *(self._list_name(name) for name in providers)}
            book = await pricebook.current(connection, now, names)
            changes_at = await pricebook.next_change_at(connection, now)
        remarks = [*self._remarks, *remarks]
        models = self._models(book, providers, policy, rules, remarks)
        return Catalog(
            models=models,
            policy=policy,
            default_models=_default_models(self._configuration.settings, models, remarks),
            rules=rules,
            providers=providers,
            stamp=stamp,
            changes_at=changes_at,
            remarks=tuple(remarks),
        )

    async def _providers(self, connection: AsyncConnection) -> dict[str, ProviderState]:
        said = {row.name: bool(row.is_enabled) for row in await connection.execute(sa.select(provider_rows))}
        return {
            name: ProviderState(
                name=name,
                kind=settings.kind,
                is_enabled=name in self._configuration.providers
                and said.get(name, name in self._configuration.enabled),
                is_ready=name in self._configuration.providers,
                is_local=_is_local(settings),
            )
            for name, settings in self._configuration.settings.providers.items()
        }

    def _list_name(self, provider: str) -> str:
        settings = self._configuration.settings.providers[provider]
        return settings.price_list or ("anthropic" if settings.kind == "anthropic" else provider)

    def _models(
        self,
        book: Mapping[str, Targets],
        providers: Mapping[str, ProviderState],
        policy: Policy,
        rules: MarkupRules,
        remarks: list[str],
    ) -> Models:
        """Everything on offer, with its markup."""
        settings = self._configuration.settings
        offered: dict[str, Candidate] = {}
        for name, state in providers.items():
            for model, entry in self._entries(name, book).items():
                fault = _fault(entry)
                if fault is None and state.is_enabled:
                    offered[f"{name}/{model}"] = _candidate(settings.providers[name], state, model, entry)
                elif fault is not None and ((name, model) in self._configured or (name, model) in book[ADMIN]):
                    remarks.append(f"{name}/{model}: {fault}, so it is not on offer")
        remarks += self._missing(offered, providers)
        models = self._named(offered, policy)
        return {name: _marked_up(name, found, rules) for name, found in models.items() if found}

    def _missing(self, offered: Mapping[str, Candidate], providers: Mapping[str, ProviderState]) -> list[str]:
        """The candidates of the configuration's names that serve nothing although their provider is enabled."""
        return [
            f'models."{alias}": {each.target} has no price, or no bound, so it serves nothing'
            for alias, settings in self._configuration.settings.models.items()
            for each, _ in _prioritized(settings.candidates)
            if each.target not in offered and providers[each.target.partition("/")[0]].is_enabled
        ]

    def _named(self, offered: Mapping[str, Candidate], policy: Policy) -> dict[str, list[Candidate]]:
        """Those that are `offered`: aliases as configured, and unless only those count all by full and by bare name."""
        settings = self._configuration.settings
        models: dict[str, list[Candidate]] = {}
        # Of several providers with a model of the same bare name, the one that the configuration names first.
        if policy.expose == "priced":
            for candidate in offered.values():
                if candidate.model not in offered:
                    others = models.setdefault(candidate.model, [])
                    others.append(msgspec.structs.replace(candidate, priority=len(others)))
            models |= {target: [candidate] for target, candidate in offered.items()}
        for alias, model_settings in settings.models.items():
            models[alias] = [
                msgspec.structs.replace(offered[each.target], priority=priority, weight=each.weight)
                for each, priority in _prioritized(model_settings.candidates)
                if each.target in offered
            ]
        return models

    def _entries(self, provider: str, book: Mapping[str, Targets]) -> dict[str, Entry]:
        """What is known of each model of `provider`: by the configuration, else by an admin, else by the list."""
        entries: dict[str, Entry] = {}
        list_name = self._list_name(provider)
        for targets, name in ((book[LIST], list_name), (book[ADMIN], provider), (self._configured, provider)):
            for (of, model), entry in targets.items():
                if of == name:
                    entries[model] = entry.completed(entries.get(model))
        return entries


async def _rules(connection: AsyncConnection, policy: Policy) -> MarkupRules:
    found: dict[str, dict[str, int]] = {}
    for row in await connection.execute(sa.select(markup_rules)):
        found.setdefault(row.kind, {})[row.subject] = row.markup_bps
    return MarkupRules(
        default_bps=policy.markup_bps,
        users=found.get(MarkupKind.USER, {}),
        models=found.get(MarkupKind.MODEL, {}),
        providers=found.get(MarkupKind.PROVIDER, {}),
    )


def _default_models(settings: Settings, models: Models, remarks: list[str]) -> dict[str | None, str]:
    """For each provider its `default_model`; else the first of `[models]` that it serves, or the only one there is.

    For calls that name no provider: `routing.default_model`, else the first of `[models]`, else the first provider's.
    What is configured and not on offer is passed over, with a remark.
    """
    defaults: dict[str | None, str] = {}
    for provider, said in settings.providers.items():
        names = [name for name, found in models.items() if any(each.provider == provider for each in found)]
        wish = said.default_model
        wishes = [] if wish is None else [f"{provider}/{wish}", wish]
        if names and wishes and not set(wishes).intersection(names):
            remarks.append(f"providers.{provider}.default_model: it does not offer {wish!r}")
        targets = {each.target for name in names for each in models[name] if each.provider == provider}
        only = names[:1] if len(targets) == 1 else []
        found_default = next((name for name in (*wishes, *settings.models, *only) if name in names), None)
        if found_default is not None:
            defaults[provider] = found_default
    wish = settings.routing.default_model
    if wish is not None and wish not in models:
        remarks.append(f"routing.default_model: {wish!r} is not on offer")
    overall = next((name for name in (wish, *settings.models, *defaults.values()) if name in models), None)
    return defaults if overall is None else {None: overall, **defaults}


def _fault(entry: Entry) -> str | None:
    """Why a model cannot be offered; None when it can."""
    if not entry.is_bounded:
        return "it has neither max_output_tokens nor context_tokens"
    return None if is_payable(entry) else "a call could cost more than can be booked"


def _prioritized(candidates: Iterable[str | CandidateSettings]) -> list[tuple[CandidateSettings, int]]:
    found = []
    for place, said in enumerate(candidates):
        candidate = CandidateSettings(target=said) if isinstance(said, str) else said
        found.append((candidate, place if candidate.priority is None else candidate.priority))
    return found


def _marked_up(name: str, found: list[Candidate], rules: MarkupRules) -> tuple[Candidate, ...]:
    """The candidates of `name`, the preferred one first, with the markup of everybody without a rule of their own."""
    return tuple(
        msgspec.structs.replace(candidate, markup_bps=rules.of_model(name, candidate.provider, candidate.model).bps)
        for candidate in sorted(found, key=lambda candidate: candidate.priority)
    )


def _candidate(settings: ProviderSettings, state: ProviderState, model: str, entry: Entry) -> Candidate:
    default_field = "max_completion_tokens" if entry.is_reasoning else "max_tokens"
    return Candidate(
        provider=state.name,
        model=model,
        price=entry.price,
        output_tokens_max=entry.output_tokens_max,
        context_tokens=entry.context_tokens,
        maximum_field=entry.maximum_field or settings.maximum_field or default_field,
        is_reasoning=bool(entry.is_reasoning),
        knows_stream_options=settings.knows_stream_options,
        tokenizer=entry.tokenizer,
        image_tokens_max=entry.image_tokens_max,
        tool_calls_max=entry.tool_calls_max,
        service_prices=entry.service_prices,
        dearest_price=dearest_price((entry.price, *entry.service_prices.values())) if entry.service_prices else None,
        is_local=state.is_local,
        added_tokens=ANTHROPIC_ADDED_TOKENS if settings.kind == "anthropic" else 0,
        # A gateway with the same API may ask for caches by itself.
        caches_unasked=settings.kind != "anthropic" or settings.base_url is not None,
        resolves_media=settings.resolves_media,
    )


def _is_local(settings: ProviderSettings) -> bool:
    if settings.is_local is not None or settings.base_url is None:
        return bool(settings.is_local)
    host = host_of(settings.base_url)
    return host is not None and is_private_name(host)


# ---- what the snapshot is made of


_STAMP = sa.select(system_config.c.key, system_config.c.value).where(system_config.c.key.in_((*SETTINGS, VERSION)))
"""Made once: it is asked every second, and a new one would be a cycle each time, for the garbage collector."""


async def _stamp(connection: AsyncConnection) -> dict[str, object]:
    return {row.key: row.value for row in await connection.execute(_STAMP)}


async def touch(connection: AsyncConnection) -> None:
    """Let every process know that something in the catalogue has changed, once this transaction is committed."""
    await put_config(connection, VERSION, new_id("catalog"), "Changes with prices, rules and providers.")


async def put_config(connection: AsyncConnection, key: str, value: object, description: str) -> None:
    """Set a row of `system_config`."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(system_config).values(key=key, value=value, description=description, updated_at=now_micros())
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["key"],
            set_={"value": statement.excluded.value, "updated_at": statement.excluded.updated_at},
        )
    )


async def seed(connection: AsyncConnection, percent: Decimal) -> None:
    """Give a new database its first values: `percent` as the default rule, and the price list that ships."""
    exists = await connection.scalar(sa.select(system_config.c.key).where(system_config.c.key == MARKUP_PERCENT))
    if exists is None:
        await put_config(connection, MARKUP_PERCENT, str(percent), SETTINGS[MARKUP_PERCENT].description)
    if await pricebook.is_empty(connection):
        listed = pricebook.shipped()
        await pricebook.add(connection, listed.rows, source=LIST, version=listed.version, now=now_micros())
        await touch(connection)
