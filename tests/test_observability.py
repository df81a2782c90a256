"""What must never be in a log is not, even when somebody writes it there."""

import pytest

from proxy.identity.passwords import NOBODYS_HASH
from proxy.identity.tokens import Tokens
from proxy.observability import _redact


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
