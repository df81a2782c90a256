"""Where media are fetched from, and which of these places are private."""

import msgspec
import pytest

from proxy.wire.media import host_of, is_private_name, is_public_address, media_urls


def test_numbers_of_any_size_hide_no_address():
    """They may stand in any place that is not read."""
    part = b'{"type": "image_url", "image_url": {"url": "https://example.test/a"}}'
    body = b'{"messages": [{"content": [%b]}], "odd": 1e999}' % part
    assert media_urls(body) == ["https://example.test/a"]


def test_the_addresses_of_all_media_are_found():
    """In messages and in items, at any depth and under any name that means an address; data is none."""
    body = {
        "model": "https://not.test/",
        "messages": [
            {"role": "user", "content": "https://text.test/"},
            {"role": "user", "content": [{"type": "text", "text": "https://prose.test/"}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.test/1"}}]},
            {"role": "user", "content": [{"type": "video_url", "video_url": "https://b.test/2"}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AA"}}]},
            {"role": "user", "content": [{"type": "file", "file": {"file_data": "https://c.test/3"}}]},
        ],
        "input": [{"type": "message", "content": [{"type": "input_file", "file_url": "https://d.test/4"}]}],
        "tools": [{"url": "https://e.test/5"}],
    }
    assert sorted(media_urls(msgspec.json.encode(body))) == [
        "https://a.test/1",
        "https://b.test/2",
        "https://c.test/3",
        "https://d.test/4",
    ]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.TEST./x", "example.test"),
        ("http://user:secret@10.0.0.1:80/", "10.0.0.1"),
        ("http://[::1]:8080/", "::1"),
        ("ht\ntp://a.test/", "a.test"),
        ("http:\\\\a.test\\x", "a.test"),
        ("file:///etc/passwd", None),
        ("ftp://a.test/", None),
        ("//a.test/", None),
        ("AAAA", None),
        ("http://[broken/", None),
    ],
)
def test_the_host_of_an_address(url, host):
    """As a client of HTTP would read it; None for what is fetched otherwise, or not at all."""
    assert host_of(url) == host


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",  # noqa: S104 - nobody listens here
        "255.255.255.255",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "localhost",
        "redis",
        "db.internal",
        "printer.local",
        "router.lan",
        "a.localhost",
    ],
)
def test_private_places(host):
    """Addresses in every form that resolvers take, and names of one's own network."""
    assert is_private_name(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111", "example.com", "local.example.com", "1.example.com"])
def test_public_places(host):
    """What is out on the internet, as far as its name says."""
    assert not is_private_name(host)


def test_a_name_is_no_address():
    """It has to be looked up first."""
    with pytest.raises(ValueError, match=r"example\.com"):
        is_public_address("example.com")
