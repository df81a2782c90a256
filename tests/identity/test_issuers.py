"""Tokens of other issuers: by their published keys, fetched seldom, and never by what a token says about itself."""

import asyncio
import hashlib
import hmac
import json
import time

import jwt
import pytest
import structlog

from proxy.errors import Unauthenticated, Unavailable
from proxy.identity.issuers import FRESH_S, KEPT_S, PAUSE_S, Issuers
from proxy.identity.tokens import unverified
from proxy.settings import IssuerSettings
from tests.identity.tokens import (
    AUDIENCE,
    ISSUER,
    SECRET,
    IssuerKey,
    external_claims,
    key_set,
    own_claims,
    part,
    unsigned,
)

FIRST = IssuerKey("first")
SECOND = IssuerKey("second")
SETTINGS = IssuerSettings(issuer=ISSUER, audience=AUDIENCE, jwks_url="https://login.example.com/jwks")
NOW = int(time.time())


@pytest.fixture(autouse=True)
def logged():
    with structlog.testing.capture_logs() as entries:
        yield entries


class World:
    """An issuer, the way to it, and a clock."""

    def __init__(self, settings: IssuerSettings = SETTINGS) -> None:
        self.now = 1000.0
        self.body: bytes | Exception = key_set(FIRST)
        self.asked = 0
        self.gate: asyncio.Event | None = None
        self.is_asked = asyncio.Event()
        self.issuers = Issuers([settings], self.fetch, lambda: self.now)

    async def fetch(self, url: str) -> bytes:
        assert url == SETTINGS.jwks_url
        self.asked += 1
        self.is_asked.set()
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.body, Exception):
            raise self.body
        return self.body

    async def verify(self, token: str):
        return await self.issuers.verify(token, *unverified(token))


@pytest.fixture
def world():
    return World()


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_each_algorithm_is_known(world, algorithm):
    """Who, and until when; an address only if the issuer has verified it."""
    key = IssuerKey("k", algorithm)
    world.body = key_set(key)
    claims = await world.verify(key.sign(sub="me", email="a@example.com", email_verified=True, name="A B"))
    assert (claims.issuer, claims.subject, claims.email, claims.full_name) == (ISSUER, "me", "a@example.com", "A B")
    assert (await world.verify(key.sign(email="a@example.com"))).email is None
    assert (await world.verify(key.sign(email="a@example.com", email_verified="true"))).email is None


def tampered() -> str:
    head, _, signature = FIRST.sign().split(".")
    return f"{head}.{part(external_claims(sub='somebody else'))}.{signature}"


def with_head(**head: object) -> str:
    _, claims, signature = FIRST.sign().split(".")
    return f"{part({'alg': 'RS256', **head})}.{claims}.{signature}"


def confused() -> str:
    """HS256 with the public key as its secret, signed by hand: the library refuses to."""
    content = f"{part({'alg': 'HS256', 'kid': 'first'})}.{part(external_claims())}"
    return f"{content}.{part(hmac.digest(FIRST.public_pem, content.encode(), hashlib.sha256))}"


ATTACKS = {
    "no signature": lambda: unsigned(external_claims()),
    "no signature with a kid": lambda: f"{part({'alg': 'none', 'kid': 'first'})}.{part(external_claims())}.",
    "the public key as a secret": confused,
    "our own secret": lambda: jwt.encode(external_claims(), SECRET, "HS256", headers={"kid": "first"}),
    "tampered claims": tampered,
    "another key under the same kid": lambda: IssuerKey("first").sign(),
    "a key of another kind under the same kid": lambda: IssuerKey("first", "ES256").sign(),
    "another hash": lambda: jwt.encode(external_claims(), FIRST.private, "RS512", headers={"kid": "first"}),
    "expired": lambda: FIRST.sign(exp=NOW - 60),
    "issued in the future": lambda: FIRST.sign(iat=NOW + 3600),
    "not yet valid": lambda: FIRST.sign(nbf=NOW + 3600),
    "another audience": lambda: FIRST.sign(aud="another-service"),
    "no audience": lambda: FIRST.sign(aud=None),
    "another issuer": lambda: FIRST.sign(iss="https://evil.example.com/"),
    "our own name": lambda: FIRST.sign(iss="tollgate"),
    "no issuer": lambda: FIRST.sign(iss=None),
    "an issuer that is a list": lambda: f"{part({'alg': 'RS256'})}.{part(external_claims(iss=[ISSUER]))}.x",
    "no expiry": lambda: FIRST.sign(exp=None),
    "no subject": lambda: FIRST.sign(sub=None),
    "an empty subject": lambda: FIRST.sign(sub=""),
    "a subject with a NUL": lambda: FIRST.sign(sub="a\0b"),
    "an endless subject": lambda: FIRST.sign(sub="a" * 256),
    "a kid that is a path": lambda: with_head(kid="../../dev/null"),
    "a kid that is SQL": lambda: with_head(kid="' OR 1=1 --"),
    "a kid that is a number": lambda: with_head(kid=1),
    "a kid that is an object": lambda: with_head(kid={"first": True}),
    "its own key in the head": lambda: SECOND.sign(headers={"jwk": SECOND.published}),
    "an address of its own keys": lambda: SECOND.sign(headers={"jku": "https://evil.example.com/jwks"}),
    "an own token": lambda: jwt.encode(own_claims(), SECRET, "HS256"),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_the_issuer_did_not_sign_is_refused(world, attack):
    """As invalid, and nothing but the configured address is ever asked."""
    with pytest.raises(Unauthenticated):
        await world.verify(ATTACKS[attack]())


async def test_the_algorithms_are_the_operators():
    """A key of the issuer that is not of a configured algorithm signs nothing."""
    world = World(IssuerSettings(issuer=ISSUER, audience=AUDIENCE, jwks_url=SETTINGS.jwks_url, algorithms=("ES256",)))
    curve = IssuerKey("curve", "ES256")
    world.body = key_set(FIRST, curve)
    assert (await world.verify(curve.sign())).subject == "somebody"
    with pytest.raises(Unauthenticated):
        await world.verify(FIRST.sign())


async def test_only_keys_for_signatures_count(world):
    """Secrets, keys for encryption, short keys and unknown ones in a set are left out, and hurt no other."""
    short = IssuerKey("short", bits=1024)
    for_encryption = {**SECOND.published, "use": "enc"}
    secret = {"kty": "oct", "k": part(SECRET.encode()), "kid": "secret", "alg": "HS256"}
    odd = [{"kty": "RSA", "kid": "odd"}, {"kty": "XYZ"}, {}, {**FIRST.published, "kid": "odd2", "alg": "XX"}]
    entries = [secret, for_encryption, short.published, *odd, FIRST.published]
    world.body = json.dumps({"keys": entries}).encode()
    assert (await world.verify(FIRST.sign())).subject == "somebody"
    for token in (
        SECOND.sign(),
        jwt.encode(external_claims(), SECRET, "HS256", headers={"kid": "secret"}),
    ):
        with pytest.raises(Unauthenticated):
            await world.verify(token)
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        weak = short.sign()
    with pytest.raises(Unauthenticated):
        await world.verify(weak)


async def test_a_single_key_needs_no_name(world):
    """Two do."""
    nameless = IssuerKey(None)
    world.body = key_set(nameless)
    assert (await world.verify(nameless.sign())).subject == "somebody"
    other = World()
    other.body = key_set(FIRST, SECOND)
    with pytest.raises(Unauthenticated):
        await other.verify(jwt.encode(external_claims(), FIRST.private, "RS256"))


# ---- how often the issuer is asked


async def test_many_newcomers_ask_once(world):
    """A hundred tokens that arrive together wait for one answer."""
    world.gate = asyncio.Event()
    waiting = [asyncio.create_task(world.verify(FIRST.sign(sub=f"u{number}"))) for number in range(100)]
    await world.is_asked.wait()
    waiting[0].cancel()
    world.gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert world.asked == 1
    assert isinstance(found[0], asyncio.CancelledError)
    assert {claims.subject for claims in found[1:]} == {f"u{number}" for number in range(1, 100)}


async def test_keys_are_kept_for_a_while(world):
    """Not a question a call."""
    await world.verify(FIRST.sign())
    world.now += FRESH_S - 1
    await world.verify(FIRST.sign())
    assert world.asked == 1
    world.now += 2
    await world.verify(FIRST.sign())
    assert world.asked == 2


async def test_a_new_key_is_found_when_the_first_token_names_it(world):
    """Rotation needs nobody's help."""
    await world.verify(FIRST.sign())
    world.now += PAUSE_S
    world.body = key_set(FIRST, SECOND)
    await world.verify(SECOND.sign())
    assert world.asked == 2


async def test_unknown_names_are_no_questions(world):
    """A thousand invented kids ask the issuer once in a pause, and are invalid."""
    await world.verify(FIRST.sign())
    world.now += PAUSE_S
    for number in range(1000):
        with pytest.raises(Unauthenticated):
            await world.verify(with_head(kid=f"invented{number}"))
    assert world.asked == 2


async def test_a_withdrawn_key_is_refused(world):
    """As soon as the keys are read again."""
    await world.verify(FIRST.sign())
    world.body = key_set(SECOND)
    world.now += FRESH_S + 1
    with pytest.raises(Unauthenticated):
        await world.verify(FIRST.sign())


# ---- an issuer that is down


@pytest.mark.parametrize(
    "body",
    [Unavailable("no answer"), b"<html>", b"[]", b'{"keys": 1}', b"\xff"],
    ids=["down", "html", "list", "1", "x"],
)
async def test_down_is_not_wrong(world, body):
    """Without keys nobody knows whether a token is good: unavailable, and not asked again at once."""
    world.body = body
    for _ in range(50):
        with pytest.raises(Unavailable):
            await world.verify(FIRST.sign())
    assert world.asked == 1
    world.now += PAUSE_S
    world.body = key_set(FIRST)
    assert (await world.verify(FIRST.sign())).subject == "somebody"


async def test_known_keys_outlast_an_outage_and_not_for_ever(world):
    """Tokens of known keys stay good for an hour; those of a key that may be new are unavailable, not invalid."""
    await world.verify(FIRST.sign())
    world.body = Unavailable("down")
    world.now += FRESH_S + 1
    assert (await world.verify(FIRST.sign())).subject == "somebody"
    with pytest.raises(Unavailable):
        await world.verify(SECOND.sign())
    with pytest.raises(Unauthenticated):
        await world.verify(tampered())
    world.now += KEPT_S
    with pytest.raises(Unavailable):
        await world.verify(FIRST.sign())
