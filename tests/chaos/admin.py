"""An admin who changes what is sold, and at what markup, while calls go on; and tops wallets up, often twice."""

import asyncio
import random
import time

import httpx2

from tests.chaos.calls import Wallet
from tests.chaos.journal import AdminError, Grant, Journal, Markup, Switch

PROVIDERS = ("fake", "spare")
"""Never are both disabled: each call can be served."""

FIRST_BPS = 2001
"""Of the first markup that the admin sets, in basis points; each further one is one more, and so none comes twice."""

_PATIENCE_S = 30.0
_PAUSE_S = (0.3, 1.5)
_AWAY_S = (0.5, 2.5)
"""How long a provider is disabled."""

_AGAIN_S = 0.25


class Admin:
    """Speaks to the server at `base_url` with the key of an admin, and puts down what came of it."""

    def __init__(self, base_url: str, key: str, journal: Journal, stopped: asyncio.Event) -> None:
        self._http = httpx2.AsyncClient(
            base_url=base_url.removesuffix("/v1"),
            headers={"Authorization": f"Bearer {key}"},
            timeout=_PATIENCE_S,
            trust_env=False,
        )
        self._journal = journal
        self._stopped = stopped

    async def work(self, dice: random.Random) -> None:
        """Change one thing after the other until told to stop; then all providers are enabled again."""
        bps = FIRST_BPS
        while not self._stopped.is_set():
            await self._set_markup(bps)
            bps += 1
            if dice.random() < 0.3:
                provider = dice.choice(PROVIDERS)
                await self._switch(provider, is_enabled=False)
                await self._rest(dice.uniform(*_AWAY_S))
                await self._switch(provider, is_enabled=True)
            await self._rest(dice.uniform(*_PAUSE_S))

    async def grant(self, wallet: Wallet, idempotency_key: str, amount: int) -> Grant:
        """Top `wallet` up once, whoever else sends the same."""
        order = {"type": "topup", "amount": f"0.{amount:09d}", "description": "chaos"}
        # A personal wallet has its user's id.
        path = f"/api/v1/admin/users/{wallet.id}/credits"
        is_booked = await self._ask("POST", path, order, {"Idempotency-Key": idempotency_key})
        return Grant(
            wallet_id=wallet.id, idempotency_key=idempotency_key, amount=amount, is_acknowledged=is_booked, is_http=True
        )

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def _set_markup(self, bps: int) -> None:
        """Send it until it is acknowledged; what was not may be carried out later, or not at all."""
        sent_at = time.time()
        percent = {"percent": f"{bps // 100}.{bps % 100:02d}"}
        is_unsure = False
        while not (is_set := await self._ask("PUT", "/api/v1/admin/markup", percent)):
            is_unsure = True
            if self._stopped.is_set():
                break
            await self._rest(_AGAIN_S)
        acknowledged_at = time.time() if is_set else None
        self._journal.append(Markup(bps=bps, sent_at=sent_at, acknowledged_at=acknowledged_at, is_unsure=is_unsure))

    async def _switch(self, provider: str, *, is_enabled: bool) -> None:
        """Enable or disable; what is disabled is enabled again whatever it takes, within reason."""
        path = f"/api/v1/llm/providers/{provider}/{'enable' if is_enabled else 'disable'}"
        give_up_at = time.monotonic() + _PATIENCE_S
        while not await self._ask("POST", path):
            if not is_enabled or time.monotonic() > give_up_at:
                return
            await asyncio.sleep(_AGAIN_S)
        self._journal.append(Switch(provider=provider, is_enabled=is_enabled))

    async def _ask(
        self, method: str, path: str, said: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> bool:
        """Whether that was done; what came instead is put down."""
        try:
            answer = await self._http.request(method, path, json=said, headers=headers)
        except httpx2.HTTPError:
            self._journal.append(AdminError(path=path, status=None, code=None))
            return False
        if answer.is_success:
            return True
        try:
            code = answer.json()["error"]["code"]
        except (ValueError, KeyError, TypeError):
            code = None
        self._journal.append(AdminError(path=path, status=answer.status_code, code=code))
        return False

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            return
