"""Whose address a request comes from, seen through the proxies that the operator trusts."""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

_FORWARDED = b"x-forwarded-for"
_IPV6_CUSTOMER_BITS = 64
"""A customer of a provider has at least such a network: its addresses are one holder of limits."""


class Addresses:
    """`trusted` are the networks of the operator's own proxies, as `settings` has checked them."""

    def __init__(self, trusted: Iterable[str]) -> None:
        self._trusted = tuple(ip_network(network) for network in trusted)

    def holder_of(self, client: tuple[str, int] | None, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Who counts as the sender: an address of IPv4, or a network of IPv6.

        `client` is the other end of the connection. Only where that is a trusted proxy is `X-Forwarded-For` read, from
        its end, each entry being as good as the proxy that wrote it.
        """
        sender = client[0] if client is not None else ""
        if _is_in(sender, self._trusted):
            lines = [value.decode("latin-1") for name, value in headers if name == _FORWARDED]
            for entry in reversed(",".join(lines).split(",")):
                address = entry.strip()
                if not _is_address(address):
                    break
                sender = address
                if not _is_in(sender, self._trusted):
                    break
        return _holder(sender)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_in(text: str, networks: Sequence[Network]) -> bool:
    return bool(networks) and _is_address(text) and any(ip_address(text) in network for network in networks)


def _holder(text: str) -> str:
    if not _is_address(text):
        return text
    address = ip_address(text)
    if not isinstance(address, IPv6Address):
        return text
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((int(address), _IPV6_CUSTOMER_BITS), strict=False))
