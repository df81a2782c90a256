"""Passwords, as argon2id hashes (RFC 9106)."""

import asyncio
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from proxy.errors import BadRequest, Unavailable

PASSWORD_CHARACTERS_MIN = 8
"""Length is the whole policy, beside the list of what everybody else uses (NIST SP 800-63B, section 3.1.1)."""

PASSWORD_BYTES_MAX = 1024
"""Argon2 takes any length; a megabyte of password is an attack on our memory."""

_HASHES_AT_ONCE_MAX = 2
"""A hash takes a tenth of a second of one core and 64 MiB on purpose."""

_HASHES_WAITING_MAX = 50
"""Some seconds of work; beyond it whoever asks is better told so than kept."""

T = TypeVar("T")

_COMMON = Path(__file__).with_name("common_passwords.txt")

NOBODYS_HASH = "$argon2id$v=19$m=65536,t=3,p=4$ymX7IQDagqLuelp56peReg$OvRfzSB10kNcbFAdbd5dfDtm4Rr2FPvlN054o57PxS4"
"""What a password is held against when there is nothing else, so that it takes as long."""

_hasher = PasswordHasher()


class Passwords:
    """Makes and checks hashes in threads, a few at once and a bounded number waiting."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_HASHES_AT_ONCE_MAX)
        self._waiting = 0

    async def hash(self, password: str) -> str:
        """The hash to store for `password`. Raises `Unavailable` when too many wait."""
        return await self._in_thread(lambda: _hasher.hash(_prepared(password)))

    async def is_right(self, password: str, password_hash: str | None) -> bool:
        """Whether `password` is the one that was hashed. It takes its time even without a hash, and is wrong then.

        Raises `Unavailable` when too many wait.
        """
        is_right = await self._in_thread(lambda: _matches(password, password_hash or NOBODYS_HASH))
        return is_right and password_hash is not None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._waiting >= _HASHES_WAITING_MAX:
            raise Unavailable("Too many people are logging in just now.", retry_after_s=5)
        self._waiting += 1
        try:
            async with self._places:
                return await asyncio.to_thread(work)
        finally:
            self._waiting -= 1


def check_password(password: str, *related: str | None) -> None:
    """Raises `BadRequest` for a new password that is too short, too long, common, or one of the `related` texts."""
    if len(password) < PASSWORD_CHARACTERS_MIN:
        raise _weak(f"A password needs at least {PASSWORD_CHARACTERS_MIN} characters.")
    if len(password.encode("utf-8", "replace")) > PASSWORD_BYTES_MAX:
        raise BadRequest("The password is too long.", param="password", code="invalid_value")
    folded = unicodedata.normalize("NFKC", password).casefold()
    if folded in _common() or len(set(folded)) <= 2:
        raise _weak("This is one of the passwords that everybody tries first.")
    if any(text is not None and folded == text.casefold() for text in related):
        raise _weak("The password must not be the e-mail address or the name.")


def _weak(message: str) -> BadRequest:
    return BadRequest(message, param="password", code="weak_password")


def _matches(password: str, password_hash: str) -> bool:
    try:
        return _hasher.verify(password_hash, _prepared(password))
    except (VerificationError, InvalidHashError):
        return False


def _prepared(password: str) -> bytes:
    """The bytes that are hashed: of one spelling for what looks the same (RFC 8265, section 4.2)."""
    return unicodedata.normalize("NFC", password).encode("utf-8", "replace")


@cache
def _common() -> frozenset[str]:
    return frozenset(_COMMON.read_text(encoding="utf-8").split("\n"))
