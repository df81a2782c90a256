"""Where the media of a request are fetched from: by the provider, which may stand where the client may not look.

A provider inside of the operator's own network would fetch `http://169.254.169.254/…` for anybody.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from proxy.wire.objects import decode_any

_URL_KEYS: Final = ("url", "uri", "file_data")
"""What the name of a field holds whose value may be fetched."""

_PRIVATE_SUFFIXES: Final = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "private", "home.arpa")
"""Names below these are of somebody's own network: RFC 6761, RFC 6762, RFC 8375, and what people use besides."""

_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 addresses as a translator of one's own network takes them (RFC 6052)."""

_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")


def media_urls(body: bytes) -> list[str]:
    """All addresses in the messages or items of the JSON `body` that a provider may fetch; data in the body is none."""
    request = decode_any(body)
    found = [*_urls(request.get("messages"), is_url=False), *_urls(request.get("input"), is_url=False)]
    return [url for url in found if url.lstrip()[:5].lower() != "data:"]


def _urls(value: Any, *, is_url: bool) -> Iterator[str]:
    waiting: list[tuple[Any, bool]] = [(value, is_url)]
    while waiting:
        value, is_url = waiting.pop()
        match value:
            case str() if is_url:
                yield value
            case dict():
                # What else stands beside an address, such as the detail of an image, is none.
                waiting += [(inner, any(key in name.lower() for key in _URL_KEYS)) for name, inner in value.items()]
            case list():
                waiting += [(inner, is_url) for inner in value]
            case _:
                pass


def host_of(url: str) -> str | None:
    """The host that `url` is fetched from by HTTP; None for anything else, such as a file."""
    # What clients of HTTP take out or turn around before they look at an address.
    cleaned = "".join(url.split()).replace("\\", "/")
    try:
        parts = urlsplit(cleaned)
        host = parts.hostname
    except ValueError:
        return None
    return host.rstrip(".").lower() if host and parts.scheme in {"http", "https"} else None


def is_private_name(host: str) -> bool:
    """Whether `host` says by itself that it is not on the public internet: an address, or a name of a local network.

    Addresses count in every form that a resolver takes: `127.1`, `0x7f000001` and `2130706433` are all loopback.
    """
    try:
        return not is_public_address(host)
    except ValueError:
        pass
    labels = host.split(".")
    if len(labels) == 1 or all(_NUMBER.fullmatch(label) for label in labels):
        return True
    return any(host.endswith(f".{suffix}") for suffix in _PRIVATE_SUFFIXES)


def is_public_address(address: str) -> bool:
    """Whether an IP address is on the public internet. Raises `ValueError` when it is none in its usual form."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast
