"""Commands of `tollgate` in processes that are forked with everything imported: each a process, but a quick one."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.commands", "proxy.app", "proxy.cli"])


def run_command(
    words: Sequence[str], environ: Mapping[str, str], *, read: str = ""
) -> subprocess.CompletedProcess[str]:
    """What `tollgate` with these words prints and returns, with `read` on its standard input."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(read)
        process = _FORKING.Process(target=_command, args=(list(words), dict(environ), files))
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(words, process.exitcode, files[1].read_text(), files[2].read_text())


def _command(words: list[str], environ: dict[str, str], files: list[Path]) -> None:
    from proxy.cli import main  # noqa: PLC0415 - imported before the fork, not by the tests' own process

    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")  # of processes that it starts, multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["tollgate", *words]
    main()
