"""Whether this process lives, and whether it can serve."""

import sqlalchemy as sa
from litestar import get
from litestar.di import NamedDependency
from sqlalchemy.ext.asyncio import AsyncEngine

from proxy.edge.errors import documented
from proxy.errors import Unavailable
from proxy.ledger.ledger import Ledger
from proxy.storage.database import reading


@get("/health/live", sync_to_thread=False, summary="The process answers")
def live() -> dict[str, str]:
    """Answer whatever else is down: restart the process when this fails."""
    return {"status": "ok"}


@get("/health/ready", summary="Calls can be served", responses=documented(503, is_public=True))
async def ready(
    engine: NamedDependency[AsyncEngine], ledger: NamedDependency[Ledger], is_stopping: NamedDependency[bool]
) -> dict[str, str]:
    """Answer 503 while the database is out of reach, or takes no charges: send no calls here then."""
    if is_stopping:
        raise Unavailable("This server is stopping.", retry_after_s=1)
    if ledger.is_lost:
        raise Unavailable("The ledger is out of reach just now.", retry_after_s=2)
    async with reading(engine) as connection:
        await connection.execute(sa.text("SELECT 1"))
    return {"status": "ok"}
