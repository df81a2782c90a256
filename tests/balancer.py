"""nginx in front of replicas, with the configuration that `docker-compose.yml` gives it."""

import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from tests.postgres import PORTS

COMPOSE = yaml.safe_load((Path(__file__).parents[1] / "docker-compose.yml").read_text())
REPLICAS = ("proxy-a", "proxy-b")

PATIENCE_S = 30


def inline(name: str) -> str:
    """The content of one of the compose file's configurations, as a container sees it."""
    return COMPOSE["configs"][name]["content"].replace("$$", "$")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has just now."""
    for port in random.sample(PORTS, len(PORTS)):  # none that the system hands out to whoever connects
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


def configuration(folder: Path, port: int, replica_ports: Sequence[int]) -> str:
    """The compose file's, with this machine's ports and folder; Debian's nginx knows no `resolve`."""
    text = inline("nginx").replace("/tmp/", f"{folder}/").replace("listen 8080;", f"listen 127.0.0.1:{port};")  # noqa: S108
    text = re.sub(r"resolver [^;]*;", "", text)
    for name, replica_port in zip(REPLICAS, replica_ports, strict=True):
        assert f"server {name}:8080 resolve " in text
        text = text.replace(f"{name}:8080 resolve", f"127.0.0.1:{replica_port}")
    return text


@contextmanager
def balancing(program: Path, folder: Path, replica_ports: Sequence[int]) -> Iterator[str]:
    """The nginx at `program` in front of the replicas on those ports, in a folder of its own; yields its address."""
    port = free_port()
    file = folder / "nginx.conf"
    file.write_text(configuration(folder, port, replica_ports))
    folder.chmod(0o755)
    command = [program, "-p", folder, "-c", file, "-e", "stderr", "-g", "daemon off;"]
    with (folder / "nginx.log").open("ab") as log, subprocess.Popen(command, stderr=log) as nginx:
        try:
            _wait_for_port(port, nginx, folder / "nginx.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            nginx.send_signal(signal.SIGQUIT)
            try:
                nginx.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                nginx.terminate()


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up_at
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
