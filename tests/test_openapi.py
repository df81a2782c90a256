"""What describes our own routes is true: schemathesis calls them after it, in every way it can think of."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.provider import run_in_thread
from tests.serving import MODEL, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openapi")
    url = "sqlite+aiosqlite:///served.db"
    with run_in_thread() as upstream, serving(folder, url, upstream.base_url) as server:
        yield server


@pytest.fixture(scope="module")
def key(served):
    return served.customer("documented@example.com")


def test_every_answer_is_one_of_the_document(served, key, tmp_path):
    """No failure of the server, no status, type or shape that the document does not have, and no way around the key."""
    with served.client(key) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        document = client.get("/schema/openapi.json").json()
    assert {"/v1/models", "/api/v1/credits/transactions", "/health/ready"} <= document["paths"].keys()
    done = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis",
            "run",
            f"{served.base_url.removesuffix('/v1')}/schema/openapi.json",
            *("--header", f"Authorization: Bearer {key}"),
            # Which cursors we gave out is more than a schema can say.
            *("--exclude-checks", "positive_data_acceptance"),
            *("--max-examples", "25", "--generation-deterministic", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout.replace(key, "<key>")
    assert f"Tested: {sum(map(len, document['paths'].values()))}" in done.stdout
    assert "Traceback" not in served.log()


@pytest.mark.parametrize("path", ["/v1/models", "/api/v1/credits/balance", "/v1/chat/completions", "/health/live"])
def test_a_wrong_method_is_told_the_right_ones(served, key, path):
    """405 names them, as HTTP wants."""
    with served.client(key) as client:
        answer = client.request("PATCH", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"]
