"""Routing, markup, prices and providers of a real server, changed while it serves, on both databases."""

import asyncio
import json
from decimal import Decimal

import pytest
import sqlalchemy as sa

from proxy.routing import FAILURES_MAX
from proxy.storage import database as storage
from tests.scripted import scripted_provider
from tests.serving import SQLITE, audited, serving

CONFIG = """
[server]
port = 0

[routing]
may_pay_twice = false

[providers.flaky]
kind = "openai"
base_url = "FLAKY"
first_byte_s = 5

[providers.steady]
kind = "openai"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"
headers = {{ x-operator = "us" }}
headers_env = {{ x-secret = "UPSTREAM_KEY" }}
first_byte_s = 5

[providers.gone]
kind = "openai"
base_url = "http://127.0.0.1:9/v1"

[providers.off]
kind = "openai"
enabled = false
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"

[providers.lacking]
kind = "openai"
enabled = "auto"
base_url = "{base_url}"
api_key_env = "NOBODY_HAS_THIS_KEY"

[prices."steady/m"]
input = "1"
output = "2"
max_output_tokens = 1000
context_tokens = 100000
image_tokens_max = 100
service_tiers.flex = {{ input = "0.5", output = "1" }}
service_tiers.priority = {{ input = "2", output = "4" }}

[prices."steady/stepped"]
input = "1"
output = "2"
request = "0.01"
image = "0.001"
long_context = [{{ above_tokens = 2000, input = "3", output = "4" }}]
max_output_tokens = 1000
context_tokens = 100000
image_tokens_max = 100

[prices."off/sleeper"]
input = "1"
output = "2"
max_output_tokens = 100

[prices."steady/boundless"]
input = "1"
output = "2"
"""

FLAKY = """
[prices."flaky/{name}"]
input = "{dollars}"
output = "{dollars}"
max_output_tokens = 1000
context_tokens = 100000

[models."{name}"]
candidates = [{{ target = "flaky/{name}", weight = 2 }}, "steady/m"]
"""

MESSAGES = [{"role": "user", "content": "Say something."}]
MARKUP = Decimal("1.15")
FAILURES = [
    "refused",
    "overloaded",
    "limited",
    "unauthorized",
    "said",
    "truncated",
    "streamed",
    "closed",
    "invalid",
    "cooling",
    "wish",
]


def config(flaky_url) -> str:
    """A name for each kind of failure, so that what one test learns of a candidate does not touch the others."""
    names = "".join(FLAKY.format(name=name, dollars=5 if name == "refused" else 1) for name in FAILURES)
    gone = """
[prices."gone/m"]
input = "1"
output = "2"
max_output_tokens = 10

[models.reachable]
candidates = ["gone/m", "steady/m"]
"""
    return CONFIG.replace("FLAKY", flaky_url) + (names + gone).replace("{", "{{").replace("}", "}}")


@pytest.fixture(scope="module")
def flaky():
    with scripted_provider() as scripted:
        yield scripted


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream, flaky):
    """A running server, audited when the tests are through with it."""
    folder = tmp_path_factory.mktemp("served")
    with audited(folder, database, upstream.base_url, config(flaky[1])) as server:
        yield server


@pytest.fixture(scope="module")
def key(served) -> str:
    """Of a customer with credits."""
    return served.customer("customer@example.com", "1000")


@pytest.fixture(scope="module")
def admin(served):
    """A client with an admin's key of full scope."""
    served.command("users", "create", "--email", "boss@example.com", "--admin")
    made = served.command("keys", "create", "--email", "boss@example.com", "--scope", "admin")
    with served.client(made["key"]) as client:
        yield client


def call(served, key, model, **fields):
    """One chat completion."""
    with served.client(key) as http:
        return http.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES, **fields})


def wish(**behaviour) -> list[dict]:
    """Messages that tell the fake provider how to behave."""
    return [{"role": "user", "content": f"!fake {json.dumps(behaviour)}"}]


def charge_of(served, key, answer) -> dict:
    return served.charge(key, answer.headers["x-request-id"])


def execute(served, sql) -> None:
    """Change the database behind the server's back."""
    url = served.environ["TOLLGATE_DATABASE_URL"]
    if url.startswith("sqlite"):
        url = f"sqlite+aiosqlite:///{served.environ['TOLLGATE_DATA_DIR']}/served.db"

    async def run() -> None:
        engine = storage.connect(url, pooled=False)
        async with storage.writing(engine) as connection:
            await connection.execute(sa.text(sql))
        await engine.dispose()

    asyncio.run(run())


# ---- routing


@pytest.mark.parametrize(
    ("model", "status", "body"),
    [
        ("overloaded", 503, None),
        ("limited", 429, None),
        ("unauthorized", 401, None),
        ("truncated", 503, None),
        ("said", 200, b'{"error":{"message":"Overloaded.","code":529}}'),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_provider_refused_goes_to_the_next_one(served, key, flaky, model, status, body, stream):
    """It cannot have billed it; the answer says who served, and costs what it costs there."""
    script, _ = flaky
    script.answers_with(
        status, *([body] if body else []), **({"content_length": "9999"} if model == "truncated" else {})
    )
    before = script.calls
    answer = call(served, key, model, stream=stream)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-tollgate-provider"] == "steady"
    assert script.calls == before + 1
    charge = charge_of(served, key, answer)
    assert (charge["provider"], charge["model"], charge["state"]) == ("steady", model, "settled")
    usage = charge["usage"]
    assert Decimal(charge["charged"]) == (usage["input"] + 2 * usage["output"]) * MARKUP / 10**6


def test_an_error_as_the_first_event_goes_to_the_next_one(served, key, flaky):
    """Nothing was sent to the client yet, and the provider says itself that it failed."""
    flaky[0].answers_with(200, b'data: {"error":{"message":"Overloaded."}}\n\n', content_type="text/event-stream")
    answer = call(served, key, "streamed", stream=True)
    assert answer.headers["x-tollgate-provider"] == "steady"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_nobody_there_goes_to_the_next_one(served, key):
    """Nothing was sent."""
    assert call(served, key, "reachable").headers["x-tollgate-provider"] == "steady"


def test_what_may_have_been_billed_is_not_sent_again(served, key, flaky, upstream):
    """A connection that breaks after the request was read: 502, nobody else is asked, and nothing is charged."""
    flaky[0].answers_with(0)
    before = len(upstream.journal)
    answer = call(served, key, "closed")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "provider_broke_off")
    assert len(upstream.journal) == before
    assert charge_of(served, key, answer)["charged"] == "0"


def test_it_is_sent_again_if_the_operator_pays_twice_for_it(tmp_path, flaky, upstream):
    """He who allows it serves the call; the client pays for one answer."""
    flaky[0].answers_with(0)
    paying = config(flaky[1]).replace("may_pay_twice = false", "may_pay_twice = true")
    with serving(tmp_path, SQLITE, upstream.base_url, paying) as served:
        key = served.customer("customer@example.com")
        answer = call(served, key, "closed")
        assert (answer.status_code, answer.headers["x-tollgate-provider"]) == (200, "steady")
        spent = 10 - Decimal(served.balance(key)["balance"])
        assert spent == Decimal(answer.headers["x-credits-charged"]) > 0


def test_what_is_wrong_with_a_request_is_wrong_everywhere(served, key, flaky, upstream):
    """The provider's own 400 goes to the client."""
    flaky[0].answers_with(400)
    before = len(upstream.journal)
    assert call(served, key, "invalid").status_code == 400
    assert len(upstream.journal) == before


def test_a_candidate_that_fails_again_and_again_is_asked_no_more(served, key, flaky):
    """Until its cool-down is over."""
    script, _ = flaky
    script.answers_with(500)
    before = script.calls
    for _ in range(FAILURES_MAX + 2):
        assert call(served, key, "cooling").status_code == 200
    assert script.calls == before + FAILURES_MAX


def test_a_provider_that_wants_to_be_left_alone_is(served, key, flaky):
    """From its first Retry-After on."""
    script, _ = flaky
    script.answers_with(429, retry_after="60")
    before = script.calls
    for _ in range(3):
        assert call(served, key, "wish").headers["x-tollgate-provider"] == "steady"
    assert script.calls == before + 1


def test_the_reservation_covers_the_dearest_candidate(served, key, flaky):
    """Whoever serves in the end, and the charge is at the price of the one that did."""
    flaky[0].answers_with(503)
    alone = call(served, key, "steady/m", max_tokens=1000, service_tier="default")
    both = call(served, key, "refused", max_tokens=1000)
    # Input and output at $5, of at most as many bytes and 1,000 tokens, against $1 and $2 and the same.
    assert Decimal(both.headers["x-credits-reserved"]) > Decimal(2) * Decimal(alone.headers["x-credits-reserved"])
    assert Decimal(both.headers["x-credits-charged"]) == Decimal(alone.headers["x-credits-charged"])


def test_the_operators_headers_go_along(served, key, upstream):
    """Those of the configuration and those of the environment."""
    call(served, key, "steady/m")
    assert upstream.journal[-1].header("x-operator") == "us"
    assert upstream.journal[-1].header("x-secret")


# ---- classes of prices


@pytest.mark.parametrize(("tier", "factor"), [("flex", "0.5"), ("default", "1"), ("priority", "1"), (None, "1")])
def test_a_service_tier_has_its_price(served, key, tier, factor):
    """The one asked for is held, and the one that served is charged: the fake always serves in the standard one."""
    fields = {} if tier is None else {"service_tier": tier}
    answer = call(served, key, "steady/m", max_tokens=1000, **fields)
    charge = charge_of(served, key, answer)
    usage = charge["usage"]
    assert Decimal(charge["charged"]) == Decimal(factor) * (usage["input"] + 2 * usage["output"]) * MARKUP / 10**6
    held = Decimal(charge["reserved"]) / Decimal("0.0023")
    assert round(held * 2) / 2 == {"flex": Decimal("0.5"), "default": 1}.get(tier, 2)


def test_a_service_tier_without_a_price_is_refused(served, key, upstream):
    """400, and no call."""
    before = len(upstream.journal)
    answer = call(served, key, "steady/m", service_tier="scale")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "service_tier")
    assert len(upstream.journal) == before


@pytest.mark.parametrize(("prompt_tokens", "dollars"), [(2000, (1, 2)), (2001, (3, 4))])
def test_a_long_context_has_its_price(served, key, prompt_tokens, dollars):
    """Of all tokens, as soon as the input is above the threshold; each request has its own on top."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 10, "total_tokens": prompt_tokens + 10}
    answer = call(served, key, "steady/stepped", messages=wish(usage=usage, text="x" * 2500))
    charge = charge_of(served, key, answer)
    tokens = prompt_tokens * dollars[0] + 10 * dollars[1]
    assert Decimal(charge["provider_cost"]) == Decimal(tokens) / 10**6 + Decimal("0.01")
    assert charge["usage"]["requests"] == 1
    assert charge["prices"]["long_context"][0]["above_tokens"] == 2000
    assert (charge["prices"]["request"], charge["prices"]["image"]) == ("0.01", "0.001")


def image(url) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def test_images_are_held_at_their_maximum_and_billed_by_number(served, key):
    """Not at the whole context, whatever bytes they have."""
    data = "data:image/png;base64," + "A" * 20_000
    answer = call(served, key, "steady/stepped", messages=image(data), max_tokens=1)
    charge = charge_of(served, key, answer)
    assert charge["usage"]["images"] == 1
    assert Decimal("0.0110") < Decimal(charge["reserved"]) / MARKUP < Decimal("0.0115")
    assert Decimal(charge["charged"]) > Decimal("0.011") * MARKUP


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://localhost:8080/x.png",
        "file:///etc/passwd",
        "http://[::1]/",
        "https://example.com/x.png",
    ],
)
def test_a_local_provider_fetches_nothing_from_its_network(served, key, upstream, url):
    """The providers here are on the loopback interface: 400, and no call."""
    before = len(upstream.journal)
    answer = call(served, key, "steady/m", messages=image(url))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_media_url")
    assert len(upstream.journal) == before


def test_a_local_provider_may_fetch_from_the_internet(served, key):
    """An address there passes; nothing is fetched here."""
    assert call(served, key, "steady/m", messages=image("http://8.8.8.8/x.png")).status_code == 200


# ---- markup


def percent_charged(served, key, model="steady/m") -> str:
    return charge_of(served, key, call(served, key, model))["markup_percent"]


@pytest.fixture
def default_markup(admin):
    """The default rule, as it was again after the test."""
    yield
    assert admin.put("/api/v1/admin/markup", json={"percent": "15"}).json() == {"percent": "15"}


def test_the_default_markup_is_changed_at_once(served, key, admin, default_markup):
    """For new calls, with two decimals at most; a call in flight keeps what it began with."""
    assert admin.get("/api/v1/admin/markup").json() == {"percent": "15"}
    body = {"model": "steady/m", "stream": True, "messages": wish(tokens=40, pace_s=0.05)}
    with served.client(key) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert admin.put("/api/v1/admin/markup", json={"percent": "20.25"}).json() == {"percent": "20.25"}
        assert percent_charged(served, key) == "20.25"
        open_call = charge_of(served, key, answer)
        assert (open_call["state"], open_call["markup_percent"]) == ("open", None)
        [offer] = open_call["offers"]
        assert (offer["provider"], offer["model"], offer["markup_percent"]) == ("steady", "m", "15")
        assert offer["prices"]["output"] == "4", "the dearest service tier's, as none was named"
        for _ in lines:
            pass
    assert charge_of(served, key, answer)["markup_percent"] == "15"
    assert admin.get("/api/v1/admin/markup").json() == {"percent": "20.25"}
    for wrong in ("1.234", "-1", "x", None, [], "NaN", "10001"):
        refused = admin.put("/api/v1/admin/markup", json={"percent": wrong})
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error"), wrong


def test_the_most_specific_rule_wins_and_the_preview_says_which(served, key, admin):
    """User before model before provider before default; the preview is what a call is then charged."""
    rules = [
        ("provider", "steady", "1"),
        ("model", "m", "2"),
        ("model", "steady/m", "3"),
        ("user", "customer@example.com", "4.5"),
    ]
    made = []
    for kind, subject, percent in rules:
        answer = admin.post("/api/v1/admin/markup/rules", json={"kind": kind, "subject": subject, "percent": percent})
        assert answer.status_code == 201, answer.text
        made.append(answer.json())
        assert percent_charged(served, key) == percent
        question = {"model": "steady/m", "user": "customer@example.com", "input_tokens": 100_000, "output_tokens": 1000}
        preview = admin.post("/api/v1/admin/markup/preview", json=question).json()
        assert (preview["rule"]["kind"], preview["rule"]["percent"]) == (kind, percent)
        assert preview["provider_cost"] == "0.102"
        assert Decimal(preview["charged"]) == Decimal("0.102") * (1 + Decimal(percent) / 100)
    anybody = admin.post("/api/v1/admin/markup/preview", json={"model": "steady/m", "input_tokens": 1}).json()
    assert anybody["rule"] == {"kind": "model", "subject": "steady/m", "percent": "3"}
    assert {rule["id"] for rule in admin.get("/api/v1/admin/markup/rules").json()["items"]} == {r["id"] for r in made}

    again = admin.post("/api/v1/admin/markup/rules", json={"kind": "model", "subject": "m", "percent": "9"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "rule_exists")
    path = f"/api/v1/admin/markup/rules/{made[-1]['id']}"
    assert admin.put(path, json={"percent": "0"}).json()["percent"] == "0"
    assert percent_charged(served, key) == "0"
    for rule in made:
        assert admin.delete(f"/api/v1/admin/markup/rules/{rule['id']}").status_code == 204
    assert admin.delete(path).status_code == 404
    assert percent_charged(served, key) == "15"


def test_a_preview_of_ten_cents(admin):
    """A provider's cost of $0.10 at 15 % books 0.115 credits."""
    question = {"model": "steady/m", "input_tokens": 100_000}
    preview = admin.post("/api/v1/admin/markup/preview", json=question).json()
    assert (preview["provider_cost"], preview["charged"]) == ("0.1", "0.115")
    assert preview["rule"] == {"kind": "default", "subject": None, "percent": "15"}


def test_only_admins_with_keys_for_it_administer(served, key):
    """403 for everybody else, an admin's key for calls included."""
    inference = served.command("keys", "create", "--email", "boss@example.com")["key"]
    for denied, code in ((key, "not_an_admin"), (inference, "insufficient_scope")):
        with served.client(denied) as http:
            answers = [
                http.get("/api/v1/admin/markup"),
                http.put("/api/v1/admin/markup", json={"percent": "0"}),
                http.get("/api/v1/admin/markup/rules"),
                http.post("/api/v1/admin/markup/rules", json={"kind": "model", "subject": "m", "percent": "0"}),
                http.put("/api/v1/admin/markup/rules/x", json={"percent": "0"}),
                http.delete("/api/v1/admin/markup/rules/x"),
                http.post("/api/v1/admin/markup/preview", json={"model": "steady/m"}),
                http.get("/api/v1/admin/providers"),
                http.get("/api/v1/admin/providers/steady"),
                http.post("/api/v1/admin/providers/steady/disable"),
                http.post("/api/v1/llm/providers/steady/disable"),
                http.post("/api/v1/llm/providers/steady/enable"),
                http.get("/api/v1/admin/prices"),
                http.get("/api/v1/admin/prices/history", params={"target": "steady/m"}),
                http.put("/api/v1/admin/prices", json={"target": "steady/m", "price": {"input": "0", "output": "0"}}),
                http.delete("/api/v1/admin/prices", params={"target": "steady/m"}),
            ]
        assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {(403, code)}
    with served.client(None) as http:
        assert http.post("/api/v1/llm/providers/steady/disable").status_code == 401


# ---- providers


def test_a_provider_is_switched_off_for_new_calls_only(served, key, admin):
    """A call in flight comes to its end, new ones are 404, and all is well when it is switched on again."""
    body = {"model": "steady/m", "stream": True, "messages": wish(tokens=40, pace_s=0.05)}
    with served.client(key) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        switched = admin.post("/api/v1/llm/providers/steady/disable")
        assert (switched.status_code, switched.json()) == (200, {"name": "steady", "enabled": False})
        refused = call(served, key, "steady/m")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert list(lines)[-2] == "data: [DONE]"
    with served.client(None) as http:
        public = {item["name"]: item for item in http.get("/api/v1/llm/providers").json()["items"]}
    assert "steady" not in public
    assert admin.get("/api/v1/admin/providers/steady").json() == {"name": "steady", "enabled": False, "models": []}
    assert "steady/m" not in {model["id"] for model in served_models(served, key)}
    assert admin.post("/api/v1/admin/providers/steady/enable").json()["enabled"]
    assert call(served, key, "steady/m").status_code == 200


def test_a_provider_that_the_configuration_left_off_can_be_switched_on(served, key, admin):
    """If it has all that it needs; one that lacks its key cannot, and one that is not there is not found."""
    assert call(served, key, "off/sleeper").status_code == 404
    assert admin.post("/api/v1/llm/providers/off/enable").status_code == 200
    assert call(served, key, "off/sleeper").status_code == 200
    assert admin.post("/api/v1/llm/providers/off/disable").status_code == 200
    assert call(served, key, "off/sleeper").status_code == 404
    lacking = admin.post("/api/v1/llm/providers/lacking/enable")
    assert (lacking.status_code, lacking.json()["error"]["code"]) == (409, "provider_not_ready")
    assert admin.post("/api/v1/llm/providers/nobody/enable").status_code == 404


# ---- prices and models


def served_models(served, key) -> list[dict]:
    with served.client(key) as http:
        return http.get("/v1/models").json()["data"]


def test_an_admins_price_takes_the_place_of_the_lists(served, key, admin):
    """For new calls, at once, with the history kept; taken back, the model is what it was."""
    target = "steady/fresh"
    assert call(served, key, target).status_code == 404
    for dollars in ("1", "3"):
        price = {"input": dollars, "output": "0", "max_output_tokens": 100}
        made = admin.put("/api/v1/admin/prices", json={"target": target, "price": price})
        assert made.status_code == 200, made.text
        assert (made.json()["source"], made.json()["entry"]["price"]["input"]) == ("admin", int(dollars) * 10**9)
        charge = charge_of(served, key, call(served, key, target))
        assert Decimal(charge["provider_cost"]) == Decimal(dollars) * charge["usage"]["input"] / 10**6
    assert admin.delete("/api/v1/admin/prices", params={"target": target}).status_code == 204
    assert call(served, key, target).status_code == 404
    past = admin.get("/api/v1/admin/prices/history", params={"target": target}).json()["items"]
    assert [row["entry"] and row["entry"]["price"]["input"] for row in past] == [None, 3 * 10**9, 10**9]
    assert admin.delete("/api/v1/admin/prices", params={"target": target}).status_code == 404
    for wrong in (
        {"input": "-1", "output": "0"},
        {"input": "1"},
        {"input": "1", "output": "1", "x": 1},
        {"input": "1", "output": "1", "context_tokens": 10**22},
        {"input": "1000000", "output": "1000000", "max_output_tokens": 10**8},
    ):
        refused = admin.put("/api/v1/admin/prices", json={"target": target, "price": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "price")


def test_the_configurations_price_goes_before_an_admins(served, key, admin):
    """The file is what was deployed."""
    price = {"input": "100", "output": "100", "max_output_tokens": 100}
    assert admin.put("/api/v1/admin/prices", json={"target": "steady/m", "price": price}).status_code == 200
    items = admin.get("/api/v1/admin/prices", params={"model": "steady/m"}).json()["items"]
    assert [(item["target"], item["prices"]["input"]) for item in items] == [("steady/m", "1")]
    assert admin.delete("/api/v1/admin/prices", params={"target": "steady/m"}).status_code == 204


def test_the_list_of_models_says_what_they_cost_this_caller(served, key, admin):
    """Markup included, with limits and providers; the unpriced and the boundless are not there."""
    rule = admin.post(
        "/api/v1/admin/markup/rules", json={"kind": "user", "subject": "customer@example.com", "percent": "50"}
    ).json()
    listed = {model["id"]: model for model in served_models(served, key)}
    with served.client(key) as http:
        assert http.get("/v1/models/refused").json() == listed["refused"]
    others = {model["id"]: model for model in admin.get("/v1/models").json()["data"]}
    admin.delete(f"/api/v1/admin/markup/rules/{rule['id']}")
    found = listed["steady/m"]
    assert (found["pricing"]["input"], found["pricing"]["output"]) == ("1.5", "3")
    assert found["service_tiers"]["flex"]["input"] == "0.75"
    assert others["steady/m"]["pricing"]["input"] == "1.15"
    assert (found["context_length"], found["max_output_tokens"], found["providers"]) == (100_000, 1000, ["steady"])
    assert listed["refused"]["pricing"]["input"] == "7.5", "the dearest that it can cost"
    assert listed["refused"]["providers"] == ["flaky", "steady"]
    assert not {"steady/boundless", "off/sleeper", "boundless"} & listed.keys()


def test_the_list_of_models_has_only_what_the_key_may_use(served):
    """What its user or its key is restricted to: the rest is not found there."""
    restricted = served.customer("restricted@example.com")
    execute(served, "UPDATE users SET allowed_models = '[\"steady/*\"]' WHERE email = 'restricted@example.com'")
    listed = {model["id"]: model for model in served_models(served, restricted)}
    assert {"steady/m", "stepped"} <= listed.keys()
    assert not {name for name in listed if name.startswith("flaky/")}
    assert (listed["refused"]["providers"], listed["refused"]["pricing"]["input"]) == (["steady"], "1.15")
    with served.client(restricted) as http:
        assert http.get("/v1/models/flaky/refused").status_code == 404
        assert http.get("/v1/models/steady/m").status_code == 200
        assert http.get("/v1/models/refused").json() == listed["refused"]


def test_a_key_is_served_by_those_candidates_that_it_may_use(served, flaky):
    """The others are never asked, and their price does not count in what is held; with none left it is 403."""
    key = served.customer("choosy@example.com")
    execute(
        served,
        "UPDATE api_keys SET allowed_models = '[\"steady/*\"]'"
        " WHERE user_id = (SELECT id FROM users WHERE email = 'choosy@example.com')",
    )
    before = flaky[0].calls
    answer = call(served, key, "refused", max_tokens=10)
    assert (answer.status_code, answer.headers["x-tollgate-provider"]) == (200, "steady")
    assert flaky[0].calls == before
    assert Decimal(charge_of(served, key, answer)["reserved"]) < Decimal("0.0005")
    answer = call(served, key, "flaky/refused")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_allowed")


def test_all_of_it_is_documented(served, admin):
    """With the bodies that the endpoints take."""
    document = admin.get("/schema/openapi.json").json()
    assert "put" in document["paths"]["/api/v1/admin/markup"]
    assert "post" in document["paths"]["/api/v1/llm/providers/{name}/enable"]


def test_a_price_without_a_bound_is_said_at_the_start(served):
    """The operator reads why a model is not there."""
    assert "steady/boundless: it has neither max_output_tokens nor context_tokens" in served.log()
