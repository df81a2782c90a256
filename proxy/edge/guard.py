"""Who may administer."""

from typing import Any

from litestar import Request

from proxy.errors import Forbidden
from proxy.identity.keys import Caller, Scope


def admin_of(request: Request[Caller, Any, Any]) -> Caller:
    """The caller, who must be an admin. Raises `Forbidden` for everybody else, and for keys that are not for this."""
    caller = request.user
    if not caller.is_admin:
        raise Forbidden("Only admins may do this.", code="not_an_admin")
    if caller.scope is not Scope.ADMIN:
        raise Forbidden("This API key's scope does not allow this: it takes 'admin'.", code="insufficient_scope")
    return caller
