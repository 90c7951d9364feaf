"""Who may do what: API keys for inference, the admin key for adapters, both as `Authorization: Bearer`."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from onebase_server.api.error_replies import ForbiddenError, UnauthorizedError
from onebase_server.api.services import services_of

_KEY = HTTPBearer(auto_error=False, scheme_name="API key", description="One of the server's `--api-key`.")
_ADMIN = HTTPBearer(auto_error=False, scheme_name="Admin key", description="The server's `--admin-key`.")
_Key = Annotated[HTTPAuthorizationCredentials | None, Security(_KEY)]
_AdminKey = Annotated[HTTPAuthorizationCredentials | None, Security(_ADMIN)]


async def require_key(request: Request, given: _Key) -> str:
    """Check the API key; returns the tenant it stands for (empty where the server asks for no key)."""
    settings = services_of(request).settings
    if not settings.api_keys:
        return ""
    allowed = [*settings.api_keys, *([settings.admin_key] if settings.admin_key else [])]
    if given is None or not given.credentials.strip():
        raise UnauthorizedError("An API key is needed: send it as 'Authorization: Bearer KEY'.")
    if not _is_one_of(given.credentials.strip(), allowed):
        raise UnauthorizedError("Wrong API key.")
    # The engine need not know the key to keep tenants apart.
    return hashlib.sha256(given.credentials.strip().encode()).hexdigest()[:16]


async def require_admin(request: Request, given: _AdminKey) -> None:
    """Check the admin key."""
    key = services_of(request).settings.admin_key
    if not key:
        raise ForbiddenError(
            "Administration is closed: start the server with --admin-key, or ONEBASE_ADMIN_KEY in its environment."
        )
    if given is None or not given.credentials.strip():
        raise UnauthorizedError("The admin key is needed: send it as 'Authorization: Bearer KEY'.")
    if not _is_one_of(given.credentials.strip(), [key]):
        raise UnauthorizedError("Wrong admin key.")


Tenant = Annotated[str, Depends(require_key)]


def _is_one_of(given: str, keys: list[str]) -> bool:
    # Every key is compared, each in constant time: the time taken tells nothing about any of them.
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return any(matches)
