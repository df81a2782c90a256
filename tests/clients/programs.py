"""The programs of this folder: which there are, and how each is run in its own environment."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.skips import needs

HERE = Path(__file__).parent
RUN_S_MAX = 90


@dataclass(frozen=True, slots=True)
class Program:
    """A client's program; `node` runs it in the folder where the packages of `package.json` are."""

    runtime: str
    script: str
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, node_folder: Callable[[], Path], *words: str) -> dict:
        """What the program saw, scenario by scenario.

        `words` are what `report.py` says: a base URL, two keys, a model, and scenarios if not all are meant.
        """
        done = subprocess.run(
            [*self._command(node_folder), *words],
            env={**os.environ, **self.environ},
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_S_MAX,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def _command(self, node_folder: Callable[[], Path]) -> list[str]:
        if self.runtime == "node":
            return ["node", str(node_folder() / self.script)]
        if self.runtime == "python":
            return [sys.executable, str(HERE / self.script)]
        python = Path(sys.prefix) / self.runtime / "bin" / "python"
        assert python.exists(), "`make test-clients` makes the environment that LangChain lives in"
        return [str(python), str(HERE / self.script)]


def _clients(topic: str, *ai_sdks: str) -> list:
    return [
        pytest.param(Program("python", f"openai_{topic}.py"), id="openai-python"),
        pytest.param(Program("node", f"openai_{topic}.mjs"), id="openai-node", marks=needs("node")),
        pytest.param(Program("clients-python", f"langchain_{topic}.py"), id="langchain"),
        *(
            pytest.param(Program("node", f"ai_{topic}.mjs", {"VIA": name}), id=f"ai-sdk-{name}", marks=needs("node"))
            for name in ai_sdks
        ),
    ]


CHAT = _clients("chat", "openai-compatible", "openai")
ENDPOINTS = _clients("endpoints", "openai")
AI_ENDPOINTS = Program("node", "ai_endpoints.mjs")
