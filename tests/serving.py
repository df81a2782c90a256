"""The real thing for tests: `tollgate serve` as a process, driven by its own command line."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from tests.commands import run_command
from tests.waiting import until

MODEL = "fake-model"
UPSTREAM_KEY = "sk-upstream-secret"

SQLITE = "sqlite+aiosqlite:///served.db"
"""The URL of a file in the data folder of the server that is told of it."""

CONFIG = """
[server]
port = 0

[providers.fake]
kind = "openai"
base_url = "{base_url}"
api_key_env = "UPSTREAM_KEY"
is_local = false
first_byte_s = 5
idle_s = 5

[models."{model}"]
candidates = ["fake/{model}"]

[prices."fake/{model}"]
input = "1"
cached_input = "0.5"
output = "2"
max_output_tokens = 4096
context_tokens = 128000

[prices."fake/counted"]
input = "1"
output = "2"
audio_output = "8"
max_output_tokens = 4096
context_tokens = 128000
tokenizer = "o200k_base"

[prices."fake/boundless"]
input = "1"
output = "2"
max_output_tokens = 4096

[prices."fake/dear"]
input = "1000"
output = "1000"
max_output_tokens = 1000
context_tokens = 128000

[providers.demo]
kind = "demo"
"""


class Served:
    """A running server, and the command line beside it."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.process: subprocess.Popen[str] | None = None
        self.base_url = ""
        self.first_key: str | None = None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server

    @property
    def address(self) -> tuple[str, int]:
        """Its host and port."""
        url = urlsplit(self.base_url)
        return url.hostname, url.port

    def program(self) -> list[str]:
        """What serves: it prints its address as JSON when it is ready."""
        return [sys.executable, "-m", "proxy", "serve", "--json"]

    def start(self) -> None:
        """Serve on a free port; returns when it is ready."""
        self.process = subprocess.Popen(
            self.program(),
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line, self.log()
        ready = json.loads(line)
        self.base_url = ready["base_url"]
        self.first_key = ready["key"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by its process id; returns its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(40)
        self.process.stdout.close()
        return status

    def log(self) -> str:
        """What it wrote to standard error."""
        self.errors.seek(0)
        return self.errors.read()

    def command(self, *words: str) -> dict:
        """Run a command of `tollgate` with `--json`."""
        done = run_command([*words, "--json"], self.environ)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `tollgate`."""
        return subprocess.run(
            [sys.executable, "-m", "proxy", *words],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def customer(self, email: str, amount: str | None = "10") -> str:
        """A new user with credits; returns a key."""
        self.command("users", "create", "--email", email)
        if amount is not None:
            self.command("credits", "grant", "--email", email, "--amount", amount)
        return self.command("keys", "create", "--email", email)["key"]

    def balance(self, key: str) -> dict[str, str]:
        """What the wallet behind `key` holds."""
        with self.client(key) as http:
            return http.get("/api/v1/credits/balance").json()

    def holds_nothing(self, key: str) -> bool:
        """Whether no call holds anything of the wallet behind `key`."""
        return self.balance(key)["reserved"] == "0"

    def charge(self, key: str, request_id: str) -> dict:
        """The receipt of one call."""
        with self.client(key) as http:
            answer = http.get(f"/api/v1/credits/charges/{request_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ended(self, key: str, request_id: str, *, within_s: float = 10) -> dict:
        """The receipt of one call as soon as it is not open any more."""

        def closed() -> dict | None:
            charge = self.charge(key, request_id)
            return None if charge["state"] == "open" else charge

        return until(closed, f"{request_id} stayed open", within_s=within_s)

    def client(self, key: str | None) -> httpx2.Client:
        """A plain HTTP client on the server, with `key`."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.base_url.removesuffix("/v1"), headers=headers, timeout=30)


def environment(
    folder: Path, database_url: str, upstream_url: str = "http://127.0.0.1:9/v1", configuration: str = CONFIG
) -> dict[str, str]:
    """The environment of a server whose `configuration` (with two fields to fill in) and data lie in `folder`."""
    config = folder / "config.toml"
    config.write_text(configuration.format(base_url=upstream_url, model=MODEL))
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TOLLGATE_CONFIG": str(config),
        "TOLLGATE_DATA_DIR": str(folder / "data"),
        "TOLLGATE_DATABASE_URL": database_url,
        "UPSTREAM_KEY": UPSTREAM_KEY,
    }


@contextmanager
def serving(folder: Path, database_url: str, upstream_url: str, configuration: str = CONFIG) -> Iterator[Served]:
    """A migrated, running server; ended with the block, and its log free of secrets."""
    served = Served(environment(folder, database_url, upstream_url, configuration=configuration))
    served.command("migrate")
    served.start()
    try:
        yield served
        assert served.stop() == 0, served.log()
        assert UPSTREAM_KEY not in served.log()
    finally:
        if served.process.poll() is None:
            served.stop(signal.SIGKILL)
        served.errors.close()


@contextmanager
def audited(
    folder: Path, database_url: str, upstream_url: str, configuration: str = CONFIG, *, calls_min: int = 0
) -> Iterator[Served]:
    """Likewise; when the tests are through with it its books add up, with at least so many calls in them."""
    with serving(folder, database_url, upstream_url, configuration) as served:
        yield served
        report = served.command("audit")
        assert report["clean"], report
        assert report["totals"]["calls"] >= calls_min
