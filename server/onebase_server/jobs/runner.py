"""Runs the jobs, a few at a time, each as a process; what comes of them is registered. Belongs to one event loop.

Invariant: a job that is `queued` or `running` in the book will be run, or run on, by whatever server opens the book
next: training writes checkpoints and goes on from the last one. One that is `paused` waits to be resumed.
"""

import asyncio
import logging
import shutil
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onebase_adapters.errors import OneBaseError
from onebase_contract.events import Evaluated, Failed, Stage, Step, read_event
from onebase_contract.job_order import TRAINING_PROCESS, Ending, JobOrder, Limits
from onebase_contract.run_folder import Workspace
from onebase_contract.written_settings import read_settings
from onebase_server.engine_process.engine_client import EngineUnavailableError
from onebase_server.jobs.history_csv import write_history
from onebase_server.jobs.job_store import JobBook, JobsElsewhereError
from onebase_server.jobs.records import ENDED, Job, JobEvent, JobSpec, Level

log = logging.getLogger(__name__)

Register = Callable[[str, Path], Awaitable[str]]
"""Registers an adapter's folder under a name; returns how requests are to call it. Raises OneBaseError."""

_KEPT_LINES = 40
_OUT_OF_MEMORY = ("MemoryError", "allocate memory", "bad_alloc", "ut of memory", "Thread creation failed")
"""The words of Python, torch and the C library, C++, LLVM and OpenMP for it."""
_PATIENCE = 5.0
"""Seconds until another try to register, while the engine is away."""
_TRIES = 60


@dataclass(frozen=True)
class JobSettings:
    """The base that jobs train on, and the resources that they may take."""

    model: str
    """The base, as `onebase train --model` has it."""
    device: str = "auto"
    at_once: int = 1
    nice: int = Limits.nice
    """Niceness, 19 at most: they get the processor time that serving leaves."""
    threads: int | None = None
    """CPU threads of one; None: all cores."""
    memory_gib: float | None = None
    """Most memory of one, in GiB, that the kernel lets it have (Linux); None: what there is."""
    command: Sequence[str] = TRAINING_PROCESS
    """The command to run; a JobOrder follows it as the last argument."""

    @property
    def limits(self) -> Limits:
        """The limits of one job."""
        memory = None if self.memory_gib is None else int(self.memory_gib * 2**30)
        return Limits(self.nice, self.threads, memory)


class JobRunner:
    """Takes jobs and sees them through."""

    def __init__(self, book: JobBook, settings: JobSettings, register: Register) -> None:
        self.book = book
        self._settings = settings
        self._register = register
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._stopped: set[str] = set()
        """Jobs that were cancelled or paused: no process of theirs is to live."""
        self._busy: set[str] = set()
        """Jobs that a worker has in hand."""
        self._changed = asyncio.Condition()
        self._workers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take up what the last server left, and what comes; nothing, if another server runs this folder's jobs."""
        if not self.book.owned:
            log.warning("another server runs the jobs in %s: none are run here", self.book.root)
            return
        for job in reversed(await asyncio.to_thread(self.book.jobs)):
            if job.status in ENDED:
                await asyncio.to_thread(self._clear, job.id)  # a kill may have come between
                continue
            if job.status == "paused":
                self._stopped.add(job.id)
                continue
            if job.spec.base in ("", self._settings.model):
                self._waiting.put_nowait(job.id)
            else:
                waits = f"The server's base is {self._settings.model} now: the job waits for {job.spec.base}."
                await self._tell(job.id, waits, level="warn")
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._settings.at_once)]

    async def stop(self) -> None:
        """End the processes; the jobs go on with the next server."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._workers = []

    async def submit(self, spec: JobSpec) -> Job:
        """Queue a job. Raises JobsElsewhereError, or ConfigError for settings that no run can have."""
        self._check_owned()
        read_settings(await asyncio.to_thread(self._written, spec, Path("result")))
        job = await asyncio.to_thread(self.book.add_job, replace(spec, base=self._settings.model))
        await self._tell(job.id, "The job is queued.")
        self._waiting.put_nowait(job.id)
        return job

    async def cancel(self, job_id: str) -> Job:
        """End a job. One that has ended stays as it is. Raises UnknownJobError or JobsElsewhereError."""
        self._check_owned()
        job = await asyncio.to_thread(self.book.job, job_id)
        if job.status in ENDED:
            return job
        self._stop(job_id)
        return await self._end(job_id, "The job was cancelled.", status="cancelled")

    async def pause(self, job_id: str) -> Job:
        """Let a job rest until it is resumed; it goes on from its last checkpoint then. One whose result is there
        already ends all the same. Raises UnknownJobError or JobsElsewhereError."""
        self._check_owned()
        before = await asyncio.to_thread(self.book.job, job_id)
        job = await asyncio.to_thread(
            self.book.change, job_id, ("queued", "running"), status="paused", seconds_left=None
        )
        if job.status != "paused" or before.status == "paused":
            return job
        self._stop(job_id)
        async with self._changed:
            await self._changed.wait_for(lambda: job_id not in self._busy)
        job = await asyncio.to_thread(self.book.job, job_id)
        if job.status == "paused":
            await self._tell(job_id, "The job is paused.")
        return job

    async def resume(self, job_id: str) -> Job:
        """Queue a paused job again; any other stays as it is. Raises UnknownJobError or JobsElsewhereError."""
        self._check_owned()
        job = await asyncio.to_thread(self.book.job, job_id)
        if job.status != "paused":
            return job
        async with self._changed:  # else the worker that is still pausing it would take its end for a failure
            await self._changed.wait_for(lambda: job_id not in self._busy)
        job = await asyncio.to_thread(self.book.change, job_id, ("paused",), status="queued")
        if job.status == "queued" and job_id in self._stopped:
            self._stopped.discard(job_id)
            await self._tell(job_id, "The job is resumed: it waits for its turn.")
            self._waiting.put_nowait(job_id)
        return job

    async def follow(self, job_id: str, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """A job's events as they come, until it has ended. Raises UnknownJobError."""
        while True:
            async with self._changed:
                job = await asyncio.to_thread(self.book.job, job_id)
                events = await asyncio.to_thread(self.book.events, job_id, after=after)
                if not events and job.status not in ENDED:
                    await self._changed.wait()
                    continue
            for event in events:
                yield event
                after = event.number
            if not events:
                return

    def _stop(self, job_id: str) -> None:
        self._stopped.add(job_id)
        child = self._children.get(job_id)
        if child is not None and child.returncode is None:
            with suppress(ProcessLookupError):
                child.kill()

    def _check_owned(self) -> None:
        if not self.book.owned:
            raise JobsElsewhereError(
                f"Another server runs the jobs in {self.book.root}: ask that one, or start this one with another "
                "--jobs folder."
            )

    async def _work(self) -> None:
        while True:
            job_id = await self._waiting.get()
            if job_id in self._busy:  # it was paused and resumed while it waited, and is here twice
                continue
            self._busy.add(job_id)
            try:
                await self._see_through(job_id)
            except OneBaseError as error:
                await self._end(job_id, error.message, status="failed", level="error", error=error.message)
            except Exception:  # a bug of ours must end one job, not all
                log.exception("job %s failed", job_id)
                await self._end(job_id, "The server failed; its log says why.", status="failed", level="error")
            finally:
                self._busy.discard(job_id)
                async with self._changed:
                    self._changed.notify_all()

    async def _see_through(self, job_id: str) -> None:
        before = await asyncio.to_thread(self.book.job, job_id)
        job = await asyncio.to_thread(self.book.change, job_id, ("queued", "running"), status="running")
        if job.status != "running":
            return
        output = self.book.root / "results" / job.id
        if before.status == "queued":
            begun = Workspace(output).folder.is_dir()
            await self._tell(job.id, "Training goes on." if begun else "Training begins.")
        else:
            await self._tell(job.id, "The server was started again; the job goes on.", level="warn")
        if not output.is_dir() and not await self._train(job, output):
            return
        result_file = await asyncio.to_thread(write_history, self.book, job.id)
        model = await self._registered(job, output)
        await self._end(
            job.id,
            f"The result is registered as {model}.",
            status="succeeded",
            model=model,
            result_file=result_file,
        )

    async def _train(self, job: Job, output: Path) -> bool:
        """Run the process until the output is there; false if the job has ended otherwise."""
        while True:
            before = await self._last_step(job.id)
            life = await self._run(job, output)
            status = life.status
            if job.id in self._stopped:
                return False
            if status == Ending.DONE and output.is_dir():
                return True
            # Killed from outside: go on, as long as each life brings it further.
            if status < 0 and await self._last_step(job.id) > before:
                await self._tell(job.id, f"The process was killed by signal {-status}; it goes on.", level="warn")
                continue
            why = await self._by_names(job, _reason(life, self._settings.memory_gib))
            await self._end(job.id, why, status="failed", level="error", error=why)
            return False

    async def _run(self, job: Job, output: Path) -> "_Life":
        """One life of the process."""
        settings = await asyncio.to_thread(self._written, job.spec, output)
        settings["resume"] = Workspace(output).folder.is_dir()
        order = JobOrder(settings, self._settings.limits)
        child = await asyncio.create_subprocess_exec(
            *self._settings.command,
            order.to_json(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        self._children[job.id] = child
        if job.id in self._stopped:
            child.kill()
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        try:
            async with asyncio.TaskGroup() as group:
                failure = group.create_task(self._read_events(job, child.stdout))
                group.create_task(_keep_lines(child.stderr, lines))
                status = await child.wait()
            return _Life(status, failure.result(), lines)
        finally:
            del self._children[job.id]
            if child.returncode is None:
                child.kill()
                await asyncio.shield(child.wait())

    def _written(self, spec: JobSpec, output: Path) -> dict[str, Any]:
        """The settings of a job's run, as they are written down."""
        files = {"data": spec.training_file, "eval_data": spec.validation_file}
        return {
            **{name: str(self.book.file(file).path) for name, file in files.items() if file is not None},
            "model": self._settings.model,
            "device": self._settings.device,
            "method": spec.method,
            "output": str(output),
            **spec.options,
        }

    async def _by_names(self, job: Job, text: str) -> str:
        """What a process says of its files, by the names that they were uploaded under."""
        for file_id in (job.spec.training_file, job.spec.validation_file):
            if file_id is not None:
                stored = await asyncio.to_thread(self.book.file, file_id)
                text = text.replace(str(stored.path), stored.name)
        return text

    async def _read_events(self, job: Job, stream: asyncio.StreamReader | None) -> Failed | None:
        """Note what the process tells; gives its last word, if it failed and said why."""
        job_id = job.id
        failure: Failed | None = None
        async for line in _lines(stream):
            match read_event(line):
                case Failed() as last:
                    failure = last
                case Stage(text):
                    await self._tell(job_id, await self._by_names(job, text))
                case Step() as step:
                    await self._note_step(job_id, step)
                case Evaluated() as found:
                    data = {"step": found.step, "valid_loss": found.loss, "best": found.best}
                    message = f"Step {found.step}: validation loss={found.loss:.4f}"
                    if found.accuracy is not None:
                        message += f", accuracy={found.accuracy:.3f}"
                    await self._tell(job_id, message, kind="metrics", data=data)
        return failure

    async def _note_step(self, job_id: str, step: Step) -> None:
        data = {"step": step.step, "total_steps": step.steps, "train_loss": step.loss}
        data |= {"learning_rate": step.learning_rate, "tokens_per_second": step.tokens_per_second}
        message = f"Step {step.step}/{step.steps}: training loss={step.loss:.4f}"
        await asyncio.to_thread(self.book.change, job_id, seconds_left=step.seconds_left, told=time.time())
        await self._tell(job_id, message, kind="metrics", data=data)

    async def _last_step(self, job_id: str) -> int:
        events = await asyncio.to_thread(self.book.events, job_id)
        return max((int(event.data["step"]) for event in events if "step" in event.data), default=0)

    async def _registered(self, job: Job, output: Path) -> str:
        """Register the result, waiting for an engine that is away for the moment."""
        name = job.spec.name or f"ft:{job.id.removeprefix('ftjob-')}"
        for _ in range(_TRIES):
            try:
                return await self._register(name, output)
            except EngineUnavailableError as error:
                log.info("job %s waits to be registered: %s", job.id, error.message)
                await asyncio.sleep(_PATIENCE)
        return await self._register(name, output)

    async def _tell(self, job_id: str, message: str, **fields: Any) -> None:
        await asyncio.to_thread(self.book.tell, job_id, message, **fields)
        async with self._changed:
            self._changed.notify_all()

    async def _end(self, job_id: str, message: str, *, level: Level = "info", **values: Any) -> Job:
        """Write down how a job ended; of two endings the first counts."""
        job = await asyncio.to_thread(self.book.end, job_id, message, level=level, **values)
        await asyncio.to_thread(self._clear, job_id)
        async with self._changed:
            self._changed.notify_all()
        return job

    def _clear(self, job_id: str) -> None:
        """Remove what an ended job has left."""
        output = self.book.root / "results" / job_id
        for left in (output, Workspace(output).folder):
            shutil.rmtree(left, ignore_errors=True)


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[bytes]:
    while stream is not None:
        try:
            line = await stream.readline()
        except ValueError:  # one line of a megabyte: nothing of ours
            continue
        if not line:
            return
        yield line


async def _keep_lines(stream: asyncio.StreamReader | None, lines: deque[str]) -> None:
    async for line in _lines(stream):
        lines.append(line.decode(errors="replace").rstrip())


@dataclass(frozen=True)
class _Life:
    """How a process has ended."""

    status: int
    failure: Failed | None = None
    """The failure that it told of itself."""
    lines: Sequence[str] = ()
    """The last ones of its standard error output."""


def _reason(life: _Life, memory_gib: float | None) -> str:
    """Say why a process failed: in its own words, or else how it ended."""
    if memory_gib is not None and any(word in line for line in life.lines for word in _OUT_OF_MEMORY):
        return (
            f"Training needed more than the {memory_gib:g} GiB of memory that a job may have here. Set a smaller "
            "batch_tokens (or batch_size) or max_length; or have the server started with a larger --job-memory."
        )
    if life.failure is not None:
        return life.failure.text
    ending = f"was killed by signal {-life.status}" if life.status < 0 else f"ended with status {life.status}"
    last = next((line for line in reversed(life.lines) if line.strip()), "")
    return f"The training process {ending}. {last}".strip()
