"""What a provider in one's own network may be told to fetch."""

import asyncio
import json

import pytest

from proxy.errors import BadRequest
from proxy.upstream.media import HOSTS_MAX, check_media


def body(*urls) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()


@pytest.mark.parametrize("resolves", [False, True])
async def test_data_and_public_addresses_pass(resolves):
    """Nothing is looked up for them."""
    urls = ("data:image/png;base64,AAAA", "https://8.8.8.8/x.png", "https://[2001:4860:4860::8888]/x.png")
    await check_media(body(*urls), resolves=resolves)


async def test_names_pass_only_where_they_are_looked_up(monkeypatch):
    """By default not even one that is public just now: its owner may answer the provider otherwise."""

    async def resolved(host: str, *_: object, **__: object) -> list:
        addresses = {"public.example": ["8.8.8.8"], "rebound.example": ["8.8.8.8", "10.0.0.1"]}
        return [(None, None, None, "", (address, 443)) for address in addresses.get(host, [host])]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolved, raising=False)
    await check_media(body("https://public.example/x.png"), resolves=True)
    for url, resolves in (("https://public.example/x.png", False), ("https://rebound.example/x.png", True)):
        with pytest.raises(BadRequest) as raised:
            await check_media(body("https://8.8.8.8/x.png", url), resolves=resolves)
        assert raised.value.code == "unsupported_media_url"


@pytest.mark.parametrize("resolves", [False, True])
@pytest.mark.parametrize("url", ["http://10.0.0.1/", "http://localhost/", "file:///x", "https://nobody.invalid/x"])
async def test_private_and_unknown_places_are_refused(url, resolves):
    """A name that has no address here has perhaps one there."""
    with pytest.raises(BadRequest) as raised:
        await check_media(body("https://8.8.8.8/x.png", url), resolves=resolves)
    assert raised.value.code == "unsupported_media_url"


async def test_hosts_are_not_looked_up_without_end():
    """Each costs time."""
    with pytest.raises(BadRequest, match=str(HOSTS_MAX)):
        await check_media(body(*(f"https://{number}.example.com/" for number in range(HOSTS_MAX + 1))), resolves=True)
