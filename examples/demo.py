"""`make demo`: two adapters from real data, served beside their base from one 4-bit model, called by name.

Everything that a user would type is run as they would type it, and shown. What it makes lies under out/demo; a
second run finds it there.
"""

import asyncio
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from rich.console import Console
from rich.live import Live
from rich.table import Table

from examples.prepare import prepare
from onebase_adapters.errors import OneBaseError
from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.catalog import fetch_base
from onebase_training.data import read_dataset
from onebase_training.data.encoding.encode import verbalise

ROOT = Path("out/demo")
START_SECONDS = 180


@dataclass(frozen=True)
class Task:
    """A data set, and how an adapter is trained on it."""

    name: str
    recipe: str
    rows: int
    held_out: int
    options: tuple[str, ...]
    shown: tuple[int, ...]
    """Held-out rows that are sent to base and adapters."""

    @property
    def data(self) -> Path:
        return ROOT / self.name / "data"

    @property
    def adapter(self) -> Path:
        return ROOT / self.name / "adapter"

    def prompts(self) -> list[tuple[str, str]]:
        """The shown rows' prompts and right answers."""
        examples = read_dataset(self.data / "eval.jsonl").examples
        return [verbalise(examples[number]) for number in self.shown]


TASKS = (
    Task(
        "tweets", "tweets", rows=700, held_out=200,
        options=("--epochs", "1", "--eval-every", "26", "--metric-examples", "200"), shown=(2, 3),
    ),
    Task(
        "addresses", "address-fields", rows=700, held_out=100,
        options=("--epochs", "1", "--eval-every", "32", "--metric-examples", "64"), shown=(0, 1),
    ),
)  # fmt: skip


def main() -> int:
    """Run the demonstration; returns the exit status."""
    console = Console(highlight=False)
    try:
        _run(console)
    except KeyboardInterrupt:
        console.print("stopped; nothing is left running, and nothing half-written")
        return 130
    except OneBaseError as error:
        console.print(f"[red]error:[/red] {error.message}")
        return 1
    except subprocess.CalledProcessError as error:
        console.print(f"[red]error:[/red] {error.cmd[0]} failed; its message is above")
        return 1
    return 0


def _run(console: Console) -> None:
    console.rule("the base")
    fetch_base(DEFAULT_BASE, progress=console.print)
    for task in TASKS:
        console.rule(f"an adapter: {task.name}")
        _train(task, console)
    console.rule("the server")
    key = secrets.token_hex(8)
    with _server(console, key) as url:
        console.rule("base and adapters at once, through the openai client")
        asyncio.run(_call(console, url, key))
    console.rule("held-out data, before and after")
    console.print(_metrics())
    console.print(
        "The base answers freely, in whatever words; told to choose one of the labels it would do better."
    )
    console.print(f"The adapters are in {ROOT}: plain PEFT folders.")
    console.print(f"$ onebase serve --store {ROOT / 'store'}   serves them again", soft_wrap=True)


def _train(task: Task, console: Console) -> None:
    if (task.adapter / "adapter_model.safetensors").is_file():
        console.print(f"{task.adapter} is there from an earlier run (delete it to train anew)")
        return
    if not (task.data / "eval.jsonl").is_file():
        prepare(task.recipe, task.data, limit=task.rows, eval_limit=task.held_out, progress=console.print)
    unfinished = task.adapter.with_name(f".{task.adapter.name}.training")
    resume = ("--resume",) if unfinished.is_dir() else ()
    _onebase(
        console,
        ("train", "--method", "qlora", "--data", str(task.data / "train.jsonl")),
        ("--eval-data", str(task.data / "eval.jsonl"), "--output", str(task.adapter), *resume, *task.options),
    )


def _onebase(console: Console, *parts: tuple[str, ...]) -> None:
    """Run a command line, shown first. Raises CalledProcessError."""
    words = ["onebase", *(word for part in parts for word in part)]
    console.print(f"[bold]$ {shlex.join(words)}[/bold]")
    # Ctrl-C reaches it too, as the terminal's whole group; it cleans up, and we wait for that.
    process = subprocess.Popen([_program(), *words[1:]])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise subprocess.CalledProcessError(status, words)


def _program() -> str:
    return str(Path(sys.executable).with_name("onebase"))


@contextmanager
def _server(console: Console, key: str) -> Iterator[str]:
    """A running server's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["onebase", "serve", "--port", str(port), "--adapter-root", str(ROOT), "--store", str(ROOT / "store")]
    console.print(f"[bold]$ ONEBASE_ADMIN_KEY=... {shlex.join(words)}[/bold]")
    process = subprocess.Popen([_program(), *words[1:]], env={**os.environ, "ONEBASE_ADMIN_KEY": key})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise subprocess.CalledProcessError(status, ["onebase serve"])
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise subprocess.CalledProcessError(1, ["onebase serve"])


async def _call(console: Console, url: str, key: str) -> None:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
    async with client, httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}) as admin:
        # The base is at work while the adapters are registered.
        busy = asyncio.create_task(_ask(client, DEFAULT_BASE, "Once upon a time", {}, max_tokens=64))
        registered = {entry["id"] for entry in (await admin.get("/v1/adapters")).json()["data"]}
        for task in TASKS:
            if task.name not in registered:
                body = {"name": task.name, "path": f"{task.name}/adapter"}
                reply = await admin.post("/v1/adapters", json=body, timeout=60)
                reply.raise_for_status()
                info = reply.json()["info"]
                console.print(
                    f"POST /v1/adapters {json.dumps(body)} -> {reply.status_code}: {info['primitives'][0]}"
                )
        console.print(f"models: {', '.join([model.id async for model in client.models.list()])}")
        await busy
        names = [DEFAULT_BASE, *(task.name for task in TASKS)]
        for task in TASKS:
            for prompt, answer in task.prompts():
                await _side_by_side(console, client, names, prompt, answer)


async def _side_by_side(console: Console, client: AsyncOpenAI, names: list[str], prompt: str, answer: str) -> None:
    """Send a prompt to all models at once, and show what streams back."""
    texts = dict.fromkeys(names, "")

    def table() -> Table:
        shown = Table(
            *names, title=f"{prompt.strip()}\n(right: {answer.strip()})", title_justify="left", expand=True
        )
        shown.add_row(*(texts[name] for name in names))
        return shown

    with Live(table(), console=console, refresh_per_second=12) as live:

        async def show(name: str) -> None:
            await _ask(client, name, prompt, texts, max_tokens=60, shown=lambda: live.update(table()))

        await asyncio.gather(*(show(name) for name in names))


async def _ask(
    client: AsyncOpenAI,
    name: str,
    prompt: str,
    texts: dict[str, str],
    *,
    max_tokens: int,
    shown: Any = lambda: None,
) -> None:
    stream = await client.completions.create(
        model=name, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
    )
    async for chunk in stream:
        texts[name] = texts.get(name, "") + chunk.choices[0].text
        shown()


def _metrics() -> Table:
    table = Table("adapter", "measure", "base", "adapter's", title=f"{DEFAULT_BASE}, NF4")
    for task in TASKS:
        metrics = json.loads((task.adapter / "onebase.json").read_text())["metrics"]
        for name, after in metrics["after"].items():
            if isinstance(after, int | float):
                table.add_row(task.name, name.replace("_", " "), f"{metrics['before'][name]:.3f}", f"{after:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
