"""The application: endpoints, errors and middleware put together over one set of services."""

from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from onebase_adapters.errors import OneBaseError
from onebase_server.api.docs_page import add_docs_page
from onebase_server.api.endpoints import (
    adapters,
    chat,
    completions,
    files,
    fine_tuning,
    health,
    models,
    pooling,
    responses,
    tokens,
)
from onebase_server.api.endpoints import vllm_lora as lora
from onebase_server.api.error_replies import handle
from onebase_server.api.middleware import Around, RequestGuard
from onebase_server.api.schemas.body import ErrorDocument
from onebase_server.api.services import Services

_UPLOADS = ("/v1/adapters", "/v1/files")


def create_app(services: Services, *, around: Around | None = None) -> FastAPI:
    """The ASGI application. Its engine is started and its adapters are loaded by the caller; `around` is entered
    for each request."""
    app = FastAPI(
        title="OneBase",
        version=version("onebase"),
        summary="One frozen base model, many adapters, one batch; OpenAI-compatible.",
        responses={
            "4XX": {"model": ErrorDocument, "description": "The request's fault; `param` names the field."},
            "5XX": {"model": ErrorDocument, "description": "The server's fault, or not for the moment."},
        },
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    add_docs_page(app)
    app.state.services = services
    for topic in (
        completions,
        chat,
        responses,
        pooling,
        models,
        adapters,
        lora,
        files,
        fine_tuning,
        tokens,
        health,
    ):
        app.include_router(topic.router)
    for error in (OneBaseError, RequestValidationError, HTTPException):
        app.add_exception_handler(error, handle)
    settings = services.settings

    def body_limit(path: str) -> int:
        return settings.max_upload_bytes if path.startswith(_UPLOADS) else settings.max_body_bytes

    if settings.allowed_origins:
        shown = ["x-request-id", "x-onebase-ignored", "retry-after"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=shown,
        )
    app.add_middleware(RequestGuard, body_limit=body_limit, answered=services.metrics.answered, around=around)
    return app
