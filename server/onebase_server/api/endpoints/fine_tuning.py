"""/v1/fine_tuning/jobs: train an adapter on the server and call it by name a moment later. Needs the admin key."""

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from onebase_adapters.errors import AdapterExistsError, AdapterFormatError
from onebase_adapters.store.registry import check_name
from onebase_server.api.auth import require_admin
from onebase_server.api.endpoints.files import page_of
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.schemas.fine_tuning import FineTuningRequest
from onebase_server.api.services import Services, services_of
from onebase_server.api.sse import SseResponse, Write, event
from onebase_server.jobs.job_store import UnknownFileError
from onebase_server.jobs.records import Job, JobEvent, JobSpec

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], dependencies=[Depends(require_admin)])

Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("", summary="Start a fine-tuning job", **answers(doc.Job))
async def create_job(body: FineTuningRequest, request: Request) -> dict[str, Any]:
    """It waits its turn, trains at low priority, and registers its result under `suffix`."""
    services = services_of(request)
    if body.model != services.settings.base_name:
        raise InvalidRequestError(
            f"This server fine-tunes its base, {services.settings.base_name!r}, and nothing else.", field="model"
        )
    if body.suffix is not None:
        _check_suffix(services, body.suffix)
    for field in ("training_file", "validation_file"):
        file_id = getattr(body, field)
        if file_id is not None:
            await asyncio.to_thread(_check_file, services, file_id, field)
    settings = body.settings()
    options = settings.options()
    if body.seed is not None:
        options["seed"] = body.seed
    spec = JobSpec(
        training_file=body.training_file,
        validation_file=body.validation_file,
        name=body.suffix or "",
        method=body.method_name(),
        options=options,
        request={
            "suffix": body.suffix,
            "seed": body.seed or 0,
            "metadata": body.metadata or {},
            "hyperparameters": settings.model_dump(exclude_none=True),
            "type": body.method.type if body.method is not None else "supervised",
        },
    )
    return _describe(services, await services.runner.submit(spec))


@router.get("", summary="List the jobs", **answers(doc.Jobs))
async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    services = services_of(request)
    jobs = await asyncio.to_thread(services.book.jobs)
    page, more = page_of(jobs, [job.id for job in jobs], after, limit)
    return {"object": "list", "data": [_describe(services, job) for job in page], "has_more": more}


@router.get("/{job_id}", summary="One job", **answers(doc.Job))
async def get_job(job_id: str, request: Request) -> dict[str, Any]:
    """How it stands."""
    services = services_of(request)
    return _describe(services, await asyncio.to_thread(services.book.job, job_id))


@router.post("/{job_id}/cancel", summary="Cancel a job", **answers(doc.Job))
async def cancel_job(job_id: str, request: Request) -> dict[str, Any]:
    """Nothing is left of it but its history. One that has ended stays as it is."""
    services = services_of(request)
    return _describe(services, await services.runner.cancel(job_id))


@router.post("/{job_id}/pause", summary="Pause a job", **answers(doc.Job))
async def pause_job(job_id: str, request: Request) -> dict[str, Any]:
    """It rests until it is resumed, and keeps its last checkpoint."""
    services = services_of(request)
    return _describe(services, await services.runner.pause(job_id))


@router.post("/{job_id}/resume", summary="Resume a job", **answers(doc.Job))
async def resume_job(job_id: str, request: Request) -> dict[str, Any]:
    """A paused job waits for its turn, and goes on from its last checkpoint."""
    services = services_of(request)
    return _describe(services, await services.runner.resume(job_id))


@router.get("/{job_id}/events", summary="What happened to a job", **answers(doc.JobEvents, streams=True))
async def list_events(
    job_id: str, request: Request, after: str | None = None, limit: Limit = 20, stream: bool = False
) -> Response | dict[str, Any]:
    """Newest first; with `stream=true` all of them, oldest first, as they come, until the job has ended."""
    services = services_of(request)
    if stream:
        await asyncio.to_thread(services.book.job, job_id)

        async def produce(write: Write) -> bytes:
            async for happened in services.runner.follow(job_id):
                await write(event(_describe_event(happened)))
            return b""

        return SseResponse(produce)
    events = (await asyncio.to_thread(services.book.events, job_id))[::-1]
    page, more = page_of(events, [_event_id(one) for one in events], after, limit)
    document = {"object": "list", "data": [_describe_event(one) for one in page], "has_more": more}
    return Response(msgspec.json.encode(document), media_type="application/json")


@router.get("/{job_id}/checkpoints", summary="A job's evaluations", **answers(doc.Checkpoints))
async def list_checkpoints(
    job_id: str, request: Request, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """Newest first. Only the best of a job that succeeded is kept: it is the model."""
    services = services_of(request)
    job = await asyncio.to_thread(services.book.job, job_id)
    events = await asyncio.to_thread(services.book.events, job_id)
    evaluated = [one for one in events if "valid_loss" in one.data]
    best = max((one.number for one in evaluated if one.data["best"]), default=None)
    losses = {one.data["step"]: one.data["train_loss"] for one in events if "train_loss" in one.data}
    checkpoints = [
        {
            "id": f"ftckpt-{job.id.removeprefix('ftjob-')}-{one.data['step']}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(one.created),
            "fine_tuning_job_id": job.id,
            "fine_tuned_model_checkpoint": job.model if one.number == best else None,
            "step_number": one.data["step"],
            "metrics": {
                "step": one.data["step"],
                "train_loss": losses.get(one.data["step"]),
                "full_valid_loss": one.data["valid_loss"],
            },
        }
        for one in reversed(evaluated)
    ]
    page, more = page_of(checkpoints, [str(one["id"]) for one in checkpoints], after, limit)
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": more, **ends}


def _check_suffix(services: Services, suffix: str) -> None:
    try:
        check_name(suffix)
    except AdapterFormatError as error:
        raise InvalidRequestError(error.message, field="suffix") from error
    if suffix == services.settings.base_name:
        raise AdapterExistsError(f"{suffix!r} is the base model's own name.", field="suffix")


def _check_file(services: Services, file_id: str, field: str) -> None:
    try:
        stored = services.book.file(file_id)
    except UnknownFileError as error:
        raise InvalidRequestError(f"{field}: {error.message}", field=field) from error
    if stored.purpose != "fine-tune":
        raise InvalidRequestError(f"{field} {file_id} was not uploaded for fine-tuning.", field=field)


def _describe(services: Services, job: Job) -> dict[str, Any]:
    asked = job.spec.request
    automatic = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    hyperparameters = {**automatic, **asked["hyperparameters"]}
    estimate = None if job.seconds_left is None else int(job.told + job.seconds_left)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "finished_at": None if job.finished is None else int(job.finished),
        "estimated_finish": estimate,
        "model": services.settings.base_name,
        "fine_tuned_model": job.model,
        "organization_id": "onebase",
        "status": job.status,
        "training_file": job.spec.training_file,
        "validation_file": job.spec.validation_file,
        "result_files": [] if job.result_file is None else [job.result_file],
        "trained_tokens": None,
        "error": None if job.error is None else {"code": "training_failed", "message": job.error, "param": None},
        "user_provided_suffix": asked["suffix"],
        "seed": asked["seed"],
        "integrations": [],
        "metadata": asked["metadata"],
        "hyperparameters": hyperparameters,
        "method": {"type": asked["type"], "supervised": {"hyperparameters": hyperparameters}},
    }


def _event_id(one: JobEvent) -> str:
    return f"ftevent-{one.job.removeprefix('ftjob-')}-{one.number}"


def _describe_event(one: JobEvent) -> dict[str, Any]:
    return {
        "id": _event_id(one),
        "object": "fine_tuning.job.event",
        "created_at": int(one.created),
        "level": one.level,
        "message": one.message,
        "type": one.kind,
        "data": one.data,
    }
