"""Providers that nobody here wrote: two servers from the package registries, each behind a provider of kind `openai`.

`fakellm` (PyPI) ends its streams without usage, whatever it is asked; `aimock` (npm) reports it, and serves the other
endpoints too.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path

import openai
import pytest

from tests.serving import SQLITE, serving
from tests.skips import needs

pytestmark = needs("node")

MESSAGES = [{"role": "user", "content": "Say something."}]
TEXT = "Hello from a server that nobody here wrote."
FIXTURES = {"fixtures": [{"match": {"userMessage": "Say something."}, "response": {"content": TEXT}}]}
READY_S_MAX = 30

CONFIG = """
[server]
port = 0

[providers.fakellm]
kind = "openai"
base_url = "FAKELLM"
knows_stream_options = false

[providers.aimock]
kind = "openai"
base_url = "AIMOCK"
api_key_env = "UPSTREAM_KEY"

[models.either]
candidates = ["fakellm/m", "aimock/m"]

[prices."fakellm/m"]
input = "1"
output = "2"
context_tokens = 8192

[prices."aimock/m"]
input = "3"
output = "4"
max_output_tokens = 1000
context_tokens = 8192
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[str]:
    """The base URL of a server that `command` starts; it is ended with the block."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "PORT": str(port)})
        try:
            give_up_at = time.monotonic() + READY_S_MAX
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, (folder / "server.log").read_text()
                    assert time.monotonic() < give_up_at
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="module")
def providers(tmp_path_factory, node_modules) -> Iterator[dict[str, str]]:
    """The base URLs of both servers."""
    folder = tmp_path_factory.mktemp("providers")
    (folder / "fixtures.json").write_text(json.dumps(FIXTURES))
    (folder / "fakellm.yaml").write_text("version: 1\ndefaults:\n  fallback: deterministic_echo\nrules: []\n")
    ports = [free_port(), free_port()]
    python = Path(sys.prefix) / "clients-python" / "bin" / "fakellm"
    assert python.exists(), "`make test-clients` makes the environment that fakellm lives in"
    aimock = node_modules / "node_modules" / "@copilotkit" / "aimock" / "dist" / "cli.js"
    with ExitStack() as stack:
        yield {
            "FAKELLM": stack.enter_context(running([str(python), "serve", "--port", str(ports[0])], folder, ports[0])),
            "AIMOCK": stack.enter_context(
                running(["node", str(aimock), "-p", str(ports[1]), "-f", "fixtures.json"], folder, ports[1])
            ),
        }


def configured(providers) -> str:
    config = CONFIG
    for name, url in providers.items():
        config = config.replace(name, url)
    return config


@pytest.fixture(scope="module")
def billing(providers, tmp_path_factory):
    """A server of ours before both, whose books add up in the end, and a customer's key."""
    folder = tmp_path_factory.mktemp("before-them")
    with serving(folder, SQLITE, "", configured(providers)) as server:
        yield server, server.customer("customer@example.com")
        report = server.command("audit")
        assert report["clean"], report
        assert report["totals"]["calls"] > 0


@pytest.fixture
def client(billing):
    served, key = billing
    with openai.OpenAI(base_url=served.base_url, api_key=key, max_retries=0) as client:
        yield client


@pytest.mark.parametrize(("provider", "prices"), [("fakellm", (1, 2)), ("aimock", (3, 4))])
def test_a_plain_call(billing, client, provider, prices):
    """The answer is the server's own, and the charge what it reported, at its price."""
    answer = client.chat.completions.with_raw_response.create(model=f"{provider}/m", messages=MESSAGES)
    completion = answer.parse()
    assert completion.choices[0].message.content
    cost = completion.usage.prompt_tokens * prices[0] + completion.usage.completion_tokens * prices[1]
    assert Decimal(answer.headers["x-credits-charged"]) == cost * Decimal("1.15") / 10**6
    assert answer.headers["x-tollgate-provider"] == provider


@pytest.mark.parametrize(("provider", "source"), [("fakellm", "counted"), ("aimock", "reported")])
def test_a_stream(billing, client, provider, source):
    """It comes to its end, with the usage that was asked for and its cost, whether the server reports any or not."""
    served, key = billing
    stream = client.chat.completions.create(
        model=f"{provider}/m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    with stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    charge = served.charge(key, stream.response.headers["x-request-id"])
    assert (charge["state"], charge["usage_source"], charge["provider"]) == ("settled", source, provider)
    assert Decimal(chunks[-1].usage.cost) == Decimal(charge["charged"]) > 0


def test_the_other_endpoints(client):
    """Responses and embeddings, of the server that has them."""
    assert client.responses.create(model="aimock/m", input="Say something.").output_text == TEXT
    embedded = client.embeddings.create(model="aimock/m", input="Say something.")
    assert embedded.data[0].embedding


def test_the_servers_own_error(client):
    """What it does not know comes back as it says it."""
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="aimock/m", messages=[{"role": "user", "content": "Nobody knows this."}])
    assert raised.value.status_code in {404, 502, 503}
    assert raised.value.body["message"]


def test_one_stands_in_for_the_other(billing, client, providers, tmp_path):
    """A name that both serve goes on being served when the preferred one is gone."""
    answer = client.chat.completions.with_raw_response.create(model="either", messages=MESSAGES)
    assert answer.headers["x-tollgate-provider"] == "fakellm"
    gone = {**providers, "FAKELLM": f"http://127.0.0.1:{free_port()}/v1"}
    with serving(tmp_path, "sqlite+aiosqlite:///other.db", "", configured(gone)) as other:
        key = other.customer("customer@example.com")
        with openai.OpenAI(base_url=other.base_url, api_key=key, max_retries=0) as there:
            answer = there.chat.completions.with_raw_response.create(model="either", messages=MESSAGES)
    assert answer.headers["x-tollgate-provider"] == "aimock"
    assert answer.parse().choices[0].message.content == TEXT
