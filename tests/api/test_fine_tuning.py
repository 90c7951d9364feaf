"""/v1/files and /v1/fine_tuning/jobs: the stock client's calls, what is refused, and jobs that outlive a server."""

import asyncio
import io
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_contract.events import Failed
from onebase_contract.settings import JOB_METHODS
from onebase_contract.written_settings import read_settings
from onebase_server.api.schemas.fine_tuning import Hyperparameters
from onebase_server.api.services import ApiSettings, Services
from onebase_server.jobs.job_store import JobBook, JobsElsewhereError
from onebase_server.jobs.records import JobSpec
from onebase_server.jobs.runner import JobRunner, JobSettings, _Life, _reason

JOBS, FILES = "/v1/fine_tuning/jobs", "/v1/files"


@pytest.fixture
def http(admin: httpx.AsyncClient) -> httpx.AsyncClient:
    return admin


@pytest.fixture
def client(live: str, admin_key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key=admin_key, max_retries=0) as opened:
        yield opened


def data(**plan: Any) -> bytes:
    """A training file that says what becomes of its run."""
    return json.dumps(plan).encode() + b"\n"


def wait(client: openai.OpenAI, job_id: str, *statuses: str) -> Any:
    for _ in range(1000):
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in statuses:
            return job
        assert job.status in ("queued", "running"), job.error
        time.sleep(0.01)
    raise AssertionError(f"not within 10 s: {statuses}")


def test_the_stock_client_trains_and_calls_the_result(
    client: openai.OpenAI, engine: Any, services: Services
) -> None:
    content = data(steps=5)
    file = client.files.create(file=("data.jsonl", content), purpose="fine-tune")
    assert (file.filename, file.purpose, file.bytes, file.status) == (
        "data.jsonl",
        "fine-tune",
        len(content),
        "processed",
    )
    held_out = client.files.create(file=("held out.csv", data()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        validation_file=held_out.id,
        suffix="support",
        seed=7,
        metadata={"who": "me"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )
    assert (job.status, job.model, job.training_file, job.seed) == ("queued", "tiny", file.id, 7)
    done = wait(client, job.id, "succeeded")
    assert done.fine_tuned_model == "support"
    assert done.finished_at >= done.created_at
    assert (done.error, done.metadata, done.user_provided_suffix) == (None, {"who": "me"}, "support")
    assert done.method.supervised.hyperparameters.n_epochs == 2

    made = client.completions.create(model=done.fine_tuned_model, prompt="abc")
    assert made.choices[0].text == "abc"
    record = services.store.get("support")
    assert engine.requests[-1].adapter == record.digest
    assert record.metrics == {"after": {"loss": 0.5}}
    given = json.loads((record.folder / "adapter_config.json").read_text())
    order = given["given"]
    assert order["limits"] == {"nice": 1, "threads": None, "memory": None}
    options = order["settings"]
    assert options.pop("data").endswith(f"{file.id}.jsonl")
    assert options.pop("eval_data").endswith(f"{held_out.id}.csv")
    assert Path(options.pop("output")).name == job.id
    assert options == {
        "model": "tiny", "device": "auto", "method": "qlora", "seed": 7, "epochs": 2.0, "resume": False
    }  # fmt: skip

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    messages = [event.message for event in reversed(events)]
    assert messages[0] == "The job is queued."
    assert messages[-1] == "The result is registered as support."
    assert "Step 4/5: training loss=0.2500" in messages
    assert "Step 4: validation loss=0.1250, accuracy=0.500" in messages
    assert "a library's print" not in messages
    assert {event.type for event in events} == {"message", "metrics"}
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [4, 2]
    assert checkpoints[0].fine_tuned_model_checkpoint == "support"
    assert checkpoints[0].metrics.full_valid_loss == 0.125
    assert checkpoints[0].metrics.train_loss == 0.25
    result = client.files.content(done.result_files[0]).text.splitlines()
    assert result[0] == "step,train_loss,valid_loss,learning_rate"
    assert result[4] == "4,0.25,0.125,0.1"
    assert [one.id for one in client.fine_tuning.jobs.list()] == [job.id]
    assert not any((services.book.root / "results").iterdir())


def test_a_second_job_of_the_same_name_makes_a_version(client: openai.OpenAI) -> None:
    names = []
    for steps in (1, 2):
        file = client.files.create(file=("data.jsonl", data(steps=steps)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="support")
        names.append(wait(client, job.id, "succeeded").fine_tuned_model)
    assert names == ["support", "support@2"]
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    name = wait(client, job.id, "succeeded").fine_tuned_model
    assert name == f"ft:{job.id.removeprefix('ftjob-')}"
    assert client.models.retrieve(name).parent == "tiny"  # type: ignore[attr-defined]


def test_jobs_wait_for_each_other_and_can_be_cancelled(client: openai.OpenAI, services: Services) -> None:
    file = client.files.create(file=("data.jsonl", data(steps=1000, delay=0.05)), purpose="fine-tune")
    first = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="a")
    second = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="b")
    wait(client, first.id, "running")
    while client.fine_tuning.jobs.retrieve(first.id).estimated_finish is None:
        time.sleep(0.01)
    assert client.fine_tuning.jobs.retrieve(second.id).status == "queued"
    with pytest.raises(openai.ConflictError, match="still needs the file"):
        client.files.delete(file.id)
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    cancelled = client.fine_tuning.jobs.cancel(first.id)
    assert (cancelled.status, cancelled.fine_tuned_model) == ("cancelled", None)
    assert client.fine_tuning.jobs.cancel(first.id).finished_at == cancelled.finished_at
    for _ in range(200):
        if not services.runner._children and not any((services.book.root / "results").iterdir()):
            break
        time.sleep(0.01)
    assert not services.runner._children
    assert not any((services.book.root / "results").iterdir())
    assert services.store.list() == []
    client.files.delete(file.id)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"error": "{data}, line 7: no prompt."}, "data.jsonl, line 7: no prompt."),
        ({"exit": 3}, "The training process ended with status 3. last words"),
        ({"kill_at": 0, "steps": 0, "config": {"refuse": "AdapterMismatchError"}}, "The engine refuses this one."),
    ],
)
def test_failures_say_why(client: openai.OpenAI, services: Services, plan: dict[str, Any], message: str) -> None:
    file = client.files.create(file=("data.jsonl", data(**plan)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="a")
    failed = wait(client, job.id, "failed")
    assert failed.error.message == message
    assert failed.fine_tuned_model is None
    last = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    assert (last.level, last.message) == ("error", message)
    assert services.store.list() == []
    assert not any((services.book.root / "results").iterdir())


def test_a_killed_process_goes_on(client: openai.OpenAI) -> None:
    file = client.files.create(file=("data.jsonl", data(steps=4, kill_at=2)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="a")
    wait(client, job.id, "succeeded")
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert "The process was killed by signal 9; it goes on." in messages
    assert "fake run from step 3" in messages


def test_a_paused_job_rests_and_goes_on_where_it_was(client: openai.OpenAI, services: Services) -> None:
    file = client.files.create(file=("data.jsonl", data(steps=40, delay=0.02)), purpose="fine-tune")
    first, second = (
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix=name) for name in ("a", "b")
    )
    wait(client, first.id, "running")
    while services.runner.book.job(first.id).seconds_left is None:
        time.sleep(0.01)
    paused = client.fine_tuning.jobs.pause(first.id)
    assert (paused.status, paused.estimated_finish) == ("paused", None)
    assert first.id not in services.runner._children
    assert client.fine_tuning.jobs.pause(first.id).status == "paused"
    assert client.fine_tuning.jobs.pause(second.id).status == "paused"
    assert client.fine_tuning.jobs.resume(second.id).status == "queued"
    with pytest.raises(openai.ConflictError, match="still needs the file"):
        client.files.delete(file.id)
    wait(client, second.id, "succeeded")
    assert client.fine_tuning.jobs.retrieve(first.id).status == "paused"
    assert client.fine_tuning.jobs.resume(first.id).status == "queued"
    assert client.fine_tuning.jobs.resume(first.id).status in ("queued", "running")
    done = wait(client, first.id, "succeeded")
    assert client.fine_tuning.jobs.pause(first.id).finished_at == done.finished_at
    messages = [event.message for event in client.fine_tuning.jobs.list_events(first.id, limit=100)][::-1]
    order = ["Training begins.", "The job is paused.", "The job is resumed: it waits for its turn."]
    order += ["Training goes on."]
    assert [message for message in messages if message in order] == order
    runs = [message for message in messages if message.startswith("fake run from step")]
    assert len(runs) == 2
    assert runs[0] == "fake run from step 1" != runs[1]


async def test_of_two_endings_the_first_counts(http: httpx.AsyncClient, services: Services) -> None:
    file = (
        await http.post(FILES, files={"file": ("a.jsonl", data(steps=1))}, data={"purpose": "fine-tune"})
    ).json()
    job = services.book.add_job(JobSpec(file["id"], "a", "lora"))
    ended = services.book.end(job.id, "It was cancelled.", level="info", status="cancelled")
    assert services.book.end(job.id, "It is done.", level="info", status="succeeded", model="a") == ended
    assert [event.message for event in services.book.events(job.id)] == ["It was cancelled."]


async def test_a_job_that_is_resumed_while_it_is_being_paused_goes_on(
    http: httpx.AsyncClient, services: Services
) -> None:
    await services.runner.start()
    upload = {"file": ("data.jsonl", data(steps=40, delay=0.02))}
    file = (await http.post(FILES, files=upload, data={"purpose": "fine-tune"})).json()
    job = (await http.post(JOBS, json={"model": "tiny", "training_file": file["id"]})).json()
    for _ in range(1000):
        if services.book.job(job["id"]).seconds_left is not None:
            break
        await asyncio.sleep(0.01)
    await asyncio.gather(*(http.post(f"{JOBS}/{job['id']}/{what}") for what in ("pause", "resume", "pause")))
    await http.post(f"{JOBS}/{job['id']}/resume")
    for _ in range(1000):
        if (status := services.book.job(job["id"]).status) not in ("queued", "running"):
            break
        await asyncio.sleep(0.01)
    await services.runner.stop()
    assert status == "succeeded"


async def test_a_paused_job_stays_so_with_the_next_server(http: httpx.AsyncClient, services: Services) -> None:
    upload = {"file": ("data.jsonl", data(steps=1000, delay=0.02))}
    file = (await http.post(FILES, files=upload, data={"purpose": "fine-tune"})).json()
    job = (await http.post(JOBS, json={"model": "tiny", "training_file": file["id"]})).json()
    assert (await http.post(f"{JOBS}/{job['id']}/pause")).json()["status"] == "paused"
    await services.runner.stop()
    await services.runner.start()
    await asyncio.sleep(0.05)
    assert (await http.get(f"{JOBS}/{job['id']}")).json()["status"] == "paused"
    assert (await http.post(f"{JOBS}/{job['id']}/cancel")).json()["status"] == "cancelled"


async def test_a_file_is_deleted_when_its_time_is_over(
    http: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    fields = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    kept, over, needed = [
        (await http.post(FILES, files={"file": ("data.jsonl", data(steps=1000, delay=0.02))}, data=its)).json()
        for its in ({"purpose": "fine-tune"}, fields, fields)
    ]
    assert kept["expires_at"] is None
    assert over["expires_at"] == over["created_at"] + 3600
    job = (await http.post(JOBS, json={"model": "tiny", "training_file": needed["id"]})).json()
    monkeypatch.setattr("onebase_server.jobs.job_store.time.time", lambda: now + 4000)
    assert {one["id"] for one in (await http.get(FILES)).json()["data"]} == {kept["id"], needed["id"]}
    assert (await http.get(f"{FILES}/{over['id']}")).status_code == 404
    assert not list(services.book.root.glob(f"files/{over['id']}*"))
    await http.post(f"{JOBS}/{job['id']}/cancel")
    assert (await http.get(f"{FILES}/{needed['id']}")).status_code == 404
    for wrong, field in [
        ({"expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        ({"expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        (fields | {"expires_after[seconds]": "3599"}, "expires_after[seconds]"),
        (fields | {"expires_after[seconds]": "9" * 30}, "expires_after[seconds]"),
    ]:
        reply = await http.post(FILES, files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"} | wrong)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_a_book_of_the_first_schema_is_read(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as db:
        db.executescript(
            "CREATE TABLE files (id TEXT PRIMARY KEY, name TEXT NOT NULL, purpose TEXT NOT NULL, "
            "bytes INTEGER NOT NULL, created REAL NOT NULL) STRICT; "
            "INSERT INTO files VALUES ('file-1', 'a.jsonl', 'fine-tune', 2, 5.0); PRAGMA user_version = 1;"
        )
    with closing(JobBook(tmp_path)) as book:
        (stored,) = book.files()
        assert (stored.name, stored.created, stored.expires) == ("a.jsonl", 5.0, None)
        assert book.add_file(io.BytesIO(b"{}"), "b.jsonl", "fine-tune", lifetime=9.0).expires is not None


def test_events_stream_as_they_come(live: str, client: openai.OpenAI, admin_key: str) -> None:
    file = client.files.create(file=("data.jsonl", data(steps=3, delay=0.05)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="a")
    headers = {"authorization": f"Bearer {admin_key}"}
    with httpx.stream("GET", f"{live}{JOBS}/{job.id}/events?stream=true", headers=headers) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    streamed = [json.loads(line.removeprefix("data: "))["id"] for line in lines[:-1]]
    assert streamed == [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)][::-1]
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"


async def upload(http: httpx.AsyncClient, **plan: Any) -> str:
    reply = await http.post(FILES, files={"file": ("d.jsonl", data(**plan))}, data={"purpose": "fine-tune"})
    assert reply.status_code == 200, reply.text
    file_id: str = reply.json()["id"]
    return file_id


async def until(http: httpx.AsyncClient, job_id: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(1000):
        job: dict[str, Any] = (await http.get(f"{JOBS}/{job_id}")).json()
        if true(job):
            return job
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within 10 s, but {job}")


async def test_jobs_outlive_the_server(http: httpx.AsyncClient, services: Services) -> None:
    await services.runner.start()
    file_id = await upload(http, steps=6, delay=0.1)
    ids = []
    for name in ("a", "b"):
        body = {"model": "tiny", "training_file": file_id, "suffix": name}
        ids.append((await http.post(JOBS, json=body)).json()["id"])
    await until(http, ids[0], lambda job: job["estimated_finish"] is not None)
    await services.runner.stop()
    assert not services.runner._children
    statuses = [(await http.get(f"{JOBS}/{job_id}")).json()["status"] for job_id in ids]
    assert statuses == ["running", "queued"]
    await services.runner.start()
    for job_id in ids:
        done = await until(http, job_id, lambda job: job["status"] not in ("queued", "running"))
        assert done["status"] == "succeeded", done
    events = (await http.get(f"{JOBS}/{ids[0]}/events?limit=100")).json()["data"]
    messages = [event["message"] for event in events]
    assert "The server was started again; the job goes on." in messages
    assert "fake run from step 1" in messages
    assert any(f"fake run from step {step}" in messages for step in range(2, 6))
    await services.runner.stop()


async def test_a_job_waits_for_a_server_of_its_base(http: httpx.AsyncClient, services: Services) -> None:
    file_id = await upload(http, steps=1)
    job = (await http.post(JOBS, json={"model": "tiny", "training_file": file_id})).json()["id"]
    runner, own = services.runner, services.runner._settings
    runner._settings, runner._waiting = replace(own, model="another"), asyncio.Queue()  # as in a new process
    await runner.start()
    events = (await http.get(f"{JOBS}/{job}/events")).json()["data"]
    assert f"The server's base is another now: the job waits for {own.model}." in [e["message"] for e in events]
    await asyncio.sleep(0.2)
    assert (await http.get(f"{JOBS}/{job}")).json()["status"] == "queued"
    await runner.stop()
    runner._settings = own
    await runner.start()
    done = await until(http, job, lambda job: job["status"] not in ("queued", "running"))
    assert done["status"] == "succeeded"
    await runner.stop()


async def test_a_result_waits_for_an_engine_that_is_away(
    http: httpx.AsyncClient, services: Services, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onebase_server.engine_process.engine_client import EngineUnavailableError

    monkeypatch.setattr("onebase_server.jobs.runner._PATIENCE", 0.02)
    original, calls = engine.load_adapter, []

    async def away(digest: str, folder: str) -> Any:
        calls.append(digest)
        if len(calls) < 4:
            raise EngineUnavailableError("The engine is restarting.", retry_after=5)
        return await original(digest, folder)

    engine.load_adapter = away
    await services.runner.start()
    body = {"model": "tiny", "training_file": await upload(http), "suffix": "a"}
    job_id = (await http.post(JOBS, json=body)).json()["id"]
    await until(http, job_id, lambda job: job["status"] == "succeeded")
    await services.runner.stop()
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": None}, "model", "valid string"),
        ({"model": "gpt-4o"}, "model", "fine-tunes its base, 'tiny'"),
        ({"training_file": "file-none"}, "training_file", "No file has the id 'file-none'"),
        ({"validation_file": "file-none"}, "validation_file", "No file has the id 'file-none'"),
        ({"suffix": "a b"}, "suffix", "cannot be an adapter's name"),
        ({"suffix": ""}, "suffix", "at least 1 character"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "is not supported"),
        ({"method": {"type": "dpo"}}, "method.type", "may be supervised, qlora, lora"),
        ({"method": {"type": "supervised", "dpo": {}}}, "dpo", "is not supported"),
        ({"method": {"type": "lora", "hyperparameters": {"rank": 0}}}, "method.hyperparameters.rank", "greater"),
        (
            {"method": {"type": "lora", "hyperparameters": {"output": "x"}}},
            "method.hyperparameters.output",
            "Unknown",
        ),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "greater"),
        ({"hyperparameters": {"batch_size": 4, "accumulate": 2}}, "accumulate", "send one of them"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 0}},
            "hyperparameters.learning_rate_multiplier",
            "greater than 0",
        ),
        ({"hyperparameters": {}, "method": {"type": "lora"}}, "hyperparameters", "once"),
        ({"epochs": 3}, "epochs", "Unknown field"),
        ({"hyperparameters": {"places": "1,x"}}, "places", "INTEGER"),
        ({"hyperparameters": {"places": "-2"}}, "places", "-1 or more"),
        ({"hyperparameters": {"prompt_init": "text"}}, "prompt_text", "needs"),
        ({"hyperparameters": {"rank_pattern": "q_proj"}}, "rank_pattern", "NAME=INTEGER"),
    ],
)
async def test_bad_jobs(http: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str) -> None:
    body = {"model": "tiny", "training_file": await upload(http), **fields}
    reply = await http.post(JOBS, json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"]
    assert (await http.get(JOBS)).json()["data"] == []


async def test_methods_and_their_settings(http: httpx.AsyncClient, services: Services) -> None:
    settings = {"rank": 4, "prompt_text": "--output=/etc", "head": True, "n_epochs": "auto", "batch_size": "auto"}
    for body in (
        {"method": {"type": "p-tuning-v2", "hyperparameters": settings}},
        {"hyperparameters": settings, "suffix": "x"},
    ):
        given = {"model": "tiny", "training_file": await upload(http), **body}
        job = (await http.post(JOBS, json=given)).json()
        assert job["hyperparameters"]["rank"] == 4
        spec = services.book.job(job["id"]).spec
        assert spec.options == {"rank": 4, "prompt_text": "--output=/etc", "head": True}
        config = read_settings(services.runner._written(spec, Path("/x/out")))
        assert (config.prompt_text, config.head, config.rank) == ("--output=/etc", True, 4)
        assert (config.method, config.output) == (body.get("method", {"type": "qlora"})["type"], Path("/x/out"))


async def test_the_real_trainer(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """The process that `onebase serve` starts, on a tiny base: its lines and its result."""
    found: list[tuple[str, dict[str, Any]]] = []

    async def register(name: str, folder: Path) -> str:
        found.append((name, json.loads((folder / "adapter_config.json").read_text())))
        return name

    rows = [json.dumps({"prompt": f"{i} cat =", "completion": f" {i % 3}"}) + "\n" for i in range(40)]
    with closing(JobBook(tmp_path / "jobs")) as book:
        good = book.add_file(io.BytesIO("".join(rows).encode()), "good.jsonl", "fine-tune")
        runner = JobRunner(book, JobSettings(str(tiny_model("llama")), device="cpu", threads=1), register)
        await runner.start()
        options = {"rank": 2, "max_steps": 4, "eval_every": 2, "metric_examples": 0, "batch_size": 8}
        options["learning_rate_multiplier"] = 0.5
        job = await runner.submit(JobSpec(good.id, "a", "lora", options=options))
        events = [event async for event in runner.follow(job.id)]
        await runner.stop()
        assert book.job(job.id).status == "succeeded", events[-1].message
        assert found[0][0] == "a"
        assert found[0][1]["r"] == 2
        steps = [event.data["step"] for event in events if "train_loss" in event.data]
        assert steps == [1, 2, 3, 4]
        from onebase_training.methods.attach import find_method

        peak = max(event.data.get("learning_rate", 0) for event in events)
        assert peak == pytest.approx(0.5 * (find_method("lora").learning_rate or 0))
        assert [event.data["step"] for event in events if "valid_loss" in event.data] == [2, 4]
        assert list((book.root / "results").iterdir()) == []


def test_settings_are_those_of_the_trainer() -> None:
    import inspect

    from onebase.cli.train import train
    from onebase_training.methods.attach import METHODS as TRAINED

    assert set(JOB_METHODS) <= set(TRAINED)
    known = set(inspect.signature(train).parameters)
    ours = set(Hyperparameters.model_fields) - {"n_epochs"} | {"epochs"}
    assert ours <= known


async def test_files(http: httpx.AsyncClient, services: Services) -> None:
    ids = [await upload(http, steps=number) for number in range(3)]
    listed = (await http.get(FILES)).json()
    assert [file["id"] for file in listed["data"]] == ids[::-1]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (ids[2], ids[0], False)
    page = (await http.get(FILES, params={"limit": 2, "order": "asc"})).json()
    assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[:2], True)
    page = (await http.get(FILES, params={"after": ids[1], "order": "desc"})).json()
    assert [file["id"] for file in page["data"]] == [ids[0]]
    assert (await http.get(FILES, params={"purpose": "other"})).json()["data"] == []
    assert (await http.get(f"{FILES}/{ids[0]}")).json()["filename"] == "d.jsonl"
    assert (await http.get(f"{FILES}/{ids[1]}/content")).content == data(steps=1)
    assert (await http.delete(f"{FILES}/{ids[0]}")).json() == {"id": ids[0], "object": "file", "deleted": True}
    assert (await http.get(f"{FILES}/{ids[0]}")).status_code == 404
    assert len(list((services.book.root / "files").iterdir())) == 2


@pytest.mark.parametrize(
    ("given", "fields", "param", "message"),
    [
        ({}, {"purpose": "fine-tune"}, "file", "in its field 'file'"),
        ({"file": ("a", b"x")}, {}, "purpose", "must be one of: fine-tune"),
        ({"file": ("a", b"x")}, {"purpose": "assistants"}, "purpose", "must be one of: fine-tune"),
        ({"file": ("a", b"x")}, {"purpose": "fine-tune", "x": "y"}, "x", "Unknown field 'x'"),
    ],
)
async def test_bad_uploads(
    http: httpx.AsyncClient, services: Services, given: Any, fields: dict[str, str], param: str, message: str
) -> None:
    reply = await http.post(FILES, files=given, data=fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"]
    assert list((services.book.root / "files").iterdir()) == []


async def test_odd_file_names_stay_out_of_paths(http: httpx.AsyncClient, services: Services) -> None:
    for name in ("../../x.jsonl", "a/b.js/on", "." * 300, 'é.cs"v', ".partial"):
        reply = await http.post(FILES, files={"file": (name, b"x")}, data={"purpose": "fine-tune"})
        assert reply.status_code == 200, reply.text
        stored = services.book.file(reply.json()["id"])
        assert stored.path.parent == services.book.root / "files"
        assert stored.path.read_bytes() == b"x"


async def test_unknown_ids(http: httpx.AsyncClient) -> None:
    for method, path in [
        ("GET", f"{JOBS}/ftjob-x"),
        ("POST", f"{JOBS}/ftjob-x/cancel"),
        ("POST", f"{JOBS}/ftjob-x/pause"),
        ("POST", f"{JOBS}/ftjob-x/resume"),
        ("GET", f"{JOBS}/ftjob-x/events"),
        ("GET", f"{JOBS}/ftjob-x/events?stream=true"),
        ("GET", f"{JOBS}/ftjob-x/checkpoints"),
        ("GET", f"{FILES}/file-x"),
        ("GET", f"{FILES}/file-x/content"),
        ("DELETE", f"{FILES}/file-x"),
    ]:
        reply = await http.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found"), path
    for path in (JOBS, FILES):
        reply = await http.get(path, params={"after": "nobody"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "after")
        reply = await http.get(path, params={"limit": 0})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "limit")


async def test_the_admin_key_is_needed(http: httpx.AsyncClient) -> None:
    del http.headers["authorization"]
    for method, path in [
        ("GET", JOBS),
        ("POST", JOBS),
        ("GET", FILES),
        ("POST", FILES),
        ("GET", f"{FILES}/x/content"),
    ]:
        assert (await http.request(method, path)).status_code == 401


async def test_a_server_without_jobs_says_so(
    engine: Any, codec: Any, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient]
) -> None:
    async with in_process(Services.over(engine, codec, store, ApiSettings("tiny", admin_key="k")), key="k") as http:
        assert (await http.get(JOBS)).status_code == 403


@pytest.mark.parametrize(
    "last",
    [
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
        "error: Cannot load 'tiny': unable to mmap 9 bytes from file: Cannot allocate memory (12)",
        "MemoryError",
        "libgomp: Thread creation failed: Resource temporarily unavailable",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_what_a_job_is_told_that_needed_too_much_memory(last: str) -> None:
    assert "more than the 1.5 GiB" in _reason(_Life(1, None, ["Traceback", last, "after it"]), 1.5)
    assert "smaller batch_tokens" in _reason(_Life(-6, None, [last]), 1.5)
    assert "GiB" not in _reason(_Life(1, None, [last]), None)
    assert _reason(_Life(1, Failed("It broke.")), 1.5) == "It broke."


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
async def test_a_job_that_needs_too_much_memory(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """The kernel's limit, in the real process: too little for the largest batch."""

    async def register(name: str, _: Path) -> str:
        return name

    rows = [json.dumps({"prompt": f"{i} cat =", "completion": f" {i}" * 30}) + "\n" for i in range(600)]
    with closing(JobBook(tmp_path / "jobs")) as book:
        data = book.add_file(io.BytesIO("".join(rows).encode()), "a.jsonl", "fine-tune")
        settings = JobSettings(str(tiny_model("llama")), device="cpu", threads=1, memory_gib=1.0)
        runner = JobRunner(book, settings, register)
        await runner.start()
        options = {"rank": 2, "max_steps": 4, "metric_examples": 0, "batch_tokens": 1 << 20}
        job = await runner.submit(JobSpec(data.id, "a", "lora", options=options))
        [event async for event in runner.follow(job.id)]
        await runner.stop()
        ended = book.job(job.id)
        assert ended.status == "failed"
        # Told before training by its own estimate, or else by the kernel.
        assert str(ended.error).startswith(("The largest batch needs", "Training needed more than the 1 GiB"))


async def test_of_two_servers_with_one_folder_the_first_runs_its_jobs(
    http: httpx.AsyncClient, services: Services, tmp_path: Path
) -> None:
    path = await upload(http)
    with closing(JobBook(tmp_path / "jobs")) as second:
        runner = JobRunner(second, services.runner._settings, services.runner._register)
        await runner.start()
        assert (services.book.owned, second.owned) == (True, False)
        with pytest.raises(JobsElsewhereError, match="ask that one, or start this one with another --jobs folder"):
            await runner.submit(JobSpec(path, "a", "lora"))
        await runner.stop()
    services.book.close()
    with closing(JobBook(tmp_path / "jobs")) as third:
        assert third.owned
