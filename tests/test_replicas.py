"""Two processes on one PostgreSQL: what an admin says to one of them is soon done by the other."""

from contextlib import ExitStack
from functools import partial

import pytest

from tests.serving import MODEL, serving
from tests.waiting import until

KNOWN_S_MAX = 3
"""A second, and the patience that a busy machine needs."""

soon = partial(until, within_s=KNOWN_S_MAX)


@pytest.fixture(scope="module")
def replicas(postgres_database, tmp_path_factory, upstream):
    """Two running servers, and an admin's client on the first."""
    folder = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        servers = []
        for place in ("one", "other"):
            (folder / place).mkdir()
            servers.append(stack.enter_context(serving(folder / place, postgres_database, upstream.base_url)))
        one, other = servers
        one.command("users", "create", "--email", "boss@example.com", "--admin")
        made = one.command("keys", "create", "--email", "boss@example.com", "--scope", "admin")
        admin = stack.enter_context(one.client(made["key"]))
        yield admin, other, one.customer("customer@example.com")


def test_a_markup_reaches_the_other_process(replicas):
    """Its next calls are charged at it."""
    admin, other, key = replicas

    def percent() -> str:
        with other.client(key) as http:
            answer = http.post(
                "/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
            )
        return other.charge(key, answer.headers["x-request-id"])["markup_percent"]

    assert percent() == "15"
    assert admin.put("/api/v1/admin/markup", json={"percent": "33"}).status_code == 200
    soon(lambda: percent() == "33")


def test_a_provider_that_is_switched_off_serves_no_more_in_the_other_process(replicas):
    """And serves again when it is switched on."""
    admin, other, _ = replicas

    def is_enabled() -> bool:
        with other.client(None) as http:
            items = http.get("/api/v1/llm/providers").json()["items"]
        return "fake" in {item["name"] for item in items}

    for action, expected in (("disable", False), ("enable", True)):
        assert admin.post(f"/api/v1/llm/providers/fake/{action}").status_code == 200
        soon(lambda expected=expected: is_enabled() is expected)


def test_a_price_reaches_the_other_process(replicas):
    """A model that was not on offer is there."""
    admin, other, key = replicas
    price = {"input": "1", "output": "1", "max_output_tokens": 10}
    assert admin.put("/api/v1/admin/prices", json={"target": "fake/new", "price": price}).status_code == 200

    def is_there() -> bool:
        with other.client(key) as http:
            return http.get("/v1/models/fake/new").status_code == 200

    soon(is_there)
