"""From the Authorization header to the caller, and what that caller may do.

Closed by default: a path that is not on the public list needs a caller, and a handler that does not say what it
`needs` serves nobody.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from litestar.types import ASGIApp, Receive, Scope, Send
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.errors import Forbidden, Unauthenticated, Unavailable
from proxy.identity.accounts import Accounts
from proxy.identity.flights import Flights
from proxy.identity.keys import PREFIX, Caller, Credential, find_key, hash_key
from proxy.identity.keys import Scope as KeyScope
from proxy.identity.last_used import LastUsed
from proxy.identity.tokens import is_token
from proxy.storage.database import reading
from proxy.units import MICROS_PER_SECOND, Micros, now_micros

PUBLIC = frozenset(
    {
        "/health/live",
        "/health/ready",
        "/metrics",
        "/schema",
        "/schema/openapi.json",
        "/register",
        "/login",
        "/api/v1/llm/providers",
    }
)
"""The paths that answer anybody; `/metrics` has a door of its own."""

NEEDS = "needs"
CHECKED_BY_LEDGER = "is_checked_by_ledger"
"""The option of handlers whose caller the ledger checks again: only they may be served from memory."""

_FRESH_S = 30
"""For so long a key or token is not read again; a revoked one is still refused at once, by the ledger's own check."""

_KEPT_S = 600
"""For so long a key or token that cannot be read just now is good enough to wait at the ledger for the database."""

_LOOK_UP_S_MAX = 5.0
"""For so long a paid call waits for its key to be read; a database that hangs would hold it for much longer."""

_KNOWN_MAX = 10_000

_ASK = "Send your API key as `Authorization: Bearer sk-tg-…`."


def needs(scope: KeyScope) -> dict[str, Any]:
    """The `opt` of a handler for callers of at least this scope; `ADMIN` asks for an admin as well."""
    return {NEEDS: scope}


class Authentication:
    """Finds the caller of a request, and remembers the keys and tokens it has seen by their hashes."""

    def __init__(self, engine: AsyncEngine, accounts: Accounts, last_used: LastUsed) -> None:
        self._engine = engine
        self._accounts = accounts
        self._last_used = last_used
        self._known: dict[str, tuple[Credential, Micros]] = {}
        self._flights = Flights[Credential | None]()

    async def payer(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Who sent a paid call with `headers`, from memory where that is fresh; the ledger checks it again.

        Raises as `caller`, and `Forbidden` when its scope does not allow it.
        """
        now = now_micros()
        known = self._known.get(hash_key(_bearer(headers)))
        if known is not None and now - known[1] < _FRESH_S * MICROS_PER_SECOND and known[0].is_valid(now):
            caller = known[0].caller
            if caller.key_id is not None:
                self._last_used.note(caller.key_id, now)
        else:
            caller = await self.caller(headers, from_memory=True)
        if caller.scope is not KeyScope.INFERENCE:
            _check_scope(caller, KeyScope.INFERENCE)
        return caller

    async def caller(self, headers: Iterable[tuple[bytes, bytes]], *, from_memory: bool) -> Caller:
        """Who sent `headers`.

        Raises `Unauthenticated` without a valid key or token, `Forbidden` when its user is not active, `Unavailable`
        when the database or an issuer would have to be asked and is out of reach.
        """
        sent = _bearer(headers)
        now = now_micros()
        found = await self._found(sent, now, from_memory=from_memory)
        if found is None or not found.is_valid(now):
            raise Unauthenticated(f"The API key or token is unknown, revoked or expired. {_ASK}")
        if not found.is_user_active:
            raise Forbidden("This account is not active.", code="inactive_user")
        if found.caller.key_id is not None:
            self._last_used.note(found.caller.key_id, now)
        return found.caller

    async def _found(self, sent: str, now: Micros, *, from_memory: bool) -> Credential | None:
        sent_hash = hash_key(sent)
        if not from_memory:
            return await self._read(sent, sent_hash)
        known = self._known.get(sent_hash)
        age = now - known[1] if known is not None else 0
        if known is not None and age < _FRESH_S * MICROS_PER_SECOND:
            return known[0]
        try:
            async with asyncio.timeout(_LOOK_UP_S_MAX):
                return await self._flights.join(sent_hash, lambda: self._read(sent, sent_hash))
        except (Unavailable, TimeoutError) as exc:
            if known is not None and age < _KEPT_S * MICROS_PER_SECOND:
                return known[0]
            if isinstance(exc, Unavailable):
                raise
            raise Unavailable("The database did not answer in time.", retry_after_s=2) from exc

    async def _read(self, sent: str, sent_hash: str) -> Credential | None:
        now = now_micros()
        try:
            found = await self._look_up(sent, sent_hash)
        except (Unauthenticated, Forbidden):
            self._known.pop(sent_hash, None)
            raise
        self._known.pop(sent_hash, None)
        if found is not None and found.is_valid(now) and found.is_user_active:
            if len(self._known) >= _KNOWN_MAX:
                del self._known[next(iter(self._known))]
            self._known[sent_hash] = (found, now)
        return found

    async def _look_up(self, sent: str, sent_hash: str) -> Credential | None:
        if not sent.startswith(PREFIX):
            return await self._accounts.credential(sent)
        async with reading(self._engine) as connection:
            return await find_key(connection, sent_hash)


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    found: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            if found is not None:
                raise Unauthenticated("More than one Authorization header was sent.")
            found = value
    if found is None:
        raise Unauthenticated(f"No API key was sent. {_ASK}")
    scheme, _, sent = found.decode("latin-1").partition(" ")
    sent = sent.strip()
    if scheme.lower() != "bearer" or not (sent.startswith(PREFIX) or is_token(sent)):
        raise Unauthenticated(f"That is not an API key or token of Tollgate. {_ASK}")
    return sent


def _refuse_credentials(query: bytes) -> None:
    """Addresses end up in logs and histories: what is secret must not be in them."""
    text = unquote_to_bytes(query.replace(b"+", b" "))
    if PREFIX.encode() in text or b"access_token=" in text.lower():
        raise Unauthenticated(f"A credential in the address is not accepted, and should be replaced. {_ASK}")


def _check_scope(caller: Caller, needed: KeyScope | None) -> None:
    if needed is None:
        raise Forbidden("Nobody may do this.", code="closed")
    if needed is KeyScope.ADMIN and not caller.is_admin:
        raise Forbidden("This is for admins.", code="not_an_admin")
    if not caller.scope.includes(needed):
        raise Forbidden(f"This needs a key of the scope {needed!s}, or a login.", code="insufficient_scope")


def _is_frameworks_own(scope: Scope, options: Mapping[str, Any]) -> bool:
    """Whether the framework answers by itself: to OPTIONS, by a handler with the options of the router it is in."""
    return scope.get("method") == "OPTIONS" and CHECKED_BY_LEDGER not in options


def authenticated(app: ASGIApp, authentication: Authentication) -> ASGIApp:
    """`app` behind the door: its scope's `user` is the caller, except on public paths."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PUBLIC:
            options = scope["route_handler"].opt
            if scope["query_string"]:
                _refuse_credentials(scope["query_string"])
            caller = await authentication.caller(scope["headers"], from_memory=CHECKED_BY_LEDGER in options)
            _check_scope(caller, None if _is_frameworks_own(scope, options) else options.get(NEEDS))
            scope["user"] = caller
        await app(scope, receive, send)

    return middleware
