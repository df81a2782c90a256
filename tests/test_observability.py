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


LOOPED = """
import asyncio, os, sys
import structlog
from proxy.observability import configure_logs
configure_logs()
log = structlog.get_logger("a")

async def main():
    log.info("one")
    log.info("two")
    if {is_forking}:
        child = os.fork()
        if not child:
            log.info("child")
            log.warning("child's end")
            os._exit(0)
        os.waitpid(child, 0)
    log.warning("three")
    log.info("four")
    await asyncio.sleep(0)
    log.info("five")
    await asyncio.to_thread(log.info, "six")
    log.info("seven")
    {end}

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "raise ValueError"])
def test_lines_of_one_tick_are_written_together_and_none_is_lost(end):
    """In their order, however the program ends."""
    program = LOOPED.format(end=end, is_forking=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    events = [json.loads(line)["event"] for line in done.stderr.splitlines() if line.startswith("{")]
    assert events == ["one", "two", "three", "four", "five", "six", "seven"]


def test_a_forked_process_does_not_write_its_parents_lines_again():
    """What was held is written before the fork."""
    program = LOOPED.format(end="pass", is_forking=True)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    expected = ["one", "two", "child", "child's end", "three", "four", "five", "six", "seven"]
    assert events == expected


def test_lines_of_a_tick_take_one_write():
    """Each is a system call otherwise."""
    program = """
import asyncio, sys
import structlog
from proxy.observability import configure_logs

class Counting:
    writes = 0
    def isatty(self): return False
    def write(self, text): Counting.writes += 1
    def flush(self): pass

real, sys.stderr = sys.stderr, Counting()
configure_logs()

async def main():
    log = structlog.get_logger("a")
    for _ in range(50):
        log.info("call")
    await asyncio.sleep(0)
    print(Counting.writes)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "1"


EVENT = """
from proxy.observability import configure_logs, log_event

configure_logs(format_={format_!r}, level={level!r})
log_event({{"event": "call", "model": {model}, "none": None}}, told=str({model}))
"""


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("'gpt-4o'", "gpt-4o"),
        ("2**70", 2**70),
        ("'half \\ud800'", "half \ud800"),
        (repr(f"the key {SECRET}"), "the key sk-tg-0…"),
    ],
)
def test_an_event_that_is_known_is_logged_like_any_other(model, shown):
    """With its fields, and without secrets."""
    program = EVENT.format(format_="json", level="info", model=model)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    line = json.loads(done.stderr)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "call", "level": "info", "model": shown, "none": None}


@pytest.mark.parametrize(("format_", "level", "is_there"), [("console", "info", True), ("json", "warning", False)])
def test_an_event_that_is_known_keeps_to_the_settings(format_, level, is_there):
    """On a console it is a line for people; where only worse is wanted it is none."""
    program = EVENT.format(format_=format_, level=level, model="'gpt-4o'")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert ("gpt-4o" in done.stderr) is is_there
    assert not done.stderr.startswith("{")
