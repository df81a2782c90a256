"""Who counts as the sender of a request."""

import pytest

from proxy.edge.addresses import Addresses

PROXY = ("10.0.0.1", 1)
TRUSTED = ["10.0.0.0/8", "fd00::/8"]


@pytest.mark.parametrize(
    ("trusted", "client", "forwarded", "holder"),
    [
        ([], ("192.0.2.1", 1), [], "192.0.2.1"),
        ([], ("192.0.2.1", 1), ["203.0.113.9"], "192.0.2.1"),
        ([], PROXY, ["203.0.113.9"], "10.0.0.1"),
        (TRUSTED, ("192.0.2.1", 1), ["203.0.113.9"], "192.0.2.1"),
        (TRUSTED, PROXY, ["203.0.113.9"], "203.0.113.9"),
        (TRUSTED, PROXY, ["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
        (TRUSTED, PROXY, ["1.1.1.1", "203.0.113.9"], "203.0.113.9"),
        (TRUSTED, PROXY, ["1.1.1.1, 203.0.113.9, 10.9.9.9"], "203.0.113.9"),
        (TRUSTED, PROXY, ["10.2.2.2"], "10.2.2.2"),
        (TRUSTED, PROXY, [], "10.0.0.1"),
        (TRUSTED, PROXY, ["nonsense"], "10.0.0.1"),
        (TRUSTED, PROXY, ["203.0.113.9, nonsense"], "10.0.0.1"),
        (TRUSTED, PROXY, [" 203.0.113.9 "], "203.0.113.9"),
        (TRUSTED, ("fd00::1", 1), ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        ([], ("2001:db8:1:2::7", 1), [], "2001:db8:1:2::/64"),
        ([], ("::ffff:192.0.2.1", 1), [], "192.0.2.1"),
        ([], None, [], ""),
    ],
)
def test_only_our_own_proxies_say_for_whom(trusted, client, forwarded, holder):
    """The nearest address that is not one of theirs; what a client writes itself lies before it and is not read."""
    headers = [(b"host", b"x"), *((b"x-forwarded-for", value.encode()) for value in forwarded)]
    assert Addresses(trusted).holder_of(client, headers) == holder
