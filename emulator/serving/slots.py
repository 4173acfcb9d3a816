"""Low-rank adapters of one base in memory, each in a slot, into which it is read when it is asked for.

All slots have the same rows of each map's factors, so that what they take is known from the start, and a pass over
mixed sequences multiplies by them as they lie there. S-LoRA (arXiv 2311.03285) pages single rows, which wastes less
where ranks differ.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.structure import shape
from offsite.emulator.methods import peft_format
from offsite.emulator.methods.base import Place, factors
from offsite.emulator.methods.maps import linear_at
from offsite.kernels.mixed import Adapters, add

BASE = -1  # the slot of no adapter
MOST = 256  # slots: more than a first look needs
Key = tuple[Path, int]  # an adapter's folder, and when it was written


class Slots:
    """The slots of a model, whose maps they change for each sequence of a batch by the slot that it names."""

    def __init__(self, model: nn.Module, folders: Iterable[Path], *, size: int, rank: int = 0) -> None:
        """Make slots for all maps that the adapters in some folders have, and hook them to the model.

        `size` is what all slots may take, in bytes; `rank` the largest they are for, if it is larger than these
        adapters'. Raises ValueError if not one fits in.
        """
        known = [peft_format.ranks(folder) for folder in folders]
        self.rank = max([rank, *(own for ranks in known for own in ranks.values())])
        self._which: Tensor | None = None
        self._held: OrderedDict[Key, int] = OrderedDict()  # the one that was not asked for longest first
        places = sorted({place for ranks in known for place in ranks})
        maps: dict[Place, Any] = {place: linear_at(model, place) for place in places}
        first = next(model.parameters())
        self._device = first.device
        self.slot_bytes = sum(sum(shape(module)) for module in maps.values()) * self.rank * first.element_size()
        self.count = min(MOST, size // self.slot_bytes) if maps else 0
        if maps and not self.count:
            raise ValueError(
                f"an adapter of rank {self.rank} takes {self.slot_bytes:,} bytes, more than all may ({size:,})"
            )
        starts = tuple(self.rank * slot for slot in range(self.count + 1))
        self._tables = dict[Place, Adapters]()
        for place, module in maps.items():
            rows, columns = shape(module)
            down, up = first.new_empty(starts[-1], columns), first.new_empty(starts[-1], rows)
            self._tables[place] = Adapters(down, up, starts)
            module.register_forward_hook(partial(self._change, self._tables[place]))

    def use(self, which: Sequence[int]) -> None:
        """Have the model's next passes change each sequence as its slot says; BASE for one that stays as it is."""
        self._which = torch.tensor(which, device=self._device) if any(slot != BASE for slot in which) else None

    def hold(self, folders: Iterable[Path], *, beside: Collection[int]) -> tuple[int, ...] | None:
        """Return the slots of some adapters, after reading those that no slot has; None where there is no room.

        Slots `beside` are in use and stay as they are. Raises ValueError for an adapter that does not fit.
        """
        taken, slots = set(beside), list[int]()
        for folder in folders:
            key = folder, (folder / "adapter_model.safetensors").stat().st_mtime_ns
            if key not in self._held:
                slot = self._free(taken)
                if slot is None:
                    return None
                self._read(folder, slot)
                self._held[key] = slot
            self._held.move_to_end(key)
            taken.add(self._held[key])
            slots.append(self._held[key])
        return tuple(slots)

    def _free(self, taken: Collection[int]) -> int | None:
        """Return a slot that nothing needs."""
        if len(self._held) < self.count:
            return next(slot for slot in range(self.count) if slot not in self._held.values())
        for key, slot in self._held.items():
            if slot not in taken:
                return self._held.pop(key)
        return None

    def _read(self, folder: Path, slot: int) -> None:
        adapter, scales = peft_format.read(folder)
        pairs = factors(adapter)
        if strange := sorted(pairs.keys() - self._tables.keys()):
            raise ValueError(
                f"{folder}: {strange[0].key('A')} is of a map that no adapter had at the start; start again"
            )
        for place, table in self._tables.items():
            down, up = (part[slot * self.rank : (slot + 1) * self.rank] for part in table[:2])
            down.zero_()
            up.zero_()
            if pair := pairs.get(place):
                if pair.rank > self.rank:
                    raise ValueError(f"{folder}: its rank is {pair.rank}, the slots have {self.rank}; start again")
                if (pair.A.shape[1], pair.B.shape[0]) != (down.shape[1], up.shape[1]):
                    raise ValueError(f"{folder}: {place.key('A')} does not fit the map of this base")
                down[: pair.rank] = pair.A
                up[: pair.rank] = (pair.B * scales[place]).T

    def _change(self, table: Adapters, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Add what the slots have for a map; some families flatten its sequences before."""
        if self._which is None:
            return None
        x, y = args[0].flatten(0, -2), output.flatten(0, -2)
        return add(y, x, self._which.repeat_interleave(len(x) // len(self._which)), table).view_as(output)
