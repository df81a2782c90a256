"""`tollgate serve` and `migrate`."""

import asyncio
import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from proxy import __version__
from proxy.cli.books import run
from proxy.cli.options import config_option, examples, json_option
from proxy.cli.output import fail, show
from proxy.errors import TollgateError, Unavailable, reason_of
from proxy.ledger.decide import Credit, CreditType
from proxy.settings import WORKERS_MAX, Configuration, load
from proxy.units import parse_credits

if TYPE_CHECKING:
    from proxy.ledger.ledger import Ledger
    from proxy.metrics import Metrics
    from proxy.supervisor import Lifeline

FIRST_ADMIN = "admin@example.com"
FIRST_CREDITS = "10"


@click.command(epilog=examples("tollgate serve", "tollgate serve --config /etc/tollgate.toml --port 8080 --workers 2"))
@config_option
@click.option("--host", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on; 0 takes any free one.")
@click.option(
    "--workers", type=click.IntRange(1, WORKERS_MAX), help="How many processes serve; more than one on PostgreSQL only."
)
@json_option
def serve(config: str | None, host: str | None, port: int | None, workers: int | None, *, as_json: bool) -> None:
    """Serve until SIGTERM or SIGINT."""
    from proxy.observability import configure_logs
    from proxy.storage.database import sole_process
    from proxy.supervisor import listen

    configuration = load(os.environ, config=config, host=host, port=port, workers=workers)
    configure_logs(configuration.settings.logs.format, configuration.settings.logs.level)
    server = configuration.settings.server
    with ExitStack() as stack:
        if configuration.is_embedded:
            stack.enter_context(sole_process(configuration.sqlite_file))
        sockets = [stack.enter_context(each) for each in listen(server.host, server.port, server.workers)]
        if server.workers == 1:
            run(_serve(configuration, sockets, as_json=as_json))
        else:
            sys.exit(supervise(configuration, sockets, as_json=as_json))


@click.command(epilog=examples("tollgate migrate"))
@config_option
@json_option
def migrate(config: str | None, *, as_json: bool) -> None:
    """Create the schema, or bring it up to date."""
    from proxy.installation import prepare
    from proxy.observability import configure_logs
    from proxy.storage.database import SCHEMA_HEAD, sole_process

    configuration = load(os.environ, config=config)
    configure_logs(configuration.settings.logs.format, configuration.settings.logs.level)
    with ExitStack() as stack:
        if configuration.is_embedded:
            stack.enter_context(sole_process(configuration.sqlite_file))
        run(prepare(configuration))
    show({"revision": SCHEMA_HEAD}, f"The schema is at revision {SCHEMA_HEAD}.", as_json=as_json)


STOP_S_MAX = 45.0
"""How long a worker may take beyond the time for its calls: as long as the ledger waits for its database, and a bit."""

_DATABASE_AGAIN_S = 0.5
"""A worker that replaces another and finds the database away looks again after so long."""

_ENDING_S_MAX = 5.0
"""How long calls that were ended because the server stops may take for their last words."""


def supervise(
    configuration: Configuration, sockets: list[socket.socket], *, as_json: bool, hung_s: float | None = None
) -> int:
    """Serve in as many processes as there are `sockets`; returns the exit status. `hung_s` is as in `Supervisor`."""
    import proxy.app  # noqa: F401 - before the workers are forked, which share it then
    from proxy.edge import server  # noqa: F401 - likewise
    from proxy.metrics import DEATHS, HANGS, Metrics, SharedMemory
    from proxy.supervisor import HUNG_S, Lifeline, Supervisor

    settings = configuration.settings.server
    memory = SharedMemory(settings.workers + 1)  # with a region for the supervisor

    def work(lifeline: Lifeline) -> int:
        metrics = Metrics(memory, lifeline.number)
        serving = partial(_serve, configuration, sockets, as_json=as_json, lifeline=lifeline, metrics=metrics)
        try:
            return _serve_when_possible(serving, lifeline)
        except TollgateError as exc:
            return fail(exc)

    run(_check_schema(configuration))  # once and for all workers
    metrics = Metrics(memory, settings.workers)
    for family in (DEATHS, HANGS):
        metrics.add(family, amount=0)
    announced = sockets[0].getsockname()[:2]
    gc.freeze()
    return Supervisor(
        work,
        settings.workers,
        sockets,
        stop_s_max=settings.notice_s + settings.drain_s + STOP_S_MAX,
        on_ready=lambda: _announce(configuration, announced, None, as_json=as_json),
        on_death=lambda: metrics.add(DEATHS),
        on_hang=lambda: metrics.add(HANGS),
        hung_s=hung_s or HUNG_S,
    ).run()


def _serve_when_possible(serving: Callable[[], Coroutine[Any, Any, None]], lifeline: "Lifeline") -> int:
    """Serve as one worker of several; returns the exit status.

    Whoever replaces another waits for a database that is away, as its siblings do: dying of it again and again would
    only make the pauses longer after which it is replaced. Raises `Unavailable` in a server that has never been ready.
    """
    import structlog

    is_waiting = False
    while True:
        try:
            run(serving())
        except Unavailable as exc:
            if not lifeline.is_replacement:
                raise
            if not is_waiting:
                is_waiting = True
                log = structlog.get_logger(__name__)
                log.warning("worker_waits", worker=lifeline.number, waits_for="database", reason=reason_of(exc))
        else:
            return 0
        is_orphan, _, _ = select.select([lifeline.fd], [], [], _DATABASE_AGAIN_S)
        if is_orphan:
            return 1


async def _check_schema(configuration: Configuration) -> None:
    from proxy.storage.database import check_schema, connect

    engine = connect(configuration.database_url, pooled=False)
    try:
        await check_schema(engine)
    finally:
        await engine.dispose()


async def _serve(
    configuration: Configuration,
    sockets: list[socket.socket],
    *,
    as_json: bool,
    lifeline: "Lifeline | None" = None,
    metrics: "Metrics | None" = None,
) -> None:
    """Serve in this process until SIGTERM; of several `sockets` the one with the worker's number is its own."""
    from proxy.app import Tollgate, build
    from proxy.edge.protocol import server_config
    from proxy.edge.server import Server, Stopping
    from proxy.installation import prepare

    if configuration.is_embedded:
        await prepare(configuration)
    tollgate = Tollgate(configuration, metrics)
    async with _beating(lifeline), tollgate.open():
        first_key = await _first_start(tollgate.engine, tollgate.ledger) if configuration.is_embedded else None
        own = sockets[0 if lifeline is None else lifeline.number]

        def on_ready() -> None:
            spare_the_collector()
            if lifeline is None:
                _announce(configuration, own.getsockname()[:2], first_key, as_json=as_json)
            else:
                lifeline.say_ready()

        settings = configuration.settings.server
        stopping = Stopping(
            notice_s=settings.notice_s,
            drain_s=settings.drain_s,
            on_stopping=tollgate.stop,
            end_calls=lambda: tollgate.exchange.end_calls(_ENDING_S_MAX),
        )
        config = server_config(build(tollgate), drain_s=settings.drain_s)
        server = Server(config, stopping, on_ready, lifeline_fd=None if lifeline is None else lifeline.fd)
        # uvicorn raises the signal that stopped it once more when it is done; being stopped is no failure.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        await server.serve(sockets=[own, *(each for each in sockets if each is not own)])


@asynccontextmanager
async def _beating(lifeline: "Lifeline | None") -> AsyncIterator[None]:
    """Let the supervisor know, where there is one, that the event loop turns; around all that is done in it."""
    from proxy.supervisor import BEAT_S

    async def beat(lifeline: "Lifeline") -> None:
        while True:
            lifeline.beat()
            await asyncio.sleep(BEAT_S)

    beating = None if lifeline is None else asyncio.create_task(beat(lifeline), name="heartbeat")
    try:
        yield
    finally:
        if beating is not None:
            beating.cancel()


_GC_THRESHOLDS = (50_000, 20, 100)
"""CPython's own 700 would have the collector look at every call in flight several times; calls leave few cycles."""


def spare_the_collector() -> None:
    """Take what the start has made, which stays, out of the garbage collector's sight, and let it run less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


async def _first_start(engine: Any, ledger: "Ledger") -> str | None:
    """Make the first admin and its key; None when there are users already."""
    from proxy.administration.credits import FIRST_START_KEY
    from proxy.identity.keys import KeyTerms, create_key
    from proxy.identity.users import create_user, has_users
    from proxy.storage.database import writing

    async with writing(engine) as connection:
        if await has_users(connection):
            return None
        admin = await create_user(connection, FIRST_ADMIN, is_admin=True)
        key = await create_key(connection, admin, KeyTerms(name="first key"))
    await ledger.credit(
        Credit(
            wallet_id=admin.wallet_id,
            type=CreditType.TOPUP,
            amount=parse_credits(FIRST_CREDITS),
            description="first start",
            idempotency_key=FIRST_START_KEY,
        )
    )
    return key.secret


def _announce(configuration: Configuration, address: tuple[str, int], first_key: str | None, *, as_json: bool) -> None:
    host, port = address
    shown = f"[{host}]" if ":" in host else "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 - compared only
    base_url = f"http://{shown}:{port}/v1"
    if as_json:
        click.echo(json.dumps({"base_url": base_url, "host": host, "port": port, "key": first_key}))
        return
    click.echo(f"Tollgate {__version__} serves on {base_url}")
    click.echo(f"Database: {configuration.sqlite_file if configuration.is_embedded else 'PostgreSQL'}")
    enabled = [name for name in configuration.providers if name in configuration.enabled]
    click.echo(f"Providers: {', '.join(enabled) or 'none; name one in config.toml'}")
    if first_key is not None:
        click.echo(_FIRST_STEPS.format(key=first_key, base_url=base_url, credits=FIRST_CREDITS, email=FIRST_ADMIN))
    elif configuration.is_embedded:
        click.echo(f"New key: {_program()} keys create --email {FIRST_ADMIN}   (the first one is not shown again)")
    else:
        click.echo(f"New user: {_program()} users create --email …   New key: {_program()} keys create --email …")


def _program() -> str:
    """How this program was called, to be called so again."""
    return "python -m proxy" if sys.argv[0].endswith("__main__.py") else os.path.relpath(sys.argv[0])


# Not indented: pasted into a Python prompt, an indented line is an error.
_FIRST_STEPS = """
This first start made an admin, {email}, with {credits} credits and an API key.
It is shown this once:

{key}

Try it with curl:

curl -N {base_url}/chat/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "demo-chat", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'

or in Python, with `pip install openai`:

from openai import OpenAI
client = OpenAI(base_url="{base_url}", api_key="{key}")
print(client.chat.completions.create(model="demo-chat", messages=[{{"role": "user", "content": "Hello!"}}]).choices[0].message.content)
"""  # noqa: E501 - three lines of Python are three lines
