"""Sending to a hub: a small one of our own stands for it, and speaks what huggingface_hub's client asks."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from onebase_adapters.errors import ConfigError, UploadError
from onebase_engine.export.model_card import card_of
from onebase_engine.export.push import push

TOKEN = "hf_right"


@dataclass
class Hub:
    """Repositories by name, each whether it is private, and its files."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    failing: bool = False


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, status: int = 200) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def handle_all(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid credentials"}, 401)
            if hub.failing:
                return self.answer({"error": "out of order"}, 507)
            path = self.path.split("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.private:
                    return self.answer({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
                hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
                hub.files[name] = {}
                return self.answer({"url": f"{hub.address}/{name}", "name": name})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            name, rest = "/".join(path.split("/")[3:5]), path.split("/")[5:]
            if not rest or rest[0] == "revision":
                siblings = [{"rfilename": file} for file in hub.files[name]]
                return self.answer(
                    {"id": name, "private": hub.private[name], "siblings": siblings, "sha": "0" * 40}
                )
            if rest[0] == "preupload":
                asked = json.loads(content)["files"]
                return self.answer(
                    {
                        "files": [
                            {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked
                        ]
                    }
                )
            for line in content.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer({"commitUrl": f"{hub.address}/{name}/commit/0", "commitOid": "0" * 40})

        do_GET = do_POST = do_HEAD = handle_all  # noqa: N815

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
        for name in ("ENDPOINT", "HF_ENDPOINT"):
            monkeypatch.setattr(f"{module}.{name}", found.address, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("# mine\n")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_a_folder_and_a_file_with_its_card(hub: Hub, written: Path, tmp_path: Path) -> None:
    assert push(written, "me/mine", private=True) == f"{hub.address}/me/mine"
    assert hub.private == {"me/mine": True}
    assert hub.files["me/mine"] == {"README.md": b"# mine\n", "adapter_model.safetensors": b"weights"}
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    card_of(file).write_text("# file\n")
    push(file, "me/file", private=False)
    push(file, "me/file", private=False)
    assert hub.files["me/file"] == {"mine.gguf": b"GGUF", "README.md": b"# file\n"}
    assert hub.private["me/file"] is False


def test_what_was_private_stays_so(hub: Hub, written: Path) -> None:
    push(written, "me/open", private=False)
    hub.files["me/open"].clear()
    with pytest.raises(UploadError, match="me/open is there already, and all can read it: nothing was sent"):
        push(written, "me/open", private=True)
    assert not hub.files["me/open"]


def test_failures_are_told_and_what_was_written_stays(
    hub: Hub, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'a/b/c' is no name of a repository"):
        push(written, "a/b/c", private=False)
    hub.failing = True
    with pytest.raises(UploadError, match="the hub answers 507: out of order"):
        push(written, "me/mine", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UploadError, match="the hub does not take this token"):
        push(written, "me/mine", private=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UploadError, match="There is no token for the hub: set HF_TOKEN"):
        push(written, "me/mine", private=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT"):
        monkeypatch.setattr(name, "http://127.0.0.1:1", raising=False)
    with pytest.raises(UploadError, match="Cannot reach the hub"):
        push(written, "me/mine", private=False)
    assert len(list(written.iterdir())) == 2
