"""The fake provider as a process: `python -m tests.fakes.provider`."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from tests.fakes.provider.server import FakeProvider


async def _serve_until_told(port: int, journal_path: Path | None) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    async with FakeProvider(port=port, journal_path=journal_path) as provider:
        sys.stdout.write(f"listening on 127.0.0.1:{provider.port}\n")
        sys.stdout.flush()
        await told.wait()


def main() -> None:
    """Serves until SIGTERM or SIGINT, having printed where."""
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.provider", description="A fake OpenAI provider.")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--journal", type=Path, help="file that gets one JSON line for every call that ended")
    options = parser.parse_args()
    asyncio.run(_serve_until_told(options.port, options.journal))


if __name__ == "__main__":
    main()
