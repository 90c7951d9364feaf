"""Which adapters are resident, and bringing in those that are not: off the step loop, so that a request for a
cold adapter waits aside while all others keep running."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from onebase_adapters.compose import Weighted, compose
from onebase_adapters.errors import AdapterFormatError, OneBaseError
from onebase_adapters.lowering.lower import load_adapter
from onebase_adapters.primitives.instruction_set import Head, Template
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_adapters.primitives.virtual_tokens import Layout
from onebase_engine.engine_info import AdapterInfo, HeadInfo, TemplateInfo
from onebase_engine.request import Part
from onebase_engine.runner.adapter_slots import AdapterSlots

log = logging.getLogger(__name__)

_READ_AHEAD = 8
"""Adapters that requests have had read and that have no slot yet, at most: each takes memory of its own."""


@dataclass(frozen=True)
class Loading:
    """An adapter that is being read, on its way to being known."""

    _residency: "Residency"
    _digest: str
    _read: Future[LoweredAdapter]

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._read.done()

    def result(self, timeout: float | None = None) -> AdapterInfo:
        """Make it resident if a slot can be had; it is known from then on in any case.

        To be called by whoever steps the engine. Raises AdapterError and its branches: then it stays unknown."""
        try:
            return self._residency.admit(self._digest, self._read.result(timeout))
        except BaseException as error:
            self._residency.forget(self._digest)
            if isinstance(error, OneBaseError) or not isinstance(error, Exception):
                raise
            log.exception("reading adapter %s failed", self._digest)  # a reader's bug must not end the engine
            raise AdapterFormatError(f"Cannot be read: {error!r}", field="path") from error


@dataclass
class _Resident:
    slot: int
    layout: Layout
    users: int = 0


class Residency:
    """Adapters by digest: known (a folder), resident (a slot), in use (by so many sequences). Least recently
    used ones leave when a slot is wanted; those in use never do. A composition of known ones is resident as they
    are, under a digest of its own."""

    def __init__(self, model: AdapterSlots, wake: Callable[[], None]) -> None:
        """`wake` is called, on the reader's thread, when an adapter has been read."""
        self._model = model
        self._wake = wake
        self._folders: dict[str, Path] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        self._loading: dict[str, Future[LoweredAdapter]] = {}
        self.loads = 0
        self.evictions = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")

    @property
    def loaded(self) -> int:
        return len(self._resident)

    @property
    def bytes(self) -> int:
        return sum(self._model.slot_bytes(entry.slot) for entry in self._resident.values())

    def knows(self, digest: str) -> bool:
        return digest in self._folders

    def load(self, digest: str, folder: Path) -> Loading:
        """Start reading and lowering an adapter."""
        self._folders[digest] = folder
        return Loading(self, digest, self._load(digest, ()))

    def admit(self, digest: str, adapter: LoweredAdapter) -> AdapterInfo:
        """Make a read adapter resident if a slot can be had; it is known in any case."""
        self._loading.pop(digest, None)
        if digest not in self._resident and self._make_room():
            self._place(adapter)
        resident = self._resident.get(digest)
        return AdapterInfo(
            method=adapter.method,
            rank=adapter.rank,
            parameters=adapter.parameters,
            bytes=self._model.slot_bytes(resident.slot) if resident else 2 * adapter.parameters,
            primitives=adapter.summary(),
            sites=adapter.sites,
            virtual_tokens=adapter.layout.tokens,
            head=_head_info(adapter.one(Head)),
            template=_template_info(adapter.one(Template)),
            notes=adapter.notes,
            chat_template=adapter.chat_template,
        )

    def forget(self, digest: str) -> None:
        """Drop an adapter that was refused, or that nobody uses any more."""
        self._folders.pop(digest, None)
        self._loading.pop(digest, None)
        resident = self._resident.pop(digest, None)
        if resident is not None:
            self._model.remove(resident.slot)

    def acquire(self, digest: str, parts: Sequence[Part] = ()) -> tuple[int, Layout] | None:
        """The slot and virtual tokens of an adapter (or of the composition of `parts`), held until `release`; or
        None while it is not resident, its load started.

        Raises AdapterError if it could not be read (the files are gone or were changed) or does not compose."""
        resident = self._resident.get(digest)
        if resident is None:
            if digest not in self._loading and len(self._loading) >= _READ_AHEAD:
                return None
            future = self._load(digest, parts)
            if not future.done() or (future.exception() is None and not self._make_room()):
                return None
            del self._loading[digest]
            resident = self._place(future.result())
        self._resident.move_to_end(digest)
        resident.users += 1
        return resident.slot, resident.layout

    def release(self, digest: str) -> None:
        """Give back what `acquire` gave."""
        self._resident[digest].users -= 1

    def users(self) -> dict[str, int]:
        """How many hold each adapter that is in use."""
        return {digest: entry.users for digest, entry in self._resident.items() if entry.users}

    def slots(self) -> dict[str, int]:
        """Where each resident adapter is."""
        return {digest: entry.slot for digest, entry in self._resident.items()}

    def lacks_slot(self, digest: str) -> bool:
        """Whether an adapter has been read, and all that it waits for is that one in use leaves."""
        future = self._loading.get(digest)
        return future is not None and future.done() and future.exception() is None

    def drop_read(self, wanted: Set[str]) -> None:
        """Let go of adapters that were read for requests that are no more."""
        for digest in [d for d, future in self._loading.items() if future.done() and d not in wanted]:
            del self._loading[digest]

    def _load(self, digest: str, parts: Sequence[Part]) -> Future[LoweredAdapter]:
        if digest not in self._loading:
            if parts:
                folders = [self._folders[part.digest] for part in parts]
                future = self._reader.submit(self._compose, digest, parts, folders)
            else:
                future = self._reader.submit(self._read, digest, self._folders[digest])
            self._loading[digest] = future
            future.add_done_callback(lambda _: self._wake())
        return self._loading[digest]

    def _read(self, digest: str, folder: Path) -> LoweredAdapter:
        return load_adapter(folder, digest, self._model.shape, self._model.weights)

    def _compose(self, digest: str, parts: Sequence[Part], folders: Sequence[Path]) -> LoweredAdapter:
        read = [self._read(part.digest, folder) for part, folder in zip(parts, folders, strict=True)]
        weighted = [Weighted(part.name, one, part.weight) for part, one in zip(parts, read, strict=True)]
        return compose(digest, weighted)

    def _make_room(self) -> bool:
        """See that a slot is free, if one can be."""
        if not self._model.free_slots:
            idle = next((digest for digest, entry in self._resident.items() if not entry.users), None)
            if idle is None:
                return False
            self._model.remove(self._resident.pop(idle).slot)
            self.evictions += 1
            log.debug("an adapter has left for another", extra={"fields": {"adapter": idle}})
        return True

    def _place(self, adapter: LoweredAdapter) -> _Resident:
        resident = self._resident[adapter.digest] = _Resident(self._model.put(adapter), adapter.layout)
        self.loads += 1
        log.debug("an adapter is resident", extra={"fields": {"adapter": adapter.digest, "slot": resident.slot}})
        return resident

    def close(self) -> None:
        """Stop the reader."""
        self._reader.shutdown(wait=False, cancel_futures=True)


def _head_info(head: Head | None) -> HeadInfo | None:
    return None if head is None else HeadInfo(head.kind, head.labels)


def _template_info(template: Template | None) -> TemplateInfo | None:
    if template is None:
        return None
    return TemplateInfo(template.before, template.after, tuple(map(dict, template.messages)), template.stop)
