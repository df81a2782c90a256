"""Passwords, as argon2id hashes (RFC 9106)."""

import asyncio

from argon2 import PasswordHasher

from proxy.errors import BadRequest

PASSWORD_CHARACTERS_MIN = 8
PASSWORD_BYTES_MAX = 1024
"""Argon2 takes any length; a megabyte of password is an attack on our memory."""

_HASHES_AT_ONCE_MAX = 2
"""A hash takes a tenth of a second of one core and 64 MiB on purpose."""

_hasher = PasswordHasher()
_places = asyncio.Semaphore(_HASHES_AT_ONCE_MAX)


async def hash_password(password: str) -> str:
    """The hash to store for `password`, made off the event loop.

    Raises `BadRequest` when it is shorter than eight characters or longer than a kilobyte.
    """
    if len(password) < PASSWORD_CHARACTERS_MIN:
        raise BadRequest(
            f"A password needs at least {PASSWORD_CHARACTERS_MIN} characters.", param="password", code="weak_password"
        )
    if len(password.encode()) > PASSWORD_BYTES_MAX:
        raise BadRequest("The password is too long.", param="password", code="invalid_value")
    async with _places:
        return await asyncio.to_thread(_hasher.hash, password)
