"""What sites have measured of the linear maps of the layers that train, as a version of a run holds it.

Each is a sum over data, so that those of several sites add up to that of all: "28.mlp.down_proj.inputs", the lower
triangle of sum x x^T over the positions that are no padding, and ".count" of these; ".gradients" (d_out, d_in), the sum
of dL/dW over all targets; ".squares" (d_out, d_in), that of (dL/dW)^2 over batches. Of maps with one input, as query,
key and value have, only the first has its sum.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from offsite.emulator.anatomy.roles import roles
from offsite.emulator.anatomy.structure import find, linears
from offsite.emulator.methods.base import Adapter, Place

PARTS = ("count", "gradients", "inputs", "squares")


class Statistics(NamedTuple):
    """A version's sums, and the model that they are of."""

    sums: Adapter
    model: nn.Module
    places: Mapping[int, int]

    def mean_outer(self, place: Place) -> Tensor:
        """Return the mean of x x^T (d_in, d_in) over the inputs of a map, in fp64; raises ValueError if it has none."""
        at = next(position for position, layer in self.places.items() if layer == place.layer)
        paths = linears(find(self.model).layers[at])
        first = sources(self.model, at, paths)
        for path in (path for path in paths if first[path] == first[place.path]):
            other = Place(place.layer, path)
            if other.key("inputs") in self.sums:
                count = float(self.sums[other.key("count")])
                if not count > 0:
                    raise ValueError(f"no position was measured of the inputs of {place.layer}.{place.path}")
                return unpacked(self.sums[other.key("inputs")].double()) / count
        raise _missing(place, "inputs")

    def of_weight(self, place: Place, part: str, size: tuple[int, int]) -> Tensor:
        """Return a sum (d_out, d_in) of a map, in fp32; raises ValueError if it has none, or one of another size."""
        if place.key(part) not in self.sums:
            raise _missing(place, part)
        total = self.sums[place.key(part)]
        if tuple(total.shape) != size:
            raise ValueError(f"{place.key(part)!r} {tuple(total.shape)} was measured of another map than one of {size}")
        return total.float()


def _missing(place: Place, part: str) -> ValueError:
    return ValueError(
        f"the {part} of {place.layer}.{place.path} were not measured; begin from a run that measured them of the same "
        "layers and modules"
    )


def sources(model: nn.Module, at: int, paths: Iterable[str]) -> dict[str, str]:
    """Return for maps of a layer the first of them that has the same input, by the roles that its family gives them."""
    paths = list(paths)
    try:
        maps = roles(model, at)
        together = [{maps.query, maps.key, maps.value}, {*maps.mlp_in}]
    except ValueError:  # a family without roles
        together = []
    same = {path: next((group for group in together if path in group), {path}) for path in paths}
    return {path: next(other for other in paths if other in same[path]) for path in paths}


def packed(matrix: Tensor) -> Tensor:
    """Return the lower triangle (d (d + 1) / 2,) of a symmetric matrix (d, d), row by row."""
    return matrix[_triangle(len(matrix), matrix.device)]


def unpacked(triangle: Tensor) -> Tensor:
    """Return the symmetric matrix (d, d) of a lower triangle; raises ValueError if it is none."""
    d = side(len(triangle))
    lower = triangle.new_zeros(d, d)
    lower[_triangle(d, triangle.device)] = triangle
    return lower + lower.T - lower.diagonal().diag()


def side(length: int) -> int:
    """Return d of a triangle of d (d + 1) / 2 values; raises ValueError if none has as many."""
    d = int((2 * length) ** 0.5)
    if d * (d + 1) // 2 != length:
        raise ValueError(f"{length} values are no triangle of a square matrix")
    return d


def _triangle(d: int, device: torch.device) -> Tensor:
    return torch.ones(d, d, dtype=torch.bool, device=device).tril()


def grouped(adapter: Mapping[str, Tensor]) -> dict[Place, dict[str, Tensor]]:
    """Group sums by map; raises ValueError on a key or a shape that is none of theirs."""
    parts: dict[Place, dict[str, Tensor]] = {}
    for key, tensor in adapter.items():
        name, _, part = key.rpartition(".")
        layer, _, path = name.partition(".")
        if not (layer.isdecimal() and path and part in PARTS):
            raise ValueError(f"adapter key {key!r}: expected '<layer>.<path>.' and one of {', '.join(PARTS)}")
        if tensor.ndim != (1 if part in ("count", "inputs") else 2):
            raise ValueError(f"{key!r}: {tuple(tensor.shape)} is no shape of its sums")
        parts.setdefault(Place(int(layer), path), {})[part] = tensor
    for place, its in parts.items():
        if ("inputs" in its) != ("count" in its):
            raise ValueError(f"{place.layer}.{place.path}: inputs and their count come together, there are {[*its]}")
    return parts
