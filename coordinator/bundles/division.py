"""A build that several machines do: one chooses the layers and looks at the text, several encode, and one finishes.

Each place is encoded by one machine from beginning to end, of the base's own matrices, so that the bytes are those of
one machine whatever their number. What must see the emulator as a whole is done once: choosing layers, and tuning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from offsite.coordinator.bundles.building import Base, Built, load, material, memory, write_loaded
from offsite.emulator import builders, placements, zoo
from offsite.emulator.activations import Map
from offsite.emulator.anatomy.structure import positions
from offsite.emulator.builders import Material, Separable
from offsite.emulator.checkpoint import Checkpoint
from offsite.emulator.formats.base import Parts
from offsite.emulator.outline import Outline
from offsite.emulator.zoo.weights import refuse_infinite
from offsite.protos.spec import Choice


@dataclass(frozen=True)
class Texts:
    """What a build reads beside the base, as `building.build` takes it."""

    public: Path | None
    calibration: Path | None = None
    folders: Sequence[Path] = ()

    def material(self, base: Base, scratch: Path | None = None) -> Material:
        """Read them for a base; raises ValueError."""
        return material(
            self.public,
            base.tokenizer,
            calibration=self.calibration,
            folders=self.folders,
            scratch=scratch,
            longest=positions(base.model),
        )


@dataclass(frozen=True)
class Begun:
    """A build whose places are yet to be encoded: the layers, and how much each input of their maps counts."""

    outline: Outline
    places: int  # that can be encoded apart
    weights: dict[str, Tensor]  # "<place>.<path inside the layer>" -> (d_in,) fp64


def begin(model: str, chain: Sequence[Choice], trainable: Choice, texts: Texts) -> Begun | None:
    """Choose the layers of an emulator and look at the text, for others to encode; raises ValueError.

    None where nothing can be divided: the chain's last builder needs all of the emulator at once, or what one before it
    has changed; or the base fills more than half of this machine's memory, and is read one layer at a time if at all.
    """
    makers = [builders.make(choice.name, choice.settings) for choice in chain]
    builders.check(makers)
    last, source = builders.separable(makers), zoo.locate(model, cache=zoo.cache_folder())
    if last is None or Checkpoint.open(source).bytes > memory() / 2:
        return None
    refuse_infinite(source)
    base = load(source)
    text = texts.material(base)
    placement = placements.make(trainable.name, trainable.settings)
    draft = builders.outlined(base.model, builders.first(makers).outline(base.model, text.batches, placement))
    weights = {f"{place}.{path}": weight for (place, path), weight in last.look(draft, text).items()}
    return Begun(draft.outline, len(last.places(draft.outline)), weights)


def encode(
    model: str, chain: Sequence[Choice], outline: Outline, weights: Mapping[str, Tensor], *, part: int, parts: int
) -> dict[str, Tensor]:
    """Encode every `parts`-th place from the `part`-th on; return what its maps are stored as, by names for a file.

    Raises ValueError if a map cannot be encoded.
    """
    last = _last(chain)
    base, _ = zoo.load_base(zoo.locate(model, cache=zoo.cache_folder()), dtype="auto")
    draft = builders.outlined(base, outline)
    mine = last.places(outline)[part::parts]
    encoded = last.encode(draft, mine, {_map(name): weight for name, weight in weights.items()}, Material())
    return {f"{place}.{path}.{name}": one for (place, path), held in encoded.items() for name, one in held.items()}


def finish(
    model: str,
    chain: Sequence[Choice],
    outline: Outline,
    encoded: Mapping[str, Tensor],
    folder: Path,
    texts: Texts,
    *,
    called: str,
    scratch: Path | None = None,
) -> Built:
    """Build the emulator whose places others have encoded into a folder, as `building.build` does without a signature.

    Raises ValueError if it cannot be tuned, or written.
    """
    base, parts = load(zoo.locate(model, cache=zoo.cache_folder())), dict[Map, Parts]()
    for name, tensor in encoded.items():
        of, _, part = name.rpartition(".")
        parts.setdefault(_map(of), {})[part] = tensor
    draft = builders.outlined(base.model, outline)
    draft = _last(chain).finish(draft, dict(sorted(parts.items())), texts.material(base, scratch))
    return write_loaded(draft, base, folder, called=called, chain=chain, owner_key=None)


def _last(chain: Sequence[Choice]) -> Separable:
    last = builders.separable([builders.make(choice.name, choice.settings) for choice in chain])
    assert last is not None, "begun as a chain that can be divided"
    return last


def _map(name: str) -> Map:
    place, _, path = name.partition(".")
    return int(place), path
