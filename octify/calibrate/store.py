"""Activations kept in memory up to a bound, and beyond it in one unnamed temporary file."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

MEMORY = 1 << 30  # bytes that a store keeps in memory

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Slot:
    """A storage in a file: where it begins, how many bytes it has, and the device that it came from."""

    place: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Filed:
    """A tensor over the storage in a slot."""

    slot: Slot
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def over(self, storage: Any) -> Tensor:
        """The tensor, its storage being in memory."""
        empty = torch.empty(0, dtype=self.dtype, device=self.slot.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


class Store:
    """How much room in memory is left to some shelves, and the file that takes what finds none."""

    def __init__(self, memory: int | None = None) -> None:
        self.room = MEMORY if memory is None else memory
        self._file: Any = None
        self._end = 0
        self._empty: dict[int, list[int]] = defaultdict(list)

    def write(self, storage: torch.UntypedStorage, slot: Slot | None = None) -> Slot:
        """Writes a storage into a slot, by default into a new one."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="octify-")  # noqa: SIM115 - it goes when the store goes
        if slot is None:
            places = self._empty[storage.nbytes()]
            slot = Slot(places.pop() if places else self._end, storage.nbytes(), storage.device)
            self._end = max(self._end, slot.place + slot.size)
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(cast(Any, storage))
        self._file.seek(slot.place)
        self._file.write(cast(Any, flat.cpu().numpy()))
        return slot

    def read(self, slot: Slot) -> torch.UntypedStorage:
        """What was written last, in memory of its own."""
        flat = torch.empty(slot.size, dtype=torch.uint8)
        self._file.seek(slot.place)
        self._file.readinto(cast(Any, flat.numpy()))
        return flat.to(slot.device).untyped_storage()

    def drop(self, slot: Slot) -> None:
        """Leaves a slot's place to whoever comes next."""
        self._empty[slot.size].append(slot.place)


class Shelf(Generic[Key]):
    """Some values by name. Whole storages are kept: tensors go on sharing them, and lie in them as they did."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._values: dict[Key, Any] = {}
        self._slots: set[Slot] = set()
        self._held = 0  # bytes in memory

    def look(self, key: Key) -> Any:
        """A value; what is on file is read anew each time."""
        return map_kind(Filed, self._values[key], lambda leaf: leaf.over(self._store.read(leaf.slot)))

    def copied(self) -> dict[Key, Any]:
        """All values in memory of their own."""
        found: dict[Key, Any] = {}

        def look(values: dict[Key, Any]) -> dict[Key, Any]:
            found.update(zip(values, copy.deepcopy(list(values.values())), strict=True))
            return values

        self.change(look)
        return found

    def change(self, work: Callable[[dict[Key, Any]], Mapping[Key, Any]]) -> None:
        """Gives all values to `work`, which may also write into them, and keeps the values that it returns."""
        storages: dict[Slot, torch.UntypedStorage] = {}
        loaded: list[tuple[Slot, Tensor, int]] = []

        def load(leaf: Filed) -> Tensor:
            if leaf.slot not in storages:
                storages[leaf.slot] = self._store.read(leaf.slot)
            tensor = leaf.over(storages[leaf.slot])
            loaded.append((leaf.slot, tensor, tensor._version))
            return tensor

        values = work({key: map_kind(Filed, value, load) for key, value in self._values.items()})
        for slot in {slot: None for slot, tensor, version in loaded if tensor._version != version}:
            self._store.write(storages[slot], slot)
        self._store.room += self._held
        self._held = 0
        slots: dict[int, Slot | None] = {storage.data_ptr(): slot for slot, storage in storages.items()}
        used: set[Slot] = set()

        def put(leaf: Tensor) -> Tensor | Filed:
            storage = leaf.untyped_storage()
            address = storage.data_ptr()
            if address not in slots:
                slots[address] = self._place(storage)
            slot = slots[address]
            if slot is None:
                return leaf
            used.add(slot)
            return Filed(slot, leaf.dtype, int(leaf.storage_offset()), leaf.shape, leaf.stride())

        self._values = {key: map_kind(Tensor, value, put) for key, value in values.items()}
        for slot in self._slots - used:
            self._store.drop(slot)
        self._slots = used

    def _place(self, storage: torch.UntypedStorage) -> Slot | None:
        """None if a storage stays in memory, else its slot."""
        size = storage.nbytes()
        if size > self._store.room:
            return self._store.write(storage)
        self._store.room -= size
        self._held += size
        return None


def map_kind(kind: type[Any], tree: Any, change: Callable[[Any], Any]) -> Any:
    """A tree of plain tuples, lists and dicts with `change(leaf)` in the place of every leaf of a kind."""
    if isinstance(tree, kind):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(map_kind(kind, item, change) for item in tree)
    if type(tree) is dict:
        return {key: map_kind(kind, item, change) for key, item in cast("dict[Any, Any]", tree).items()}
    return tree
