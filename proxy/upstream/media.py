"""Keeps providers in the operator's own network from fetching what only that network may see."""

import asyncio
import ipaddress
import socket

from proxy.errors import BadRequest
from proxy.wire.media import host_of, is_private_name, is_public_address, media_urls

HOSTS_MAX = 32
"""In one call: each is looked up."""

RESOLVE_S_MAX = 5.0


async def check_media(body: bytes, *, resolves: bool) -> None:
    """Raises `BadRequest` when a medium of the request `body` lies in a private network, or nobody can tell.

    Names are refused, since the provider looks them up by itself, and their owner may tell it something else than us.
    With `resolves` they are looked up here, and pass if all of their addresses are public just now. What is not caught
    either way is a redirect: a provider that must never reach into its network needs to be kept from it there too.
    """
    urls = media_urls(body)
    hosts = {host_of(url) for url in urls}
    if len(hosts) > HOSTS_MAX:
        raise _refusal(f"Media of one call come from at most {HOSTS_MAX} hosts.")
    for host in hosts:
        if host is None or is_private_name(host):
            raise _refusal("Media must lie on the public internet, or be sent as data.")
    if not resolves and any(host is not None and not _is_address(host) for host in hosts):
        raise _refusal("Media must be sent as data here, or lie at a public IP address: names are not looked up.")
    if not all(await asyncio.gather(*(_is_public(host) for host in hosts if host is not None))):
        raise _refusal("Media must lie on the public internet, or be sent as data.")


def _refusal(message: str) -> BadRequest:
    return BadRequest(message, code="unsupported_media_url")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _is_public(host: str) -> bool:
    """Whether all addresses of `host` are on the public internet; not when it has none."""
    try:
        async with asyncio.timeout(RESOLVE_S_MAX):
            found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return False
    return all(is_public_address(str(address[4][0])) for address in found)
