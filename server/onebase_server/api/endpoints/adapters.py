"""/v1/adapters: register, list, promote and delete adapters. Needs the admin key."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, BinaryIO, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from onebase_server.api.adapters.adapter_sources import Stage, from_files, from_path
from onebase_server.api.adapters.directory import AdapterDirectory, Entry
from onebase_server.api.auth import require_admin
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.adapters import (
    PromoteRequest,
    RegisterFields,
    RegisterRequest,
    VersionFields,
    VersionRequest,
)
from onebase_server.api.schemas.answers import answers
from onebase_server.api.services import services_of

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], dependencies=[Depends(require_admin)])

B = TypeVar("B", bound=BaseModel)


def _bodies(json: type[BaseModel], form: type[BaseModel]) -> dict[str, Any]:
    """The two ways of giving an adapter's files, for the OpenAPI document."""
    schema = form.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"]["files"] = {"type": "array", "items": file, "minItems": 1}
    schema["required"] = [*schema.get("required", ()), "files"]
    content = {
        "application/json": {"schema": json.model_json_schema()},
        "multipart/form-data": {"schema": schema},
    }
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "",
    status_code=201,
    summary="Register an adapter",
    **answers(doc.Adapter, 201),
    openapi_extra=_bodies(RegisterRequest, RegisterFields),
)
async def register_adapter(request: Request) -> Response:
    """Either JSON with `name` and a `path` below the adapter root, or a multipart form with `name` and the files
    `adapter_config.json` and `adapter_model.safetensors` (or one zip of them). With `replace` a name that is taken
    gets a new version, which takes over at once."""
    adapters = services_of(request).adapters
    async with _read(request, RegisterFields, RegisterRequest) as (fields, stage):
        entry = await adapters.register(fields.name, stage, replace=bool(fields.replace))
    return JSONResponse(_describe(adapters, entry), 201)


@router.get("", summary="List the adapters", **answers(doc.Adapters))
async def list_adapters(request: Request) -> dict[str, Any]:
    """All that are registered, those that are not served included: `problem` says why."""
    adapters = services_of(request).adapters
    return {"object": "list", "data": [_describe(adapters, entry) for entry in adapters.entries()]}


@router.post(
    "/{name:path}/versions",
    status_code=201,
    summary="Register a new version",
    **answers(doc.Adapter, 201),
    openapi_extra=_bodies(VersionRequest, VersionFields),
)
async def register_version(name: str, request: Request) -> Response:
    """As registering, for a name that exists. `promote: false` leaves the current version in its place: the new one
    can be tried as `name@version` first."""
    adapters = services_of(request).adapters
    adapters.get(name)
    async with _read(request, VersionFields, VersionRequest) as (fields, stage):
        entry = await adapters.register(name, stage, replace=True, promote=fields.promote is not False)
    return JSONResponse(_describe(adapters, entry), 201)


@router.post("/{name:path}/promote", summary="Make a version the current one", **answers(doc.Adapter))
async def promote_version(name: str, body: PromoteRequest, request: Request) -> dict[str, Any]:
    """The next request for the name gets it; those that run finish on what they began with."""
    adapters = services_of(request).adapters
    return _describe(adapters, await adapters.promote(name, body.version))


@router.post("/{name:path}/rollback", summary="Go back to the version before", **answers(doc.Adapter))
async def roll_back(name: str, request: Request) -> dict[str, Any]:
    """To the one that was current before the last change; once more undoes it."""
    adapters = services_of(request).adapters
    return _describe(adapters, await adapters.promote(name, None))


@router.get("/{name:path}", summary="One adapter", **answers(doc.Adapter))
async def get_adapter(name: str, request: Request) -> dict[str, Any]:
    """Describe a `name`'s current version, or a `name@version`."""
    adapters = services_of(request).adapters
    return _describe(adapters, adapters.get(name))


@router.delete("/{name:path}", summary="Delete an adapter, or a version of it", **answers(doc.Deleted))
async def delete_adapter(name: str, request: Request) -> dict[str, Any]:
    """Requests that run under it finish; new ones get 404."""
    await services_of(request).adapters.delete(name)
    return {"id": name, "object": "adapter", "deleted": True}


def _describe(adapters: AdapterDirectory, entry: Entry) -> dict[str, Any]:
    record = entry.record
    return {
        "id": record.name,
        "object": "adapter",
        "version": record.version,
        "current": record.current,
        "versions": [other.record.version for other in adapters.versions(record.name)],
        "digest": record.digest,
        "base": record.base,
        "source": record.source,
        "created": int(record.created),
        "status": "served" if entry.problem is None else "not_served",
        "problem": entry.problem,
        "info": record.info,
        "metrics": record.metrics,
    }


@asynccontextmanager
async def _read(request: Request, form_kind: type[B], json_kind: type[B]) -> AsyncIterator[tuple[B, Stage]]:
    """Read either kind of body: its fields, and where its adapter's files are. `json_kind` has a `path` more."""
    services = services_of(request)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=16, max_fields=16) as form:
            fields, files = _read_form(form, form_kind)
            yield fields, from_files(services.store, services.vocabulary, files)
    else:
        body = await _read_json(request, json_kind)
        path: str = body.path  # type: ignore[attr-defined]
        yield body, from_path(services.store, services.vocabulary, services.settings.adapter_root, path)


async def _read_json(request: Request, kind: type[B]) -> B:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        # As FastAPI reports a body that it reads itself.
        if (first := error.errors(include_url=False)[0])["type"] == "json_invalid":
            raise InvalidRequestError(f"The body is not valid JSON: {first['msg']}.") from error
        raise _as_fastapi(error) from error


def _read_form(form: FormData, kind: type[B]) -> tuple[B, Mapping[str, BinaryIO]]:
    fields: dict[str, str] = {}
    files: dict[str, BinaryIO] = {}
    for field, value in form.multi_items():
        if isinstance(value, UploadFile):
            # A base name, whatever the client sent; the store keeps only files that it knows.
            file_name = (value.filename or field).replace("\\", "/").rpartition("/")[2]
            if file_name in files:
                raise InvalidRequestError(f"Two files are named {file_name!r}.", field=field)
            files[file_name] = value.file
        else:
            fields[field] = value
    try:
        body = kind.model_validate(fields, strict=False)
    except ValidationError as error:
        raise _as_fastapi(error) from error
    if not files:
        raise InvalidRequestError(
            "No files: send adapter_config.json and adapter_model.safetensors.", field="files"
        )
    return body, files


def _as_fastapi(error: ValidationError) -> RequestValidationError:
    found = error.errors(include_url=False)
    return RequestValidationError([{**entry, "loc": ("body", *entry["loc"])} for entry in found])
