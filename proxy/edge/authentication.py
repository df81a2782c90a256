"""From the Authorization header to the caller. Whatever is not on the public list needs one."""

from collections.abc import Iterable

from litestar.types import ASGIApp, Receive, Scope, Send
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.errors import Forbidden, Unauthenticated
from proxy.identity.keys import PREFIX, Caller, KeyRecord, find_key, hash_key
from proxy.storage.database import reading
from proxy.units import MICROS_PER_SECOND, now_micros

PUBLIC = frozenset({"/health/live", "/health/ready", "/schema/openapi.json", "/api/v1/llm/providers"})
"""The paths that answer anybody."""

CHECKED_BY_LEDGER = "is_checked_by_ledger"
"""The option of handlers whose caller the ledger checks again: only they may be served from memory."""

_FRESH_S = 30
"""For so long a key is not read again; a revoked one is still refused at once, by the ledger's own check."""

_KNOWN_MAX = 10_000

_ASK = "Send your API key as `Authorization: Bearer sk-tg-…`."


class Authentication:
    """Finds the caller of a request, and remembers the keys it has seen by their hashes."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[KeyRecord, int]] = {}

    async def caller(self, headers: Iterable[tuple[bytes, bytes]], *, from_memory: bool) -> Caller:
        """Who sent `headers`.

        Raises `Unauthenticated` without a valid key, `Forbidden` when its user is not active, `Unavailable` when the
        database would have to be asked and is out of reach.
        """
        key_hash = hash_key(_bearer(headers))
        record = await self._record(key_hash, from_memory=from_memory)
        if record is None or not record.is_valid(now_micros()):
            raise Unauthenticated(f"The API key is unknown, revoked or expired. {_ASK}")
        if not record.is_user_active:
            raise Forbidden("This account is not active.", code="inactive_user")
        return record.caller

    async def _record(self, key_hash: str, *, from_memory: bool) -> KeyRecord | None:
        now = now_micros()
        known = self._known.get(key_hash)
        if known is not None and from_memory and now - known[1] < _FRESH_S * MICROS_PER_SECOND:
            return known[0]
        async with reading(self._engine) as connection:
            record = await find_key(connection, key_hash)
        self._known.pop(key_hash, None)
        if record is not None:
            if len(self._known) >= _KNOWN_MAX:
                del self._known[next(iter(self._known))]
            self._known[key_hash] = (record, now)
        return record


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    values = [value for name, value in headers if name == b"authorization"]
    if not values:
        raise Unauthenticated(f"No API key was sent. {_ASK}")
    if len(values) > 1:
        raise Unauthenticated("More than one Authorization header was sent.")
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token.startswith(PREFIX):
        raise Unauthenticated(f"That is not an API key of Tollgate. {_ASK}")
    return token


def authenticated(app: ASGIApp, authentication: Authentication) -> ASGIApp:
    """`app` behind the door: its scope's `user` is the caller, except on public paths."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PUBLIC:
            from_memory = bool(scope["route_handler"].opt.get(CHECKED_BY_LEDGER))
            scope["user"] = await authentication.caller(scope["headers"], from_memory=from_memory)
        await app(scope, receive, send)

    return middleware
