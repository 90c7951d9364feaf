"""The adapters that a model has resident, by slot. Slot 0 is the bare base."""

from onebase_adapters.errors import AdapterError
from onebase_adapters.primitives.by_site import Parts
from onebase_adapters.primitives.instruction_set import Bottleneck, Head, LowRank
from onebase_adapters.primitives.lowered_adapter import LoweredAdapter
from onebase_engine.base.load_base import LoadedBase
from onebase_engine.base.model_weights import ModelWeights
from onebase_engine.kernels.adapter_interface import Table
from onebase_engine.kernels.arena import Arena
from onebase_engine.kernels.batch import Traits
from onebase_engine.kernels.site_tables import SiteTables
from onebase_engine.kernels.tables import BottleneckTable
from onebase_engine.runner.classifier_heads import HeadTable
from onebase_engine.runner.input_embedding import InputEmbedding


class AdapterSlots:
    """What every served model is to those who bring adapters in: its shape, its weights, and slots to fill."""

    def __init__(self, base: LoadedBase, slots: int) -> None:
        """`base` is not hooked yet; `slots`: most adapters resident at once."""
        self.base = base
        self.shape = base.shape
        self.weights = ModelWeights(base.model)
        self._inputs = InputEmbedding(base.model.get_input_embeddings(), base.shape.embedding, base.device)
        self._heads = HeadTable(base.device)
        self._tables: list[Table] = [self._inputs, self._heads]
        self._sites: list[SiteTables] = []
        self._sublayers: list[BottleneckTable] = []
        self._traits = Traits.none(slots + 1)
        self._free_slots = list(range(slots, 0, -1))
        self._arenas: dict[int, Arena] = {}
        self._slot_bytes: dict[int, int] = {}
        self._changes = 0
        """How often an adapter came or left."""

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def put(self, adapter: LoweredAdapter) -> int:
        """Make an adapter resident and return its slot.

        Raises IndexError when no slot is free, AdapterError when no memory is left; nothing of it stays then.
        """
        slot = self._free_slots.pop()
        self._changes += 1
        try:
            self._fill(slot, adapter)
        except (MemoryError, OSError, RuntimeError) as error:
            self.remove(slot)
            raise AdapterError(f"The adapter cannot be brought into memory: {error}") from error
        return slot

    def _fill(self, slot: int, adapter: LoweredAdapter) -> None:
        parts = Parts.of(adapter)
        stores: list[SiteTables | BottleneckTable] = [*self._sites, *self._sublayers]
        arena = Arena(sum(store.size(parts) for store in stores), self.base.device)
        self._arenas[slot] = arena
        for store in stores:
            store.put(slot, parts, arena)
        self._traits.affine[slot] = bool(parts.inputs or parts.outputs or parts.shifts)
        self._traits.bottleneck[slot] = bool(parts.bottlenecks)
        for table in self._tables:
            table.put(slot, adapter)
        packed = sum(p.parameters for p in adapter.of(LowRank)) + sum(p.parameters for p in adapter.of(Bottleneck))
        self._slot_bytes[slot] = arena.bytes + 4 * (adapter.parameters - packed)

    def remove(self, slot: int) -> None:
        """Free a slot that no running sequence uses."""
        self._changes += 1
        stores: list[SiteTables | BottleneckTable | Table] = [*self._sites, *self._sublayers, *self._tables]
        for store in stores:
            store.clear(slot)
        self._arenas.pop(slot, None)
        self._slot_bytes.pop(slot, None)
        self._free_slots.append(slot)

    def slot_bytes(self, slot: int) -> int:
        """Memory of a resident adapter."""
        return self._slot_bytes[slot]

    def head(self, slot: int) -> Head | None:
        """A resident adapter's classification head."""
        return self._heads.get(slot)
