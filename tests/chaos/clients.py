"""The customers: a process of its own, whose calls and top-ups go on whatever happens to the proxies.

`python -m tests.chaos.clients PLAN` works on a `Plan` until SIGTERM, then finishes what is under way.
"""

import asyncio
import json
import random
import signal
import sys
from pathlib import Path

import httpx2
import msgspec

from tests.chaos.admin import Admin
from tests.chaos.calls import Wallet, intend, place
from tests.chaos.journal import End, Grant, Journal
from tests.chaos.sdk import Customer

GRANT_NANOS = 5_000_000
"""Less than the small wallets spend meanwhile, or none of them would ever run dry."""

_GRANT_S_MAX = 60.0
_BREATH_S = 0.25
"""Before another try where there was no answer or no credit, and between top-ups: customers are not a busy loop."""


class Plan(msgspec.Struct, frozen=True):
    """What the customers are to do; each sticks to one of `base_urls`.

    `sdk_customers` of them call by an SDK. With an `admin_key`, an admin changes markup and providers meanwhile, and
    every other top-up goes over HTTP.
    """

    seed: int
    customers: int
    base_urls: list[str]
    wallets: list[Wallet]
    journal: str
    sdk_customers: int = 0
    admin_key: str | None = None


async def _buy(plan: Plan, number: int, journal: Journal, stopped: asyncio.Event) -> None:
    """One customer: call after call, each put down when it is over."""
    dice = random.Random(f"{plan.seed}/{number}")  # noqa: S311 - to be repeated, not to be secret
    base_url = plan.base_urls[number % len(plan.base_urls)]
    async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:
        while not stopped.is_set():
            call = await place(http, base_url, intend(dice, plan.wallets))
            journal.append(call)
            if call.end is End.UNANSWERED or call.status in {402, 503}:
                await _rest(stopped)


async def _buy_by_sdk(plan: Plan, number: int, journal: Journal, stopped: asyncio.Event) -> None:
    """Likewise, by an SDK."""
    dice = random.Random(f"{plan.seed}/{number}")  # noqa: S311 - likewise
    base_url = plan.base_urls[number % len(plan.base_urls)]
    async with Customer(base_url, journal) as customer:
        while not stopped.is_set():
            said = await customer.call(intend(dice, plan.wallets))
            if said.raised is not None:
                await _rest(stopped)


async def _tell(plan: Plan, journal: Journal, stopped: asyncio.Event, admin: Admin | None) -> None:
    """The teller: tops small wallets up, by the command line and by the admin. Much is sent again, or twice at once."""
    dice = random.Random(f"{plan.seed}/teller")  # noqa: S311 - likewise
    small = [wallet for wallet in plan.wallets if wallet.is_small]
    sent = 0
    while not stopped.is_set():
        number = sent
        if sent and dice.random() < 0.3:
            number = dice.randrange(sent)
        else:
            sent += 1
        wallet, key = small[number % len(small)], f"grant-{number}"
        copies = dice.choice((1, 1, 2))
        if admin is not None and number % 2:
            granting = [admin.grant(wallet, key, GRANT_NANOS) for _ in range(copies)]
        else:
            granting = [_grant(wallet, key) for _ in range(copies)]
        for grant in await asyncio.gather(*granting):
            journal.append(grant)
        await _rest(stopped)


async def _grant(wallet: Wallet, idempotency_key: str) -> Grant:
    command = [sys.executable, "-m", "proxy", "credits", "grant", "--json", "--email", wallet.email]
    command += ["--amount", f"0.{GRANT_NANOS:09d}", "--idempotency-key", idempotency_key]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        async with asyncio.timeout(_GRANT_S_MAX):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
    told = json.loads(output) if process.returncode == 0 else {}
    return Grant(
        wallet_id=wallet.id,
        idempotency_key=idempotency_key,
        amount=GRANT_NANOS,
        is_acknowledged=process.returncode == 0,
        is_replay=bool(told.get("replayed")),
    )


async def _rest(stopped: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(_BREATH_S):
            await stopped.wait()
    except TimeoutError:
        return


async def _work(plan: Plan) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    journal = Journal(Path(plan.journal))
    admin = None if plan.admin_key is None else Admin(plan.base_urls[0], plan.admin_key, journal, stopped)
    async with asyncio.TaskGroup() as group:
        group.create_task(_tell(plan, journal, stopped, admin))
        if admin is not None:
            group.create_task(admin.work(random.Random(f"{plan.seed}/admin")))  # noqa: S311 - likewise
        for number in range(plan.customers):
            buy = _buy_by_sdk if number < plan.sdk_customers else _buy
            group.create_task(buy(plan, number, journal, stopped))
    if admin is not None:
        await admin.aclose()
    journal.close()


def main() -> None:
    """Work on the plan in the file that the command line names."""
    asyncio.run(_work(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Plan)))


if __name__ == "__main__":
    main()
