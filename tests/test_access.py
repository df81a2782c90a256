"""Who may do what, end to end: real servers on both databases, a real issuer and a real provider on sockets."""

import json
import time
from decimal import Decimal

import openai
import pytest
from click.testing import CliRunner

from proxy.cli import cli
from tests.identity.tokens import AUDIENCE, ISSUER, SECRET, IssuerKey, external_claims, key_set, unsigned
from tests.issuer import publishing
from tests.serving import CONFIG, MODEL, audited
from tests.waiting import until

PASSWORD = "a password of some length"
CALL = {"model": MODEL, "messages": [{"role": "user", "content": "Say something."}]}
APP = "https://app.example.com"

ACCESS = f"""
[auth]
jwt_secret = "{SECRET}"
address_attempts_per_minute = 6
account_failures_per_hour = 2

[[auth.issuers]]
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
jwks_url = "JWKS_URL"

[[auth.issuers]]
issuer = "https://away.example.com/"
audience = "{AUDIENCE}"
jwks_url = "http://127.0.0.1:9/jwks"

[credits]
starting_credits = "0.25"
give_to_strangers = true
"""
KEY = IssuerKey()


@pytest.fixture(scope="module")
def issuer():
    with publishing() as issuer:
        issuer.body = key_set(KEY)
        yield issuer


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream, issuer):
    """A running server whose log holds no secret, and whose books add up, when the tests are through with it."""
    folder = tmp_path_factory.mktemp("access")
    server = f'port = 0\ntrusted_proxies = ["127.0.0.0/8"]\ncors_origins = ["{APP}"]'
    config = CONFIG.replace("port = 0", server) + ACCESS.replace("JWKS_URL", issuer.url)
    with audited(folder, database, upstream.base_url, config) as served:
        yield served
        log = served.log()
        for secret in (PASSWORD, SECRET, "$argon2", "eyJ", "key_hash"):
            assert secret not in log, secret
        assert "internal_error" not in log
        assert '"level": "error"' not in log


class Senders:
    """An address of its own for each test, as our proxy in front says it."""

    number = 0

    def next(self) -> str:
        self.number += 1
        return f"198.51.100.{self.number}"


SENDERS = Senders()


@pytest.fixture
def anybody(served):
    """A client without a credential."""
    with served.client(None) as http:
        http.headers["x-forwarded-for"] = SENDERS.next()
        yield http


def fresh_email() -> str:
    return f"u{time.time_ns()}@example.com"


def register(http, email=None) -> tuple[str, dict]:
    email = email or fresh_email()
    answer = http.post("/register", json={"email": email, "password": PASSWORD, "full_name": "Some Body"})
    assert answer.status_code == 201, answer.text
    return email, answer.json()


def log_in(http, email: str, password: str = PASSWORD) -> str:
    answer = http.post("/login", json={"email": email, "password": password})
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@pytest.fixture
def somebody(served, anybody):
    """A client logged in to an account of its own."""
    email, _ = register(anybody)
    with served.client(log_in(anybody, email)) as http:
        http.headers["x-forwarded-for"] = anybody.headers["x-forwarded-for"]
        yield http


@pytest.fixture(scope="module")
def member(served):
    """A client logged in to an account that several tests may use."""
    with served.client(None) as http:
        http.headers["x-forwarded-for"] = SENDERS.next()
        token = log_in(http, register(http)[0])
    with served.client(token) as http:
        yield http


def code(answer) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# ---- accounts


def test_register_log_in_and_look_at_oneself(served, anybody):
    """An account has its starting credits, no rights, and no password in any answer."""
    email, account = register(anybody, f"Mixed.{fresh_email()}")
    assert account["email"] == email.lower()
    assert (account["credits_balance"], account["is_admin"], account["email_verified"]) == ("0.25", False, False)
    answer = anybody.post("/login", json={"email": email, "password": PASSWORD})
    login = answer.json()
    assert (login["token_type"], login["expires_in"]) == ("bearer", 30 * 86_400)
    with served.client(login["access_token"]) as http:
        assert http.get("/me").json() == account
    assert "password" not in json.dumps(account)


def test_a_token_is_accepted_wherever_a_key_is(somebody, served):
    """OpenAI's own client takes it for a key; the call is paid, and on the receipt."""
    token = somebody.headers["authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=served.base_url, api_key=token, max_retries=0) as client:
        answer = client.chat.completions.with_raw_response.create(**CALL)
        assert MODEL in {model.id for model in client.models.list()}
    charge = somebody.get(f"/api/v1/credits/charges/{answer.headers['x-request-id']}").json()
    assert charge["state"] == "settled"
    assert Decimal(charge["charged"]) > 0
    assert Decimal(somebody.get("/me").json()["credits_balance"]) == Decimal("0.25") - Decimal(charge["charged"])


def test_a_new_password_voids_every_token_on_the_very_next_paid_call(somebody, served):
    """Even one that a replica has in its memory: the ledger checks the version again."""
    assert somebody.post("/v1/chat/completions", json=CALL).status_code == 200
    change = {"current_password": PASSWORD, "new_password": "another password of length"}
    assert code(somebody.post("/me/password", json={**change, "current_password": "wrong one"}))[0] == 401
    weak = somebody.post("/me/password", json={**change, "new_password": "password1"})
    assert (code(weak), weak.json()["error"]["param"]) == ((400, "weak_password"), "new_password")
    fresh = somebody.post("/me/password", json=change).json()["access_token"]
    assert code(somebody.post("/v1/chat/completions", json=CALL)) == (401, "invalid_api_key")
    assert code(somebody.get("/me")) == (401, "invalid_api_key")
    with served.client(fresh) as http:
        assert http.post("/v1/chat/completions", json=CALL).status_code == 200


def test_nothing_but_what_is_asked_for_can_be_set(anybody):
    """Neither rank nor money comes by a registration."""
    body = {"email": fresh_email(), "password": PASSWORD}
    more = {
        "is_admin": True,
        "email_verified": True,
        "id": "usr_x",
        "balance": "5",
        "token_version": 3,
        "scope": "admin",
    }
    for name, value in more.items():
        answer = anybody.post("/register", json={**body, name: value})
        if answer.status_code == 429:
            anybody.headers["x-forwarded-for"] = SENDERS.next()
            answer = anybody.post("/register", json={**body, name: value})
        assert code(answer) == (400, "unknown_parameter"), name
        assert answer.json()["error"]["param"] == name
    assert register(anybody, body["email"])[1]["is_admin"] is False


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"email": 5, "password": "a password of some length"}', 400),
        (b'{"email": null, "password": "a password of some length"}', 400),
        (b'{"email": "\\u0000@example.com", "password": "a password of some length"}', 400),
        (b'{"email": "x@example.com", "password": "\\ud800 password of length"}', 400),
        (b'{"email": "x@example.com", "password": "' + b"x" * 1025 + b'"}', 400),
        (b'{"email": "x@example.com", "password": "' + b"x" * 20_000 + b'"}', 413),
        (b'{"email": "' + b"x" * 10_000 + b'@example.com", "password": "a password of some length"}', 400),
        (b'{"email": "x@example.com", "password": "a password of some length", "full_name": "\\u0000"}', 400),
    ],
)
def test_bodies_that_nobody_should_send(anybody, body, status):
    """Refused in OpenAI's shape, and never repeated."""
    answer = anybody.post("/register", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.content) < 600


def test_quotes_are_letters_wherever_they_stand(anybody, member):
    """SQL in any string is text, or is refused as what it is not."""
    evil = "'; DROP TABLE users; --"
    answer = anybody.post("/register", json={"email": fresh_email(), "password": evil * 2, "full_name": evil})
    assert (answer.status_code, answer.json()["full_name"]) == (201, evil)
    assert code(anybody.post("/login", json={"email": evil, "password": evil})) == (401, "invalid_credentials")
    for path in ("charges/' OR 1=1 --", "charges/%00", "transactions?cursor=%00", "transactions?cursor='--"):
        assert member.get(f"/api/v1/credits/{path}").status_code in {400, 404}, path


def test_guessing_is_limited_by_address(anybody):
    """So many attempts a minute from one sender, of whatever kind; others go on."""
    for _ in range(6):
        assert anybody.post("/login", json={"email": fresh_email(), "password": "x"}).status_code == 401
    answer = anybody.post("/login", json={"email": fresh_email(), "password": "x"})
    assert code(answer) == (429, "rate_limit_exceeded")
    assert 0 < int(answer.headers["retry-after"]) <= 60
    assert code(anybody.post("/register", json={"email": fresh_email(), "password": PASSWORD}))[0] == 429
    anybody.headers["x-forwarded-for"] = f"198.51.100.200, {SENDERS.next()}"
    register(anybody)


def test_guessing_is_limited_by_account(anybody):
    """From however many addresses."""
    email, _ = register(anybody)
    for _ in range(2):
        anybody.headers["x-forwarded-for"] = SENDERS.next()
        assert code(anybody.post("/login", json={"email": email, "password": "x"})) == (401, "invalid_credentials")
    assert anybody.post("/login", json={"email": email, "password": PASSWORD}).status_code == 429


# ---- other issuers


def test_another_issuers_token_pays_for_calls(served, issuer):
    """Who comes for the first time gets an account with its starting credits, and finds it again."""
    token = KEY.sign(sub=fresh_email(), email="someone@example.com")
    with served.client(token) as http:
        assert http.post("/v1/chat/completions", json=CALL).status_code == 200
        me = http.get("/me").json()
    assert (me["email"], me["is_admin"]) == (None, False)
    assert Decimal("0.2") < Decimal(me["credits_balance"]) < Decimal("0.25")
    assert issuer.asked < 20


@pytest.mark.parametrize(
    "token",
    [
        unsigned(external_claims()),
        KEY.sign(aud="another"),
        KEY.sign(iss="https://evil.example.com/"),
        KEY.sign(exp=int(time.time()) - 60),
        IssuerKey("first").sign(),
        IssuerKey("unknown").sign(),
    ],
)
def test_bad_tokens_open_nothing(served, token):
    """On paid paths and on all others."""
    with served.client(token) as http:
        assert code(http.post("/v1/chat/completions", json=CALL)) == (401, "invalid_api_key")
        assert code(http.get("/me")) == (401, "invalid_api_key")


def test_an_issuer_that_is_down_is_not_a_wrong_token(served):
    """503 with a time to wait."""
    with served.client(KEY.sign(iss="https://away.example.com/")) as http:
        answer = http.post("/v1/chat/completions", json=CALL)
    assert code(answer) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0


# ---- keys


def test_users_manage_their_own_keys(somebody, served):
    """The key is answered once; everything else can be read, changed and taken back."""
    wanted = {
        "name": "laptop",
        "scope": "inference",
        "expires_at": "2099-01-01T00:00:00+01:00",
        "allowed_models": ["fake-*"],
        "limit_amount": "0.1",
        "limit_period": "day",
        "requests_per_minute": 100,
    }
    answer = somebody.post("/api/v1/keys", json=wanted)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    key = made.pop("key")
    assert key.startswith(made["prefix"])
    assert made["expires_at"] == "2098-12-31T23:00:00.000000Z"
    assert {name: made[name] for name in wanted if name != "expires_at"} == {
        name: value for name, value in wanted.items() if name != "expires_at"
    }
    listed = somebody.get("/api/v1/keys")
    assert listed.json() == {"items": [made], "next_cursor": None}
    assert key not in listed.text
    changed = somebody.patch(f"/api/v1/keys/{made['id']}", json={"name": "desktop", "limit_period": None})
    assert (changed.json()["name"], changed.json()["limit_amount"], changed.json()["limit_period"]) == (
        "desktop",
        "0.1",
        None,
    )
    with served.client(key) as http:
        answer = http.post("/v1/chat/completions", json=CALL)
        assert answer.status_code == 200
        shown = somebody.get("/api/v1/keys").json()["items"][0]
        assert shown["spent"] == shown["period_spent"] == answer.headers["x-credits-charged"]
        assert code(http.get("/me")) == (403, "insufficient_scope")
        assert code(http.post("/api/v1/keys", json={})) == (403, "insufficient_scope")
        answer = http.post("/v1/chat/completions", json={**CALL, "model": "demo-chat"})
        assert code(answer) == (403, "model_not_allowed")
        somebody.patch(f"/api/v1/keys/{made['id']}", json={"limit_amount": "0.000001"})
        assert code(http.post("/v1/chat/completions", json=CALL)) == (402, "key_limit_reached")
        somebody.patch(f"/api/v1/keys/{made['id']}", json={"limit_amount": None, "requests_per_minute": 0})
        assert code(http.post("/v1/chat/completions", json=CALL)) == (429, "rate_limit_exceeded")
        assert somebody.delete(f"/api/v1/keys/{made['id']}").status_code == 204
        assert code(http.post("/v1/chat/completions", json=CALL)) == (401, "invalid_api_key")
        assert code(http.get("/v1/models")) == (401, "invalid_api_key")
    assert somebody.get("/api/v1/keys").json()["items"][0]["is_active"] is False


def test_the_last_use_shows_after_a_while(somebody, served):
    """Written in the background within some seconds."""
    key = somebody.post("/api/v1/keys", json={}).json()["key"]
    with served.client(key) as http:
        http.get("/v1/models")
    until(lambda: somebody.get("/api/v1/keys").json()["items"][0]["last_used_at"], within_s=15)


def test_keys_come_page_by_page(somebody):
    """With a cursor to the next; one that was not given out is refused."""
    made = [somebody.post("/api/v1/keys", json={"name": str(number)}).json()["id"] for number in range(3)]
    first = somebody.get("/api/v1/keys?limit=2").json()
    second = somebody.get(f"/api/v1/keys?limit=2&cursor={first['next_cursor']}").json()
    assert [item["id"] for item in first["items"] + second["items"]] == made[::-1]
    assert second["next_cursor"] is None
    for query in ("limit=0", "limit=201", "limit=x", "cursor=x", "cursor=%00", "cursor='--"):
        assert somebody.get(f"/api/v1/keys?{query}").status_code == 400, query


def test_a_key_never_grants_more_than_it_has(somebody, served):
    """Neither scope nor money; and it is no way to another's."""
    wanted = {"scope": "manage", "limit_amount": "0.2"}
    made = somebody.post("/api/v1/keys", json=wanted).json()
    assert code(somebody.post("/api/v1/keys", json={"scope": "admin"})) == (403, "not_an_admin")
    with served.client(made["key"]) as http:
        for terms in ({}, {"limit_amount": "0.3"}, {"limit_amount": "0.1", "limit_period": "day"}):
            assert code(http.post("/api/v1/keys", json=terms)) == (403, "key_grants_more"), terms
        assert http.post("/api/v1/keys", json={"limit_amount": "0.15"}).status_code == 201
        assert code(http.post("/api/v1/keys", json={"limit_amount": "0.15"})) == (403, "key_grants_more")
        assert code(http.patch(f"/api/v1/keys/{made['id']}", json={"limit_amount": None})) == (403, "key_grants_more")


@pytest.mark.parametrize(
    ("terms", "param"),
    [
        ({"name": "a\0b"}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"allowed_models": ["a\0"]}, "allowed_models"),
        ({"allowed_models": "gpt-4o"}, "allowed_models"),
        ({"limit_amount": 2.5}, "limit_amount"),
        ({"limit_amount": "NaN"}, "limit_amount"),
        ({"limit_amount": "1e400"}, "limit_amount"),
        ({"limit_amount": "0.0000000001"}, "limit_amount"),
        ({"limit_amount": "-1"}, "limit_amount"),
        ({"limit_amount": "1\0"}, "limit_amount"),
        ({"limit_period": "day"}, "limit_period"),
        ({"limit_amount": "1", "limit_period": "\0"}, "limit_period"),
        ({"expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"requests_per_minute": 2**70}, "requests_per_minute"),
        ({"scope": "root"}, "scope"),
        ({"user_id": "usr_x"}, "user_id"),
        ({"spent": "0"}, "spent"),
        ({"key_hash": "x"}, "key_hash"),
    ],
)
def test_terms_that_no_key_can_have(member, terms, param):
    """Refused by name, on making and on changing."""
    answer = member.post("/api/v1/keys", json=terms)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    key_id = member.post("/api/v1/keys", json={}).json()["id"]
    answer = member.patch(f"/api/v1/keys/{key_id}", json=terms)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_nobody_reaches_anothers_data_by_id(somebody, member):
    """What is another's is not there: the same answer as for what never was."""
    request_id = member.post("/v1/chat/completions", json=CALL).headers["x-request-id"]
    assert member.get(f"/api/v1/credits/charges/{request_id}").status_code == 200
    key_id = member.post("/api/v1/keys", json={}).json()["id"]
    for method, path in (
        ("GET", f"/api/v1/credits/charges/{request_id}"),
        ("PATCH", f"/api/v1/keys/{key_id}"),
        ("DELETE", f"/api/v1/keys/{key_id}"),
        ("DELETE", f"/api/v1/keys/{key_id[:-4]}0000"),
    ):
        answer = somebody.request(method, path, json={} if method == "PATCH" else None)
        assert code(answer) == (404, "not_found"), path
    assert member.get("/api/v1/keys").json()["items"][0]["is_active"]
    assert somebody.get("/api/v1/keys").json()["items"] == []
    assert somebody.get("/api/v1/credits/transactions").json()["items"][0]["description"] == "starting credits"


def test_the_operator_makes_lists_and_revokes_keys(member, served):
    """By the command line, beside the running server; a limit binds on the next call."""
    email = member.get("/me").json()["email"]
    words = ("--email", email, "--name", "tight", "--limit-amount", "0.000001", "--limit-period", "day")
    made = served.command(
        "keys", "create", *words, "--expires-at", "2099-01-01", "--allowed-models", "fake-*,demo-chat"
    )
    item = served.command("keys", "list", "--email", email)["items"][0]
    assert item == member.get("/api/v1/keys").json()["items"][0]
    assert (item["id"], item["name"], item["limit_amount"], item["limit_period"], item["allowed_models"]) == (
        made["id"],
        "tight",
        "0.000001",
        "day",
        ["fake-*", "demo-chat"],
    )
    assert item["expires_at"] == "2099-01-01T00:00:00.000000Z"
    with served.client(made["key"]) as http:
        assert code(http.post("/v1/chat/completions", json=CALL)) == (402, "key_limit_reached")
        assert "Revoked sk-tg-" in served.run("keys", "revoke", "--email", email, "--id", made["id"]).stdout
        assert code(http.post("/v1/chat/completions", json=CALL)) == (401, "invalid_api_key")


def test_the_operator_sets_a_password(somebody, served):
    """Whoever was logged in is not any more, and the new one opens the account."""
    email = somebody.get("/me").json()["email"]
    served.command("users", "password", "--email", email, "--password", "set by the operator")
    assert code(somebody.get("/me")) == (401, "invalid_api_key")
    log_in(somebody, email, "set by the operator")


@pytest.mark.parametrize(
    "words",
    [
        ("keys", "create", "--email", "a@example.com", "--limit-period", "year"),
        ("keys", "create", "--email", "a@example.com", "--limit-amount", "x"),
        ("keys", "create", "--email", "a@example.com", "--expires-at", "soon"),
        ("users", "create", "--email", "a@example.com", "--issuer", "https://login.example.com/"),
    ],
)
def test_commands_that_make_no_sense(words):
    """Said before a database is opened."""
    assert CliRunner().invoke(cli, words).exit_code == 2


# ---- browsers


def test_only_configured_origins_may_call_from_a_browser(somebody, anybody):
    """A preflight needs no credential; other origins get no permission."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    answer = anybody.options("/v1/chat/completions", headers={"origin": APP, **asked})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == APP
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    answer = somebody.post("/v1/chat/completions", json=CALL, headers={"origin": APP})
    assert answer.headers["access-control-allow-origin"] == APP
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    for answer in (
        anybody.options("/v1/chat/completions", headers={"origin": "https://evil.example.com", **asked}),
        somebody.get("/me", headers={"origin": "https://evil.example.com"}),
    ):
        assert answer.headers.get("access-control-allow-origin") is None
