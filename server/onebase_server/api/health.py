"""GET /health, /ping and /version: for load balancers and for people."""

from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from onebase_server.api.services import services_of

router = APIRouter(tags=["health"])


@router.get("/health", summary="Is the engine ready?", response_model=None)
@router.get("/ping", include_in_schema=False, response_model=None)
async def health(request: Request) -> Response:
    """200 while requests are taken; 503 while the engine starts, restarts or drains."""
    services = services_of(request)
    if not services.engine.ready:
        return JSONResponse({"status": "unavailable"}, 503, {"retry-after": "5"})
    stats = services.engine.stats
    details = {
        "status": "ok",
        "model": services.settings.base_name,
        "adapters": sum(entry.problem is None for entry in services.adapters.entries()),
        "engine": msgspec.to_builtins(stats),
    }
    return JSONResponse(details)


@router.get("/version", summary="Version of the server")
async def get_version() -> dict[str, Any]:
    """As vLLM answers it."""
    return {"version": version("onebase")}
