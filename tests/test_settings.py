import os
import subprocess
import sys

import pytest

from proxy.errors import SettingsError
from proxy.settings import load

OPENAI = '[providers.openai]\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\napi_key_env = "UPSTREAM_KEY"\n'
ISSUER = '[[auth.issuers]]\nissuer = "https://login"\naudience = "a"\njwks_url = "https://keys"\n'
DEMO = '[providers.demo]\nkind = "demo"\n'


@pytest.fixture
def written(tmp_path):
    def write(text):
        file = tmp_path / "config.toml"
        file.write_text(text)
        return str(file)

    return write


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[server]\nport = 'x'", "server.port"),
        ("[server]\nprot = 1", "server"),
        ("[server]\nport = 8080.5", "server.port"),
        ("[sever]\nport = 1", "sever"),
        ("[server]\nhttp_client = 'curl'", "server.http_client"),
        ("server = 1", "server"),
        ("[server", "config.toml"),
        ("[credits]\nmarkup_percent = -1", "credits.markup_percent"),
        ('[database]\nurl = "postgresql://localhost/x"', "database.url"),
        ('[database]\nurl = "sqlite+aiosqlite:///:memory:"', "database.url"),
        ("[database]\nlease_s = 0.5", "database.lease_s"),
        ('[auth]\njwt_secret = "short"', "auth.jwt_secret"),
        ('[server]\nmetrics_token = ""', "server.metrics_token"),
        ("[auth]\ntoken_days = 0", "auth.token_days"),
        ("[auth]\nis_admin = true", "auth"),
        (ISSUER.replace("https://login", "tollgate"), "auth.issuers[0].issuer"),
        (ISSUER.replace("https://keys", "http://keys"), "auth.issuers[0].jwks_url"),
        (ISSUER.replace("https://keys", "file://keys"), "auth.issuers[0].jwks_url"),
        (f"{ISSUER}{ISSUER}", "auth.issuers[1].issuer"),
        (f'{ISSUER}algorithms = ["HS256"]', "auth.issuers[0].algorithms"),
        (f'{ISSUER}algorithms = ["none"]', "auth.issuers[0].algorithms"),
        (f"{ISSUER}algorithms = []", "auth.issuers[0].algorithms"),
        (ISSUER.replace("audience", "audiences"), "auth.issuers[0]"),
        ('[server]\ntrusted_proxies = ["everybody"]', "server.trusted_proxies"),
        ('[server]\ntrusted_proxies = ["10.0.0.1/8"]', "server.trusted_proxies"),
        ('[credits]\nstarting_credits = "-1"', "credits.starting_credits"),
        ('[credits]\nstarting_credits = "NaN"', "credits.starting_credits"),
        ('[credits]\nstarting_credits = "1"', "credits.starting_credits"),
        ('[providers.x]\nkind = "magic"', "providers.x.kind"),
        ('[providers.x]\nkind = "openai"', "providers.x.base_url"),
        ('[providers.x]\nkind = "anthropic"\nbase_url = "api.anthropic.com"', "providers.x.base_url"),
        ('[providers.x]\nkind = "anthropic"\nbase_url = ""', "providers.x.base_url"),
        ('[providers.x]\nkind = "anthropic"\napi_key_env = "NOBODY_HAS_IT"', "providers.x.api_key_env"),
        ('[providers."a/b"]\nkind = "demo"', "a/b"),
        (OPENAI, "providers.openai.api_key_env"),
        (DEMO + '[prices."demo/x"]\ninput = "cheap"', "prices.demo/x.input"),
        (DEMO + '[prices."demo/x"]\ninput = "-1"\noutput = "1"', "prices.demo/x.input"),
        (DEMO + '[prices."nobody/x"]\ninput = "1"', "prices.nobody/x"),
        (DEMO + '[prices."demo"]\ninput = "1"', "prices.demo"),
        (DEMO + '[models."x"]\ncandidates = []', "models.x.candidates"),
        (DEMO + '[models."x"]\ncandidates = ["nobody/x"]', "models.x.candidates"),
        (DEMO + '[models."x"]\ncandidates = [{ target = "nobody/x" }]', "models.x.candidates"),
        (DEMO + '[models."x"]\ncandidates = [{ target = "demo/x", weight = 0 }]', "models.x.candidates"),
        (DEMO + '[prices."demo/x"]\ninput = "1"\noutput = "1"\nrequest = "1001"', "prices.demo/x.request"),
        (
            DEMO + '[prices."demo/x"]\ninput = "1"\noutput = "1"\nservice_tiers.flex = { input = "-1", output = "1" }',
            "prices.demo/x.service_tiers.flex.input",
        ),
        (
            DEMO + '[prices."demo/x"]\ninput = "1"\noutput = "1"\n'
            'long_context = [{ above_tokens = 1, input = "1", output = "-1" }]',
            "prices.demo/x.long_context.output",
        ),
        (
            '[providers.x]\nkind = "openai"\nbase_url = "http://x/"\nheaders_env = { api-key = "NOBODY_HAS_IT" }',
            "providers.x.headers_env.api-key",
        ),
        ('[routing]\nexpose = "all"', "routing.expose"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(written, text, place):
    """One line, with the file and the place in it."""
    with pytest.raises(SettingsError) as raised:
        load({}, config=written(text))
    assert place in str(raised.value).replace('"', "")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        '[credits]\nstarting_credits = "1"\ngive_to_strangers = true',
        '[credits]\nstarting_credits = "1"\n[auth]\nregistration_open = false',
        ISSUER.replace("https://keys", "http://127.0.0.1:1/keys"),
        '[server]\ntrusted_proxies = ["10.0.0.0/8", "fd00::/8", "127.0.0.1"]',
    ],
)
def test_what_is_open_to_strangers_is_meant(written, text):
    """Free money needs closed doors or insistence; keys come over https, or from this machine."""
    load({}, config=written(text))


def test_the_shipped_file_needs_no_environment():
    """The file in the repository enables the demo provider, and openai once its key is there."""
    assert set(load({}, config="config.toml").providers) == {"demo"}
    configuration = load({"OPENAI_API_KEY": "sk-x"}, config="config.toml")
    assert set(configuration.providers) == {"openai", "demo"}
    assert configuration.api_keys == {"openai": "sk-x"}


def test_anthropic_needs_nothing_but_its_key(written):
    """The address is Anthropic's own; the shipped file enables it once the key is there."""
    text = '[providers.claude]\nkind = "anthropic"\napi_key_env = "CLAUDE_KEY"'
    assert load({"CLAUDE_KEY": "sk-ant"}, config=written(text)).api_keys == {"claude": "sk-ant"}
    assert "anthropic" in load({"ANTHROPIC_API_KEY": "sk-ant"}, config="config.toml").enabled


def test_a_provider_that_is_off_may_lack_something(written):
    """One that lacks nothing can be switched on later, and its headers are known."""
    off = '[providers.{name}]\nkind = "openai"\nenabled = false\nbase_url = "http://x/"\n{more}\n'
    text = off.format(name="ready", more='headers = { a = "1" }\nheaders_env = { b = "IT" }')
    text += off.format(name="lacking", more='api_key_env = "NOBODY_HAS_IT"')
    configuration = load({"IT": "2"}, config=written(text))
    assert set(configuration.providers) == {"ready"}
    assert configuration.enabled == frozenset()
    assert configuration.headers == {"ready": [("a", "1"), ("b", "2")]}


def test_flags_beat_the_environment_beats_the_file(written, tmp_path):
    """The nearest to the hand wins."""
    file = written('[server]\nport = 1\nhost = "0.0.0.0"\n[database]\nurl = "sqlite+aiosqlite:///a.db"')
    environ = {"TOLLGATE_CONFIG": file, "TOLLGATE_DATABASE_URL": "sqlite+aiosqlite:///b.db"}
    configuration = load(environ, port=2)
    assert (configuration.settings.server.port, configuration.settings.server.host) == (2, "0.0.0.0")  # noqa: S104
    assert configuration.sqlite_file == tmp_path / ".tollgate" / "b.db"
    moved = load({**environ, "TOLLGATE_DATA_DIR": str(tmp_path / "data")})
    assert moved.sqlite_file == tmp_path / "data" / "b.db"


def test_a_named_file_must_exist_and_the_default_one_need_not(tmp_path, monkeypatch):
    """A typing error in a path is no reason to start with other settings."""
    monkeypatch.chdir(tmp_path)
    assert load({}).providers == {}
    with pytest.raises(SettingsError):
        load({}, config="missing.toml")


def test_the_command_line_says_it_in_one_line_and_exits_with_2(written):
    """Operators see the place, never a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "serve", "--config", written("[server]\nport = 'x'")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOLLGATE_CONFIG": ""},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "server.port" in done.stderr


# ---- secrets from files


def test_secrets_may_come_from_files(written, tmp_path):
    """Every variable, those of providers included; the database's password is put into its address."""
    files = {
        "UPSTREAM_KEY": "sk-from-a-file\n",
        "TOLLGATE_DATABASE_PASSWORD": "a b/c@d",
        "TOLLGATE_JWT_SECRET": "x" * 32,
    }
    environ = {"TOLLGATE_DATABASE_URL": "postgresql+asyncpg://tollgate@db:5432/books"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        environ[f"{name}_FILE"] = str(tmp_path / name)
    found = load(environ, config=written(OPENAI))
    assert found.api_keys == {"openai": "sk-from-a-file"}
    assert found.settings.auth.jwt_secret == "x" * 32
    assert found.database_url == "postgresql+asyncpg://tollgate:a%20b%2Fc%40d@db:5432/books"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"UPSTREAM_KEY": "sk-1", "UPSTREAM_KEY_FILE": "/dev/null"}, "both UPSTREAM_KEY and UPSTREAM_KEY_FILE are set"),
        ({"UPSTREAM_KEY_FILE": "/nowhere/at/all"}, "UPSTREAM_KEY_FILE: /nowhere/at/all cannot be read"),
        (
            {
                "UPSTREAM_KEY": "sk-1",
                "TOLLGATE_DATABASE_URL": "postgresql+asyncpg://me:secret@db/books",
                "TOLLGATE_DATABASE_PASSWORD": "other",
            },
            "must name a user and no password beside TOLLGATE_DATABASE_PASSWORD",
        ),
    ],
)
def test_what_is_wrong_with_a_secret_is_said_without_it(written, environ, said):
    """A secret twice, or a file that is not there."""
    with pytest.raises(SettingsError, match=said) as raised:
        load(environ, config=written(OPENAI))
    assert "secret" not in str(raised.value)
    assert "other" not in str(raised.value)


def test_more_than_one_process_needs_postgresql(written):
    """SQLite takes one, whoever asks for more."""
    with pytest.raises(SettingsError, match="SQLite takes one process, not 3"):
        load({}, config=written("[server]\nworkers = 3"))
    environ = {"TOLLGATE_DATABASE_URL": "postgresql+asyncpg://me:x@db/books"}
    assert load(environ, config=written("[server]\nworkers = 3")).settings.server.workers == 3
    assert load(environ, config=written(""), workers=4).settings.server.workers == 4
