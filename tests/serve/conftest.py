"""One server for the whole session, on a tiny model, with a folder to register adapters from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from support.servers import ServeProcess

KEY = "admin-secret"


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    process: ServeProcess
    url: str
    root: Path
    client: openai.OpenAI


@pytest.fixture(scope="session")
def server(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home, root = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("adapters")
    process = ServeProcess(
        "--model", tiny_model("llama"), "--served-name", "tiny", "--port", "0", "--adapter-root", root,
        "--admin-key", KEY, "--cache-gib", "0.01", "--max-running", "4", "--max-waiting", "4", "--device", "cpu",
        home=home,
    )  # fmt: skip
    try:
        url = process.wait_until_ready()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield Served(process, url, root, client)
    finally:
        process.kill()
