"""/v1/adapters: register, list and delete adapters. Needs the admin key."""

from typing import Any, BinaryIO

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from onebase_server.api.adapter_sources import from_files, from_path
from onebase_server.api.auth import require_admin
from onebase_server.api.directory import Entry
from onebase_server.api.errors import InvalidRequestError
from onebase_server.api.schemas import RegisterRequest
from onebase_server.api.services import services_of

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require_admin)])

_FILE = {"type": "string", "format": "binary"}
_BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": RegisterRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}, "files": {"type": "array", "items": _FILE}},
                }
            },
        },
    }
}


@router.post("", status_code=201, summary="Register an adapter", response_model=None, openapi_extra=_BODIES)
async def register_adapter(request: Request) -> Response:
    """Either JSON with `name` and a `path` below the adapter root, or a multipart form with `name` and the files
    `adapter_config.json` and `adapter_model.safetensors` (or one zip that holds them)."""
    services = services_of(request)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=16, max_fields=16) as form:
            name, files = _read_form(form)
            entry = await services.adapters.register(name, from_files(services.store, files))
    else:
        body = await _read_json(request)
        stage = from_path(services.store, services.settings.adapter_root, body.path)
        entry = await services.adapters.register(body.name, stage)
    return JSONResponse(_describe(entry), 201)


@router.get("", summary="List the adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    """All that are registered, those that are not served included: `problem` says why."""
    entries = services_of(request).adapters.entries()
    return {"object": "list", "data": [_describe(entry) for entry in entries]}


@router.get("/{name:path}", summary="One adapter")
async def get_adapter(name: str, request: Request) -> dict[str, Any]:
    """What is known of it."""
    return _describe(services_of(request).adapters.get(name))


@router.delete("/{name:path}", summary="Delete an adapter")
async def delete_adapter(name: str, request: Request) -> dict[str, Any]:
    """Requests that run under it finish; new ones get 404."""
    await services_of(request).adapters.delete(name)
    return {"id": name, "object": "adapter", "deleted": True}


def _describe(entry: Entry) -> dict[str, Any]:
    record = entry.record
    return {
        "id": record.name,
        "object": "adapter",
        "version": record.version,
        "digest": record.digest,
        "base": record.base,
        "source": record.source,
        "created": int(record.created),
        "status": "served" if entry.problem is None else "not_served",
        "problem": entry.problem,
        "info": record.info,
        "metrics": record.metrics,
    }


async def _read_json(request: Request) -> RegisterRequest:
    try:
        return RegisterRequest.model_validate_json(await request.body())
    except ValidationError as error:
        # As FastAPI reports a body that it reads itself.
        found = error.errors(include_url=False, include_context=False)
        if found[0]["type"] == "json_invalid":
            raise InvalidRequestError(f"The body is not valid JSON: {found[0]['msg']}.") from error
        raise RequestValidationError([{**entry, "loc": ("body", *entry["loc"])} for entry in found]) from error


def _read_form(form: FormData) -> tuple[str, dict[str, BinaryIO]]:
    name = form.get("name")
    if not isinstance(name, str):
        raise InvalidRequestError("Field 'name' is required.", field="name")
    files: dict[str, BinaryIO] = {}
    for field, value in form.multi_items():
        if isinstance(value, UploadFile):
            # A base name, whatever the client sent; the store keeps only files that it knows.
            file_name = (value.filename or field).replace("\\", "/").rpartition("/")[2]
            if file_name in files:
                raise InvalidRequestError(f"Two files are named {file_name!r}.", field=field)
            files[file_name] = value.file
        elif field != "name":
            raise InvalidRequestError(f"Unknown field {field!r}.", field=field)
    if not files:
        raise InvalidRequestError(
            "No files: send adapter_config.json and adapter_model.safetensors.", field="files"
        )
    return name, files
