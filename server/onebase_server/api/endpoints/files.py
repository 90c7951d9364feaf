"""/v1/files: data for fine-tuning, and its results, as OpenAI has them. Needs the admin key."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, Response

from onebase_server.api.auth import require_admin
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.services import services_of
from onebase_server.jobs.records import StoredFile

router = APIRouter(prefix="/v1/files", tags=["fine-tuning"], dependencies=[Depends(require_admin)])

T = TypeVar("T")
_PURPOSES = ("fine-tune",)
_LIFETIME = range(3600, 30 * 24 * 3600 + 1)
"""Seconds, as OpenAI has them: from an hour to thirty days."""
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
Limit = Annotated[int, Query(ge=1, le=10_000)]

_BYTES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(_PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": _LIFETIME[0],
                            "maximum": _LIFETIME[-1],
                        },
                    },
                }
            }
        },
    }
}


@router.post("", summary="Upload a file", openapi_extra=_BODY, **answers(doc.File))
async def upload_file(request: Request) -> dict[str, Any]:
    """A multipart form with `file` and `purpose`, which is `fine-tune`; it is deleted `expires_after[seconds]`
    after it was made, unless a job still needs it."""
    services = services_of(request)
    async with request.form(max_files=1, max_fields=8) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidRequestError("Send a multipart form with the file in its field 'file'.", field="file")
        for field in form:
            if field not in ("file", "purpose", _ANCHOR, _SECONDS):
                raise InvalidRequestError(f"Unknown field {field!r}.", field=field)
        if purpose not in _PURPOSES:
            raise InvalidRequestError(f"purpose must be one of: {', '.join(_PURPOSES)}.", field="purpose")
        lifetime = _lifetime(form.get(_ANCHOR), form.get(_SECONDS))
        name = (file.filename or "file").replace("\\", "/").rpartition("/")[2]
        stored = await asyncio.to_thread(services.book.add_file, file.file, name, str(purpose), lifetime=lifetime)
    return describe_file(stored)


@router.get("", summary="List the files", **answers(doc.Files))
async def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Newest first, unless asked for otherwise."""
    files = await asyncio.to_thread(services_of(request).book.files)
    wanted = [file for file in files if purpose in (None, file.purpose)]
    page, more = page_of(wanted if order == "desc" else wanted[::-1], [f.id for f in wanted], after, limit)
    data = [describe_file(file) for file in page]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": more, **ends}


@router.get("/{file_id}", summary="One file", **answers(doc.File))
async def get_file(file_id: str, request: Request) -> dict[str, Any]:
    """Describe it: its name, size and purpose."""
    return describe_file(await asyncio.to_thread(services_of(request).book.file, file_id))


@router.get("/{file_id}/content", summary="A file's content", response_class=Response, responses=_BYTES)
async def get_file_content(file_id: str, request: Request) -> FileResponse:
    """As it was uploaded."""
    stored = await asyncio.to_thread(services_of(request).book.file, file_id)
    return FileResponse(stored.path, media_type="application/octet-stream", filename=stored.name)


@router.delete("/{file_id}", summary="Delete a file", **answers(doc.Deleted))
async def delete_file(file_id: str, request: Request) -> dict[str, Any]:
    """Refused while a job needs it."""
    await asyncio.to_thread(services_of(request).book.delete_file, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def describe_file(file: StoredFile) -> dict[str, Any]:
    """OpenAI's object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": None if file.expires is None else int(file.expires),
    }


def _lifetime(anchor: object, seconds: object) -> int | None:
    """Raises InvalidRequestError."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequestError(f"{_ANCHOR} must be 'created_at'.", field=_ANCHOR)
    text = str(seconds)
    if not text.isdecimal() or int(text[:12]) not in _LIFETIME:
        raise InvalidRequestError(
            f"{_SECONDS} must be a whole number from {_LIFETIME[0]} to {_LIFETIME[-1]}.", field=_SECONDS
        )
    return int(text)


def page_of(items: Sequence[T], ids: Sequence[str], after: str | None, limit: int) -> tuple[Sequence[T], bool]:
    """The items behind the one with the id `after`, at most `limit`; and whether there are more. Raises
    InvalidRequestError."""
    start = 0
    if after is not None:
        if after not in ids:
            raise InvalidRequestError(f"after names {after[:80]!r}, which is not in the list.", field="after")
        start = ids.index(after) + 1
    return items[start : start + limit], len(items) > start + limit
