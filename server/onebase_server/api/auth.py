"""Who may do what: API keys for inference, the admin key for adapters, both as `Authorization: Bearer`."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from onebase_server.api.error_replies import ForbiddenError, UnauthorizedError
from onebase_server.api.services import services_of


async def require_key(request: Request) -> str:
    """Check the API key; returns the tenant it stands for (empty where the server asks for no key)."""
    settings = services_of(request).settings
    if not settings.api_keys:
        return ""
    given = _bearer(request)
    allowed = [*settings.api_keys, *([settings.admin_key] if settings.admin_key else [])]
    if given is None:
        raise UnauthorizedError("An API key is needed: send it as 'Authorization: Bearer KEY'.")
    if not _is_one_of(given, allowed):
        raise UnauthorizedError("Wrong API key.")
    # The engine need not know the key to keep tenants apart.
    return hashlib.sha256(given.encode()).hexdigest()[:16]


async def require_admin(request: Request) -> None:
    """Check the admin key."""
    key = services_of(request).settings.admin_key
    if not key:
        raise ForbiddenError(
            "Administration is closed: start the server with --admin-key, or ONEBASE_ADMIN_KEY in its environment."
        )
    given = _bearer(request)
    if given is None:
        raise UnauthorizedError("The admin key is needed: send it as 'Authorization: Bearer KEY'.")
    if not _is_one_of(given, [key]):
        raise UnauthorizedError("Wrong admin key.")


Tenant = Annotated[str, Depends(require_key)]


def _bearer(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _is_one_of(given: str, keys: list[str]) -> bool:
    # Every key is compared, each in constant time: the time taken tells nothing about any of them.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return any(matches)
