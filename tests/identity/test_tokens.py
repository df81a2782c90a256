"""Tokens of our own: what we signed is good, and nothing else."""

import stat
import time

import jwt
import pytest

from proxy.errors import SettingsError, Unauthenticated
from proxy.identity.tokens import TOKEN_CHARACTERS_MAX, Tokens, is_token, kept_secret, unverified
from tests.identity.tokens import SECRET, IssuerKey, own_claims, part, unsigned

DAY = 86_400


@pytest.fixture(scope="module")
def tokens():
    return Tokens(SECRET, 30 * DAY)


def test_a_login_lasts_as_long_as_the_operator_says(tokens):
    """The token says who, which version, and until when."""
    before = int(time.time())
    token = tokens.issue("usr_a", 7)
    claims = tokens.verify(token)
    assert (claims.user_id, claims.token_version) == ("usr_a", 7)
    assert before + 30 * DAY <= claims.expires_at // 10**6 <= time.time() + 30 * DAY
    plain = jwt.decode(token, options={"verify_signature": False})
    assert {"exp", "iat", "sub", "jti", "ver"} <= plain.keys()


def test_every_token_has_an_id_of_its_own(tokens):
    """Two logins in one second are two tokens."""
    assert tokens.issue("usr_a", 0) != tokens.issue("usr_a", 0)


def hs256(secret: str = SECRET, **claims: object) -> str:
    return jwt.encode(own_claims(**claims), secret, "HS256")


def tampered() -> str:
    head, _, signature = hs256().split(".")
    return f"{head}.{part(own_claims(sub='usr_admin'))}.{signature}"


NOW = int(time.time())
ENDLESS = b'{"iss": "tollgate", "sub": "usr_x", "iat": 1, "exp": 1e999, "jti": "x", "ver": 0}'
ATTACKS = {
    "no signature": lambda: unsigned(own_claims()),
    "no signature, spelled otherwise": lambda: unsigned(own_claims(), "NoNe"),
    "no signature, but the head says HS256": lambda: unsigned(own_claims(), "HS256"),
    "another secret": lambda: hs256("b" * 40),
    "a signature of nothing": lambda: f"{hs256()[:-43]}{'A' * 43}",
    "another algorithm of the same secret": lambda: jwt.encode(own_claims(), SECRET * 2, "HS512"),
    "somebody's private key": lambda: jwt.encode(own_claims(), IssuerKey().private, "RS256"),
    "tampered claims": tampered,
    "expired": lambda: hs256(exp=NOW - 60),
    "issued in the future": lambda: hs256(iat=NOW + 3600),
    "not yet valid": lambda: hs256(nbf=NOW + 3600),
    "another issuer": lambda: hs256(iss="https://login.example.com/"),
    "an audience": lambda: hs256(aud="somebody-else"),
    "no expiry": lambda: hs256(exp=None),
    "no version": lambda: hs256(ver=None),
    "no subject": lambda: hs256(sub=None),
    "no id": lambda: hs256(jti=None),
    "a version that is no number": lambda: hs256(ver="0"),
    "an expiry without end": lambda: jwt.api_jws.encode(ENDLESS, SECRET, "HS256"),
    "claims that are no object": lambda: jwt.api_jws.encode(b"[]", SECRET, "HS256"),
    "a critical header that nobody knows": lambda: jwt.encode(
        own_claims(), SECRET, "HS256", headers={"crit": ["exp"], "exp": 1}
    ),
    "deep nonsense": lambda: f"{part({'alg': 'HS256'})}.{part(b'[' * 5000)}.x",
    "no JSON": lambda: "a.b.c",
    "nothing": lambda: "..",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_we_did_not_sign_is_refused(tokens, attack):
    """As unauthenticated, whatever the library makes of it; the message repeats nothing of the token."""
    token = ATTACKS[attack]()
    with pytest.raises(Unauthenticated) as raised:
        tokens.verify(token)
    assert not any(len(piece) > 3 and piece in str(raised.value) for piece in token.split("."))


def test_clocks_may_be_a_little_apart(tokens):
    """A token from a machine whose clock is some seconds ahead is good."""
    assert tokens.verify(hs256(iat=int(time.time()) + 10)).user_id == "usr_x"


@pytest.mark.parametrize("token", ["a.b.c", "..", f"{part({'alg': 'HS256'})}.{part(b'[' * 5000)}.x", "é.é.é"])
def test_what_cannot_be_read_is_refused_before_anybody_checks_it(token):
    """Its issuer cannot be told."""
    with pytest.raises(Unauthenticated):
        unverified(token)


def test_a_token_has_three_parts_and_an_end():
    """Anything else is no token, and megabytes are not parsed."""
    assert is_token("a.b.c")
    assert not is_token("a.b")
    assert not is_token("a.b.c.d")
    assert not is_token(f"a.{'b' * TOKEN_CHARACTERS_MAX}.c")


def test_the_embedded_secret_is_made_once_and_is_its_owners(tmp_path):
    """A restart keeps all logins; nobody else on the machine can read it."""
    file = tmp_path / "data" / "jwt_secret"
    secret = kept_secret(file)
    assert len(secret) >= 32
    assert kept_secret(file) == secret != kept_secret(tmp_path / "other")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [one.name for one in file.parent.iterdir()] == ["jwt_secret"]


def test_a_short_secret_in_the_file_stops_the_start(tmp_path):
    """Somebody has cut it off; nothing is signed with what is left."""
    (tmp_path / "jwt_secret").write_text("short")
    with pytest.raises(SettingsError, match="shorter than 32"):
        kept_secret(tmp_path / "jwt_secret")
