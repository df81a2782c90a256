"""Tokens for tests, right and wrong ones, and the keys that other issuers sign with."""

import base64
import json
import time

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as rsa_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SECRET = "an invented secret of more than 32 bytes"
ISSUER = "https://login.example.com/"
AUDIENCE = "tollgate-tests"

_MAKERS = {
    "RS256": lambda: rsa_key(65537, 2048),
    "ES256": lambda: ec_key(SECP256R1()),
    "EdDSA": Ed25519PrivateKey.generate,
}


class IssuerKey:
    """A key pair of another issuer."""

    def __init__(self, kid: str | None = "first", algorithm: str = "RS256", bits: int | None = None) -> None:
        self.kid = kid
        self.algorithm = algorithm
        self.private = _MAKERS[algorithm]() if bits is None else rsa_key(65537, bits)

    @property
    def published(self) -> dict:
        """Its entry in a key set."""
        entry = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private.public_key(), as_dict=True)
        return {**entry, "use": "sig", **({} if self.kid is None else {"kid": self.kid})}

    @property
    def public_pem(self) -> bytes:
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, *, headers: dict | None = None, **claims: object) -> str:
        """A token; a claim of None is left out."""
        return jwt.encode(
            external_claims(**claims),
            self.private,
            self.algorithm,
            headers={**({} if self.kid is None else {"kid": self.kid}), **(headers or {})},
        )


def key_set(*keys: IssuerKey) -> bytes:
    """What an issuer publishes."""
    return json.dumps({"keys": [key.published for key in keys]}).encode()


def external_claims(**claims: object) -> dict:
    now = int(time.time())
    values = {"iss": ISSUER, "aud": AUDIENCE, "sub": "somebody", "iat": now, "exp": now + 600, **claims}
    return {name: value for name, value in values.items() if value is not None}


def own_claims(**claims: object) -> dict:
    now = int(time.time())
    values = {"iss": "tollgate", "sub": "usr_x", "iat": now, "exp": now + 600, "jti": "tok_x", "ver": 0, **claims}
    return {name: value for name, value in values.items() if value is not None}


def part(value: object) -> str:
    """One of the three parts of a token, by hand."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unsigned(claims: dict, algorithm: str = "none") -> str:
    """A token that says that it needs no signature."""
    return f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(claims)}."
