"""What Tollgate is compared with: itself without a ledger, and a relay without anything.

    python -m tests.bench.gateways bare PROVIDER_URL      uvicorn and our HTTP client, nothing in between
    python -m tests.bench.gateways unbooked               Tollgate, whose ledger says yes to everything

Both print their address as JSON when they are ready, as `tollgate serve --json` does, and serve until SIGTERM.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
import uvloop

from proxy.app import Tollgate, build
from proxy.cli.serve import spare_the_collector
from proxy.edge.protocol import server_config
from proxy.ledger.decide import Release, Released, Reserve, Reserved, Settle, Settled
from proxy.observability import configure_logs
from proxy.settings import load
from proxy.upstream.client import Timeouts
from proxy.upstream.lean import LeanClient


class YesLedger:
    """Grants and charges at once, and remembers nothing."""

    async def reserve(self, operation: Reserve) -> Reserved:
        return Reserved(operation.at_most)

    async def settle(self, operation: Settle) -> Settled:
        return Settled(charged=operation.cost, shortfall=0, balance=0)

    async def release(self, _operation: Release) -> Released:
        return Released()


def bare(provider_url: str) -> Any:
    """An app that relays every request and its answer as they are."""
    client = LeanClient()

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        is_whole = False
        while not is_whole:
            message = await receive()
            body += message["body"]
            is_whole = not message["more_body"]
        response = await client.send(
            provider="bench",
            method="POST",
            url=provider_url + scope["path"].removeprefix("/v1"),
            headers=[(b"content-type", b"application/json"), (b"authorization", b"Bearer sk-upstream")],
            body=body,
            timeouts=Timeouts(),
        )
        headers = [header for header in response.headers if header[0] != b"transfer-encoding"]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        async for chunk in response.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return serve


@asynccontextmanager
async def unbooked() -> AsyncIterator[Any]:
    """Tollgate over the configuration of the environment, without its ledger."""
    tollgate = Tollgate(load(os.environ))
    async with tollgate.open():
        tollgate.exchange._ledger = YesLedger()
        yield build(tollgate)


async def serve(app: Any) -> None:
    """Serve `app` on a free port."""
    listening = socket.create_server(("127.0.0.1", 0))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            spare_the_collector()
            base_url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            sys.stdout.write(json.dumps({"base_url": base_url, "key": None}) + "\n")
            sys.stdout.flush()

    # As in `cli`: uvicorn raises the signal that stopped it once more.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    await Server(server_config(app, drain_s=1)).serve(sockets=[listening])


async def run(words: list[str]) -> None:
    """Be one of the two."""
    configure_logs()
    if words[0] == "bare":
        await serve(bare(words[1]))
        return
    async with unbooked() as app:
        await serve(app)


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1:]))
