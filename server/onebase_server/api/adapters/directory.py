"""The adapters by name: the store's rows, and which of them the engine serves. Requests look up here, in memory."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from onebase_adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    OneBaseError,
    did_you_mean,
)
from onebase_adapters.store.adapter_store import AdapterStore, StagedAdapter
from onebase_adapters.store.registry import AdapterRecord, check_name
from onebase_engine.engine_info import HeadInfo, TemplateInfo
from onebase_engine.request import EngineRequest, Part, SamplingParams, Task
from onebase_server.engine_process.engine_client import EngineClient, EngineUnavailableError

log = logging.getLogger(__name__)

_LOADS_AT_ONCE = 4
_NAMES_IN_MESSAGE = 8


@dataclass(frozen=True)
class Entry:
    """A version of a registered adapter, and why it is not served, where it is not."""

    record: AdapterRecord
    problem: str | None = None


@dataclass(frozen=True)
class Target:
    """The adapter that a request runs, or the base: the one that `model` names, or its `adapters` together."""

    name: str
    adapter: str | None
    """The adapter's digest, or the composition's; None is the base."""
    virtual_tokens: int = 0
    """Tokens that each request gives up of its context."""
    template: TemplateInfo | None = None
    head: HeadInfo | None = None
    """The classification head, which `/v1/classify` needs."""
    chat_template: str | None = None
    """Its own, in place of the base's."""
    composed: bool = False
    """Whether it is several adapters, or one with a weight."""
    parts: tuple[Part, ...] = ()
    """The parts that the engine composes."""

    @classmethod
    def of(cls, name: str, record: AdapterRecord) -> "Target":
        """An adapter's, from what lowering found."""
        info = record.info
        return cls(
            name,
            record.digest,
            int(info.get("virtual_tokens", 0)),
            msgspec.convert(info.get("template"), TemplateInfo | None),
            msgspec.convert(info.get("head"), HeadInfo | None),
            info.get("chat_template"),
        )

    @property
    def label(self) -> str:
        """For metrics: there are too many compositions for a label each."""
        return "composed" if self.composed else self.name

    def request(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        tenant: str,
        priority: int | None,
        task: Task = "generate",
    ) -> EngineRequest:
        """To the engine, for one prompt."""
        return EngineRequest(
            request_id, tuple(prompt), sampling, self.adapter, tenant, priority or 0, task, self.parts
        )


class AdapterDirectory:
    """Registers, changes, removes and finds adapters. Belongs to one event loop; changes happen one at a time.

    `name` is an adapter's current version, `name@2` a version of it; `base:name` is the same as `name`.
    """

    def __init__(self, engine: EngineClient, store: AdapterStore, base_name: str) -> None:
        self._engine = engine
        self._store = store
        self._base = Target(base_name, None)
        self._entries: dict[str, list[Entry]] = {}
        """The versions of each name, oldest first."""
        self._targets: dict[str, Target] = {}
        """The adapters that are served, by `name` and by `name@version`."""
        self._problems: dict[str, str] = {}
        """Why the engine would not take some digests."""
        self._changing = asyncio.Lock()
        self._closed = False
        self._leaving: dict[str, asyncio.Task[None]] = {}
        """Digests that no name has any more, while the engine finishes with them."""

    def resolve(self, model: str | None) -> Target:
        """Return the target for a request's `model`. Raises AdapterNotFoundError or AdapterError."""
        if model is None or model == self._base.name:
            return self._base
        target = self._targets.get(model) or self._targets.get(self._without_base(model))
        if target is not None:
            return target
        try:
            entry = self.get(self._without_base(model))
        except AdapterNotFoundError as error:
            if error.field == "version":
                raise
            raise AdapterNotFoundError(
                f"The model {model[:160]!r} does not exist{self._what_exists(model)}", field="model"
            ) from None
        raise AdapterError(f"The adapter {model!r} is not served: {entry.problem}", field="model")

    def entries(self) -> list[Entry]:
        """The current version of each adapter, by name."""
        return [self.get(name) for name in sorted(self._entries)]

    def versions(self, name: str) -> Sequence[Entry]:
        """All versions of an adapter, oldest first; empty if there is none."""
        return self._entries.get(name, ())

    def get(self, name: str) -> Entry:
        """A `name`'s current version, or a `name@version`. Raises AdapterNotFoundError."""
        name, version = split_version(name)
        entries = self._entries.get(name)
        if not entries:
            raise AdapterNotFoundError(f"No adapter is named {name[:160]!r}{self._what_exists(name)}", field="name")
        for entry in entries:
            if entry.record.current if version is None else str(entry.record.version) == version:
                return entry
        known = ", ".join(str(entry.record.version) for entry in entries)
        raise AdapterNotFoundError(f"{name!r} has no version {version!r}. It has: {known}.", field="version")

    async def load_all(self) -> None:
        """At start-up: hand the engine every adapter in the store that is for this base."""
        records = await asyncio.to_thread(self._store.list)
        gate = asyncio.Semaphore(_LOADS_AT_ONCE)

        async def load(record: AdapterRecord) -> None:
            async with gate:
                try:
                    await self._engine.load_adapter(record.digest, str(record.folder))
                except OneBaseError as error:
                    log.warning("adapter %s cannot be served: %s", record.name, error.message)
                    self._problems[record.digest] = error.message

        ours = [record for record in records if record.base == self._engine.info.fingerprint]
        async with asyncio.TaskGroup() as group:
            for record in {record.digest: record for record in ours}.values():
                group.create_task(load(record))
        by_name: dict[str, list[AdapterRecord]] = {}
        for record in records:
            by_name.setdefault(record.name, []).append(record)
        for name, versions in by_name.items():
            self._remember(name, versions)

    async def register(
        self, name: str, stage: Callable[[], StagedAdapter], *, replace: bool = False, promote: bool = True
    ) -> Entry:
        """Stage the files (in a thread), have the engine check and load them, then give them their name.

        With `replace` a name that is taken gets a new version; until that is loaded and checked, nothing changes.
        Raises an AdapterError, StorageError or EngineUnavailableError; nothing is left behind then.
        """
        if check_name(name) == self._base.name:
            raise AdapterExistsError(f"{name!r} is the base model's own name.", field="name")
        async with self._change():
            if name in self._entries and not replace:
                raise AdapterExistsError(
                    f"The name {name!r} is taken: send replace to make a new version of it, delete it first, or "
                    "choose another.",
                    field="name",
                )
            staged = await asyncio.to_thread(stage)
            try:
                if staged.digest in self._leaving:
                    await asyncio.wait([self._leaving[staged.digest]])
                loaded = await self._engine.load_adapter(staged.digest, str(staged.folder))
                record = await asyncio.to_thread(
                    self._store.commit,
                    name,
                    staged,
                    msgspec.to_builtins(loaded),
                    base=self._engine.info.fingerprint,
                    replace=replace,
                    promote=promote,
                )
            except BaseException:
                if not self._is_used(staged.digest):
                    await self._unload(staged.digest)
                await asyncio.to_thread(self._store.discard, staged)
                raise
            self._problems.pop(staged.digest, None)
            await self._reread(name)
            return self.get(f"{name}@{record.version}")

    async def promote(self, name: str, version: int | None) -> Entry:
        """Make a version the current one: the next request for the name gets it. None goes back to the one before.

        Raises AdapterNotFoundError, AdapterError (there was none before) or StorageError."""
        async with self._change():
            self.get(name if version is None else f"{name}@{version}")
            await asyncio.to_thread(self._store.promote, name, version)
            await self._reread(name)
            return self.get(name)

    async def delete(self, name: str) -> None:
        """Take a `name`, or a `name@version`, away at once; what runs under it finishes, and then its files go.

        Raises AdapterNotFoundError, AdapterError (the version is the current one) or StorageError.
        """
        async with self._change():
            record = self.get(name).record
            version = record.version if split_version(name)[1] is not None else None
            name = record.name
            gone = await asyncio.to_thread(self._store.delete, name, version, keep_files=True)
            await self._reread(name)
            for digest in {record.digest for record in gone}:
                if not self._is_used(digest):
                    self._problems.pop(digest, None)
                    self._leaving[digest] = asyncio.create_task(self._leave(digest))

    async def close(self) -> None:
        """Let the change that is going on end; from here on there are no more."""
        self._closed = True
        async with self._changing:
            pass

    async def settle(self) -> None:
        """After the engine has ended: until nothing works on the store any more."""
        await self.close()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """One at a time. Raises EngineUnavailableError once the server stops."""
        async with self._changing:
            if self._closed:
                raise EngineUnavailableError("The server is stopping: its adapters change no more.", retry_after=5)
            yield

    async def _reread(self, name: str) -> None:
        self._remember(name, await asyncio.to_thread(self._store.versions, name))

    def _remember(self, name: str, records: Sequence[AdapterRecord]) -> None:
        """Take over what the store knows of a name, in one go: no request sees half of a change."""
        for entry in self._entries.pop(name, ()):
            self._targets.pop(f"{name}@{entry.record.version}", None)
        self._targets.pop(name, None)
        if not records:
            return
        self._entries[name] = entries = [Entry(record, self._problem(record)) for record in records]
        for entry in entries:
            if entry.problem is None:
                own = f"{name}@{entry.record.version}"
                self._targets[own] = Target.of(own, entry.record)
                if entry.record.current:
                    self._targets[name] = Target.of(name, entry.record)

    def _problem(self, record: AdapterRecord) -> str | None:
        if record.base != self._engine.info.fingerprint:
            return f"it was registered for another base ({record.base})"
        return self._problems.get(record.digest)

    def _is_used(self, digest: str) -> bool:
        return any(entry.record.digest == digest for entries in self._entries.values() for entry in entries)

    def _without_base(self, model: str) -> str:
        return model.removeprefix(f"{self._base.name}:")

    async def _leave(self, digest: str) -> None:
        """Have the engine forget the adapter once nothing runs on it, then remove its files."""
        try:
            await self._unload(digest)
            await asyncio.to_thread(self._store.remove_unused, digest)
        except OneBaseError as error:
            log.warning("the files of adapter %s stay until the next start: %s", digest[:12], error.message)
        finally:
            del self._leaving[digest]

    async def _unload(self, digest: str) -> None:
        try:
            await self._engine.unload_adapter(digest)
        except OneBaseError as error:  # it never got there, or the engine is down and forgets it anyway
            log.info("adapter %s was not unloaded: %s", digest[:12], error.message)

    def _what_exists(self, wanted: str) -> str:
        """With the name that may have been meant, if it is not among those shown."""
        names = [self._base.name, *sorted(name for name in self._entries if name in self._targets)]
        more = len(names) - _NAMES_IN_MESSAGE
        shown = ", ".join(names[:_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
        return f"{did_you_mean(wanted, names)}. This server has: {shown}."


def split_version(name: str) -> tuple[str, str | None]:
    """`name@version` apart; the version is None where there is none."""
    plain, at, version = name.partition("@")
    return plain, version if at else None
