"""The adapters by name: the store's rows, and which of them the engine serves. Requests look up here, in memory."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from onebase_adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    OneBaseError,
)
from onebase_adapters.registry import AdapterRecord, check_name
from onebase_adapters.store import AdapterStore, StagedAdapter
from onebase_server.engine.client import EngineClient

log = logging.getLogger(__name__)

_LOADS_AT_ONCE = 4
_NAMES_IN_MESSAGE = 8


@dataclass(frozen=True)
class Entry:
    """A registered adapter, and why it is not served, where it is not."""

    record: AdapterRecord
    problem: str | None = None

    @property
    def virtual_tokens(self) -> int:
        """Tokens that each of its requests gives up of its context."""
        return int(self.record.info.get("virtual_tokens", 0))


@dataclass(frozen=True)
class Target:
    """What a request's `model` means."""

    name: str
    adapter: str | None
    """The adapter's digest; None is the base."""
    virtual_tokens: int = 0


class AdapterDirectory:
    """Registers, removes and finds adapters. Belongs to one event loop; changes happen one at a time."""

    def __init__(self, engine: EngineClient, store: AdapterStore, base_name: str) -> None:
        self._engine = engine
        self._store = store
        self._base = Target(base_name, None)
        self._entries: dict[str, Entry] = {}
        self._targets: dict[str, Target] = {}
        self._changing = asyncio.Lock()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        """Digests that no name has any more, while the engine finishes with them."""

    def resolve(self, model: str | None) -> Target:
        """What to run for a request's `model`. Raises AdapterNotFoundError or AdapterError."""
        if model is None or model == self._base.name:
            return self._base
        target = self._targets.get(model)
        if target is not None:
            return target
        entry = self._entries.get(model)
        if entry is not None:
            raise AdapterError(f"The adapter {model!r} is not served: {entry.problem}", field="model")
        raise AdapterNotFoundError(
            f"The model {model[:160]!r} does not exist. {self._what_exists()}", field="model"
        )

    def entries(self) -> list[Entry]:
        """All, by name."""
        return [self._entries[name] for name in sorted(self._entries)]

    def get(self, name: str) -> Entry:
        """Raises AdapterNotFoundError."""
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterNotFoundError(f"No adapter is named {name[:160]!r}. {self._what_exists()}", field="name")
        return entry

    async def load_all(self) -> None:
        """At start-up: hand the engine every adapter in the store that is for this base."""
        records = await asyncio.to_thread(self._store.list)
        gate = asyncio.Semaphore(_LOADS_AT_ONCE)
        loads: dict[tuple[str, str], asyncio.Task[str | None]] = {}

        async def load(record: AdapterRecord) -> str | None:
            if record.base != self._engine.info.fingerprint:
                return f"it was registered for another base ({record.base})"
            async with gate:
                try:
                    await self._engine.load_adapter(record.digest, str(record.folder))
                except OneBaseError as error:
                    log.warning("adapter %s cannot be served: %s", record.name, error.message)
                    return error.message
            return None

        async with asyncio.TaskGroup() as group:
            for record in records:
                key = (record.digest, record.base)
                if key not in loads:
                    loads[key] = group.create_task(load(record))
        for record in records:
            self._remember(Entry(record, loads[record.digest, record.base].result()))

    async def register(self, name: str, stage: Callable[[], StagedAdapter]) -> Entry:
        """Stage the files (in a thread), have the engine check and load them, then give them their name.

        Raises an AdapterError, StorageError or EngineUnavailableError; nothing is left behind then.
        """
        if check_name(name) == self._base.name:
            raise AdapterExistsError(f"{name!r} is the base model's own name.", field="name")
        async with self._changing:
            if name in self._entries:
                raise AdapterExistsError(
                    f"The name {name!r} is taken; delete it first, or choose another.", field="name"
                )
            staged = await asyncio.to_thread(stage)
            try:
                if staged.digest in self._leaving:
                    await asyncio.wait([self._leaving[staged.digest]])
                loaded = await self._engine.load_adapter(staged.digest, str(staged.folder))
                info = msgspec.to_builtins(loaded)
                fingerprint = self._engine.info.fingerprint
                record = await asyncio.to_thread(self._store.commit, name, staged, info, base=fingerprint)
            except BaseException:
                if not self._is_used(staged.digest):
                    await self._unload(staged.digest)
                await asyncio.to_thread(self._store.discard, staged)
                raise
            entry = Entry(record)
            self._remember(entry)
            return entry

    async def delete(self, name: str) -> Entry:
        """Take the name away at once; what runs under it finishes, and then its files go.

        Raises AdapterNotFoundError or StorageError.
        """
        async with self._changing:
            entry = self.get(name)
            digest = entry.record.digest
            await asyncio.to_thread(self._store.delete, name, keep_files=True)
            del self._entries[name]
            self._targets.pop(name, None)
            if not self._is_used(digest):
                self._leaving[digest] = asyncio.create_task(self._leave(digest))
            return entry

    def _remember(self, entry: Entry) -> None:
        name = entry.record.name
        self._entries[name] = entry
        if entry.problem is None:
            self._targets[name] = Target(name, entry.record.digest, entry.virtual_tokens)

    def _is_used(self, digest: str) -> bool:
        return any(entry.record.digest == digest for entry in self._entries.values())

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

    def _what_exists(self) -> str:
        names = [self._base.name, *sorted(self._targets)]
        more = len(names) - _NAMES_IN_MESSAGE
        return f"This server has: {', '.join(names[:_NAMES_IN_MESSAGE])}{f' and {more} more' if more > 0 else ''}."
