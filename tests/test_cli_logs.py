"""Commands that meet trouble on their way still print nothing but their result."""

import json
import sqlite3
import subprocess
import sys

from tests.serving import Served, environment


def test_what_is_logged_does_not_mix_with_the_result(tmp_path):
    """A grant that has to wait for a busy database says so on standard error; its output is one JSON object."""
    served = Served(environment(tmp_path, "sqlite+aiosqlite:///books.db"))
    served.command("migrate")
    served.command("users", "create", "--email", "a@example.com")
    other = sqlite3.connect(tmp_path / "data" / "books.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    command = [sys.executable, "-m", "proxy", "credits", "grant", "--email", "a@example.com", "--amount", "1", "--json"]
    granting = subprocess.Popen(
        command,
        env=served.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert json.loads(granting.stderr.readline())["event"] == "ledger_lost"
        other.execute("ROLLBACK")
        output, _ = granting.communicate(timeout=30)
    finally:
        granting.kill()
        granting.communicate()
        other.close()
        served.errors.close()
    assert granting.returncode == 0
    assert json.loads(output)["balance"] == "1"
