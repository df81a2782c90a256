"""The first minutes of a new installation: what it prints is copied, pasted, and works."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from tests.skips import needs

ROOT = Path(__file__).parents[1]


@contextmanager
def started(folder, **variables):
    """`tollgate serve` as `make run` calls it, with the configuration that ships; gives its process and environment."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TOLLGATE_", "OPENAI_"))}
    environ |= {"PYTHONPATH": str(ROOT), "TOLLGATE_DATA_DIR": str(folder), **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy", "serve", "--config", "config.toml", "--port", "0"],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process, environ
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def printed(process, last: str) -> str:
    """What it prints, up to the line that begins with `last`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(last):
            return "".join(lines)
    raise AssertionError(f"no line begins with {last!r} in: {''.join(lines)}")


def block(text: str, start: str, end: str) -> str:
    """The lines from the one that begins with `start` to the one that begins with `end`."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(start))
    last = next(number for number, line in enumerate(lines) if number >= first and line.lstrip().startswith(end))
    return "\n".join(lines[first : last + 1])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A server after its first start: its environment, and what it printed."""
    folder = tmp_path_factory.mktemp("first")
    with started(folder) as (process, environ):
        yield folder, environ, printed(process, "print(")


def test_it_says_where_it_serves(first):
    """The base URL and one key, which is shown nowhere else."""
    folder, _, text = first
    assert re.search(r"serves on http://127\.0\.0\.1:\d+/v1$", text, re.MULTILINE)
    (key,) = set(re.findall(r"sk-tg-[\w-]{43}", text))
    assert all(key.encode() not in file.read_bytes() for file in folder.iterdir())
    assert "Providers: demo\n" in text, "OpenAI's needs a key that is not there"


@needs("curl")
def test_the_curl_line_works_as_printed(first):
    """Pasted into a shell, it streams an answer to its end."""
    _, environ, text = first
    command = block(text, "curl ", "-d ")
    done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith('data: {"id":"chatcmpl-demo-')
    assert done.stdout.endswith("data: [DONE]\n\n")


def pasted_into_python(lines: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a Python prompt makes of `lines`."""
    return subprocess.run(
        [sys.executable, "-ic", ""],
        input=lines + "\n",
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def test_the_python_lines_work_as_printed(first):
    """Three lines, pasted into a Python prompt."""
    _, environ, text = first
    lines = block(text, "from openai import", "print(")
    assert len(lines.splitlines()) == 3
    done = pasted_into_python(lines, environ)
    assert "You said: “Hello!”." in done.stdout
    assert "Error" not in done.stderr


def test_the_first_calls_are_in_the_books(first):
    """The admin has ten credits less what was charged, and the audit is clean beside the running server."""
    _, environ, text = first
    pasted_into_python(block(text, "from openai import", "print("), environ)

    def command(*words: str) -> dict:
        return json.loads(
            subprocess.run(
                [sys.executable, "-m", "proxy", *words, "--json"],
                cwd=ROOT,
                env=environ,
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout
        )

    report = command("audit")
    assert report["clean"]
    assert report["totals"]["calls"] >= 1
    balance = command("credits", "balance", "--email", "admin@example.com")
    assert Decimal("9.9") < Decimal(balance["balance"]) < 10


def test_a_second_start_prints_no_key_and_says_how_to_make_one(tmp_path):
    """The command that it names works as printed."""
    with started(tmp_path) as (process, _):
        printed(process, "print(")
    with started(tmp_path) as (process, environ):
        text = printed(process, "New key: ")
        assert "sk-tg-" not in text
        command = text.splitlines()[-1].removeprefix("New key: ").partition("   ")[0]
        _, *words = shlex.split(command)
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=60
        )
    assert re.fullmatch(r"sk-tg-[\w-]{43}\n", done.stdout)


def test_openais_provider_is_enabled_by_its_key(tmp_path):
    """The same file, with OPENAI_API_KEY set."""
    with started(tmp_path, OPENAI_API_KEY="sk-test") as (process, _):
        assert "Providers: openai, demo\n" in printed(process, "print(")
