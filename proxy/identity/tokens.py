"""JSON Web Tokens of our own (RFC 7519): signed by HS256 at a login, accepted wherever an API key is."""

import os
import secrets
import time
from pathlib import Path
from typing import Any

import jwt
import msgspec

from proxy.errors import SettingsError, Unauthenticated
from proxy.settings import JWT_SECRET_BYTES_MIN, OWN_ISSUER
from proxy.units import MICROS_PER_SECOND, Micros, new_id

ALGORITHM = "HS256"
"""The only one for our own tokens, whatever their header says."""

TOKEN_CHARACTERS_MAX = 8192
"""Several times what issuers send; a longer one is not parsed at all."""

_SECRET_BYTES = 48

LEEWAY_S = 30
"""How far the clocks of two machines may be apart."""

SUBJECT_CHARACTERS_MAX = 255
"""As OpenID Connect Core has it, section 2."""

MALFORMED = (jwt.PyJWTError, RecursionError, ValueError, TypeError, OverflowError)
"""What the library raises for tokens that are wrong, and for JSON in them that is hostile."""


class Claims(msgspec.Struct, frozen=True):
    """What a valid token of our own says."""

    user_id: str
    token_version: int
    expires_at: Micros


class Tokens:
    """Makes and checks our own tokens. `secret` has 32 bytes or more (see `settings`)."""

    def __init__(self, secret: str, lifetime_s: int) -> None:
        self._secret = secret
        self.lifetime_s = lifetime_s

    def issue(self, user_id: str, token_version: int) -> str:
        """A token for this user, valid until its lifetime or its version has passed."""
        now = int(time.time())
        claims = {
            "iss": OWN_ISSUER,
            "sub": user_id,
            "iat": now,
            "exp": now + self.lifetime_s,
            "jti": new_id("tok"),
            "ver": token_version,
        }
        return jwt.encode(claims, self._secret, ALGORITHM)

    def verify(self, token: str) -> Claims:
        """What `token` says. Raises `Unauthenticated` unless we signed it and its time has come and not passed."""
        try:
            claims = jwt.decode(
                token,
                self._secret,
                [ALGORITHM],
                issuer=OWN_ISSUER,
                leeway=LEEWAY_S,
                options={"require": ["iss", "sub", "iat", "exp", "jti", "ver"]},
            )
            return msgspec.convert(
                {
                    "user_id": claims["sub"],
                    "token_version": claims["ver"],
                    "expires_at": int(claims["exp"]) * MICROS_PER_SECOND,
                },
                Claims,
            )
        except MALFORMED as exc:
            raise refusal(exc) from exc


def refusal(exc: BaseException) -> Unauthenticated:
    """Why a token was not accepted, as far as its bearer needs to know."""
    if isinstance(exc, jwt.ExpiredSignatureError):
        return Unauthenticated("The token has expired. Log in again.")
    return Unauthenticated("The token is not valid.")


def unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the claims that `token` carries: what anybody may have written, to choose who checks it.

    Raises `Unauthenticated` when it cannot be read at all.
    """
    try:
        decoded = jwt.decode_complete(token, options={"verify_signature": False})
    except MALFORMED as exc:
        raise refusal(exc) from exc
    return decoded["header"], decoded["payload"]


def kept_secret(file: Path) -> str:
    """The secret in `file`, which only its owner can read; made at the first start and kept.

    Raises `SettingsError` when the file cannot be read or made, or was made shorter than a secret must be.
    """
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = file.with_name(f"{file.name}.new")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as written:
                written.write(secrets.token_urlsafe(_SECRET_BYTES))
            fresh.replace(file)
        secret = file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{file}: {exc}") from exc
    if len(secret) < JWT_SECRET_BYTES_MIN:
        raise SettingsError(f"{file}: shorter than {JWT_SECRET_BYTES_MIN} bytes; remove it, and another is made")
    return secret


def is_token(credential: str) -> bool:
    """Whether `credential` has the form of a JWT (RFC 7515, section 7.1: three parts)."""
    return len(credential) <= TOKEN_CHARACTERS_MAX and credential.count(".") == 2
