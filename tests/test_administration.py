"""What admins do over HTTP, end to end: one server on SQLite, two on one PostgreSQL, a provider on a socket."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import pytest

from proxy.cli.serve import FIRST_ADMIN
from proxy.units import new_id
from tests.identity.tokens import SECRET
from tests.serving import CONFIG, MODEL, SQLITE, serving
from tests.waiting import until

PASSWORD = "a password of some length"
CALL = {"model": MODEL, "messages": [{"role": "user", "content": "Say something."}]}
SETTINGS = f"""
[auth]
jwt_secret = "{SECRET}"
"""
USERS = "/api/v1/admin/users"
SOON_S_MAX = 5
"""A second, and the patience that a busy machine needs."""

soon = partial(until, within_s=SOON_S_MAX, pause_s=0.1)  # of registrations there are only so many in a minute


@pytest.fixture(scope="module")
def servers(database, tmp_path_factory, upstream):
    """The running servers of one database; its books add up, and their logs are clean, when the tests are through."""
    folder = tmp_path_factory.mktemp("administration")
    places = ["one"] if database == SQLITE else ["one", "other"]
    with ExitStack() as stack:
        servers = []
        for place in places:
            (folder / place).mkdir()
            servers.append(stack.enter_context(serving(folder / place, database, upstream.base_url, CONFIG + SETTINGS)))
        yield servers
        report = servers[0].command("audit")
        assert report["clean"], report
        for server in servers:
            assert "internal_error" not in server.log()
            assert '"level": "error"' not in server.log()


@pytest.fixture(scope="module")
def boss(servers):
    """The id of the only active admin, and its clients: one on each server, by an API key."""
    made = servers[0].command("users", "create", "--email", "boss@example.com", "--admin")
    key = servers[0].command("keys", "create", "--email", "boss@example.com", "--scope", "admin")["key"]
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client(key)) for server in servers]
        for user in clients[0].get(USERS, params={"email": FIRST_ADMIN}).json()["items"]:
            assert clients[0].delete(f"{USERS}/{user['id']}").status_code == 204
        yield made["id"], clients


@pytest.fixture
def admin(boss):
    """The first admin's client on the first server."""
    return boss[1][0]


@pytest.fixture
def elsewhere(boss):
    """The first admin's client on the last server, which on PostgreSQL is another one."""
    return boss[1][-1]


def fresh_email(name="u") -> str:
    return f"{name}.{new_id('x')}@example.com"


def made_by(admin, **fields) -> dict:
    """A new user."""
    answer = admin.post(USERS, json={"email": fresh_email(), **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def book(admin, user, type_="topup", amount="1", key=None, **fields):
    """Credits, booked by hand."""
    body = {"type": type_, **({} if amount is None else {"amount": amount}), **fields}
    headers = {} if key is None else {"Idempotency-Key": key}
    return admin.post(f"{USERS}/{user['id']}/credits", json=body, headers=headers)


def key_of(admin, user, **terms) -> str:
    answer = admin.post(f"{USERS}/{user['id']}/keys", json=terms)
    assert answer.status_code == 201, answer.text
    return answer.json()["key"]


@pytest.fixture
def customer(admin):
    """A new user with ten credits."""
    user = made_by(admin)
    assert book(admin, user, amount="10").status_code == 201
    return user


@contextmanager
def clients_of(servers, key):
    """Clients with `key`, one on each server."""
    with ExitStack() as stack:
        yield [stack.enter_context(server.client(key)) for server in servers]


def code(answer) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def wallet(admin, user) -> dict:
    return admin.get(f"{USERS}/{user['id']}").json()["wallet"]


def charged(client) -> tuple[str, str]:
    """A paid call: its request id, and what it was charged."""
    answer = client.post("/v1/chat/completions", json=CALL)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-request-id"], answer.headers["x-credits-charged"]


def events_of(admin, **filters) -> list[dict]:
    answer = admin.get("/api/v1/admin/events", params=filters)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


def at_once(*works) -> list:
    """The results of all `works`, begun at the same moment in threads."""
    start = threading.Barrier(len(works))

    def run(work):
        start.wait(10)
        return work()

    with ThreadPoolExecutor(len(works)) as threads:
        return [future.result(30) for future in [threads.submit(run, work) for work in works]]


# ---- users


def test_a_user_is_made_read_changed_and_found(admin, boss):
    """With its limits and wallet; every change is an event with who, what, before and after."""
    email = fresh_email("Mixed.Case")
    limits = {"requests_per_minute": 5, "tokens_per_minute": None, "concurrent_calls_max": 2, "allowed_models": ["a*"]}
    made = made_by(admin, email=email, full_name=" Ann B ", **limits)
    assert {name: made[name] for name in limits} == limits
    assert (made["email"], made["full_name"], made["is_active"], made["is_admin"]) == (
        email.lower(),
        "Ann B",
        True,
        False,
    )
    assert made["wallet"] == {"balance": "0", "reserved": "0", "owed": "0", "available": "0"}
    path = f"{USERS}/{made['id']}"
    assert admin.get(path).json() == made
    changes = {"full_name": None, "email_verified": True, "allowed_models": None, "requests_per_minute": 9}
    answer = admin.patch(path, json=changes)
    assert answer.status_code == 200, answer.text
    assert {name: answer.json()[name] for name in changes} == changes
    assert admin.patch(path, json=changes).json()["updated_at"] == answer.json()["updated_at"], "nothing was changed"
    moved = admin.patch(path, json={"email": fresh_email("moved")}).json()
    assert moved["email_verified"] is False
    events = events_of(admin, subject=made["id"])
    assert [(event["actor"], event["action"]) for event in events] == [
        (boss[0], "user.change"),
        (boss[0], "user.change"),
        (boss[0], "user.create"),
    ]
    assert events[1]["after"] == changes
    assert events[1]["before"] == {
        "full_name": "Ann B",
        "email_verified": False,
        "allowed_models": ["a*"],
        "requests_per_minute": 5,
    }
    assert (events[2]["before"], events[2]["after"]["has_password"]) == (None, False)


def test_users_are_searched_and_come_page_by_page(admin):
    """By a whole address, the beginning of one, or a part of an address or a name, whatever letters they hold."""
    mark = new_id("x")
    people = [
        made_by(admin, email=f"{mark}.{number}_%@example.com", full_name=f"Zoë {mark} {number}") for number in range(3)
    ]
    ids = [user["id"] for user in people][::-1]

    def found(**params) -> list[str]:
        answer = admin.get(USERS, params=params)
        assert answer.status_code == 200, answer.text
        return [item["id"] for item in answer.json()["items"]]

    assert found(email=mark.upper()) == found(q=mark) == found(q=f"zoë {mark}") == ids
    assert found(email=f"{mark}.1_%@example.com") == found(q=ids[1]) == [ids[1]]
    assert found(email=f"{mark}.1_%@example.co") == [ids[1]], "an address may be the beginning of another"
    assert found(email=f"{mark}_") == found(q=f"{mark}%{mark}") == []
    first = admin.get(USERS, params={"q": mark, "limit": 2}).json()
    second = admin.get(USERS, params={"q": mark, "limit": 2, "cursor": first["next_cursor"]}).json()
    assert [item["id"] for item in first["items"] + second["items"]] == ids
    assert second["next_cursor"] is None
    for query in ("limit=0", "limit=201", "cursor=x", "cursor=%00", "email=%00", "q=a%00", f"q={'x' * 201}"):
        assert admin.get(f"{USERS}?{query}").status_code == 400, query


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"email": "nobody"}, "email"),
        ({"email": None}, "email"),
        ({"password": "short"}, "password"),
        ({"full_name": "a\0"}, "full_name"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"requests_per_minute": "7"}, "requests_per_minute"),
        ({"is_active": "true"}, "is_active"),
        ({"is_admin": 1}, "is_admin"),
        ({"tokens_per_minute": 2**70}, "tokens_per_minute"),
        ({"allowed_models": ["a b"]}, "allowed_models"),
        ({"balance": "5"}, "balance"),
        ({"token_version": 3}, "token_version"),
        ({"password_hash": "x"}, "password_hash"),
    ],
)
def test_users_that_cannot_be(admin, customer, fields, param):
    """Refused by name, on making and on changing."""
    answer = admin.post(USERS, json={"email": fresh_email(), **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    answer = admin.patch(f"{USERS}/{customer['id']}", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_an_address_belongs_to_one(admin, customer):
    """In any spelling."""
    assert code(admin.post(USERS, json={"email": customer["email"].upper()})) == (409, "email_taken")
    other = made_by(admin)
    assert code(admin.patch(f"{USERS}/{other['id']}", json={"email": customer["email"]})) == (409, "email_taken")


@pytest.mark.parametrize("user_id", ["x", "usr_" + "0" * 32, "%00", "boss@example.com"])
def test_who_is_not_there_is_not_found(admin, user_id):
    """By every method and on every path below."""
    path = f"{USERS}/{user_id}"
    for answer in (
        admin.get(path),
        admin.patch(path, json={}),
        admin.delete(path),
        admin.put(f"{path}/password", json={"password": PASSWORD}),
        admin.get(f"{path}/keys"),
        admin.post(f"{path}/keys", json={}),
        admin.patch(f"{path}/keys/key_{'0' * 32}", json={}),
        admin.delete(f"{path}/keys/x"),
        admin.post(f"{path}/credits", json={"type": "topup", "amount": "1"}),
    ):
        assert code(answer) == (404, "not_found"), answer.request.method


def test_an_address_is_taken_once_however_many_try(admin, elsewhere):
    """At the same moment: one is made, the other told so."""
    email = fresh_email()
    answers = at_once(*(lambda http=http: http.post(USERS, json={"email": email}) for http in (admin, elsewhere)))
    assert sorted(answer.status_code for answer in answers) == [201, 409]


def test_an_admin_sets_a_password(admin, servers):
    """Who had none can log in by it; who was logged in is not any more; it is on record that it was set."""
    user = made_by(admin)
    path = f"{USERS}/{user['id']}/password"
    assert admin.put(path, json={"password": PASSWORD}).status_code == 204
    token = admin.post("/login", json={"email": user["email"], "password": PASSWORD}).json()["access_token"]
    weak = admin.put(path, json={"password": user["email"]})
    assert (code(weak), weak.json()["error"]["param"]) == ((400, "weak_password"), "password")
    with clients_of(servers, token) as clients:
        assert [client.get("/me").status_code for client in clients] == [200] * len(servers)
        assert admin.put(path, json={"password": f"{PASSWORD}!"}).status_code == 204
        assert [client.get("/me").status_code for client in clients] == [401] * len(servers)
    (event, _) = events_of(admin, subject=user["id"], action="user.password")
    assert (event["before"], event["after"]) == (None, None)


# ---- rank and access


def test_who_is_deactivated_is_refused_on_the_very_next_call(admin, servers, customer):
    """Everywhere, by key and by token; back again, the key works, and the token of before does not."""
    admin.patch(f"{USERS}/{customer['id']}", json={"full_name": "Somebody"})
    email = fresh_email("logs.in")
    user = made_by(admin, email=email, password=PASSWORD)
    book(admin, user)
    token = admin.post("/login", json={"email": email, "password": PASSWORD}).json()["access_token"]
    path = f"{USERS}/{user['id']}"
    with clients_of(servers, key_of(admin, user)) as by_key, clients_of(servers, token) as by_token:
        for client in (*by_key, *by_token):
            charged(client)
        assert admin.delete(path).status_code == 204
        for client in (*by_key, *by_token):
            assert client.post("/v1/chat/completions", json=CALL).status_code in {401, 403}
            assert client.get("/v1/models").status_code in {401, 403}
        assert code(admin.post("/login", json={"email": email, "password": PASSWORD})) == (403, "inactive_user")
        assert admin.patch(path, json={"is_active": True}).status_code == 200
        for client in by_key:
            charged(client)
        for client in by_token:
            assert client.post("/v1/chat/completions", json=CALL).status_code == 401


def test_limits_on_a_user_hold_for_the_very_next_call(admin, servers, customer):
    """On every server, though each has the key in its memory."""
    with clients_of(servers, key_of(admin, customer)) as clients:
        for limit, refusal in (
            ({"allowed_models": ["other"]}, (403, "model_not_allowed")),
            ({"allowed_models": None, "requests_per_minute": 0}, (429, "rate_limit_exceeded")),
            ({"requests_per_minute": None, "concurrent_calls_max": 0}, (429, "rate_limit_exceeded")),
        ):
            for client in clients:
                admin.patch(f"{USERS}/{customer['id']}", json=dict.fromkeys(limit))
                charged(client)
                admin.patch(f"{USERS}/{customer['id']}", json=limit)
                assert code(client.post("/v1/chat/completions", json=CALL)) == refusal
            admin.patch(f"{USERS}/{customer['id']}", json=dict.fromkeys(limit))


def test_rank_is_given_and_taken(admin, servers):
    """An admin's key opens the administration until its user is one no more."""
    user = made_by(admin, is_admin=True)
    with clients_of(servers, key_of(admin, user, scope="admin")) as clients:
        for client in clients:
            assert client.get(USERS).status_code == 200
        assert admin.patch(f"{USERS}/{user['id']}", json={"is_admin": False}).status_code == 200
        for client in clients:
            assert code(client.get(USERS)) == (403, "not_an_admin")
    assert code(admin.post(f"{USERS}/{user['id']}/keys", json={"scope": "admin"})) == (403, "not_an_admin")


def test_the_last_admin_stays(admin, boss):
    """Neither demoted nor deactivated, whatever else is changed with it."""
    path = f"{USERS}/{boss[0]}"
    other = made_by(admin, is_admin=True)
    assert admin.delete(f"{USERS}/{other['id']}").status_code == 204
    for answer in (
        admin.delete(path),
        admin.patch(path, json={"is_active": False}),
        admin.patch(path, json={"is_admin": False, "full_name": "Nobody"}),
    ):
        assert code(answer) == (409, "last_admin"), "the other one is not active"
    assert admin.get(path).json()["full_name"] is None


def test_two_admins_who_demote_each_other(admin, servers, boss):
    """At the same moment, on two servers where there are two: one of them stays."""
    rival = made_by(admin, is_admin=True)
    key = key_of(admin, rival, scope="admin")
    with clients_of(servers, key) as clients:
        for _ in range(4):
            answers = at_once(
                lambda: admin.patch(f"{USERS}/{rival['id']}", json={"is_admin": False}),
                lambda: clients[-1].patch(f"{USERS}/{boss[0]}", json={"is_admin": False}),
            )
            assert sorted(answer.status_code for answer in answers) in ([200, 403], [200, 409])
            winner, loser = (admin, rival["id"]) if answers[0].status_code == 200 else (clients[-1], boss[0])
            assert winner.patch(f"{USERS}/{loser}", json={"is_admin": True}).status_code == 200
    assert admin.delete(f"{USERS}/{rival['id']}").status_code == 204


def test_only_admins_with_an_admins_key_get_in(servers, admin, boss, customer):
    """A plain user by any key, and an admin by a key for anything less, are told so."""
    admin_user = {"id": boss[0]}
    for user, scope, reason in (
        (customer, "inference", "not_an_admin"),
        (customer, "manage", "not_an_admin"),
        (admin_user, "inference", "insufficient_scope"),
        (admin_user, "manage", "insufficient_scope"),
    ):
        with servers[0].client(key_of(admin, user, scope=scope)) as http:
            for path in (USERS, f"{USERS}/{customer['id']}/keys", "/api/v1/admin/audit", "/api/v1/admin/events"):
                assert code(http.get(path)) == (403, reason), (scope, path)
            assert code(book(http, customer)) == (403, reason)
    assert wallet(admin, customer)["balance"] == "10"


# ---- keys


def test_admins_manage_anybodys_keys(admin, boss, servers, customer):
    """Made, limited, listed and revoked, each on record without the key; it works, and is refused on its next call."""
    path = f"{USERS}/{customer['id']}/keys"
    made = admin.post(path, json={"name": "theirs", "limit_amount": "5", "expires_at": "2099-01-01T00:00:00Z"}).json()
    key = made.pop("key")
    assert admin.get(path).json() == {"items": [made], "next_cursor": None}
    with clients_of(servers, key) as clients:
        for client in clients:
            charged(client)
        assert admin.patch(f"{path}/{made['id']}", json={"limit_amount": "0.000001"}).status_code == 200
        for client in clients:
            assert code(client.post("/v1/chat/completions", json=CALL)) == (402, "key_limit_reached")
        assert admin.delete(f"{path}/{made['id']}").status_code == 204
        assert admin.delete(f"{path}/{made['id']}").status_code == 204
        for client in clients:
            assert code(client.post("/v1/chat/completions", json=CALL)) == (401, "invalid_api_key")
    assert code(admin.patch(f"{path}/{made['id']}", json={"name": "x"})) == (409, "key_revoked")
    other = made_by(admin)
    assert code(admin.delete(f"{USERS}/{other['id']}/keys/{made['id']}")) == (404, "not_found"), "of another user"
    events = events_of(admin, subject=made["id"])
    assert [(event["action"], event["actor"]) for event in events] == [
        ("key.revoke", boss[0]),
        ("key.change", boss[0]),
        ("key.create", boss[0]),
    ]
    assert (events[1]["before"], events[1]["after"]) == ({"limit_amount": "5"}, {"limit_amount": "0.000001"})
    assert (events[2]["after"]["user_id"], events[2]["after"]["name"]) == (customer["id"], "theirs")
    assert key[6:12] not in json.dumps(events)


def test_an_admins_limited_key_gives_no_more_than_it_has(admin, boss, servers, customer):
    """Its own rules hold when it makes keys for others, too."""
    limited = key_of(admin, {"id": boss[0]}, scope="admin", limit_amount="2")
    with servers[0].client(limited) as http:
        path = f"{USERS}/{customer['id']}/keys"
        assert code(http.post(path, json={})) == (403, "key_grants_more")
        assert http.post(path, json={"limit_amount": "1.5"}).status_code == 201
        assert code(http.post(path, json={"limit_amount": "1"})) == (403, "key_grants_more")


def test_a_field_that_is_there_twice(admin, customer):
    """Neither value is taken, whatever the field is; what is no object is still said to be none."""
    for method, path, body in (
        ("POST", f"{USERS}/{customer['id']}/credits", '{"type": "topup", "amount": "1", "amount": "2"}'),
        ("POST", f"{USERS}/{customer['id']}/credits", '{"type":"topup","amount":"1","\\u0061mount":"2"}'),
        ("PATCH", f"{USERS}/{customer['id']}", '{"is_admin": false, "is_admin": true}'),
        ("PUT", "/api/v1/admin/markup", '{"percent": "15", "percent": "0"}'),
        ("POST", "/api/v1/keys", '{"limit_amount": "1", "limit_amount": null}'),
        ("POST", "/login", '{"email": "a@example.com", "email": "b@example.com", "password": "x"}'),
    ):
        answer = admin.request(method, path, content=body)
        assert code(answer) == (400, "duplicate_field"), (path, answer.text)
    for body in ("", "[]", "{", "null"):
        assert admin.request("PUT", "/api/v1/admin/markup", content=body).status_code == 400
    too_large = json.dumps({"type": "topup", "amount": "1", "description": "x" * 20_000})
    assert admin.post(f"{USERS}/{customer['id']}/credits", content=too_large).status_code == 413
    assert wallet(admin, customer)["balance"] == "10"


# ---- names


def test_names_that_nothing_has(admin):
    """A name that cannot be stored, and a user or a provider that there is not, are refused: no rule is for nobody."""
    rules, prices = "/api/v1/admin/markup/rules", "/api/v1/admin/prices"
    price = {"input": "1", "output": "1", "context_tokens": 9}
    for subject in ("a\0b", "a\nb", "   "):
        answer = admin.post(rules, json={"kind": "model", "subject": subject, "percent": "1"})
        assert code(answer) == (400, "invalid_value"), subject
    for target in ("fake/a\0b", "fake/ ", "fake/" + "x" * 301):
        assert code(admin.put(prices, json={"target": target, "price": price})) == (400, "invalid_value"), target
        assert code(admin.delete(prices, params={"target": target})) == (400, "invalid_value"), target
        assert code(admin.get(f"{prices}/history", params={"target": target})) == (400, "invalid_value"), target
    for method in ("PUT", "DELETE"):
        for rule_id in ("%00", new_id("rule")):
            answer = admin.request(method, f"{rules}/{rule_id}", json={"percent": "1"})
            assert code(answer) == (404, "not_found"), (method, rule_id)
    for kind, subject in (("user", new_id("usr")), ("provider", "opnai")):
        assert code(admin.post(rules, json={"kind": kind, "subject": subject, "percent": "1"})) == (404, "not_found")
    assert code(admin.post("/api/v1/admin/markup/preview", json={"model": MODEL, "user": new_id("usr")})) == (
        404,
        "not_found",
    )
    assert admin.get(rules).json()["items"] == []


# ---- credits


def test_the_four_ways_to_book(admin, boss, servers, customer):
    """Top-up, adjustment, part of a charge and the rest of it, each with the balance after it, on record."""
    with servers[0].client(key_of(admin, customer)) as client:
        request_id, charge = charged(client)
    spent = Decimal(charge)
    part = spent / 2
    balance = Decimal(10) - spent
    expected = []
    for type_, amount, more, change in (
        ("topup", "2.5", {"description": "invoice 7"}, Decimal("2.5")),
        ("adjustment", "-1", {}, Decimal(-1)),
        ("adjustment", 3, {}, Decimal(3)),
        ("refund", str(part), {"request_id": request_id}, part),
        ("refund", None, {"request_id": request_id}, spent - part),
    ):
        answer = book(admin, customer, type_, amount, **more)
        assert answer.status_code == 201, answer.text
        booked = answer.json()
        balance += change
        assert (Decimal(booked["balance"]), Decimal(booked["transaction"]["amount"])) == (balance, change)
        assert booked["transaction"]["request_id"] == more.get("request_id")
        expected.append(booked["transaction"])
        with servers[0].client(key_of(admin, customer)) as client:
            assert client.get("/api/v1/credits/transactions?limit=1").json()["items"] == [booked["transaction"]]
    assert Decimal(wallet(admin, customer)["balance"]) == balance
    charge = servers[0].charge(key_of(admin, customer), request_id)
    assert charge["refunded"] == charge["charged"]
    events = [event for event in events_of(admin, subject=customer["id"]) if event["action"].startswith("credits.")]
    assert [event["action"] for event in events[:5]] == [f"credits.{row['type']}" for row in reversed(expected)]
    for event, row in zip(events, reversed(expected), strict=False):
        assert (event["actor"], event["before"]["balance"]) == (boss[0], row["balance_before"])
        assert (event["after"]["balance"], event["after"]["amount"]) == (row["balance_after"], row["amount"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"type": "topup", "amount": "0"}, "amount"),
        ({"type": "topup", "amount": "-1"}, "amount"),
        ({"type": "topup"}, "amount"),
        ({"type": "topup", "amount": "1", "request_id": "req_" + "0" * 32}, "request_id"),
        ({"type": "adjustment"}, "amount"),
        ({"type": "adjustment", "amount": "0"}, "amount"),
        ({"type": "adjustment", "amount": "1", "request_id": "req_" + "0" * 32}, "request_id"),
        ({"type": "refund"}, "request_id"),
        ({"type": "refund", "amount": "0", "request_id": "req_" + "0" * 32}, "amount"),
        ({"type": "refund", "amount": "-1", "request_id": "req_" + "0" * 32}, "amount"),
        ({"type": "topup", "amount": "0.0000000001"}, "amount"),
        ({"type": "topup", "amount": "NaN"}, "amount"),
        ({"type": "topup", "amount": "1e400"}, "amount"),
        ({"type": "topup", "amount": "9223372036"}, "amount"),
        ({"type": "topup", "amount": "1\0"}, "amount"),
        ({"type": "topup", "amount": 2.5}, None),
        ({"type": "topup", "amount": True}, None),
        ({"type": "deduction", "amount": "-1"}, None),
        ({"type": "topup", "amount": "1", "description": "a\0b"}, "description"),
        ({"type": "topup", "amount": "1", "description": "x" * 501}, None),
        ({"type": "topup", "amount": "1", "balance": "5"}, "balance"),
        ({"amount": "1"}, "type"),
    ],
)
def test_credits_that_cannot_be_booked(admin, customer, fields, param):
    """Signs are checked by type, amounts are decimals; nothing is booked."""
    answer = admin.post(f"{USERS}/{customer['id']}/credits", json=fields)
    assert answer.status_code == 400, answer.text
    assert param is None or answer.json()["error"]["param"] == param, answer.text
    assert wallet(admin, customer)["balance"] == "10"


def test_a_refund_is_of_a_charge_of_this_wallet_and_never_more_than_it(admin, servers, customer):
    """Over all refunds together."""
    with servers[0].client(key_of(admin, customer)) as client:
        request_id, charge = charged(client)
    other = made_by(admin)
    for user, request in ((other, request_id), (customer, new_id("req")), (customer, "x"), (customer, "\0")):
        assert code(book(admin, user, "refund", None, request_id=request)) == (404, "not_found")
    more = str(Decimal(charge) + Decimal("0.000000001"))
    assert code(book(admin, customer, "refund", more, request_id=request_id)) == (400, "refund_above_charge")
    assert book(admin, customer, "refund", "0.000000001", request_id=request_id).status_code == 201
    assert code(book(admin, customer, "refund", charge, request_id=request_id)) == (400, "refund_above_charge")
    assert book(admin, customer, "refund", None, request_id=request_id).status_code == 201
    assert code(book(admin, customer, "refund", None, request_id=request_id)) == (400, "refund_above_charge")
    assert wallet(admin, customer)["balance"] == "10"


def test_an_idempotency_key_books_once(admin, elsewhere, servers, customer):
    """The same again is the first answer again, on whatever server; other values are a conflict."""
    with servers[0].client(key_of(admin, customer)) as client:
        request_id, _ = charged(client)
    for number, (type_, amount, more) in enumerate(
        (("topup", "1", {}), ("adjustment", "-1", {}), ("refund", None, {"request_id": request_id}))
    ):
        first = book(admin, customer, type_, amount, f"key-{number}", **more)
        assert first.status_code == 201, first.text
        again = book(elsewhere, customer, type_, amount, f"key-{number}", **more)
        assert (again.status_code, again.json()) == (201, first.json())
        for other in (
            book(admin, customer, type_, "0.000000002", f"key-{number}", **more),
            book(admin, customer, type_, amount, f"key-{number}", description="other", **more),
            book(elsewhere, customer, "topup", "7", f"key-{number}"),
        ):
            assert code(other) == (409, "idempotency_key_reused")
    assert wallet(admin, customer)["balance"] == "10"
    assert book(admin, made_by(admin), key="key-0").status_code == 201, "another wallet's"
    creditings = [event for event in events_of(admin, subject=customer["id"]) if event["action"].startswith("credits.")]
    assert len(creditings) == 4


@pytest.mark.parametrize(
    "values",
    [[""], ["a b"], ["a\xe4"], ["x" * 256], ["a", "a"], ["a", "b"], ["starting-credits"], ["first-start"]],
)
def test_idempotency_keys_that_nobody_should_send(admin, customer, values):
    """Too long, of other letters, twice, or one of Tollgate's own: nothing is booked."""
    headers = [("Idempotency-Key", value.encode("latin-1")) for value in values]
    answer = admin.post(f"{USERS}/{customer['id']}/credits", json={"type": "topup", "amount": "1"}, headers=headers)
    assert answer.status_code == 400, answer.text
    assert wallet(admin, customer)["balance"] == "10"


def test_a_header_that_holds_a_nul(servers, boss, customer):
    """Is no HTTP: nothing is booked."""
    address = servers[0].base_url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(address, timeout=10)
    headers = {
        "Authorization": boss[1][0].headers["authorization"],
        "Content-Type": "application/json",
        "Idempotency-Key": "a\0b",
    }
    body = json.dumps({"type": "topup", "amount": "1"})
    connection.request("POST", f"{USERS}/{customer['id']}/credits", body, headers)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["type"]) == (400, "invalid_request_error")
    connection.close()
    assert wallet(boss[1][0], customer)["balance"] == "10"


def test_the_same_top_up_twice_at_the_same_moment(admin, elsewhere, customer):
    """By two admins' hands, on two servers where there are two: booked once, and answered twice."""
    for number in range(5):
        answers = at_once(
            lambda number=number: book(admin, customer, key=f"twice-{number}"),
            lambda number=number: book(elsewhere, customer, key=f"twice-{number}"),
        )
        assert [answer.status_code for answer in answers] == [201, 201]
        assert answers[0].json() == answers[1].json()
    assert wallet(admin, customer)["balance"] == "15"


def test_a_refund_that_races_another_of_the_same_charge(admin, elsewhere, servers, customer):
    """Together they never give back more than it was."""
    with servers[0].client(key_of(admin, customer)) as client:
        for _ in range(3):
            request_id, charge = charged(client)
            most = str(Decimal(charge) - Decimal("0.000000001"))
            answers = at_once(
                lambda request_id=request_id: book(admin, customer, "refund", None, request_id=request_id),
                lambda request_id=request_id, most=most: book(
                    elsewhere, customer, "refund", most, request_id=request_id
                ),
                lambda request_id=request_id: book(elsewhere, customer, "refund", None, "k", request_id=request_id),
            )
            statuses = [answer.status_code for answer in answers]
            assert statuses.count(201) >= 1
            assert set(statuses) <= {201, 400, 409}
            refunded = sum(Decimal(a.json()["transaction"]["amount"]) for a in answers if a.status_code == 201)
            assert refunded == Decimal(charge)
    assert wallet(admin, customer)["balance"] == "10"


def test_what_an_open_call_holds_cannot_be_adjusted_away(admin, elsewhere, servers, customer):
    """All that is available can, and not a nano-credit more."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": '!fake {"delay_s": 1.5}'}]}
    with servers[0].client(key_of(admin, customer)) as client, ThreadPoolExecutor() as threads:
        call = threads.submit(client.post, "/v1/chat/completions", json=body)
        soon(lambda: wallet(admin, customer)["reserved"] != "0")
        available = Decimal(wallet(admin, customer)["available"])
        more = str(-available - Decimal("0.000000001"))
        assert code(book(elsewhere, customer, "adjustment", more)) == (400, "below_reserved")
        assert book(elsewhere, customer, "adjustment", str(-available)).status_code == 201
        assert wallet(admin, customer)["available"] == "0"
        assert call.result(20).status_code == 200


def test_an_adjustment_and_a_call_at_the_same_moment(admin, elsewhere, servers):
    """Whether the call or the adjustment comes first, the balance covers what is reserved, and each is told so."""
    user = made_by(admin)
    book(admin, user, amount="0.02")
    body = {**CALL, "max_tokens": 4000}
    key = key_of(admin, user)
    outcomes = set()
    with clients_of(servers, key) as clients:
        for _ in range(6):
            missing = Decimal("0.02") - Decimal(wallet(admin, user)["balance"])
            if missing:
                assert book(admin, user, "adjustment", str(missing)).status_code == 201
            call, adjusted = at_once(
                lambda: clients[0].post("/v1/chat/completions", json=body),
                lambda: book(elsewhere, user, "adjustment", "-0.015"),
            )
            assert call.status_code in {200, 402}, call.text
            if adjusted.status_code != 201:
                assert code(adjusted) == (400, "below_reserved")
            outcomes.add((call.status_code, adjusted.status_code))
            found = wallet(admin, user)
            assert Decimal(found["balance"]) >= Decimal(found["reserved"]) >= 0
    assert outcomes <= {(200, 201), (200, 400), (402, 201)}
    assert code(book(admin, user, "adjustment", "-1000")) == (400, "below_reserved")


# ---- settings


def set_to(admin, name, value):
    return admin.put(f"/api/v1/admin/config/{name}", json={"value": value})


def settings_of(admin) -> dict[str, dict]:
    return {item["name"]: item for item in admin.get("/api/v1/admin/config").json()["items"]}


def test_settings_are_typed_and_described(admin):
    """Each with its value, what the configuration says, its type and what it does."""
    found = settings_of(admin)
    assert {name: (item["default"], item["type"]) for name, item in found.items()} == {
        "markup_percent": ("15", "percent"),
        "registration_open": (True, "boolean"),
        "starting_credits": ("0", "credits"),
        "give_to_strangers": (False, "boolean"),
        "expose": ("priced", "choice"),
    }
    assert all(len(item["description"]) > 20 for item in found.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("markup_percent", "x"),
        ("markup_percent", "-1"),
        ("markup_percent", "1e999999999"),
        ("markup_percent", True),
        ("registration_open", "yes"),
        ("registration_open", 1),
        ("starting_credits", "-1"),
        ("starting_credits", False),
        ("starting_credits", "NaN"),
        ("give_to_strangers", "true"),
        ("expose", "all"),
        ("expose", True),
    ],
)
def test_values_that_a_setting_cannot_have(admin, name, value):
    """Refused, and nothing changes."""
    before = settings_of(admin)
    answer = set_to(admin, name, value)
    assert (code(answer), answer.json()["error"]["param"]) == ((400, "invalid_value"), "value")
    assert settings_of(admin) == before


@pytest.mark.parametrize("name", ["jwt_secret", "catalog_version", "x", "%00"])
def test_settings_that_are_none(admin, name):
    """Not found, whatever else is in that table."""
    assert code(set_to(admin, name, "1")) == (404, "not_found")
    for body in ({}, {"value": None}, {"value": []}, {"value": 0.5}, {"value": "1", "more": 1}):
        assert admin.put(f"/api/v1/admin/config/{name}", json=body).status_code == 400


def test_settings_act_everywhere_within_a_second(admin, servers, boss, customer):
    """Registration, what newcomers get, what is on offer and the markup, on each server; each change is on record."""
    with ExitStack() as stack:
        strangers = [stack.enter_context(server.client(None)) for server in servers]
        clients = stack.enter_context(clients_of(servers, key_of(admin, customer)))

        def registered(http) -> str:
            answer = http.post("/register", json={"email": fresh_email(), "password": PASSWORD})
            return answer.json().get("credits_balance") or code(answer)[1]

        assert [registered(http) for http in strangers] == ["0"] * len(servers)
        assert set_to(admin, "registration_open", False).status_code == 200
        assert registered(strangers[0]) == "registration_closed", "here at once"
        soon(lambda: registered(strangers[-1]) == "registration_closed")
        assert set_to(admin, "starting_credits", "0.25").json()["value"] == "0.25"
        assert code(set_to(admin, "registration_open", True)) == (409, "gives_to_strangers")
        assert set_to(admin, "give_to_strangers", True).status_code == 200
        assert set_to(admin, "registration_open", True).status_code == 200
        assert code(set_to(admin, "give_to_strangers", False)) == (409, "gives_to_strangers")
        soon(lambda: registered(strangers[-1]) == "0.25")
        assert set_to(admin, "expose", "listed").status_code == 200
        for client in clients:
            soon(lambda client=client: client.get("/v1/models/demo-chat").status_code == 404)
            charged(client)
        for name, value in (("expose", "priced"), ("starting_credits", 0), ("give_to_strangers", False)):
            assert set_to(admin, name, value).status_code == 200
        for percent in ("33", "15"):
            assert set_to(admin, "markup_percent", percent).status_code == 200
            assert admin.get("/api/v1/admin/markup").json() == {"percent": percent}
    events = events_of(admin, actor=boss[0], action="config.set", subject="markup_percent", limit=2)
    assert [(event["before"], event["after"]) for event in events] == [("33", "15"), ("15", "33")]
    assert settings_of(admin)["expose"]["updated_at"] is not None


def test_two_admins_make_no_unsafe_setting_together(admin, elsewhere):
    """Each of two changes is safe, and not both: one is refused, however close they come."""
    for _ in range(3):
        assert set_to(admin, "starting_credits", "0").status_code == 200
        assert set_to(admin, "registration_open", False).status_code == 200
        answers = at_once(
            lambda: set_to(admin, "starting_credits", "1"), lambda: set_to(elsewhere, "registration_open", True)
        )
        assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert set_to(admin, "starting_credits", "0").status_code == 200
    assert set_to(admin, "registration_open", True).status_code == 200


# ---- the record


def test_events_are_filtered_and_come_page_by_page(admin, boss, servers):
    """By actor, action, subject and time; what the command line does is there, too, and nothing secret is."""
    email = fresh_email("command.line")
    began = datetime.now(UTC).isoformat()  # to the microsecond: the fixtures may have made people just now
    made = servers[0].command("users", "create", "--email", email, "--password", PASSWORD)
    key = servers[0].command("keys", "create", "--email", email, "--name", "cli")
    servers[0].command("credits", "grant", "--email", email, "--amount", "2", "--idempotency-key", "cli-1")
    servers[0].command("users", "password", "--email", email, "--password", PASSWORD + "!")
    servers[0].command("keys", "revoke", "--email", email, "--id", key["id"])
    events = events_of(admin, actor="command line", since=began)
    assert [(event["action"], event["subject"]) for event in events] == [
        ("key.revoke", key["id"]),
        ("user.password", made["id"]),
        ("credits.topup", made["id"]),
        ("key.create", key["id"]),
        ("user.create", made["id"]),
    ]
    assert events[2]["after"]["idempotency_key"] == "cli-1"
    everything = json.dumps(events_of(admin, limit=200))
    for secret in (PASSWORD, key["key"], "argon2", "hash", SECRET):
        assert secret not in everything
    assert events_of(admin, subject=made["id"], action="credits.topup") == [events[2]]
    assert events_of(admin, subject=made["id"], until=events[2]["created_at"]) == [events[4]]
    assert events_of(admin, subject=made["id"], since=events[2]["created_at"]) == events[1:3]
    first = admin.get("/api/v1/admin/events", params={"subject": made["id"], "limit": 2}).json()
    rest = events_of(admin, subject=made["id"], limit=2, cursor=first["next_cursor"])
    assert first["items"] + rest == [events[1], events[2], events[4]]
    assert events_of(admin, actor=boss[0], until="2001-01-01T00:00:00+01:00") == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "cursor=x",
        "cursor=%00",
        "actor=%00",
        f"subject={'x' * 301}",
        "since=yesterday",
        "until=2026-01-01",
        "until=0.5",
    ],
)
def test_events_that_cannot_be_asked_for(admin, query):
    """Refused, not guessed."""
    assert admin.get(f"/api/v1/admin/events?{query}").status_code == 400


def test_switches_and_prices_are_on_record(admin, boss):
    """Providers and markup, as before."""
    for action in ("disable", "enable"):
        admin.post(f"/api/v1/llm/providers/demo/{action}")
    admin.put("/api/v1/admin/markup", json={"percent": "15"})
    assert [event["action"] for event in events_of(admin, actor=boss[0], limit=3)] == [
        "config.set",
        "provider.enable",
        "provider.disable",
    ]


def test_the_audit_by_http_is_that_of_the_command_line(admin, servers):
    """Read-only, and the same report."""
    shown = admin.get("/api/v1/admin/audit")
    assert shown.status_code == 200
    assert shown.json() == servers[0].command("audit")
    assert shown.json()["clean"]
