"""Log lines: one for each request, with its id and what became of it; JSON on request."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from onebase_server.logs import LogFormat, configure_logging


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


async def test_json_lines(http: httpx.AsyncClient, engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    for stream in (False, True):
        await http.post(
            "/v1/completions",
            json={"prompt": [60, 61], "n": 2, "max_tokens": 1, "stream": stream},
            headers={"x-request-id": "mine"},
        )
    await http.get("/v1/models/nobody")
    found = [json.loads(line) for line in lines(capsys)]
    assert [line["status"] for line in found] == [200, 200, 404]
    for line in found[:2]:
        assert line["message"] == "POST /v1/completions"
        assert (line["level"], line["request_id"], line["model"]) == ("info", "mine", "tiny")
        assert (line["prompt_tokens"], line["completion_tokens"]) == (2, 2)
        assert line["id"].startswith("cmpl-")
        assert 0 < line["seconds"] < 10
        assert line["time"].endswith("Z")
    assert found[2]["request_id"] != "mine"
    assert "model" not in found[2]


@pytest.mark.parametrize("form", ["text", "json"])
async def test_failures_have_the_requests_id(
    http: httpx.AsyncClient, engine: Any, capsys: pytest.CaptureFixture[str], form: LogFormat
) -> None:
    configure_logging("warning", form)
    engine.raises = ZeroDivisionError("a bug")
    await http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine"})
    found = lines(capsys)
    if form == "json":
        (line,) = map(json.loads, found)
        assert (line["request_id"], line["message"]) == ("mine", "a request failed: POST /v1/completions")
        assert "ZeroDivisionError: a bug" in line["exception"]
    else:
        assert "ERROR onebase_server.api.middleware: a request failed: POST /v1/completions" in found[0]
        assert "request_id=mine" in found[0]
        assert found[1].startswith("Traceback")
        assert found[-1] == "ZeroDivisionError: a bug"


async def test_quiet_by_default(http: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning", "text")
    await http.get("/version")
    assert lines(capsys) == []
