"""Programs of Debian's packages, for tests that need the real thing and cannot expect that it is installed."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "debian"
"""What was unpacked stays here, beside what was installed with pip: the next run needs no network."""


def found(name: str, package: str) -> Path | None:
    """The program `name`, installed or unpacked from Debian's `package`, without being root; None without Debian.

    Raises `CalledProcessError` if its packages are out of reach.
    """
    installed = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if installed is not None:
        return Path(installed)
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    unpacked = FOLDER / package
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:  # other processes of the tests want it as well
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not unpacked.exists():
            _unpack(package, unpacked)
    return next(path for path in unpacked.glob(f"usr/*bin/{name}"))


def program(name: str, package: str) -> Path:
    """Likewise, for a test that is skipped where there is no Debian."""
    there = found(name, package)
    if there is None:
        pytest.skip(f"needs {name}")
    return there


def _unpack(package: str, folder: Path) -> None:
    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    making.mkdir(parents=True)
    try:
        if _download(package, making).returncode:
            _run("apt-get", "update", "-q", cwd=making)
            _download(package, making).check_returncode()
        for archive in making.glob("*.deb"):
            _run("dpkg-deb", "-x", archive, making, cwd=making)
            archive.unlink()
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _download(package: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["apt-get", "download", "-q", package], cwd=folder, capture_output=True, check=False, timeout=100
    )


def _run(*command: str | Path, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, capture_output=True, check=True, timeout=100)
