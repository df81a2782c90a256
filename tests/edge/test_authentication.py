"""The door: closed by default, the same for every route, and not fooled by a database that is away."""

import asyncio
from contextlib import asynccontextmanager

import httpx2
import pytest
import structlog
from litestar import Litestar, get

from proxy.app import Tollgate, identified, routed
from proxy.edge import authentication as module
from proxy.edge.authentication import CHECKED_BY_LEDGER, NEEDS, PUBLIC, Authentication, authenticated, needs
from proxy.edge.errors import respond
from proxy.edge.invoke import INVOKE_PATH, TEST_PATH
from proxy.errors import Unauthenticated, Unavailable
from proxy.identity.keys import KeyTerms, Scope, create_key
from proxy.identity.users import create_user
from proxy.settings import load
from proxy.storage import database
from proxy.units import MICROS_PER_SECOND, now_micros
from proxy.wire.requests import Endpoint
from tests.serving import environment


@asynccontextmanager
async def opened(folder, url):
    """A server's parts in this process."""
    tollgate = Tollgate(load(environment(folder, url)))
    async with tollgate.open():
        yield tollgate


@pytest.fixture
async def tollgate(tmp_path, database_url):
    async with opened(tmp_path, database_url) as tollgate:
        yield tollgate


@pytest.fixture
async def on_sqlite(tmp_path, sqlite_template):
    file = tmp_path / "tollgate.db"
    file.write_bytes(sqlite_template.read_bytes())
    async with opened(tmp_path, f"sqlite+aiosqlite:///{file}") as tollgate:
        yield tollgate


def client_of(app, credential: str | None = None) -> httpx2.AsyncClient:
    headers = {} if credential is None else {"Authorization": f"Bearer {credential}"}
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(identified(app)), base_url="http://test", headers=headers)


def doors(app: Litestar) -> list[tuple[str, str, dict]]:
    """Every method and path there is, with the options of its handler."""
    found = []
    for route in app.routes:
        path = "/" + "/".join(
            "x" if isinstance(part, dict) or not isinstance(part, str) else part for part in route.path_components
        )
        handlers = getattr(route, "route_handlers", None) or [route.route_handler]
        for handler in handlers:
            found += [(method, path, handler.opt) for method in sorted(getattr(handler, "http_methods", {"POST"}))]
    return found


async def people(tollgate) -> dict[str, str]:
    """Keys of a plain user and of an admin, of each scope."""
    keys = {}
    async with database.writing(tollgate.engine) as connection:
        for name, is_admin in (("plain", False), ("admin", True)):
            user = await create_user(connection, f"{name}@example.com", is_admin=is_admin)
            for scope in Scope:
                if scope is not Scope.ADMIN or is_admin:
                    made = await create_key(connection, user, KeyTerms(scope=scope))
                    keys[f"{name} {scope}"] = made.secret
    return keys


async def test_every_route_is_public_by_name_or_asks_who_is_there(on_sqlite):
    """Nothing answers an anonymous caller but what is on the list; every route says what it needs."""
    app = routed(on_sqlite)
    found = doors(app)
    paths = {path for _, path, _ in found}
    assert paths >= PUBLIC
    assert {"/v1/chat/completions", "/v1/models", "/me", "/api/v1/keys/x"} <= paths
    assert {"/api/v1/admin/users/x/credits", "/api/v1/admin/users/x/keys/x", "/api/v1/admin/events"} <= paths
    async with client_of(app) as http:
        for method, path, options in found:
            answer = await http.request(method, path)
            if path in PUBLIC:
                assert answer.status_code not in {401, 403}, (method, path)
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert NEEDS in options or method == "OPTIONS" or path == "/schema/x", "the framework's own stay closed"


async def test_routes_for_admins_refuse_everybody_else(on_sqlite):
    """A plain user by any key, and an admin by a key that is not for administration."""
    app = routed(on_sqlite)
    keys = await people(on_sqlite)
    for method, path, options in doors(app):
        if options.get(NEEDS) is Scope.ADMIN:
            for name in ("plain inference", "plain manage", "admin inference", "admin manage"):
                async with client_of(app, keys[name]) as http:
                    assert (await http.request(method, path)).status_code == 403, (method, path, name)


async def test_the_framework_answers_nobody_by_itself(on_sqlite):
    """Not even admins hear from it, on a path for them, half of what it may be asked; paid paths say it all."""
    app = routed(on_sqlite)
    async with client_of(app, (await people(on_sqlite))["admin admin"]) as http:
        for method, path, options in doors(app):
            if method == "OPTIONS" and path not in PUBLIC:
                assert (await http.request(method, path)).status_code == 403, (path, options)


async def test_what_manages_an_account_needs_more_than_a_key_for_calls(on_sqlite):
    """All of one's own account and keys, by whatever method; calls, models and receipts need no more."""
    for method, path, options in doors(routed(on_sqlite)):
        if method != "OPTIONS" and path not in PUBLIC and path.startswith(("/me", "/api/v1/keys")):
            assert options[NEEDS] is Scope.MANAGE, (method, path)
        if path.startswith(("/v1/", "/api/v1/credits/")) and NEEDS in options:
            assert options[NEEDS] is Scope.INFERENCE, (method, path)


async def test_a_key_of_less_scope_than_a_route_needs_is_refused(on_sqlite):
    """Keys for inference manage nothing."""
    app = routed(on_sqlite)
    keys = await people(on_sqlite)
    async with client_of(app, keys["plain inference"]) as http:
        for method, path, options in doors(app):
            if options.get(NEEDS) is Scope.MANAGE:
                answer = await http.request(method, path)
                assert answer.status_code == 403, (method, path)
                assert answer.json()["error"]["code"] == "insufficient_scope"


# ---- a small application, for what the routes of today do not show


@pytest.fixture
async def small(on_sqlite):
    """An application with a route for each scope, and one that does not say."""

    @get("/inference", opt=needs(Scope.INFERENCE), sync_to_thread=False)
    def inference() -> str:
        return "yes"

    @get("/manage", opt=needs(Scope.MANAGE), sync_to_thread=False)
    def manage() -> str:
        return "yes"

    @get("/admin", opt=needs(Scope.ADMIN), sync_to_thread=False)
    def admin() -> str:
        return "yes"

    @get("/forgotten", sync_to_thread=False)
    def forgotten() -> str:
        return "yes"

    door = Authentication(on_sqlite.engine, on_sqlite.accounts, on_sqlite.last_used)
    return Litestar(
        [inference, manage, admin, forgotten],
        middleware=[lambda app: authenticated(app, door)],
        exception_handlers={Exception: respond},
        openapi_config=None,
        logging_config=None,
    )


@pytest.mark.parametrize(
    ("who", "opens"),
    [
        ("plain inference", {"/inference"}),
        ("plain manage", {"/inference", "/manage"}),
        ("admin inference", {"/inference"}),
        ("admin manage", {"/inference", "/manage"}),
        ("admin admin", {"/inference", "/manage", "/admin"}),
    ],
)
async def test_scopes_open_what_they_are_for(on_sqlite, small, who, opens):
    """Each with those before it; what names no scope is closed even to admins."""
    keys = await people(on_sqlite)
    async with client_of(small, keys[who]) as http:
        for path in ("/inference", "/manage", "/admin", "/forgotten"):
            assert (await http.get(path)).status_code == (200 if path in opens else 403), path


async def test_who_is_no_admin_any_more_has_no_admin_key(on_sqlite, small):
    """The key's scope is nothing without its user's rank, from the next request on."""
    keys = await people(on_sqlite)
    async with client_of(small, keys["admin admin"]) as http:
        assert (await http.get("/admin")).status_code == 200
        async with database.writing(on_sqlite.engine) as connection:
            await connection.exec_driver_sql("UPDATE users SET is_admin = false")
        answer = await http.get("/admin")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_an_admin")


async def test_logins_outlive_a_restart_on_the_embedded_database(tmp_path, database_url):
    """It keeps a secret of its own; on PostgreSQL, which several processes share, none is made up."""
    async with opened(tmp_path, database_url) as tollgate:
        credentials = {"email": "ann@example.com", "password": "a password of some length"}
        async with client_of(routed(tollgate)) as http:
            assert (await http.post("/register", json=credentials)).status_code == 201
            answer = await http.post("/login", json=credentials)
    if not database_url.startswith("sqlite"):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "login_not_configured")
        return
    async with opened(tmp_path, database_url) as again, client_of(routed(again), answer.json()["access_token"]) as http:
        assert (await http.get("/me")).json()["email"] == "ann@example.com"
    (tmp_path / "data" / "jwt_secret").unlink()
    async with opened(tmp_path, database_url) as other, client_of(routed(other), answer.json()["access_token"]) as http:
        assert (await http.get("/me")).status_code == 401, "another secret"


# ---- the header


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Basic {key}")],
        [("authorization", "{key}")],
        [("authorization", "Bearer {key} {key}")],
        [("authorization", "Bearer {key}, Bearer {key}")],
        [("authorization", "Bearer {key}"), ("authorization", "Bearer {key}")],
        [("authorization", "Bearer {key}"), ("Authorization", "Basic x")],
        [("x-api-key", "{key}")],
        [("cookie", "authorization={key}")],
        [("authorization", "Bearer {key}x")],
        [("authorization", "Bearer sk-tg-' OR 1=1 --")],
        [("authorization", "Bearer sk-tg-")],
        [("authorization", "Bearer sk-tg-\xff\xfe")],
        [("authorization", "Bearer " + "a" * 20_000 + ".b.c")],
    ],
)
async def test_one_header_in_one_form(on_sqlite, headers):
    """Anything else is nobody."""
    key = (await people(on_sqlite))["plain inference"]
    sent = [(name.encode(), value.format(key=key).encode("latin-1")) for name, value in headers]
    async with client_of(routed(on_sqlite)) as http:
        answer = await http.get("/v1/models", headers=sent)
    assert answer.status_code == 401
    assert key not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_the_scheme_may_be_written_as_one_likes(on_sqlite, scheme):
    """As RFC 9110 has it."""
    key = (await people(on_sqlite))["plain inference"]
    async with client_of(routed(on_sqlite)) as http:
        assert (await http.get("/v1/models", headers={"authorization": f"{scheme} {key}"})).status_code == 200


@pytest.mark.parametrize(
    "query", ["api_key={key}", "x=a%26{key}", "k=sk%2Dtg%2Dabc", "access_token=a.b.c", "Access_Token=x"]
)
async def test_credentials_in_the_address_are_refused(on_sqlite, query):
    """With or without a good header: an address is in every log on the way."""
    key = (await people(on_sqlite))["plain inference"]
    for credential in (key, None):
        async with client_of(routed(on_sqlite), credential) as http:
            answer = await http.get(f"/v1/models?{query.format(key=key)}")
        assert answer.status_code == 401
        assert key not in answer.text


# ---- memory


def sent(credential: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {credential}".encode())]


class Away:
    """An engine whose database is out of reach, for as long as it is told."""

    def __init__(self, engine) -> None:
        self._engine = engine
        self.url = engine.url
        self.is_away = False
        self.gate: asyncio.Event | None = None
        self.asked = 0

    @asynccontextmanager
    async def connect(self):
        self.asked += 1
        if self.is_away:
            raise ConnectionRefusedError
        if self.gate is not None:
            await self.gate.wait()
        async with self._engine.connect() as connection:
            yield connection


@pytest.fixture
async def door(tollgate):
    """Authentication over a database that can go away."""
    away = Away(tollgate.engine)
    return Authentication(away, tollgate.accounts, tollgate.last_used), away


async def test_a_known_key_is_not_read_again_at_once(tollgate, door):
    """On paid paths; everywhere else it is, since nobody checks it after us."""
    authentication, away = door
    key = (await people(tollgate))["plain inference"]
    for _ in range(3):
        await authentication.caller(sent(key), from_memory=True)
    assert away.asked == 1
    await authentication.caller(sent(key), from_memory=False)
    assert away.asked == 2


async def test_a_crowd_with_one_key_reads_it_once(tollgate, door):
    """Whatever the number of calls at the moment when it has to be read again."""
    authentication, away = door
    key = (await people(tollgate))["plain inference"]
    await asyncio.gather(*(authentication.caller(sent(key), from_memory=True) for _ in range(200)))
    assert away.asked == 1


async def test_down_is_not_wrong(tollgate, door, monkeypatch):
    """A known key goes on to the ledger, which says 503; an unknown one, and any other path, says so here."""
    authentication, away = door
    keys = await people(tollgate)
    await authentication.caller(sent(keys["plain inference"]), from_memory=True)
    away.is_away = True
    later = now_micros() + (module._FRESH_S + 1) * MICROS_PER_SECOND
    monkeypatch.setattr(module, "now_micros", lambda: later)
    assert (await authentication.caller(sent(keys["plain inference"]), from_memory=True)).key_id
    for credential, from_memory in (
        (keys["plain manage"], True),
        ("sk-tg-unknown", True),
        (keys["plain inference"], False),
    ):
        with pytest.raises(Unavailable) as raised:
            await authentication.caller(sent(credential), from_memory=from_memory)
        assert raised.value.retry_after_s > 0
    monkeypatch.setattr(module, "now_micros", lambda: later + module._KEPT_S * MICROS_PER_SECOND)
    with pytest.raises(Unavailable):
        await authentication.caller(sent(keys["plain inference"]), from_memory=True)


async def test_a_database_that_hangs_is_not_waited_for(tollgate, door, monkeypatch):
    """Not for longer than a paid call can wait: a known key goes on, an unknown one is unavailable."""
    authentication, away = door
    keys = await people(tollgate)
    await authentication.caller(sent(keys["plain inference"]), from_memory=True)
    away.gate = asyncio.Event()
    monkeypatch.setattr(module, "_FRESH_S", 0)
    monkeypatch.setattr(module, "_LOOK_UP_S_MAX", 0.05)
    assert (await authentication.caller(sent(keys["plain inference"]), from_memory=True)).key_id
    with pytest.raises(Unavailable):
        await authentication.caller(sent(keys["plain manage"]), from_memory=True)
    away.gate.set()
    monkeypatch.undo()
    assert (await authentication.caller(sent(keys["plain manage"]), from_memory=True)).key_id


async def test_a_remembered_key_expires_on_time(tollgate, door, monkeypatch):
    """Memory does not lengthen a life."""
    authentication, _ = door
    now = now_micros()
    async with database.writing(tollgate.engine) as connection:
        user = await create_user(connection, "short@example.com")
        key = (await create_key(connection, user, KeyTerms(expires_at=now + 5 * MICROS_PER_SECOND))).secret
    await authentication.caller(sent(key), from_memory=True)
    monkeypatch.setattr(module, "now_micros", lambda: now + 6 * MICROS_PER_SECOND)
    with pytest.raises(Unauthenticated):
        await authentication.caller(sent(key), from_memory=True)


async def test_unknown_keys_are_not_remembered(tollgate, door, monkeypatch):
    """A flood of invented keys takes no memory, and one of known keys a bounded one."""
    authentication, _ = door
    for number in range(20):
        with pytest.raises(Unauthenticated):
            await authentication.caller(sent(f"sk-tg-{number}"), from_memory=True)
    assert not authentication._known
    monkeypatch.setattr(module, "_KNOWN_MAX", 2)
    for key in (await people(tollgate)).values():
        await authentication.caller(sent(key), from_memory=True)
    assert len(authentication._known) == 2


async def test_only_what_the_ledger_checks_again_is_served_from_memory(on_sqlite):
    """The paid paths, and no other."""
    found = {path for _, path, options in doors(routed(on_sqlite)) if CHECKED_BY_LEDGER in options}
    assert found == {*(f"/v1/{endpoint}" for endpoint in Endpoint), INVOKE_PATH, TEST_PATH}


@pytest.fixture(autouse=True)
def logged():
    with structlog.testing.capture_logs() as entries:
        yield entries
