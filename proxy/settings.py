"""The operator's configuration: `config.toml`, overridden by the environment, overridden by flags.

Everything wrong is reported as one `SettingsError` that names the place, before anything starts.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import msgspec

from proxy.errors import SettingsError
from proxy.units import AmountError, parse_credits, parse_percent

CONFIG_FILE = "config.toml"
DATA_FOLDER = ".tollgate"
JWT_SECRET_BYTES_MIN = 32
OWN_ISSUER = "tollgate"
"""What our own tokens say in `iss`: no other issuer may be called that."""

_SQLITE = "sqlite+aiosqlite:///"
_POSTGRESQL = "postgresql+asyncpg://"

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


WORKERS_MAX = 64
"""More processes than that on one machine have nothing to do."""


class ServerSettings(_Section, frozen=True):
    """Where to listen, and how much to take from a client."""

    host: Annotated[str, msgspec.Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    body_bytes_max: PositiveInt = 20_000_000
    """The longest request body."""
    body_s: Seconds = 60
    """How long a client may take to send its body."""
    nesting_max: PositiveInt = 128
    """How deep arrays and objects may be nested in a request body; what the parser can take is a few hundred."""
    answer_bytes_max: PositiveInt = 64_000_000
    """The longest plain answer of a provider that is held back until its charge is durable."""
    event_bytes_max: PositiveInt = 16_000_000
    """The longest single event of a stream."""
    call_s: Seconds = 900
    """How long one call may take from its reservation to its last byte."""
    settle_wait_s: Seconds = 30
    """How long the end of an answer waits for its charge while the database is out of reach."""
    keep_alive_s: Seconds = 15
    """How long a stream may be silent before its client gets a comment, lest somebody in between cut it off."""
    stall_s: Seconds = 60
    """How long a client may take nothing of what is sent to it, before it counts as gone."""
    workers: Annotated[int, msgspec.Meta(ge=1, le=WORKERS_MAX)] = 1
    """How many processes serve the port; on SQLite one."""
    notice_s: Annotated[float, msgspec.Meta(ge=0)] = 0
    """How long after SIGTERM calls are still taken, with readiness red already.

    For a load balancer in front to take note; longer than it keeps idle connections.
    """
    drain_s: PositiveInt = 30
    """How long calls in flight may go on after that."""
    trusted_proxies: list[str] = []
    """The networks of the proxies in front of us: only what comes from them may say in `X-Forwarded-For` for whom."""
    cors_origins: list[str] = []
    """The origins whose scripts may call us from a browser; `*` for all. None by default."""
    metrics_token: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Who may read `/metrics`: whoever sends this as a bearer token; without one, only this machine."""
    http_client: Literal["lean", "httpx"] = "lean"
    """What speaks to providers: our own HTTP/1.1 client, or the slower one of the library httpx2."""


class DatabaseSettings(_Section, frozen=True):
    """Where the books are."""

    url: str = f"{_SQLITE}tollgate.db"
    lease_s: Annotated[float, msgspec.Meta(ge=1)] = 20
    """How long a process on PostgreSQL that gives no sign of life keeps what its calls hold, before others free it.

    Longer than any pause from which a process comes back; it renews four times as often.
    """


class LogSettings(_Section, frozen=True):
    """What is written to standard error."""

    format: Literal["auto", "json", "console"] = "auto"
    """Automatically: for the console on a terminal, JSON elsewhere."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """From which level on; a line for every call is `info`."""


class CreditsSettings(_Section, frozen=True):
    """What a new database starts with."""

    markup_percent: Decimal = Decimal(15)
    starting_credits: Decimal = Decimal(0)
    """What everybody gets who registers or is provisioned."""
    give_to_strangers: bool = False
    """Insists on starting credits while anybody may register: free money for whoever writes a script."""


class IssuerSettings(_Section, frozen=True):
    """Somebody else whose tokens are good here, such as a company's single sign-on."""

    issuer: Annotated[str, msgspec.Meta(min_length=1)]
    """The exact `iss` of its tokens."""
    audience: Annotated[str, msgspec.Meta(min_length=1)]
    """What `aud` of a token must hold: the name that the issuer knows us by."""
    jwks_url: str
    """Where it publishes its keys; https, or this machine."""
    algorithms: Annotated[tuple[Literal["RS256", "ES256", "EdDSA"], ...], msgspec.Meta(min_length=1)] = (
        "RS256",
        "ES256",
        "EdDSA",
    )
    """What its tokens may be signed by: never what a token says about itself."""
    provision: bool = True
    """Whether whoever comes with a valid token for the first time gets an account."""


class AuthSettings(_Section, frozen=True):
    """How callers are known."""

    jwt_secret: str | None = None
    token_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 30
    """How long a login lasts."""
    registration_open: bool = True
    """Whether anybody may make an account."""
    address_attempts_per_minute: PositiveInt = 30
    """Registrations, logins and changes of a password, from one address."""
    account_failures_per_hour: PositiveInt = 30
    """Wrong passwords for one account; after them not even the right one opens it until the hour is over."""
    issuers: list[IssuerSettings] = []


MaximumField = Literal["max_tokens", "max_completion_tokens", "either"]
"""With `either` both of these do, and what the client says stays as it is."""


class RoutingSettings(_Section, frozen=True):
    """Who serves a call, and what is on offer."""

    expose: Literal["listed", "priced"] = "priced"
    """What may be asked for: every model with a price, or only the names that `[models]` lists."""
    default_model: str | None = None
    """The name that serves a simple call which names neither model nor provider."""
    may_pay_twice: bool = False
    """Whether a call is sent to the next candidate although the last one may have done, and billed, the work."""


class ProviderSettings(_Section, frozen=True):
    """One upstream.

    `enabled = "auto"` enables it when the variable that `api_key_env` names is set. Admins enable and disable providers
    at run time; what they say stands from then on.
    """

    kind: Literal["openai", "anthropic", "demo"]
    enabled: bool | Literal["auto"] = True
    base_url: str | None = None
    """Of the kind `anthropic`, Anthropic's own unless another one is said."""
    api_key_env: str | None = None
    knows_stream_options: bool = True
    """Whether it accepts `stream_options.include_usage`; if not, usage it does not report is counted."""
    maximum_field: MaximumField | None = None
    """The field in which its models take their maximum, where their rows do not say."""
    headers: dict[str, str] = {}
    """Header fields that go with every call."""
    headers_env: dict[str, str] = {}
    """Likewise, with the names of the environment variables that hold their values, such as `api-key`."""
    connections_max: PositiveInt = 1000
    """Calls at once."""
    default_model: str | None = None
    """The one of its models that serves a simple call which names the provider and no model."""
    price_list: str | None = None
    """The name under which the price book knows it, if that is not its own; of the kind `anthropic`, `anthropic`."""
    is_local: bool | None = None
    """Whether it stands in the operator's own network, and must not fetch media from there for clients; none: if its
    address says so."""
    resolves_media: bool = False
    """Whether a local provider may fetch media from names on the public internet, not only from addresses there.

    Names are looked up here and once more by the provider: whoever owns one may answer it with a private address then.
    """
    connect_s: Seconds = 5
    first_byte_s: Seconds = 300
    idle_s: Seconds = 120


class CandidateSettings(_Section, frozen=True):
    """One who may serve a name. The lowest priority comes first; equals share the calls by their weights."""

    target: str
    priority: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """None: its place in the list."""
    weight: PositiveInt = 1


class ModelSettings(_Section, frozen=True):
    """A name that clients use, and who may serve it: `provider/model`, in order of preference."""

    candidates: Annotated[list[str | CandidateSettings], msgspec.Meta(min_length=1)]


class RateSettings(_Section, frozen=True):
    """Dollars per million tokens. A class without a price costs what its side does."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None
    """For an hour; none: what `cache_write` costs."""
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None


class LongContextSettings(RateSettings, frozen=True, kw_only=True):
    """The rates of all tokens of a call with more input than `above_tokens`."""

    above_tokens: PositiveInt


class ServicePriceSettings(RateSettings, frozen=True, kw_only=True):
    """Dollars per million tokens, for one image, for one request, and for one use of each tool that the provider runs.

    A tool without a price is not for sale. One use of the code interpreter is one container.
    """

    image: Decimal | None = None
    request: Decimal | None = None
    web_search: Decimal | None = None
    file_search: Decimal | None = None
    code_interpreter: Decimal | None = None
    long_context: list[LongContextSettings] = []


class PriceSettings(ServicePriceSettings, frozen=True, kw_only=True):
    """What a model costs, in the standard service tier and in others, and its limits: those not said are the book's."""

    service_tiers: dict[str, ServicePriceSettings] = {}
    max_output_tokens: PositiveInt | None = None
    context_tokens: PositiveInt | None = None
    image_tokens_max: PositiveInt | None = None
    """The most tokens that one image can become; without it, the whole context."""
    tool_calls_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    """The most uses of the provider's tools in one call that names no maximum of its own; without one it is refused."""
    tokenizer: str | None = None
    maximum_field: MaximumField | None = None
    """The field in which this model takes its maximum; reasoning models know only the second one."""
    is_reasoning: bool | None = None
    """Whether it thinks before it answers, on output tokens that are not shown."""


class Settings(_Section, frozen=True):
    """The whole file. `data_dir` is no part of it: it comes from the environment, or lies beside the file."""

    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    logs: LogSettings = LogSettings()
    credits: CreditsSettings = CreditsSettings()
    auth: AuthSettings = AuthSettings()
    routing: RoutingSettings = RoutingSettings()
    providers: dict[str, ProviderSettings] = {}
    models: dict[str, ModelSettings] = {}
    prices: dict[str, PriceSettings] = {}


class Configuration(msgspec.Struct, frozen=True):
    """The settings with everything the environment decides about them filled in."""

    settings: Settings
    data_dir: Path
    database_url: str
    """Absolute: a relative SQLite path has been taken to lie in the data folder."""
    providers: dict[str, ProviderSettings]
    """Those that could serve: they have all they need."""
    enabled: frozenset[str]
    """Those of them that do, until an admin says otherwise."""
    api_keys: dict[str, str]
    """The key of each provider that has one. A secret: never log this struct."""
    headers: dict[str, list[tuple[str, str]]]
    """The header fields of each provider's calls. Secrets as well."""

    @property
    def is_embedded(self) -> bool:
        """Whether the database is SQLite, in a file of our own."""
        return self.database_url.startswith(_SQLITE)

    @property
    def sqlite_file(self) -> Path:
        """The database file of an embedded configuration."""
        return Path(self.database_url.removeprefix(_SQLITE))


def load(
    environ: Mapping[str, str],
    *,
    config: str | None = None,
    host: str | None = None,
    port: int | None = None,
    workers: int | None = None,
) -> Configuration:
    """Read the file that `config`, `TOLLGATE_CONFIG` or the current folder names, then the environment and flags.

    Instead of any variable its name with `_FILE` may name a file with the value, as containers get their secrets.
    Raises `SettingsError` with one line that names the place: a file that cannot be read or parsed, unknown keys,
    wrong types, values out of range, an enabled provider without its address or its variable.
    """
    environ = _Environment(environ)
    path, raw = _read(config or environ.get("TOLLGATE_CONFIG"))
    overrides: tuple[tuple[str, str, object], ...] = (
        ("server", "host", host),
        ("server", "port", port),
        ("server", "workers", workers),
        ("database", "url", environ.get("TOLLGATE_DATABASE_URL")),
        ("auth", "jwt_secret", environ.get("TOLLGATE_JWT_SECRET")),
        ("server", "metrics_token", environ.get("TOLLGATE_METRICS_TOKEN")),
        ("logs", "format", environ.get("TOLLGATE_LOG_FORMAT")),
        ("server", "notice_s", _number(environ.get("TOLLGATE_NOTICE_S"))),
        ("server", "trusted_proxies", _words(environ.get("TOLLGATE_TRUSTED_PROXIES"))),
    )
    for section, key, value in overrides:
        if value is not None and isinstance(raw.setdefault(section, {}), dict):
            raw[section][key] = value
    try:
        settings = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"{path}: {_fault(raw, exc)}") from exc
    _check(settings, path)
    data_dir = Path(environ.get("TOLLGATE_DATA_DIR") or path.parent / DATA_FOLDER).absolute()
    enabled = {name for name, provider in settings.providers.items() if _is_enabled(name, provider, environ, path)}
    providers = {
        name: provider
        for name, provider in settings.providers.items()
        if name in enabled or not _fault_of(provider, environ)
    }
    database_url = _absolute(settings.database.url, data_dir, environ.get("TOLLGATE_DATABASE_PASSWORD"))
    if settings.server.workers > 1 and database_url.startswith(_SQLITE):
        raise SettingsError(
            f"{path}: server.workers: SQLite takes one process, not {settings.server.workers};"
            " name a PostgreSQL in database.url (TOLLGATE_DATABASE_URL) for more"
        )
    return Configuration(
        settings=settings,
        data_dir=data_dir,
        database_url=database_url,
        providers=providers,
        enabled=frozenset(enabled),
        api_keys={name: environ[provider.api_key_env] for name, provider in providers.items() if provider.api_key_env},
        headers={
            name: [*provider.headers.items(), *((field, environ[env]) for field, env in provider.headers_env.items())]
            for name, provider in providers.items()
        },
    )


def _number(text: str | None) -> float | str | None:
    """`text` as a number; what is none is left for the check of types, which names the place."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


class _Environment(Mapping[str, str]):
    """The environment, in which a variable may be replaced by a file: `NAME_FILE` for `NAME`."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def __getitem__(self, name: str) -> str:
        file = self._environ.get(f"{name}_FILE")
        if not file:
            return self._environ[name]
        if self._environ.get(name):
            raise SettingsError(f"both {name} and {name}_FILE are set")
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError(f"{name}_FILE: {file} cannot be read") from exc

    def __iter__(self) -> Iterator[str]:
        return iter(self._environ)

    def __len__(self) -> int:
        return len(self._environ)


def _read(named: str | None) -> tuple[Path, dict[str, Any]]:
    path = Path(named or CONFIG_FILE)
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except FileNotFoundError as exc:
        if named is None:
            return path, {}
        raise SettingsError(f"{path}: there is no such file") from exc
    except OSError as exc:
        raise SettingsError(f"{path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: {exc}") from exc


def _fault(raw: dict[str, Any], error: msgspec.ValidationError) -> str:
    """The error with its place first: ``Expected `int` - at `$.server.port` `` as `server.port: expected …`.

    msgspec writes `[...]` for the key of a table, so the entry at fault is looked for by converting each alone.
    """
    message, _, place = str(error).partition(" - at `$.")
    if "[...]" in place:
        for section, entry_type in (
            ("providers", ProviderSettings),
            ("models", ModelSettings),
            ("prices", PriceSettings),
        ):
            for name, entry in raw.get(section, {}).items():
                try:
                    msgspec.convert(entry, entry_type)
                except msgspec.ValidationError as exc:
                    message, _, inner = str(exc).partition(" - at `$")
                    return f'{section}."{name}"{inner.rstrip("`")}: {_sentence(message)}'
    return f"{place.rstrip('`')}: {_sentence(message)}" if place else _sentence(message)


def _sentence(text: str) -> str:
    return text[:1].lower() + text[1:]


def _check(settings: Settings, path: Path) -> None:
    try:
        parse_percent(settings.credits.markup_percent)
    except AmountError as exc:
        raise SettingsError(f"{path}: credits.markup_percent: {exc}") from exc
    secret = settings.auth.jwt_secret
    if secret is not None and len(secret.encode()) < JWT_SECRET_BYTES_MIN:
        raise SettingsError(f"{path}: auth.jwt_secret (TOLLGATE_JWT_SECRET): shorter than {JWT_SECRET_BYTES_MIN} bytes")
    _check_strangers(settings, path)
    for name in settings.providers:
        if not name or "/" in name:
            raise SettingsError(f"{path}: providers.{name!r}: a provider's name must not be empty or hold a slash")
    for alias, model in settings.models.items():
        for candidate in model.candidates:
            target = candidate if isinstance(candidate, str) else candidate.target
            _check_target(target, settings, f'{path}: models."{alias}".candidates')
    for target, price in settings.prices.items():
        place = f'{path}: prices."{target}"'
        _check_target(target, settings, place)
        try:
            check_price(price)
        except AmountError as exc:
            raise SettingsError(f"{place}.{exc}") from exc


def check_price(price: PriceSettings) -> None:
    """Raises `AmountError`, which begins with the place, when one of the prices is out of range."""
    for place, rates in _rates_in(price):
        for name in (*RateSettings.__struct_fields__, *_BILLED_EACH):
            value = getattr(rates, name, None)
            most = _DOLLARS_EACH_MAX if name in _BILLED_EACH else _DOLLARS_PER_MTOK_MAX
            if value is not None and not (value.is_finite() and 0 <= value <= most):
                raise AmountError(f"{place}{name}: must be from 0 to {most} dollars")


def _rates_in(price: PriceSettings) -> Iterator[tuple[str, RateSettings]]:
    services: list[tuple[str, ServicePriceSettings]] = [("", price)]
    services += [(f"service_tiers.{name}.", service) for name, service in price.service_tiers.items()]
    for place, service in services:
        yield place, service
        for step in service.long_context:
            yield f"{place}long_context.", step


def _check_strangers(settings: Settings, path: Path) -> None:
    """What is open to anybody: registration, other issuers' tokens, headers of proxies."""
    try:
        starting = parse_credits(str(settings.credits.starting_credits))
    except AmountError as exc:
        raise SettingsError(f"{path}: credits.starting_credits: {exc}") from exc
    if starting < 0:
        raise SettingsError(f"{path}: credits.starting_credits: must not be below zero")
    if starting and settings.auth.registration_open and not settings.credits.give_to_strangers:
        raise SettingsError(
            f"{path}: credits.starting_credits: anybody may register and would get credits for it; close registration"
            " (auth.registration_open = false), or insist by credits.give_to_strangers = true"
        )
    for number, issuer in enumerate(settings.auth.issuers):
        place = f"{path}: auth.issuers[{number}]"
        if issuer.issuer == OWN_ISSUER or issuer.issuer in {one.issuer for one in settings.auth.issuers[:number]}:
            raise SettingsError(f"{place}.issuer: {issuer.issuer!r} is taken")
        url = urlsplit(issuer.jwks_url)
        if url.scheme != "https" and not (url.scheme == "http" and url.hostname in _LOOPBACK):
            raise SettingsError(f"{place}.jwks_url: an https:// address is needed")
    for network in settings.server.trusted_proxies:
        try:
            ip_network(network)
        except ValueError as exc:
            raise SettingsError(f"{path}: server.trusted_proxies: {exc}") from exc


_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_DOLLARS_PER_MTOK_MAX = 1_000_000
"""A dollar a token: more is a slip of the keyboard, and less keeps any one call within 64 bits."""

_BILLED_EACH = ("image", "request", "web_search", "file_search", "code_interpreter")

_DOLLARS_EACH_MAX = 1_000
"""For one image, request or use of a tool: likewise."""


def _check_target(target: str, settings: Settings, place: str) -> None:
    provider, slash, model = target.partition("/")
    if not (provider and slash and model):
        raise SettingsError(f"{place}: {target!r} is not of the form provider/model")
    if provider not in settings.providers:
        raise SettingsError(f"{place}: there is no provider {provider!r}")


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _is_enabled(name: str, provider: ProviderSettings, environ: Mapping[str, str], path: Path) -> bool:
    variable = provider.api_key_env
    if variable and not _VARIABLE.fullmatch(variable):
        raise SettingsError(
            f"{path}: providers.{name}.api_key_env: must be the name of an environment variable, not the key itself"
        )
    if provider.enabled is False or (provider.enabled == "auto" and variable and not environ.get(variable)):
        return False
    fault = _fault_of(provider, environ)
    if fault is not None:
        raise SettingsError(f"{path}: providers.{name}{fault}")
    return True


def _fault_of(provider: ProviderSettings, environ: Mapping[str, str]) -> str | None:
    """What keeps a provider from serving, with its place; None when nothing does."""
    if provider.kind == "demo":
        if provider.base_url or provider.api_key_env:
            return ": a demo provider takes neither base_url nor api_key_env"
    elif not _has_address(provider):
        return ".base_url: an http:// or https:// address is needed"
    places = [("api_key_env", provider.api_key_env)]
    places += [(f"headers_env.{field}", variable) for field, variable in provider.headers_env.items()]
    for place, variable in places:
        if variable and not environ.get(variable):
            return f".{place}: the environment variable {variable} is not set (or set `enabled = false`)"
    return None


def _has_address(provider: ProviderSettings) -> bool:
    if provider.kind == "anthropic" and provider.base_url is None:
        return True
    return (provider.base_url or "").startswith(("http://", "https://"))


def _checked_postgresql(url: str, password: str | None) -> str:
    """`url` with `password`, in which libpq's `sslmode` has the name that asyncpg knows it by: `ssl`."""
    parts = urlsplit(url)
    try:
        has_address = bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_address = False
    if not has_address or not parts.path.strip("/"):
        raise SettingsError(f"database.url: must be of the form {_POSTGRESQL}user:password@host:port/database")
    query = [("ssl" if name == "sslmode" else name, value) for name, value in parse_qsl(parts.query)]
    if unknown := [name for name, _ in query if name != "ssl"]:
        raise SettingsError(f"database.url: unknown option {unknown[0]!r}; only sslmode can be set")
    netloc = parts.netloc
    if password is not None:
        user, _, host = netloc.rpartition("@")
        if not user or ":" in user:
            raise SettingsError("database.url: must name a user and no password beside TOLLGATE_DATABASE_PASSWORD")
        netloc = f"{user}:{quote(password, safe='')}@{host}"
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(query)))


def _absolute(url: str, data_dir: Path, password: str | None) -> str:
    if url.startswith(_POSTGRESQL):
        return _checked_postgresql(url, password)
    if not url.startswith(_SQLITE) or url in {_SQLITE, f"{_SQLITE}:memory:"} or "?" in url:
        raise SettingsError(f"database.url: must begin with {_POSTGRESQL} or name a file as {_SQLITE}tollgate.db")
    return f"{_SQLITE}{data_dir / url.removeprefix(_SQLITE)}"
