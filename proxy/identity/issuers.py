"""Tokens of other issuers: checked by the public keys that each publishes (JWKS, RFC 7517).

The algorithms are those of the configuration, and each key answers for one of them; what a token's header says about
itself chooses a key by its `kid`, and nothing else. An issuer that is out of reach says nothing about its tokens: they
are refused as unavailable, not as invalid.
"""

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import jwt
import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from proxy.errors import Unauthenticated, Unavailable
from proxy.identity.flights import Flights
from proxy.identity.tokens import LEEWAY_S, MALFORMED, SUBJECT_CHARACTERS_MAX, refusal
from proxy.settings import IssuerSettings
from proxy.units import MICROS_PER_SECOND, Micros

log = structlog.get_logger(__name__)

Fetch = Callable[[str], Awaitable[bytes]]
"""The body of the answer to a GET of a URL. Raises `Unavailable` for whatever else comes of it."""

FRESH_S = 300.0
"""For so long keys are not asked for again: a withdrawn one is refused after that at the latest."""

KEPT_S = 3600.0
"""For so long keys are good while their issuer is out of reach."""

PAUSE_S = 10.0
"""Between two questions to one issuer, whatever is sent to us: neither a `kid` that nobody knows nor an issuer that
is down becomes a question a call."""

KEYS_MAX = 100
"""Of one issuer: real ones publish two or three."""

RSA_BITS_MIN = 2048
"""As RFC 7518 has it, section 3.3."""


class ExternalClaims(msgspec.Struct, frozen=True):
    """What a valid token of another issuer says. `email` is None unless the issuer says that it has verified it."""

    issuer: str
    subject: str
    expires_at: Micros
    email: str | None = None
    full_name: str | None = None


class Issuers:
    """The issuers that the operator trusts. `clock` gives seconds that never run backwards."""

    def __init__(
        self, settings: Sequence[IssuerSettings], fetch: Fetch, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._issuers = {one.issuer: _Issuer(one, fetch, clock) for one in settings}

    def provisions(self, issuer: str) -> bool:
        """Whether somebody whom `issuer` names for the first time gets an account."""
        return self._issuers[issuer].settings.provision

    async def verify(self, token: str, header: Mapping[str, Any], claims: Mapping[str, Any]) -> ExternalClaims:
        """What `token` says, whose unverified `header` and `claims` name its issuer and key.

        Raises `Unauthenticated` when it is not valid, `Unavailable` when its issuer's keys are not known and cannot
        be had just now.
        """
        named = claims.get("iss")
        issuer = self._issuers.get(named) if isinstance(named, str) else None
        if issuer is None:
            raise Unauthenticated("The token is not valid.")
        return await issuer.verify(token, header)


class _Issuer:
    def __init__(self, settings: IssuerSettings, fetch: Fetch, clock: Callable[[], float]) -> None:
        self.settings = settings
        self._fetch = fetch
        self._clock = clock
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_at = -math.inf
        self._asked_at = -math.inf
        self._is_lost = False
        self._flights = Flights[None]()

    async def verify(self, token: str, header: Mapping[str, Any]) -> ExternalClaims:
        key = await self._key(header.get("kid"))
        try:
            claims = jwt.decode(
                token,
                key,
                [key.algorithm_name],
                issuer=self.settings.issuer,
                audience=self.settings.audience,
                leeway=LEEWAY_S,
                options={"require": ["iss", "sub", "aud", "iat", "exp"]},
            )
            return _external(self.settings.issuer, claims)
        except MALFORMED as exc:
            raise refusal(exc) from exc

    async def _key(self, kid: object) -> jwt.PyJWK:
        if kid is not None and not isinstance(kid, str):
            raise Unauthenticated("The token is not valid.")
        if self._age_s > FRESH_S or kid not in self._keys:
            await self._refresh()
        found = self._keys.get(kid)
        if self._age_s > KEPT_S or (found is None and self._is_lost):
            raise Unavailable("The issuer of this token is out of reach just now.", retry_after_s=int(PAUSE_S))
        if found is None:
            raise Unauthenticated("The token is signed by a key that its issuer does not publish.")
        return found

    @property
    def _age_s(self) -> float:
        return self._clock() - self._fetched_at

    async def _refresh(self) -> None:
        """Ask for the keys, unless somebody did a moment ago. A failure leaves those that are known."""
        if self._clock() - self._asked_at >= PAUSE_S or self._flights.is_flying(self.settings.issuer):
            await self._flights.join(self.settings.issuer, self._ask)

    async def _ask(self) -> None:
        self._asked_at = self._clock()
        try:
            body = await self._fetch(self.settings.jwks_url)
            self._keys = _keys(body, self.settings.algorithms)
        except (Unavailable, ValueError) as exc:
            log.warning("issuer_unavailable", issuer=self.settings.issuer, reason=str(exc))
            self._is_lost = True
            return
        self._is_lost = False
        self._fetched_at = self._clock()


def _keys(body: bytes, algorithms: Sequence[str]) -> dict[str | None, jwt.PyJWK]:
    """The published keys that sign by one of `algorithms`, by `kid`; the only one also for tokens that name none.

    Symmetric keys, keys for encryption, short ones and such as we do not understand are left out. Raises `ValueError`
    when `body` is no key set.
    """
    found: dict[str | None, jwt.PyJWK] = {}
    for entry in msgspec.json.decode(body, type=_KeySet).keys[:KEYS_MAX]:
        if entry.get("kty") not in {"RSA", "EC", "OKP"} or entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(entry)
        except MALFORMED:
            continue
        is_short = isinstance(key.key, RSAPublicKey) and key.key.key_size < RSA_BITS_MIN
        if key.algorithm_name in algorithms and not is_short:
            kid = entry.get("kid")
            found[kid if isinstance(kid, str) else None] = key
    if len(found) == 1:
        found[None] = next(iter(found.values()))
    return found


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


def _external(issuer: str, claims: Mapping[str, Any]) -> ExternalClaims:
    subject = claims["sub"]
    if not 0 < len(subject) <= SUBJECT_CHARACTERS_MAX or not subject.isprintable():
        raise ValueError("the subject is not one that can be stored")
    email, full_name = claims.get("email"), claims.get("name")
    is_verified = claims.get("email_verified") is True and isinstance(email, str)
    return ExternalClaims(
        issuer=issuer,
        subject=subject,
        expires_at=int(claims["exp"]) * MICROS_PER_SECOND,
        email=email if is_verified else None,
        full_name=full_name if isinstance(full_name, str) else None,
    )
