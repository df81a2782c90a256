"""What describes our own routes is true: schemathesis calls them after it, in every way it can think of."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy import __version__
from proxy.wire.requests import Endpoint
from tests.serving import CONFIG, MODEL, SQLITE, serving
from tests.skips import needs

METHODS = {"get", "post", "put", "patch", "delete"}
EXAMPLES = ("gpt-4o-mini", "gpt-3.5-turbo-instruct", "text-embedding-3-small")
"""The models of the document's examples."""

CONFIGURATION = CONFIG + "".join(f'[models."{name}"]\ncandidates = ["fake/{MODEL}"]\n' for name in EXAMPLES)


@contextmanager
def opened(folder, upstream):
    """A running server, and the key of an admin with credits: to it no route is closed."""
    with serving(folder, SQLITE, upstream.base_url, configuration=CONFIGURATION) as server:
        server.command("users", "create", "--email", "documented@example.com", "--admin")
        server.command("credits", "grant", "--email", "documented@example.com", "--amount", "1000")
        made = server.command("keys", "create", "--email", "documented@example.com", "--scope", "admin")
        yield server, made["key"]


@pytest.fixture(scope="module")
def served_and_key(tmp_path_factory, upstream):
    with opened(tmp_path_factory.mktemp("served"), upstream) as server_and_key:
        yield server_and_key


@pytest.fixture
def served(served_and_key):
    return served_and_key[0]


@pytest.fixture
def key(served_and_key):
    return served_and_key[1]


@pytest.fixture
def shaken(tmp_path, upstream):
    """A server of its own, for one who may do anything to it, and does."""
    with opened(tmp_path, upstream) as server_and_key:
        yield server_and_key


def test_every_answer_is_one_of_the_document(shaken, upstream, tmp_path):
    """No failure of the server, no status, type or shape that the document does not have, and no way around the key.

    The paid calls are among them: a provider is asked, answers are streamed, and the books are in order afterwards.
    """
    served, key = shaken
    with served.client(key) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        document = client.get("/schema/openapi.json").json()
    assert {"/v1/models", "/v1/chat/completions", "/api/v1/llm/invoke", "/health/ready"} <= document["paths"].keys()
    done = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            "run",
            f"{served.base_url.removesuffix('/v1')}/schema/openapi.json",
            *("--header", f"Authorization: Bearer {key}"),
            # Which cursors we gave out is more than a schema can say.
            *("--exclude-checks", "positive_data_acceptance"),
            *("--max-examples", "5", "--generation-deterministic", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout.replace(key, "<key>")
    operations = sum(len(METHODS & item.keys()) for item in document["paths"].values())
    assert f"Tested: {operations - 1}\n" in done.stdout, "all but the place of the document itself, which it has read"
    assert "Traceback" not in served.log()
    assert {entry.path.removeprefix("/v1/") for entry in upstream.journal} >= set(Endpoint)
    assert any(entry.parsed.get("stream") for entry in upstream.journal)
    assert served.command("audit")["clean"]


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/credits/balance", "/v1/chat/completions", "/health/live"])
def test_a_wrong_method_is_told_the_right_ones(served, key, path):
    """405 names them, as HTTP wants."""
    with served.client(key) as client:
        answer = client.request("PATCH", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"]


@needs("node")
@pytest.mark.parametrize(
    ("operation", "filled", "read"),
    [
        ("POST /api/v1/llm/invoke", ['{"prompt": "Hello!", "stream": true}'], ['{"type":"delta"', '{"type":"done"']),
        ("GET /v1/models/{model_id}", [MODEL], ["200 OK", f'"id": "{MODEL}"', "x-request-id: req_"]),
        ("GET /api/v1/credits/transactions", ["1000", ""], ["400 Bad Request", '"param": "limit"']),
        ("POST /v1/chat/completions", [], ["200 OK", "x-credits-charged: 0.0", '"finish_reason": "stop"']),
    ],
)
def test_the_page_shows_every_operation_and_tries_it(served, key, operation, filled, read):
    """With the body that is there already, or with what a person fills in; what comes is shown as it comes."""
    root = served.base_url.removesuffix("/v1")
    page = Path(__file__).with_name("page.mjs")
    done = subprocess.run(
        ["node", page, root, key, operation, *filled], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert all(text in shown["output"] for text in read), shown["output"]
    assert shown["about"].startswith(f"Version {__version__}")
    with served.client(None) as client:
        paths = client.get("/schema/openapi.json").json()["paths"]
    documented = {f"{method.upper()} {path}" for path, item in paths.items() for method in METHODS & item.keys()}
    assert set(shown["operations"]) == documented
