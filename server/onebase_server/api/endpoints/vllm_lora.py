"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, for the gateways made for it."""

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import PlainTextResponse, Response

from onebase_adapters.errors import AdapterExistsError
from onebase_server.api.adapters.adapter_sources import from_path
from onebase_server.api.auth import require_admin
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.adapters import LoadLoraRequest, UnloadLoraRequest
from onebase_server.api.services import services_of

router = APIRouter(prefix="/v1", tags=["adapters"], dependencies=[Depends(require_admin)])

_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.post(
    "/load_lora_adapter", summary="Register an adapter (vLLM's call)", response_class=Response, responses=_TEXT
)
async def load_lora_adapter(body: LoadLoraRequest, request: Request) -> Response:
    """As POST /v1/adapters with a path; `load_inplace` makes a new version of a name that is taken."""
    services = services_of(request)
    stage = from_path(services.store, services.vocabulary, services.settings.adapter_root, body.lora_path)
    try:
        await services.adapters.register(body.lora_name, stage, replace=bool(body.load_inplace))
    except AdapterExistsError as error:
        # vLLM's status and words: gateways look for them.
        raise InvalidRequestError(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in "
            "place, set 'load_inplace' to True.",
            field="lora_name",
        ) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/unload_lora_adapter", summary="Delete an adapter (vLLM's call)", response_class=Response, responses=_TEXT
)
async def unload_lora_adapter(body: UnloadLoraRequest, request: Request) -> Response:
    """As DELETE /v1/adapters/{name}."""
    await services_of(request).adapters.delete(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
