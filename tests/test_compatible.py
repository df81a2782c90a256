"""Addresses and keys as the providers want them that took over OpenAI's API: Azure, Gemini, OpenRouter and the like."""

import pytest

from tests.serving import SQLITE, UPSTREAM_KEY, serving

CONFIG = """
[server]
port = 0

[providers.azure]
kind = "openai"
base_url = "ROOT/openai/v1/?api-version=preview"
headers_env = {{ api-key = "UPSTREAM_KEY" }}

[providers.gemini]
kind = "openai"
base_url = "ROOT/v1beta/openai/"
api_key_env = "UPSTREAM_KEY"

[providers.openrouter]
kind = "openai"
base_url = "ROOT/api/v1"
api_key_env = "UPSTREAM_KEY"
headers = {{ HTTP-Referer = "https://shop.example", X-Title = "A shop" }}
"""

PRICE = """
[prices."{name}/m"]
input = "1"
output = "2"
max_output_tokens = 100
context_tokens = 10000
"""
NAMES = ("azure", "gemini", "openrouter")
BODIES = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hello."}]},
    "responses": {"input": "Hello."},
    "completions": {"prompt": "Hello."},
    "embeddings": {"input": "Hello."},
}


@pytest.fixture(scope="module", params=["lean", "httpx"])
def client(request, tmp_path_factory, upstream):
    """A customer's, of a server that speaks to providers by each of the two clients of HTTP."""
    configuration = CONFIG.replace("ROOT", upstream.base_url.removesuffix("/v1"))
    configuration = configuration.replace("[server]", f'[server]\nhttp_client = "{request.param}"')
    configuration += "".join(PRICE.format(name=name) for name in NAMES)
    folder = tmp_path_factory.mktemp("compatible")
    with (
        serving(folder, SQLITE, upstream.base_url, configuration) as server,
        server.client(server.customer("customer@example.com")) as http,
    ):
        yield http


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize(
    ("name", "path", "authorization", "headers"),
    [
        ("azure", "/openai/v1/{}?api-version=preview", "", {"api-key": UPSTREAM_KEY}),
        ("gemini", "/v1beta/openai/{}", f"Bearer {UPSTREAM_KEY}", {}),
        (
            "openrouter",
            "/api/v1/{}",
            f"Bearer {UPSTREAM_KEY}",
            {"http-referer": "https://shop.example", "x-title": "A shop"},
        ),
    ],
)
def test_a_call_reaches_its_provider(client, upstream, endpoint, name, path, authorization, headers):
    """At its address, under its key and with its header fields, and none of the client's own; it is charged as ever."""
    answer = client.post(f"/v1/{endpoint}", json={"model": f"{name}/m", **BODIES[endpoint]}, headers={"api-key": "x"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-tollgate-provider"] == name
    assert float(answer.headers["x-credits-charged"]) > 0
    served = upstream.journal[-1]
    assert (served.path, served.header("authorization")) == (path.format(endpoint), authorization)
    assert {field: served.header(field) for field in headers} == headers
    assert served.header("api-key") == headers.get("api-key", "")
