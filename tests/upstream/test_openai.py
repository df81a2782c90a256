import httpx2
import pytest

from proxy import __version__
from proxy.errors import SettingsError
from proxy.upstream import ProviderCall
from proxy.upstream.client import Timeouts
from proxy.upstream.httpx import HttpxClient
from proxy.upstream.openai import OpenAIProvider, relayed_headers


def call(*, headers=(), stream=False):
    return ProviderCall(path="chat/completions", model="m", body=b'{"a": 1}', headers=list(headers), stream=stream)


@pytest.fixture
async def sent():
    """Sends a call through a provider and returns the request as it goes out."""
    requests = []

    def answer(request):
        requests.append(request)
        return httpx2.Response(200, json={})

    client = HttpxClient(transport=httpx2.MockTransport(answer))

    async def send(call, *, base_url="https://acme.test/v1", api_key="sk-op", headers=()):
        provider = OpenAIProvider("acme", base_url, api_key, client, Timeouts(), headers=headers)
        response = await provider.send(call)
        await response.aclose()
        await provider.aclose()
        return requests.pop()

    yield send
    await client.aclose()


async def test_the_whole_request(sent):
    """Everything that goes out, and nothing beside it."""
    request = await sent(call())
    assert (request.method, str(request.url), request.content) == (
        "POST",
        "https://acme.test/v1/chat/completions",
        b'{"a": 1}',
    )
    assert request.headers.raw == [
        (b"Host", b"acme.test"),
        (b"authorization", b"Bearer sk-op"),
        (b"content-type", b"application/json"),
        (b"accept", b"application/json"),
        (b"accept-encoding", b"identity"),
        (b"user-agent", b"tollgate/" + __version__.encode()),
        (b"Content-Length", b"8"),
    ]


async def test_a_stream_is_asked_for_as_events(sent):
    """Some servers choose the shape of the answer by this header."""
    assert (await sent(call(stream=True))).headers["accept"] == "text/event-stream"


@pytest.mark.parametrize("api_key", [None, ""])
async def test_without_a_key(sent, api_key):
    """No authorization goes out, the client's least of all."""
    request = await sent(call(headers=[(b"authorization", b"Bearer tg-client")]), api_key=api_key)
    assert "authorization" not in request.headers


async def test_the_operators_headers_go_before_the_clients(sent):
    """Every call has them, once, whatever the client says."""
    clients = [(b"user-agent", b"OpenAI/Python 3"), (b"x-stainless-os", b"Linux"), (b"api-key", b"tg-client")]
    headers = [("Api-Key", " sk-op "), ("User-Agent", "us")]
    request = await sent(call(headers=clients), api_key=None, headers=headers)
    assert request.headers.raw[1:3] == [(b"api-key", b"sk-op"), (b"user-agent", b"us")]
    assert request.headers.get_list("user-agent") == ["us"]
    assert request.headers["x-stainless-os"] == "Linux"


@pytest.mark.parametrize(
    "header",
    [
        ("host", "x"),
        ("Content-Length", "1"),
        ("a b", "x"),
        ("", "x"),
        ("a", "x\ny: z"),
        ("a", ""),
        ("Authorization", "x"),
    ],
)
async def test_a_header_that_cannot_be_sent(header):
    """It is refused at once: what frames the call, what is no header, and what is there already."""
    client = HttpxClient()
    with pytest.raises(SettingsError, match="cannot be sent"):
        OpenAIProvider("acme", "https://acme.test/v1", "sk-op", client, Timeouts(), headers=[header])
    await client.aclose()


@pytest.mark.parametrize("base_url", ["http://acme.test/v1", "http://acme.test/v1/", "http://acme.test/v1//"])
async def test_slashes_at_the_end_of_the_base_url(sent, base_url):
    """They make no difference."""
    assert str((await sent(call(), base_url=base_url)).url) == "http://acme.test/v1/chat/completions"


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("https://acme.test/openai/v1?api-version=preview", "/openai/v1/chat/completions?api-version=preview"),
        ("https://acme.test/v1/?a=1&b=%20", "/v1/chat/completions?a=1&b=%20"),
        ("https://acme.test/v1?", "/v1/chat/completions"),
        ("https://acme.test", "/chat/completions"),
        ("https://acme.test/v1beta/openai/", "/v1beta/openai/chat/completions"),
    ],
)
async def test_paths_and_queries_of_the_base_url(sent, base_url, url):
    """The path of the call comes between them."""
    assert str((await sent(call(), base_url=base_url)).url) == f"https://acme.test{url}"


@pytest.mark.parametrize(
    "header",
    [(b"openai-beta", b"assistants=v2"), (b"user-agent", b"OpenAI/Python 3"), (b"x-stainless-retry-count", b"1")],
)
async def test_client_headers_that_cross(sent, header):
    """What the client says of its software reaches the provider as it is, once."""
    request = await sent(call(headers=[header]))
    assert [pair for pair in request.headers.raw if pair[0] == header[0]] == [header]


@pytest.mark.parametrize(
    "name",
    [
        b"accept",
        b"accept-encoding",
        b"authorization",
        b"connection",
        b"content-length",
        b"content-type",
        b"cookie",
        b"forwarded",
        b"host",
        b"openai-organization",
        b"openai-project",
        b"proxy-authorization",
        b"te",
        b"transfer-encoding",
        b"x-api-key",
        b"x-forwarded-for",
        b"x-request-id",
    ],
)
async def test_client_headers_that_do_not_cross(sent, name):
    """Whatever names or authorizes the client, or speaks of its connection, stays here."""
    request = await sent(call(headers=[(name, b"of-the-client")]))
    assert b"of-the-client" not in [value for _, value in request.headers.raw]


@pytest.mark.parametrize("value", [b"", b"a\x00", b"a\r\nx-evil: 1", b" a", b"a\x7f"])
async def test_client_values_that_are_no_header_values(sent, value):
    """They are left out, since they would break the call or be read as other headers."""
    request = await sent(call(headers=[(b"x-stainless-lang", value), (b"user-agent", value)]))
    assert "x-stainless-lang" not in request.headers
    assert request.headers["user-agent"] == f"tollgate/{__version__}"


async def test_over_the_library_itself(httpx2_mock):
    """The provider's status, headers and bytes come back as they are, through the real pool's interface."""
    route = httpx2_mock.post("https://acme.test/v1/chat/completions").respond(
        429, headers={"retry-after": "2"}, content=b"slow"
    )
    client = HttpxClient()
    response = await OpenAIProvider("acme", "https://acme.test/v1", "sk-op", client, Timeouts()).send(call())
    assert route.called
    assert (response.status, dict(response.headers)[b"retry-after"]) == (429, b"2")
    assert b"".join([chunk async for chunk in response.chunks()]) == b"slow"
    await client.aclose()


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "acme.test/v1",
        "ftp://acme.test",
        "http://",
        "http:///v1",
        "http://[::1/v1",
        "http://acme.test:99999/v1",
        "http://acme.test:x/v1",
        "http://a..test/v1",
        "http://acme.test/v 1",
        "http://acme.test/v1\n",
        "https://user:secret@acme.test/v1",
        "https://acme.test/v1?key=secret with a space",
        "https://acme.test/v1#secret",
    ],
)
async def test_a_base_url_that_cannot_work(base_url):
    """It is refused at once, in words that do not repeat it."""
    client = HttpxClient()
    with pytest.raises(SettingsError, match="The base_url of provider 'acme'") as caught:
        OpenAIProvider("acme", base_url, None, client, Timeouts())
    assert "secret" not in str(caught.value)
    await client.aclose()


@pytest.mark.parametrize("api_key", ["sk secret", "sk-secret\n", "sk-secrét"])
async def test_a_key_that_cannot_be_sent(api_key):
    """It is refused at once, in words that do not repeat it."""
    client = HttpxClient()
    with pytest.raises(SettingsError) as caught:
        OpenAIProvider("acme", "https://acme.test/v1", api_key, client, Timeouts())
    assert "secr" not in str(caught.value)
    await client.aclose()


@pytest.mark.parametrize(
    "name",
    [
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"te",
        b"trailer",
        b"upgrade",
        b"proxy-authenticate",
        b"proxy-connection",
        b"content-length",
        b"set-cookie",
        b"server",
        b"date",
        b"alt-svc",
        b"strict-transport-security",
        b"access-control-allow-origin",
        b"openai-organization",
        b"openai-project",
        b"authorization",
        b"www-authenticate",
        b"x-api-key",
        b"x-credits-charged",
        b"x-tollgate-anything",
        b"x-upstream-request-id",
    ],
)
def test_headers_that_are_not_relayed(name):
    """They are another connection's, the operator's, or ours to say."""
    assert relayed_headers([(name, b"v")]) == []


@pytest.mark.parametrize(
    ("name", "relayed"),
    [
        (b"content-type", b"content-type"),
        (b"content-encoding", b"content-encoding"),
        (b"openai-processing-ms", b"openai-processing-ms"),
        (b"retry-after", b"retry-after"),
        (b"x-anything", b"x-anything"),
        (b"x-request-id", b"x-upstream-request-id"),
        (b"x-ratelimit-remaining-requests", b"x-upstream-ratelimit-remaining-requests"),
    ],
)
def test_headers_that_are_relayed(name, relayed):
    """Unknown ones too; the provider's id and limits under names that are not ours."""
    assert relayed_headers([(name, b"v")]) == [(relayed, b"v")]


def test_headers_named_in_connection_are_not_relayed():
    """However the names are written and over however many fields."""
    headers = [
        (b"x-hop", b"1"),
        (b"connection", b"close, X-Hop"),
        (b"x-end", b"2"),
        (b"connection", b"x-other"),
        (b"x-other", b"3"),
    ]
    assert relayed_headers(headers) == [(b"x-end", b"2")]


def test_order_and_repetition_are_kept():
    """A list stays a list."""
    headers = [(b"x-b", b"1"), (b"x-a", b"2"), (b"x-b", b"3")]
    assert relayed_headers(headers) == headers
