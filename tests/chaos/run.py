"""The proof by chaos: `python -m tests.chaos.run [--duration SECONDS] [--database postgresql|sqlite|both] [--seed N]`.

Exit status 1 when a promise was broken, or when too little happened for that to mean anything; what the processes wrote
is kept then.
"""

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast, get_args

import msgspec

from proxy.errors import Unavailable
from proxy.storage import database
from tests.chaos.admin import PROVIDERS
from tests.chaos.evidence import collect, open_reservations
from tests.chaos.faults import Deed, Fault, schedule, strike, wait_until
from tests.chaos.journal import End, Markup
from tests.chaos.judge import Evidence, Kind, Violation, growth, judge, paid_for_nothing
from tests.chaos.world import (
    FIRST_GRANT,
    LEASE_S,
    MARKUP_BPS,
    NOTICE_S,
    DatabaseKind,
    Watch,
    World,
    appoint,
    endow,
    opened_world,
)

DURATION_S = 300.0
_DURATION_S_MIN = 5.0
_CUSTOMERS = 16
_RECOVERY_S = 2.0
"""Calls go on for at least so long after the last fault: they have to succeed again."""

QUIET_S_MAX = 60.0
"""Once all proxies run and no calls come, nothing is open any more by then: a lease, a sweep, and a slow machine."""

BALANCED = "load balancers (nginx)"

FULL_S_MIN = 40.0
"""A run of this length has everything that can happen, but for workers that live long."""

MEMORY_RUN_S_MIN = 150.0
"""Here one worker at least lives for long enough that something can be said of its memory."""

_VIOLATIONS_SHOWN = 10


class Result(msgspec.Struct):
    """What happened in a run (counts by what the table calls them), and what was wrong."""

    tally: Counter[str]
    statuses: Counter[int]
    violations: list[Violation]
    shortcomings: list[str]
    """What did not happen that has to, for the run to prove anything."""

    @property
    def is_proof(self) -> bool:
        """Whether the promises held, and were put to the test."""
        return not self.violations and not self.shortcomings


Attack = Callable[[World, Counter[str]], None]
"""What is done to a world under load; it counts its deeds."""


def run(
    folder: Path,
    kind: DatabaseKind,
    *,
    duration_s: float,
    seed: int,
    attack: Attack | None = None,
    quiet_s: float = QUIET_S_MAX,
) -> Result:
    """One run in an empty folder. Without an `attack` of the caller's it has the faults that follow from its seed.

    When the clients are done, everything open has `quiet_s` seconds to be closed.
    """
    tally: Counter[str] = Counter()
    # Short runs stop nobody in order before their end, when there is nobody left to be given notice.
    with opened_world(folder, kind, NOTICE_S if duration_s >= FULL_S_MIN else 0) as world:
        wallets = asyncio.run(endow(world.url, world.client_journal, rich=2, small=3))
        admin_key = None if world.is_embedded else asyncio.run(appoint(world.url))
        world.start_proxies()
        watch = Watch(world.url, world.memory)
        with watch.kept():
            world.let_clients_loose(seed=seed, customers=_CUSTOMERS, wallets=wallets, admin_key=admin_key)
            started_at = time.monotonic()
            if attack is None:
                strike(world, _faults(world, duration_s, seed), tally)
            else:
                attack(world, tally)
            recovering_at = time.time()
            wait_until(world, max(started_at + duration_s, time.monotonic() + _RECOVERY_S))
            world.call_clients_home()
            asyncio.run(_all_closed(world.url, quiet_s))
        world.stop_proxies()
        world.stop_providers()
        audit = world.audit()
        logs = [proxy.log_path for proxy in world.proxies]
        journals = [provider.journal for provider in world.providers]
        evidence = asyncio.run(collect(world.url, world.client_journal, journals, logs))
    _complete(evidence, world, watch, audit)
    if not world.is_embedded:
        tally[BALANCED] = int(world.balancer is not None)
    tally["snapshots under load"] = watch.samples
    tally["audits under load"] = watch.audits
    tally["calls completed after the last fault"] = sum(
        call.end is End.COMPLETE and call.ended_at > recovering_at for call in evidence.calls
    )
    tally.update(_counted(evidence))
    return Result(
        tally=tally,
        statuses=Counter(call.status for call in evidence.calls if call.status is not None),
        violations=judge(evidence),
        shortcomings=list(shortcomings(tally, duration_s=duration_s, is_embedded=world.is_embedded)),
    )


def _complete(evidence: Evidence, world: World, watch: Watch, audit: list[str]) -> None:
    """Add what was seen from outside while the run went on."""
    evidence.balancer = world.balancer
    evidence.kills += world.kills
    evidence.absences += world.absences
    evidence.disturbances += world.disturbances
    evidence.memory |= watch.memory
    evidence.overdrawn += watch.overdrawn
    evidence.audit += watch.violations + audit
    evidence.mishaps += world.mishaps
    if not world.is_embedded:
        evidence.lease_s = LEASE_S
        evidence.markups.insert(0, Markup(bps=MARKUP_BPS, sent_at=0, acknowledged_at=0))


def _faults(world: World, duration_s: float, seed: int) -> list[Fault]:
    lease_s = None if world.is_embedded else LEASE_S
    return schedule(seed=seed, duration_s=duration_s, replicas=len(world.proxies), lease_s=lease_s)


async def _all_closed(url: str, quiet_s: float) -> None:
    """Return when nothing is open any more, or after `quiet_s` seconds: the judge will see."""
    engine = database.connect(url, pooled=False)
    give_up_at = time.monotonic() + quiet_s
    while time.monotonic() < give_up_at:
        try:
            if not await open_reservations(engine):
                break
        except Unavailable:
            pass  # it has only just come back
        await asyncio.sleep(0.1)
    await engine.dispose()


def _counted(evidence: Evidence) -> dict[str, int]:
    ends = Counter(call.end for call in evidence.calls)
    return {
        "ledger operations": 2 * len(evidence.reservations) + sum(row.type == "topup" for row in evidence.transactions),
        "calls": len(evidence.calls),
        **{f"calls {end}": ends[end] for end in End},
        "calls that the provider saw": len(evidence.served),
        "charges acknowledged": sum(call.acknowledged is not None for call in evidence.calls),
        "grants acknowledged": sum(
            grant.is_acknowledged and grant.idempotency_key != FIRST_GRANT for grant in evidence.grants
        ),
        "grants replayed": sum(grant.is_replay for grant in evidence.grants),
        "late settles": sum(row.is_late for row in evidence.reservations),
        "expired": sum(row.state == "expired" for row in evidence.reservations),
        "charges taken back": sum(row.refunded > 0 for row in evidence.reservations),
        "charged, but killed before the answer was out": len(paid_for_nothing(evidence)),
        **(_counted_of_replicas(evidence) if evidence.lease_s is not None else {}),
    }


def _counted_of_replicas(evidence: Evidence) -> dict[str, int]:
    """What only happens where replicas, an admin and an SDK are."""
    raised = Counter(f"{said.raised} {said.status or ''} {said.code or ''}" for said in evidence.said if said.raised)
    return {
        "calls by the SDK": len(evidence.said),
        "calls by the SDK that it tried again": sum(said.attempts > 1 for said in evidence.said),
        **{f"SDK: {name.strip()}": count for name, count in sorted(raised.items())},
        "calls served by the second provider": sum(row.provider == PROVIDERS[1] for row in evidence.reservations),
        "markups set": len(evidence.markups) - 1,
        "markups charged at": len({row.markup_bps for row in evidence.reservations if row.taken}),
        "providers disabled": sum(not switch.is_enabled for switch in evidence.switches),
        "grants by HTTP acknowledged": sum(grant.is_http and grant.is_acknowledged for grant in evidence.grants),
        "refusals of the admin's requests": len(evidence.admin_errors),
        "workers whose memory was judged": sum(growth(samples) is not None for samples in evidence.memory.values()),
    }


def shortcomings(tally: Counter[str], *, duration_s: float, is_embedded: bool) -> Iterator[str]:
    """What a run with these counts is lacking."""
    if not tally[Deed.KILL] + tally[Deed.CRASH_DATABASE]:
        yield "nothing was killed"
    needed = [
        f"calls {End.COMPLETE}",
        f"calls {End.HUNG_UP}",
        "calls completed after the last fault",
        "charges acknowledged",
        "grants acknowledged",
        "snapshots under load",
        "audits under load",
    ]
    if not is_embedded:
        needed += ["calls by the SDK", "markups set", "markups charged at"]
        if duration_s >= FULL_S_MIN:
            needed += ["calls served by the second provider", "providers disabled", "grants by HTTP acknowledged"]
        if duration_s >= MEMORY_RUN_S_MIN:
            needed += ["workers whose memory was judged"]
        if os.environ.get("CI") and not tally[BALANCED]:
            yield "nginx was not there: clients spoke to the replicas themselves"
    for name in needed:
        if not tally[name]:
            yield f"no {name}"


def table(result: Result) -> str:
    """The result for people."""
    rows: list[tuple[str, object]] = [*result.tally.items()]
    rows += [(f"status {status}", count) for status, count in sorted(result.statuses.items())]
    kinds = Counter(violation.kind for violation in result.violations)
    rows += [(f"{kind}", kinds[kind]) for kind in Kind]
    lines = [f"  {name:<56}{count:>8}" for name, count in rows]
    if result.tally.get(BALANCED) == 0:
        lines.append("WITHOUT NGINX, which cannot be had here: clients spoke to the replicas themselves")
    for kind in kinds:
        shown = [violation.where for violation in result.violations if violation.kind is kind][:_VIOLATIONS_SHOWN]
        lines += [f"BROKEN: {kind}: {where}" for where in shown]
    lines += [f"TOO LITTLE: {shortcoming}" for shortcoming in result.shortcomings]
    return "\n".join(lines)


def main() -> int:
    """Run, print the table of each database, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--duration", type=float, default=DURATION_S, help="seconds under load, for each database")
    parser.add_argument("--database", choices=["postgresql", "sqlite", "both"], default="both")
    parser.add_argument("--seed", type=int, default=None, help="of faults and clients; a new one each time by default")
    options = parser.parse_args()
    if options.duration < _DURATION_S_MIN:
        parser.error(f"nothing can be proved in less than {_DURATION_S_MIN:g} seconds")
    seed = time.time_ns() % 10**6 if options.seed is None else options.seed
    kinds = get_args(DatabaseKind) if options.database == "both" else (cast("DatabaseKind", options.database),)
    is_proof = True
    for kind in kinds:
        folder = Path(tempfile.mkdtemp(prefix=f"tollgate-chaos-{kind}-"))
        result = run(folder, kind, duration_s=options.duration, seed=seed)
        sys.stdout.write(f"{kind}, {options.duration:g} s, seed {seed}\n{table(result)}\n")
        if result.is_proof:
            shutil.rmtree(folder)
        else:
            sys.stdout.write(f"What the processes wrote is in {folder}\n")
        sys.stdout.flush()
        is_proof = is_proof and result.is_proof
    return 0 if is_proof else 1


if __name__ == "__main__":
    sys.exit(main())
