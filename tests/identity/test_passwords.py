"""Passwords: length and commonness decide, and nobody learns anything from how long an answer takes."""

import asyncio

import pytest
from argon2 import PasswordHasher

from proxy.errors import BadRequest, Unavailable
from proxy.identity import passwords
from proxy.identity.passwords import NOBODYS_HASH, Passwords, check_password


@pytest.mark.parametrize(
    "password",
    [
        "short",
        "",
        "password",
        "PassWord123",
        "Password2026",
        "12345678",
        "aaaaaaaaaa",
        "abababab",
        "ｐａｓｓｗｏｒｄ",
        "somebody@example.com",
        "Somebody@Example.com",
        "somebody-long",
    ],
)
def test_weak_passwords_are_refused(password):
    """Too short, common in any spelling, made of two letters, or what everybody knows of the account."""
    with pytest.raises(BadRequest) as raised:
        check_password(password, "somebody@example.com", "somebody-long", None)
    assert (raised.value.param, raised.value.code) == ("password", "weak_password")


@pytest.mark.parametrize("password", ["eight ch", "correct horse battery", "пароль-из-слов", "\0\0 nul and ' OR 1=1"])
def test_length_is_all_that_is_asked(password):
    """No digits, no capitals, any letters of the world."""
    check_password(password, "somebody@example.com")


def test_a_kilobyte_is_enough():
    """More is an attack on our memory."""
    check_password("ab c" * 256)
    with pytest.raises(BadRequest):
        check_password("ab c" * 256 + "d")


def test_the_list_holds_what_could_pass_otherwise():
    """A few hundred, each long enough to have to be refused, in the spelling in which they are compared."""
    common = [line for line in passwords._COMMON.read_text(encoding="utf-8").splitlines() if line]
    assert 300 < len(common) == len(set(common))
    assert all(len(word) >= passwords.PASSWORD_CHARACTERS_MIN and word == word.casefold() for word in common)


async def test_the_right_password_is_right_in_any_spelling_of_its_letters():
    """What looks the same on two machines is the same: é is one letter or two."""
    kept = Passwords()
    stored = await kept.hash("caf\u00e9 au lait")
    assert stored.startswith("$argon2id$")
    assert await kept.is_right("cafe\u0301 au lait", stored)
    assert not await kept.is_right("cafe au lait", stored)
    assert not await kept.is_right("cafe au lait", "no hash at all")


async def test_nobodys_hash_costs_what_everybodys_does_and_opens_nothing():
    """Its parameters are those of new hashes, so that an unknown account takes as long."""
    assert not PasswordHasher().check_needs_rehash(NOBODYS_HASH)
    assert not await Passwords().is_right("anything at all", None)


async def test_a_crowd_is_told_so_and_the_loop_goes_on():
    """Some wait, the others are refused; meanwhile everything else is served."""
    kept = Passwords()
    crowd = [asyncio.create_task(kept.is_right("anything", None)) for _ in range(60)]
    turns = 0
    while sum(task.done() for task in crowd) < 12:
        await asyncio.sleep(0.001)
        turns += 1
    for task in crowd:
        task.cancel()
    found = await asyncio.gather(*crowd, return_exceptions=True)
    assert sum(isinstance(one, Unavailable) for one in found) == 60 - passwords._HASHES_WAITING_MAX
    assert turns > 10, "hashes ran on the loop"
