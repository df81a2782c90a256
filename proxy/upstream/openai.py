"""Providers that speak OpenAI's protocol: OpenAI itself, and the many servers that took over its shapes.

The module also says which header fields cross in either direction. Requests go by an allow-list, since what a
client sends may identify or authorize it; answers by a deny-list, since unknown fields of a provider's answer are
the client's to see.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from proxy import __version__
from proxy.errors import SettingsError
from proxy.upstream import Headers, ProviderCall, UpstreamResponse
from proxy.upstream.client import HttpClient, Timeouts

_USER_AGENT = b"tollgate/" + __version__.encode()

_CLIENT_HEADERS = frozenset({b"openai-beta", b"user-agent"})
_CLIENT_PREFIX = b"x-stainless-"
"""What OpenAI's SDKs say of themselves: language, version, number of the retry."""

_HEADER_VALUE = re.compile(rb"[\x21-\x7e\x80-\xff]+(?:[ \t]+[\x21-\x7e\x80-\xff]+)*")
"""RFC 9110, section 5.5. A value that is none would break the whole call, and servers differ in what they let in."""

_HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")

_FRAMING = frozenset(
    {b"accept", b"accept-encoding", b"connection", b"content-length", b"content-type", b"host", b"transfer-encoding"}
)
"""Fields that say how a call is sent, which is not the operator's to say."""

_DROPPED = frozenset(
    {
        # Hop by hop (RFC 9110, section 7.6.1): they speak of the provider's connection, not of the client's.
        b"connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        # Said anew by our own server, of the answer that we send.
        b"content-length",
        b"date",
        b"server",
        # They bind the browser to an origin, and the origin is ours.
        b"alt-svc",
        b"clear-site-data",
        b"nel",
        b"report-to",
        b"set-cookie",
        b"set-cookie2",
        b"strict-transport-security",
        # The operator's account and credentials.
        b"api-key",
        b"authentication-info",
        b"authorization",
        b"cookie",
        b"openai-organization",
        b"openai-project",
        b"www-authenticate",
        b"x-api-key",
    }
)

_DROPPED_PREFIXES = (
    b"proxy-",
    # Whom a browser shows our answers to is our edge's to say.
    b"access-control-",
    # Ours: a provider must not forge them.
    b"x-credits-",
    b"x-tollgate-",
    b"x-upstream-",
)


class OpenAIProvider:
    """A server with OpenAI's API under `base_url`, such as `https://api.openai.com/v1`.

    A query in it goes with every call: Azure wants `?api-version=…` there.

    Without an `api_key` no authorization is sent, as servers in one's own network often want it. `headers` go with
    every call, and before those of the client.

    Raises `SettingsError` when `base_url` is not a plain HTTP address, or the key or a header cannot be sent: better at
    start than with each call.
    """

    def __init__(  # noqa: PLR0913 - what the operator says of a provider
        self,
        name: str,
        base_url: str,
        api_key: str | None,
        client: HttpClient,
        timeouts: Timeouts,
        *,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self._base_url, self._query = checked_base_url(base_url, provider=name)
        self._own_headers = _authorization(api_key, provider=name)
        self._own_headers += checked_headers(headers, beside=self._own_headers, provider=name)
        self._client = client
        self._timeouts = timeouts
        self._composed = lru_cache(maxsize=256)(self._compose)
        """Clients send few different headers that cross, each again and again."""

    async def send(self, call: ProviderCall) -> UpstreamResponse:
        """Post the body of `call` as it is; see `Provider.send`."""
        return await self._client.send(
            provider=self.name,
            method="POST",
            url=f"{self._base_url}/{call.path}{self._query}",
            headers=self._composed(_crossing(call.headers), is_stream=call.stream),
            body=call.body,
            timeouts=self._timeouts,
        )

    async def aclose(self) -> None:
        """Close the provider's connections."""
        await self._client.aclose()

    def _compose(self, sent: tuple[tuple[bytes, bytes], ...], *, is_stream: bool) -> Headers:
        """The header of a call whose client has `sent` what crosses."""
        headers = list(self._own_headers)
        headers.append((b"content-type", b"application/json"))
        headers.append((b"accept", b"text/event-stream" if is_stream else b"application/json"))
        headers.append((b"accept-encoding", b"identity"))
        own = {name for name, _ in headers}
        crossing = [(name, value) for name, value in sent if name not in own and _HEADER_VALUE.fullmatch(value)]
        if not any(name == b"user-agent" for name, _ in (*crossing, *headers)):
            headers.append((b"user-agent", _USER_AGENT))
        return headers + crossing


def relayed_headers(headers: Headers) -> Headers:
    """Those of a provider's response `headers` that go to the client, in their order, some under other names.

    The provider's request id and rate limits are the operator's, not the caller's: they come back as
    `x-upstream-request-id` and `x-upstream-ratelimit-…`, beside our own.
    """
    connections = [value for name, value in headers if name == b"connection"]
    named = {token.strip().lower() for value in connections for token in value.split(b",")}
    return [
        (relayed, value)
        for name, value in headers
        if (relayed := _relayed_name(name)) is not None and name not in named
    ]


@lru_cache(maxsize=1024)
def _relayed_name(name: bytes) -> bytes | None:
    """What a field is called in our answer; None for one that stays behind."""
    if name in _DROPPED or name.startswith(_DROPPED_PREFIXES):
        return None
    if name == b"x-request-id" or name.startswith(b"x-ratelimit-"):
        return b"x-upstream-" + name.removeprefix(b"x-")
    return name


def _crossing(headers: Headers) -> tuple[tuple[bytes, bytes], ...]:
    """Those of the client's `headers` that the provider gets, if they can be sent."""
    return tuple([header for header in headers if header[0] in _CLIENT_HEADERS or header[0].startswith(_CLIENT_PREFIX)])


def checked_base_url(base_url: str, *, provider: str) -> tuple[str, str]:
    """What stands before the path of a call, and what behind it. Raises `SettingsError` for no plain HTTP address."""
    # The messages do not quote the address: it may hold a password.
    place = f"The base_url of provider {provider!r}"
    try:
        parts = urlsplit(base_url)
        # Encoding finds labels that are empty or too long, on which the look-up of the address would fail.
        has_address = parts.scheme in {"http", "https"} and bool((parts.hostname or "").encode("idna"))
        has_address = has_address and parts.port != 0
    except ValueError as exc:
        raise SettingsError(f"{place} is not a URL.") from exc
    if not has_address or not re.fullmatch(r"[\x21-\x7e]+", base_url):
        raise SettingsError(f"{place} must begin with http:// or https:// and a host, and be plain ASCII.")
    if "@" in parts.netloc:
        raise SettingsError(f"{place} must not hold credentials: put the key into the environment.")
    if "#" in base_url:
        raise SettingsError(f"{place} must not have a fragment: no server would see it.")
    path, mark, query = base_url.partition("?")
    return path.rstrip("/"), f"{mark}{query}" if query else ""


def checked_headers(headers: Sequence[tuple[str, str]], *, beside: Headers, provider: str) -> Headers:
    """The operator's header fields. Raises `SettingsError` for one that cannot be sent or is `beside` them already."""
    checked: Headers = []
    for name, value in headers:
        field, text = name.lower().encode(), value.strip().encode("latin-1", "replace")
        is_taken = field in _FRAMING or any(field == known for known, _ in (*beside, *checked))
        if is_taken or not _HEADER_NAME.fullmatch(field) or not _HEADER_VALUE.fullmatch(text):
            raise SettingsError(f"The header {name!r} of provider {provider!r} cannot be sent.")
        checked.append((field, text))
    return checked


def _authorization(api_key: str | None, *, provider: str) -> Headers:
    return [(b"authorization", b"Bearer " + checked_key(api_key, provider=provider))] if api_key else []


def checked_key(api_key: str, *, provider: str) -> bytes:
    """The key as a header has it. Raises `SettingsError` when it cannot be sent."""
    if not re.fullmatch(r"[\x21-\x7e]+", api_key):
        raise SettingsError(f"The key of provider {provider!r} has a space, line break or other unusable character.")
    return api_key.encode()
