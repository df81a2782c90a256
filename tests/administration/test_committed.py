"""A change that is committed is answered as one, although the database goes away at the very next moment."""

from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from proxy.app import routed
from tests.edge.test_authentication import client_of, on_sqlite, people

__all__ = ["on_sqlite"]

RULE = {"kind": "model", "subject": "m", "percent": "5"}
PRICE = {"target": "fake/new", "price": {"input": "1", "output": "2", "max_output_tokens": 10}}


@contextmanager
def lost_after_a_change(engine):
    """The connection breaks at every statement that comes after the commit of what was written."""
    is_lost = False

    def committed(connection) -> None:
        nonlocal is_lost
        is_lost = is_lost or bool(connection.get_execution_options().get("is_writing"))

    def executed(*_) -> None:
        if is_lost:
            raise ConnectionResetError

    sa.event.listen(engine.sync_engine, "commit", committed)
    sa.event.listen(engine.sync_engine, "before_cursor_execute", executed)
    try:
        yield
    finally:
        sa.event.remove(engine.sync_engine, "commit", committed)
        sa.event.remove(engine.sync_engine, "before_cursor_execute", executed)


@pytest.fixture
async def changed(on_sqlite):
    """Sends an admin's request, after whose change the database is away; returns the answer."""
    key = (await people(on_sqlite))["admin admin"]
    async with client_of(routed(on_sqlite), key) as http:

        async def send(method: str, path: str, body: object = None):
            assert (await http.get("/me")).status_code == 200, "the key is known by now"
            with lost_after_a_change(on_sqlite.engine):
                return await http.request(method, f"/api/v1/{path}", json=body)

        yield send


async def test_what_is_changed_in_the_catalogue(changed, on_sqlite):
    """Markup, rules, providers, prices and settings; the server sees the change as soon as it can."""
    rule = await changed("POST", "admin/markup/rules", RULE)
    assert rule.status_code == 201, rule.text
    await on_sqlite.refresh_catalog()
    assert on_sqlite.catalog.rules.models == {"m": 500}
    for method, path, body, status in (
        ("PUT", f"admin/markup/rules/{rule.json()['id']}", {"percent": "6"}, 200),
        ("DELETE", f"admin/markup/rules/{rule.json()['id']}", None, 204),
        ("PUT", "admin/markup", {"percent": "7"}, 200),
        ("PUT", "admin/config/expose", {"value": "listed"}, 200),
        ("POST", "llm/providers/fake/disable", None, 200),
        ("POST", "llm/providers/fake/enable", None, 200),
        ("PUT", "admin/prices", PRICE, 200),
        ("DELETE", "admin/prices?target=fake/new", None, 204),
    ):
        answer = await changed(method, path, body)
        assert answer.status_code == status, (method, path, answer.text)


async def test_who_is_made_or_changed(changed):
    """With the wallet."""
    made = await changed("POST", "admin/users", {"email": "ann@example.com"})
    assert made.status_code == 201, made.text
    assert made.json()["wallet"]["balance"] == "0"
    for name in ("Ann", "Ann"):
        answer = await changed("PATCH", f"admin/users/{made.json()['id']}", {"full_name": name})
        assert answer.status_code == 200, answer.text
        assert answer.json() == {**made.json(), "full_name": "Ann", "updated_at": answer.json()["updated_at"]}
