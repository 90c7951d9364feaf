"""GET /v1/models: the base and every adapter that is served, as OpenAI lists models."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from onebase_adapters.errors import AdapterNotFoundError
from onebase_server.api.adapters.directory import Entry, Target
from onebase_server.api.auth import require_admin, require_key
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.services import Services, services_of

router = APIRouter(tags=["models"], dependencies=[Depends(require_key)])


@router.get("/v1/models", summary="List what can be asked", **answers(doc.Models))
async def list_models(request: Request) -> dict[str, Any]:
    """The base first, then the adapters by name."""
    services = services_of(request)
    served = [entry for entry in services.adapters.entries() if entry.problem is None]
    return {"object": "list", "data": [_base(services), *(_adapter(services, entry) for entry in served)]}


@router.get("/v1/models/{name:path}", summary="One model", **answers(doc.Model))
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """404 if it does not exist or is not served; `name@version` is one version of an adapter."""
    services = services_of(request)
    if name == services.settings.base_name:
        return _base(services)
    entry = services.adapters.get(name)
    if entry.problem is not None:
        raise AdapterNotFoundError(f"The adapter {name!r} is not served: {entry.problem}", field="model")
    return {**_adapter(services, entry), "id": name}


@router.delete(
    "/v1/models/{name:path}",
    summary="Delete an adapter",
    dependencies=[Depends(require_admin)],
    **answers(doc.Deleted),
)
async def delete_model(name: str, request: Request) -> dict[str, Any]:
    """As DELETE /v1/adapters/NAME, with the admin key; the base stays."""
    services = services_of(request)
    if name == services.settings.base_name:
        raise InvalidRequestError("The base cannot be deleted.", field="model")
    await services.adapters.delete(name)
    return {"id": name, "object": "model", "deleted": True}


def _base(services: Services) -> dict[str, Any]:
    return {
        "id": services.settings.base_name,
        "object": "model",
        "created": services.started,
        "owned_by": "onebase",
        "root": services.engine.info.model,
        "parent": None,
        "max_model_len": services.longest,
    }


def _adapter(services: Services, entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.record.name,
        "object": "model",
        "created": int(entry.record.created),
        "owned_by": "onebase",
        "root": services.settings.base_name,
        "parent": services.settings.base_name,
        "max_model_len": services.longest - Target.of(entry.record.name, entry.record).virtual_tokens,
    }
