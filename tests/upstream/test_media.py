"""What a provider in one's own network may be told to fetch."""

import json

import pytest

from proxy.errors import BadRequest
from proxy.upstream.media import HOSTS_MAX, check_media


def body(*urls) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()


async def test_data_and_public_addresses_pass():
    """Nothing is looked up for them."""
    await check_media(body("data:image/png;base64,AAAA", "https://8.8.8.8/x.png"))


@pytest.mark.parametrize("url", ["http://10.0.0.1/", "http://localhost/", "file:///x", "https://nobody.invalid/x"])
async def test_private_and_unknown_places_are_refused(url):
    """A name that has no address here has perhaps one there."""
    with pytest.raises(BadRequest) as raised:
        await check_media(body("https://8.8.8.8/x.png", url))
    assert raised.value.code == "unsupported_media_url"


async def test_hosts_are_not_looked_up_without_end():
    """Each costs time."""
    with pytest.raises(BadRequest, match=str(HOSTS_MAX)):
        await check_media(body(*(f"https://{number}.example.com/" for number in range(HOSTS_MAX + 1))))
