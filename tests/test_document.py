"""The OpenAPI document holds every route there is, and what it says fits together; its page needs nobody else."""

import re

import jsonschema
import pytest

from proxy.app import build, routed
from proxy.edge.authentication import PUBLIC
from proxy.edge.document import PAID
from tests.edge.test_authentication import client_of, on_sqlite

__all__ = ["on_sqlite"]

METHODS = {"get", "post", "put", "patch", "delete"}
THE_FRAMEWORKS_OWN = {"/schema/{path}"}
"""It says that there is nothing of this name, and stays closed."""


@pytest.fixture
async def http(on_sqlite):
    async with client_of(build(on_sqlite)) as client:
        yield client


@pytest.fixture
async def document(http) -> dict:
    answer = await http.get("/schema/openapi.json")
    assert answer.headers["content-type"] == "application/vnd.oai.openapi+json"
    return answer.json()


def operations(document):
    for path, item in document["paths"].items():
        for method in METHODS & item.keys():
            yield path, method, item[method]


def media_of(operation):
    """Every body of an operation, with its type."""
    bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
    return [each for body in bodies for each in body.get("content", {}).items()]


def resolved(document, schema):
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


async def test_every_route_is_documented(on_sqlite, document):
    """Those that are served past the framework too, and the document itself; nothing else is in it."""
    served = set()
    for route in routed(on_sqlite).routes:
        handlers = getattr(route, "route_handlers", None) or [route.route_handler]
        for handler in handlers:
            methods = {method.lower() for method in getattr(handler, "http_methods", {"POST"})} & METHODS
            served |= {(route.path_format, method) for method in methods if route.path_format not in THE_FRAMEWORKS_OWN}
    assert len(served) > 30
    assert {(path, method) for path, method, _ in operations(document)} == served


async def test_every_operation_says_what_it_is(document):
    """A summary, a heading, a name of its own, the id in each answer, and an answer that is none of the errors'."""
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    tags = {tag["name"] for tag in document["tags"]}
    for path, method, operation in operations(document):
        assert operation["summary"], (path, method)
        assert set(operation["tags"]) <= tags
        assert all(response["headers"]["x-request-id"]["required"] for response in operation["responses"].values())
        if path != "/v1/responses/{response_path}":
            assert [status for status in operation["responses"] if status.startswith("2")], (path, method)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("post", "/api/v1/llm/providers/{name}/enable"),
        ("post", "/api/v1/admin/providers/{name}/enable"),
        ("post", "/api/v1/keys"),
        ("patch", "/api/v1/keys/{key_id}"),
        ("post", "/me/password"),
    ],
)
async def test_what_may_contradict_what_is_there_says_so(document, method, path):
    """What a provider lacks, too many keys, a revoked one, a password that was changed meanwhile."""
    assert "409" in document["paths"][path][method]["responses"]


async def test_who_may_call_what(document):
    """By a key or a token, but for what is public; who may not is told 401."""
    assert {scheme["scheme"] for scheme in document["components"]["securitySchemes"].values()} == {"bearer"}
    assert document["security"] == [{"api_key": []}, {"token": []}]
    for path, method, operation in operations(document):
        assert operation.get("security") == ([] if path in PUBLIC else None), (path, method)
        if path not in {"/login", "/metrics"}:  # which have doors of their own
            assert ("401" in operation["responses"]) == (path not in PUBLIC), (path, method)


async def test_every_body_has_an_example_that_fits_it(document):
    """Those of requests, answers and errors."""
    checked = 0
    for path, method, operation in operations(document):
        for kind, media in media_of(operation):
            shown = [each["value"] for each in media.get("examples", {}).values()] or [media["example"]]
            assert None not in shown, (path, method, kind)
            schema = resolved(document, media["schema"])
            assert not [fault.message for each in shown for fault in schema.iter_errors(each)], (path, method, kind)
            checked += 1
    assert checked > 200


async def test_paid_calls_are_documented_whole(document):
    """Streams, headers, errors, and requests that may have more fields than are named."""
    for path in PAID:
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "402", "403", "404", "413", "415", "429", "4XX", "502", "503", "504"} == set(
            operation["responses"]
        )
        done = operation["responses"]["200"]
        assert {"x-credits-reserved", "x-credits-charged", "x-credits-balance"} <= done["headers"].keys()
        is_streamed = path not in {"/v1/embeddings", "/api/v1/llm/test"}
        assert ("text/event-stream" in done["content"]) == is_streamed
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        takes_more = resolved(document, schema).is_valid({**example, "new": {"a": 1}})
        assert takes_more == (path != "/api/v1/llm/test")


async def test_the_page_needs_nobody_else(http):
    """Browsers get it, and are told to load nothing from anywhere; programs may have the document there."""
    for accept in ("text/html,application/xhtml+xml,application/json;q=0.9,*/*;q=0.8", "*/*"):
        page = await http.get("/schema", headers={"accept": accept})
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    assert "unsafe" not in policy
    assert not re.findall(r"(?i)https?:|//\w+\.|\bsrc=|@import|url\(", page.text.partition("<script>")[0])
    assert not re.findall(r"""(?i)https?:|["'`]//|innerHTML|import\(|document\.write|eval\(""", page.text)
    as_json = await http.get("/schema", headers={"accept": "application/json"})
    assert as_json.json() == (await http.get("/schema/openapi.json")).json()
    assert as_json.headers["vary"] == "Accept"
