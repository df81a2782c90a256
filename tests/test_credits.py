"""What callers and admins read of the books over HTTP, on both databases; nobody reaches what is another's."""

import csv
import io
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from tests.serving import MODEL, audited

CALL = {"model": MODEL, "messages": [{"role": "user", "content": "Say something."}]}
TRANSACTIONS = "/api/v1/credits/transactions"
ADMIN_PATHS = ("/api/v1/admin/usage", "/api/v1/admin/margin", "/api/v1/llm/usage")


@pytest.fixture(scope="module")
def served(database, tmp_path_factory, upstream):
    """A running server whose books add up when the tests are through with it."""
    with audited(tmp_path_factory.mktemp("credits"), database, upstream.base_url) as server:
        yield server
        assert "internal_error" not in server.log()


def spend(http, calls: int = 1, **more) -> list[str]:
    """So many calls; returns their request ids."""
    answers = [http.post("/v1/chat/completions", json={**CALL, **more}) for _ in range(calls)]
    assert {answer.status_code for answer in answers} == {200}
    return [answer.headers["x-request-id"] for answer in answers]


@pytest.fixture(scope="module")
def spender(served):
    """A client that has made three calls of one model and one of another."""
    with served.client(served.customer("spender@example.com", "5")) as http:
        spend(http, 3)
        spend(http, model="fake/counted")
        yield http


@pytest.fixture(scope="module")
def stranger(served):
    """A client of somebody else, who has made one call."""
    with served.client(served.customer("stranger@example.com", "5")) as http:
        spend(http)
        yield http


@pytest.fixture(scope="module")
def admin(served):
    """A client with an admin's key of the scope admin."""
    served.command("users", "create", "--email", "boss@example.com", "--admin")
    key = served.command("keys", "create", "--email", "boss@example.com", "--scope", "admin")["key"]
    with served.client(key) as http:
        yield http


@pytest.fixture(scope="module")
def off_duty(served, admin):
    """A client with the same admin's key of the scope inference."""
    with served.client(served.command("keys", "create", "--email", "boss@example.com")["key"]) as http:
        yield http


def items(http, **asked) -> list[dict]:
    answer = http.get(TRANSACTIONS, params=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


def rows(answer) -> list[dict]:
    """The lines of an export."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="transactions.csv"'
    return list(csv.DictReader(io.StringIO(answer.text)))


def today(days: int = 0) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).date().isoformat()


def refused(answer) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return answer.status_code, error["param"], error["code"]


# ---- one's own books


def test_transactions_are_filtered(spender):
    """By type, model, key and date, in any combination."""
    everything = items(spender)
    assert [item["type"] for item in everything] == ["deduction"] * 4 + ["topup"]
    key = everything[0]["key_id"]
    assert items(spender, type="topup") == everything[-1:]
    assert items(spender, model="fake/counted") == everything[:1]
    assert items(spender, key=key) == everything[:4]
    assert items(spender, key=key, type="topup") == []
    assert items(spender, **{"from": today(-1), "to": today(1)}) == everything
    assert items(spender, **{"from": today(1)}) == []
    assert items(spender, to=today(-2)) == []
    assert items(spender, model="fake/counted", type="deduction", **{"from": today(-1)}, limit=1) == everything[:1]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"cursor": "!"}, (400, "cursor", "invalid_cursor")),
        ({"limit": 0}, (400, "limit", "invalid_value")),
        ({"limit": "many"}, (400, "limit", "invalid_type")),
        ({"type": "gift"}, (400, "type", "invalid_type")),
        ({"format": "xlsx"}, (400, "format", "invalid_type")),
        ({"from": "yesterday"}, (400, "from", "invalid_value")),
        ({"to": "2026-02-30"}, (400, "to", "invalid_value")),
        ({"from": "2026-02-02", "to": "2026-02-01"}, (400, "from", "invalid_value")),
        ({"key": "laptop"}, (400, "key", "invalid_value")),
        ({"key": "key_\0"}, (400, "key", "invalid_value")),
        ({"model": "a\0b"}, (400, "model", "invalid_value")),
        ({"model": "m" * 301}, (400, "model", "invalid_value")),
        ({"format": "csv", "from": "x"}, (400, "from", "invalid_value")),
    ],
)
def test_a_wrong_question_is_told_what_is_wrong(spender, asked, expected):
    """In OpenAI's shape, with the parameter."""
    assert refused(spender.get(TRANSACTIONS, params=asked)) == expected


def test_an_export_has_everything(spender):
    """Asked for by parameter or by header, with the same columns as the list, and the same filters."""
    everything = [{name: value or "" for name, value in item.items()} for item in items(spender)]
    assert rows(spender.get(TRANSACTIONS, params={"format": "csv", "limit": 1})) == everything
    assert rows(spender.get(TRANSACTIONS, headers={"Accept": "text/csv"})) == everything
    assert rows(spender.get(TRANSACTIONS, params={"format": "csv", "type": "topup"})) == everything[-1:]
    json = spender.get(TRANSACTIONS, params={"format": "json"}, headers={"Accept": "text/csv"})
    assert json.headers["content-type"] == "application/json"


def test_an_export_runs_no_formula(served):
    """What a spreadsheet would run is text in it; a negative amount stays a number."""
    key = served.customer("formula@example.com", "1")
    for number, text in enumerate(("=1+1", "+1", "@SUM(A1)", '-2+3+cmd|"/C calc"!A0', "plain, with a comma")):
        served.command(
            *("credits", "grant", "--email", "formula@example.com", "--amount", "1"),
            f"--description={text}",
            *("--idempotency-key", str(number)),
        )
    with served.client(key) as http:
        spend(http)
        exported = rows(http.get(TRANSACTIONS, params={"format": "csv"}))
    assert [row["description"] for row in exported[1:]] == [
        "plain, with a comma",
        '\'-2+3+cmd|"/C calc"!A0',
        "'@SUM(A1)",
        "'+1",
        "'=1+1",
        "granted by the operator",
    ]
    assert exported[0]["amount"].startswith("-0.0")


def test_stats_add_up_to_what_was_charged(spender):
    """By day, model and key, for the days that are asked for; in UTC."""
    charged = -sum(Decimal(item["amount"]) for item in items(spender, type="deduction"))
    stats = spender.get("/api/v1/credits/stats").json()
    assert (stats["from"], stats["to"], stats["time_zone"]) == (today(-29), today(), "UTC")
    total = stats["total"]
    assert (total["calls"], Decimal(total["charged"]), total["refunded"]) == (4, charged, "0")
    assert Decimal(total["average_charged"]) == charged / 4
    assert [one["calls"] for one in stats["by_day"]] == [4]
    assert {one["model"]: one["calls"] for one in stats["by_model"]} == {MODEL: 3, "fake/counted": 1}
    [by_key] = stats["by_key"]
    assert (by_key["key_id"], by_key["calls"]) == (items(spender)[0]["key_id"], 4)
    for name in ("by_day", "by_model", "by_key"):
        assert sum(Decimal(one["charged"]) for one in stats[name]) == charged
    earlier = spender.get("/api/v1/credits/stats", params={"from": today(-9), "to": today(-3)}).json()
    assert (earlier["total"]["calls"], earlier["by_day"]) == (0, [])
    assert refused(spender.get("/api/v1/credits/stats?from=x")) == (400, "from", "invalid_value")
    assert refused(spender.get("/api/v1/credits/stats?from=1999-01-01")) == (400, "from", "invalid_value")


def test_calls_are_listed(spender):
    """Each is what its own address answers."""
    first = spender.get("/api/v1/credits/charges", params={"limit": 3}).json()
    second = spender.get("/api/v1/credits/charges", params={"cursor": first["next_cursor"]}).json()
    listed = [*first["items"], *second["items"]]
    assert second["next_cursor"] is None
    assert [item["request_id"] for item in listed] == [item["request_id"] for item in items(spender, type="deduction")]
    assert spender.get(f"/api/v1/credits/charges/{listed[0]['request_id']}").json() == listed[0]
    for cursor in ("!", "Mw==", "cmVxXw=="):
        answer = spender.get("/api/v1/credits/charges", params={"cursor": cursor})
        assert refused(answer) == (400, "cursor", "invalid_cursor")
    assert refused(spender.get("/api/v1/credits/charges?limit=201")) == (400, "limit", "invalid_value")


# ---- other people's books


def test_nobody_sees_what_is_anothers(spender, stranger):
    """Not by a key's id, a cursor, a request id, or a list."""
    theirs = items(spender)
    assert items(stranger, key=theirs[0]["key_id"]) == []
    assert rows(stranger.get(TRANSACTIONS, params={"format": "csv", "key": theirs[0]["key_id"]})) == []
    assert len(items(stranger)) == 2
    assert stranger.get(f"/api/v1/credits/charges/{theirs[0]['request_id']}").status_code == 404
    cursor = spender.get("/api/v1/credits/charges?limit=1").json()["next_cursor"]
    own = {item["request_id"] for item in items(stranger)}
    answer = stranger.get("/api/v1/credits/charges", params={"cursor": cursor}).json()
    assert {item["request_id"] for item in answer["items"]} <= own
    assert stranger.get("/api/v1/credits/stats").json()["total"]["calls"] == 1


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_reports_are_for_admins(served, spender, off_duty, path):
    """With a key of that scope: not for users, and not for an admin's key that is for inference."""
    assert spender.get(path).json()["error"]["code"] == "not_an_admin"
    assert off_duty.get(path).json()["error"]["code"] == "insufficient_scope"
    with served.client(None) as http:
        assert http.get(path).status_code == 401


def test_an_admin_reads_anybodys_charge(spender, admin, off_duty):
    """With a key of the scope admin, and not otherwise."""
    request_id = items(spender)[0]["request_id"]
    assert admin.get(f"/api/v1/credits/charges/{request_id}").json()["request_id"] == request_id
    assert off_duty.get(f"/api/v1/credits/charges/{request_id}").status_code == 404


# ---- reports


def test_usage_is_of_everybody(spender, stranger, admin):
    """By whatever is asked, and each way adds up to the same."""
    overview = admin.get("/api/v1/llm/usage").json()
    total = overview["total"]
    assert (overview["from"], overview["to"], overview["time_zone"]) == (today(-29), today(), "UTC")
    by_user = {one["name"]: one for one in overview["by_user"]}
    assert (by_user["spender@example.com"]["calls"], by_user["stranger@example.com"]["calls"]) == (4, 1)
    for group_by in ("day", "month", "model", "provider", "user", "key"):
        page = admin.get("/api/v1/admin/usage", params={"group_by": group_by}).json()
        assert (page["group_by"], page["total"], page["next_cursor"]) == (group_by, total, None)
        assert sum(one["calls"] for one in page["items"]) == total["calls"]
        if group_by in {"day", "model", "provider", "user"}:
            assert page["items"] == overview[f"by_{group_by}"]
    assert admin.get("/api/v1/admin/usage").json()["items"][0]["group"] == today()
    months = admin.get("/api/v1/admin/usage?group_by=month").json()
    assert (months["items"][0]["group"], months["from"][-2:]) == (today()[:7], "01")
    assert admin.get("/api/v1/admin/usage", params={"to": today(-1)}).json()["items"] == []


def test_usage_is_paged(spender, stranger, admin):
    """Every user once."""
    seen, cursor = [], None
    while True:
        asked = {"group_by": "user", "limit": 1, **({"cursor": cursor} if cursor else {})}
        page = admin.get("/api/v1/admin/usage", params=asked).json()
        seen += [one["name"] for one in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(seen) == len(set(seen))
    assert {"spender@example.com", "stranger@example.com"} <= set(seen)


def test_the_margin_is_of_everybody(spender, stranger, admin):
    """Fifteen percent of what providers took, less what they may have billed for nothing."""
    wish = '!fake {"stall": "before_headers"}'
    assert (
        stranger.post(
            "/v1/chat/completions", json={**CALL, "messages": [{"role": "user", "content": wish}]}
        ).status_code
        == 504
    )
    page = admin.get("/api/v1/admin/margin").json()
    total = page["total"]
    assert page["group_by"] == "provider"
    charged, cost = Decimal(total["charged"]), Decimal(total["provider_cost"])
    assert Decimal(total["markup"]) == charged - cost == Decimal(total["margin"])
    assert charged == cost * Decimal("1.15")
    assert (total["shortfall"], total["refunded"], total["perhaps_billed"]) == ("0", "0", 1)
    assert Decimal(total["perhaps_billed_at_most"]) > 0
    assert [one["group"] for one in page["items"]] == ["fake"]
    assert admin.get("/api/v1/admin/margin?group_by=day").json()["items"][0]["group"] == today()


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_a_wrong_report_is_told_what_is_wrong(admin, path):
    """Dates, groups, pages: whatever it is, a 400."""
    assert refused(admin.get(path, params={"from": "2026-13-01"})) == (400, "from", "invalid_value")
    assert refused(admin.get(path, params={"to": ""})) == (400, "to", "invalid_value")
    if path != "/api/v1/llm/usage":
        assert refused(admin.get(path, params={"group_by": "colour"})) == (400, "group_by", "invalid_type")
        assert refused(admin.get(path, params={"cursor": "LTE="})) == (400, "cursor", "invalid_cursor")
        assert refused(admin.get(path, params={"limit": 1001})) == (400, "limit", "invalid_value")
