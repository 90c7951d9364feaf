"""Bodies of the administration of adapters."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from onebase_server.api.schemas.body import Body, Refused


class RegisterFields(Body):
    """POST /v1/adapters, beside the uploaded files."""

    name: str
    replace: bool | None = None
    """Make a new version, and the current one, of a name that is taken."""


class RegisterRequest(RegisterFields):
    """POST /v1/adapters, for a folder that the server can read."""

    path: str = Field(min_length=1)


class VersionFields(Body):
    """POST /v1/adapters/{name}/versions, beside the uploaded files."""

    promote: bool | None = None
    """Make it the current version; default true."""


class VersionRequest(VersionFields):
    """POST /v1/adapters/{name}/versions, for a folder that the server can read."""

    path: str = Field(min_length=1)


class PromoteRequest(Body):
    """POST /v1/adapters/{name}/promote."""

    version: int = Field(ge=1, le=2**31 - 1)


class LoadLoraRequest(Body):
    """POST /v1/load_lora_adapter."""

    refused: ClassVar[Mapping[str, Refused]] = {"base_model_name": Refused("there is one base")}

    lora_name: str
    lora_path: str = Field(min_length=1)
    load_inplace: bool | None = None


class UnloadLoraRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None
    """Accepted for compatibility; changes nothing."""
