"""Logs: one JSON object a line, whatever is in it, and no secret."""

import json
import subprocess
import sys

import pytest

from proxy.identity.passwords import NOBODYS_HASH
from proxy.identity.tokens import Tokens
from proxy.observability import _redact

SECRET = "sk-tg-0123456789abcdefghijklmnopqrstuv"

PROGRAM = """
import sys
import structlog
from proxy.observability import configure_logs
configure_logs()
structlog.get_logger("a").info("call", value={value})
"""


def logged(value: str) -> dict:
    """What a process logs of that expression."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(value=value)], capture_output=True, text=True, check=True, timeout=30
    )
    return json.loads(done.stderr)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("'gpt-4o'", "gpt-4o"),
        ("12", 12),
        ("2**70", 2**70),
        ("'half \\ud800'", "half \ud800"),
        ("object", "<class 'object'>"),
        ("None", None),
    ],
)
def test_any_value_can_be_logged(value, shown):
    """Also what JSON or UTF-8 has no form for."""
    line = logged(value)
    assert (line["event"], line["level"], line["value"]) == ("call", "info", shown)
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (f"the key {SECRET}, twice: {SECRET}", "the key sk-tg-0…, twice: sk-tg-0…"),
        ("Authorization: Bearer abc.def.ghi", "Authorization: Bearer …"),
        ("desk-0123456789abcdef", "desk-0123456789abcdef"),
    ],
)
def test_a_secret_is_not_logged(value, shown):
    """Of a key only its beginning is left, of a token nothing."""
    assert logged(repr(value))["value"] == shown


@pytest.mark.parametrize(
    "secret",
    [
        "sk-tg-" + "a1B2" * 10,
        "sk-proj-abcdefghijklmnop",
        Tokens("an invented secret of more than 32 bytes", 60).issue("usr_x", 0),
        NOBODYS_HASH,
    ],
)
def test_secrets_in_messages_are_cut_out(secret):
    """Wherever they stand in a text, tracebacks included."""
    for text in (secret, f"failed with {secret} (twice: {secret})", f"Authorization: Bearer {secret}"):
        event = _redact(None, "error", {"event": text, "exception": f"E: {text!r}", "status": 500})
        assert secret[-12:] not in str(event)
        assert event["status"] == 500
