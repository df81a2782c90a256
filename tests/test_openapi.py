"""What describes our own routes is true: schemathesis calls them after it, in every way it can think of."""

import subprocess
import sys
from pathlib import Path

import pytest

from proxy.wire.requests import Endpoint
from tests.fakes.provider import run_in_thread
from tests.serving import CONFIG, MODEL, serving

METHODS = {"get", "post", "put", "patch", "delete"}
EXAMPLES = ("gpt-4o-mini", "gpt-3.5-turbo-instruct", "text-embedding-3-small")
"""The models of the document's examples."""

CONFIGURATION = CONFIG + "".join(f'[models."{name}"]\ncandidates = ["fake/{MODEL}"]\n' for name in EXAMPLES)


@pytest.fixture(scope="module")
def upstream():
    with run_in_thread() as provider:
        yield provider


@pytest.fixture(scope="module")
def served(tmp_path_factory, upstream):
    folder = tmp_path_factory.mktemp("openapi")
    with serving(folder, "sqlite+aiosqlite:///served.db", upstream.base_url, configuration=CONFIGURATION) as server:
        yield server


@pytest.fixture(scope="module")
def key(served):
    """An admin's: to it no route is closed."""
    served.command("users", "create", "--email", "documented@example.com", "--admin")
    served.command("credits", "grant", "--email", "documented@example.com", "--amount", "1000")
    return served.command("keys", "create", "--email", "documented@example.com", "--scope", "admin")["key"]


def test_every_answer_is_one_of_the_document(served, upstream, key, tmp_path):
    """No failure of the server, no status, type or shape that the document does not have, and no way around the key.

    The paid calls are among them: a provider is asked, answers are streamed, and the books are in order afterwards.
    """
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
