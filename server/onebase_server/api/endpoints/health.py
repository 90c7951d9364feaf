"""GET /health, /ping, /version and /metrics: for load balancers, for people and for Prometheus."""

from importlib.metadata import version
from typing import Any

import msgspec
import prometheus_client
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.services import services_of
from onebase_server.engine_process.engine_client import EngineUnavailableError

router = APIRouter(tags=["health"])

_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/health", summary="Is the engine ready?", **answers(doc.Health))
@router.get("/ping", include_in_schema=False, response_model=None)
async def health(request: Request) -> Response:
    """200 while requests are taken; 503 while the engine starts, restarts or drains."""
    services = services_of(request)
    if not services.engine.ready:
        raise EngineUnavailableError("The engine is starting or stopping.", retry_after=5)
    stats = services.engine.stats
    details = {
        "status": "ok",
        "model": services.settings.base_name,
        "adapters": sum(entry.problem is None for entry in services.adapters.entries()),
        "engine": msgspec.to_builtins(stats),
    }
    return JSONResponse(details)


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=_TEXT)
async def get_metrics(request: Request) -> Response:
    """In its text format."""
    services = services_of(request)
    encode, content_type = prometheus_client.exposition.choose_encoder(request.headers.get("accept", ""))
    return Response(encode(services.metrics.registry), headers={"content-type": content_type})


@router.get("/version", summary="Version of the server", **answers(doc.Version))
async def get_version() -> dict[str, Any]:
    """As vLLM answers it."""
    return {"version": version("onebase")}
