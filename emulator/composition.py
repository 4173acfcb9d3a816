"""Sums of published adapters: those of a language and of a task, trained apart, in one base.

    theta_0 + phi_T + phi_L          (phi: a sparse change of the weights; Ansell et al., arXiv 2110.07560, section 3)

An entry that an adapter does not have is zero in it, and nothing is divided, for they are no updates of one round. Sums
are compensated, so that their order changes no bit, and what was added can be taken off again.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from offsite.emulator.methods import own_format
from offsite.emulator.methods.base import Adapter, Method, Place
from offsite.emulator.methods.entries import Sparse, SparseEntries, sparse, tensors
from offsite.kernels.sparse import Size, Total, Vector


def compose(directory: Path, adapters: Sequence[Path], *, without: Sequence[Path] = ()) -> None:
    """Write the sum of published adapters, less those of `without`, as one that `plug.load` puts beside their base.

    It is of the first one's method. Raises ValueError unless all are of methods that train single entries and of one
    base, and if nothing is left.
    """
    if not adapters:
        raise ValueError("there is no adapter to compose; name one or more folders that runs have published")
    kept: dict[Path, Method] = {}
    terms: list[tuple[Mapping[Place, Sparse], float]] = []
    bases: dict[str, Path] = {}
    for folder, sign in [*((one, 1.0) for one in adapters), *((one, -1.0) for one in without)]:
        method, adapter = own_format.read(folder)
        if not isinstance(method, SparseEntries):
            raise ValueError(f"{folder}: {method.name} trains no single entries of maps, and its changes do not add up")
        kept.setdefault(folder, method)
        terms.append((sparse(adapter), sign))
        bases.setdefault(own_format.base(folder), folder)
    if len(bases) > 1:
        (one, its), (other, others), *_ = bases.items()
        raise ValueError(f"{its} is of the base {one}, {others} of {other}; only changes of one base add up")
    method, (base,) = kept[adapters[0]], bases
    own_format.write(directory, method, added(terms), base_name=base)


def added(terms: Iterable[tuple[Mapping[Place, Sparse], float]]) -> Adapter:
    """Return the sum of sparse changes, each times a factor, without the entries at which it is zero.

    Raises ValueError for maps of other sizes, and if no entry is left.
    """
    totals: dict[Place, Total] = {}
    sizes: dict[Place, Size] = {}
    for parts, factor in terms:
        for place, (at, change, size) in parts.items():
            if sizes.setdefault(place, size) != size:
                raise ValueError(
                    f"{place.key('size')!r}: (d_out, d_in) = {size} in one adapter and {sizes[place]} in others"
                )
            totals.setdefault(place, Total()).add(Vector(at, change), factor)
    sums: dict[Place, Sparse] = {}
    for place, total in sorted(totals.items()):
        at, change = total.vector()
        if bool(change.any()):
            sums[place] = Sparse(at[change != 0], change[change != 0], sizes[place])
    if not sums:
        raise ValueError("the adapters take each other off, and no change is left")
    return tensors(sums)
