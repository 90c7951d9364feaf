"""The request that each of the clients' methods sends, and how its answer is read: plain values, so that the
synchronous and the asynchronous client differ in nothing but the waiting."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from onebase_client import models
from onebase_client.errors import AdapterRefusedError, InvalidRequestError, ProtocolError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Files = list[tuple[str, tuple[str, BinaryIO]]]

_CONFIG, _WEIGHTS, _SIDECAR = "adapter_config.json", "adapter_model.safetensors", "onebase.json"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request to the server."""

    method: str
    path: str
    read: Callable[[Any], T]
    """Makes the result of the answer's document, or of each event's. Raises ProtocolError."""
    json: Mapping[str, Any] | None = None
    form: Mapping[str, str] | None = None
    uploads: Sequence[Path] = ()
    admin: bool = False
    """Whether it takes the admin key."""
    repeatable: bool = True
    """Whether it may be sent again after a connection broke, when nobody knows what became of it."""

    @contextmanager
    def files(self) -> Iterator[Files | None]:
        """Its uploads, opened anew for each try."""
        with ExitStack() as stack:
            opened: Files = [("files", (path.name, stack.enter_context(path.open("rb")))) for path in self.uploads]
            yield opened or None


@dataclass(frozen=True)
class Source:
    """Where an adapter's files are: a path on the server, or a folder or zip here."""

    path: str | None
    upload: Path | None

    @classmethod
    def of(cls, path: str | None, upload: Path | str | None) -> "Source":
        if (path is None) == (upload is None):
            raise InvalidRequestError(
                "Give either path (a folder on the server) or upload (one here).", param="path"
            )
        return cls(path, None if upload is None else Path(upload))


def _model(kind: type[M]) -> Callable[[Any], M]:
    def read(document: Any) -> M:
        try:
            return kind.model_validate(document)
        except ValidationError as error:
            raise ProtocolError(f"The server's answer is not a {kind.__name__}: {error}") from error

    return read


def _list(kind: type[M]) -> Callable[[Any], list[M]]:
    adapter = TypeAdapter(list[kind])  # type: ignore[valid-type]

    def read(document: Any) -> list[M]:
        try:
            return adapter.validate_python(document["data"])
        except (ValidationError, TypeError, KeyError) as error:
            raise ProtocolError(f"The server's answer is not a list of {kind.__name__}: {error}") from error

    return read


def _nothing(_: Any) -> None:
    return None


def register(name: str, source: Source, replace: bool) -> Call[models.Adapter]:
    return _registration("/v1/adapters", {"name": name, "replace": replace or None}, source)


def add_version(name: str, source: Source, promote: bool) -> Call[models.Adapter]:
    return _registration(f"{_adapter_path(name)}/versions", {"promote": promote}, source)


def _registration(path: str, fields: Mapping[str, Any], source: Source) -> Call[models.Adapter]:
    read = _model(models.Adapter)
    if source.upload is None:
        body = {**fields, "path": source.path}
        return Call("POST", path, read, json=body, admin=True, repeatable=False)
    form = {name: _text(value) for name, value in fields.items() if value is not None}
    files = _files_of(source.upload)
    return Call("POST", path, read, form=form, uploads=files, admin=True, repeatable=False)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _files_of(folder: Path) -> list[Path]:
    if folder.is_file() and folder.suffix == ".zip":
        return [folder]
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterRefusedError(f"{folder} has no {name}: it is not a PEFT adapter's folder.", param="upload")
    return [folder / name for name in (_CONFIG, _WEIGHTS, _SIDECAR) if (folder / name).is_file()]


def _adapter_path(name: str) -> str:
    return f"/v1/adapters/{quote(name)}"


def list_adapters() -> Call[list[models.Adapter]]:
    return Call("GET", "/v1/adapters", _list(models.Adapter), admin=True)


def get_adapter(name: str) -> Call[models.Adapter]:
    return Call("GET", _adapter_path(name), _model(models.Adapter), admin=True)


def promote(name: str, version: int) -> Call[models.Adapter]:
    return Call(
        "POST", f"{_adapter_path(name)}/promote", _model(models.Adapter), json={"version": version}, admin=True
    )


def rollback(name: str) -> Call[models.Adapter]:
    path = f"{_adapter_path(name)}/rollback"
    return Call("POST", path, _model(models.Adapter), admin=True, repeatable=False)


def delete_adapter(name: str) -> Call[None]:
    return Call("DELETE", _adapter_path(name), _nothing, admin=True, repeatable=False)


def list_models() -> Call[list[models.Model]]:
    return Call("GET", "/v1/models", _list(models.Model))


def complete(prompt: models.Prompt, model: str | None, options: Mapping[str, Any]) -> Call[models.Completion]:
    body = {"model": model, "prompt": prompt, **options}
    return Call("POST", "/v1/completions", _model(models.Completion), json=body)


def chat(messages: Sequence[models.Message], model: str | None, options: Mapping[str, Any]) -> Call[models.Chat]:
    body = {"model": model, "messages": messages, **options}
    return Call("POST", "/v1/chat/completions", _model(models.Chat), json=body)


def embed(
    texts: models.Prompt, model: str | None, adapters: Sequence[models.AdapterPart] | None
) -> Call[list[models.Embedding]]:
    body = {"model": model, "adapters": adapters, "input": texts}
    return Call("POST", "/v1/embeddings", _list(models.Embedding), json=body)


def classify(
    texts: models.Prompt, model: str | None, adapters: Sequence[models.AdapterPart] | None
) -> Call[list[models.Classification]]:
    body = {"model": model, "adapters": adapters, "input": texts}
    return Call("POST", "/v1/classify", _list(models.Classification), json=body)


def complete_stream(
    prompt: models.Prompt, model: str | None, options: Mapping[str, Any]
) -> Call[models.Completion]:
    body = {"model": model, "prompt": prompt, **options, **_STREAM}
    return Call("POST", "/v1/completions", _model(models.Completion), json=body)


def chat_stream(
    messages: Sequence[models.Message], model: str | None, options: Mapping[str, Any]
) -> Call[models.ChatChunk]:
    body = {"model": model, "messages": messages, **options, **_STREAM}
    return Call("POST", "/v1/chat/completions", _model(models.ChatChunk), json=body)


_STREAM = {"stream": True, "stream_options": {"include_usage": True}}
