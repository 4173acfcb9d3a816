"""Storage in 2 bits: additive codebooks (AQLM, arXiv 2401.06118), tuned on public text (PV, arXiv 2405.14852)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from offsite.emulator.activations import Map
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.anatomy.structure import layers, linears, shape
from offsite.emulator.batches import training_batches
from offsite.emulator.builders.base import Material, Stage
from offsite.emulator.builders.storage import Which, change, chosen, importance, refuse_shapes
from offsite.emulator.formats.additive import Additive
from offsite.emulator.formats.base import Parts
from offsite.emulator.formats.packed import PackedLinear, dense, pack
from offsite.emulator.outline import PACKED, Draft, Outline
from offsite.emulator.seeds import generator
from offsite.emulator.tuning import pv


@dataclass(frozen=True)
class AdditiveCodebooks:
    """Packs the linear maps of the frozen layers or of all, then tunes them to predict what the base does.

    Each of `steps` descends on the codebooks and changes at most `code_fraction` of the codes of a map; with 0 steps
    the maps are only encoded. Embeddings and head are not packed.
    """

    group: int = 8  # entries of a row that are encoded together
    codebooks: int = 2
    bits: Literal[4, 8] = 8  # of a code; codebooks * bits / group is the cost of an entry
    layers: Which = "frozen"
    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 1e-2  # relative to the size of the codebooks
    code_fraction: float = 0.01
    seed: int = 0

    name: ClassVar[str] = "additive"
    stage: ClassVar[Stage] = "storage"
    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    alters: ClassVar[frozenset[str]] = frozenset({PACKED})
    looks_at_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._format()
        if self.steps < 0 or self.batch_size < 1 or self.learning_rate <= 0 or not 0 <= self.code_fraction <= 1:
            raise ValueError(
                "steps must not be negative, batch_size be at least 1, learning_rate positive and code_fraction in "
                f"0..1, got {self.steps}, {self.batch_size}, {self.learning_rate} and {self.code_fraction}"
            )

    @property
    def trains_on_text(self) -> bool:
        """Whether codebooks and codes are tuned."""
        return self.steps > 0

    def _format(self, precision: Literal["float16", "float32"] = "float16") -> Additive:
        return Additive(self.group, self.codebooks, self.bits, precision)

    def fits(self, model: nn.Module, outline: Outline, *, depth: int) -> list[int]:
        """Return the places to pack, of a model that may have no weights; raises ValueError if a map does not fit."""
        places = chosen(outline, self.layers)
        refuse_shapes(model, places, self._format())
        return places

    def change(self, draft: Draft, material: Material) -> Draft:
        """Return the draft with packed and tuned maps.

        Raises ValueError without text, or if there is no layer to pack or a map that does not fit.
        """
        return change(self, draft, material)

    def places(self, outline: Outline) -> list[int]:
        """Return the places to pack; raises ValueError if there is none."""
        return chosen(outline, self.layers)

    def look(self, draft: Draft, material: Material) -> dict[Map, Tensor]:
        """Return the mean square of each map's inputs on the calibration text, by which an error counts."""
        places = self.places(draft.outline)
        if self.steps and not material.samples:
            raise ValueError("tuning codebooks takes public text; give some, or say steps=0")
        return importance(draft, places, self._format(), material.batches)

    def encode(
        self, draft: Draft, places: Sequence[int], weights: Mapping[Map, Tensor], material: Material
    ) -> dict[Map, Parts]:
        """Encode the maps of some places, with codebooks in fp32."""
        format, stack = self._format("float32"), layers(draft.model)
        parts: dict[Map, Parts] = {}
        for step, place in enumerate(places, start=1):
            for path in linears(stack[place]):
                matrix = dense(stack[place].get_submodule(path))
                drawn = generator(self.seed, f"codebooks {draft.outline.layers[place]} {path}")
                parts[place, path] = format.encode(matrix, weights[place, path].to(matrix.device), drawn)
            material.tell(self.name, step, len(places))
        return parts

    def finish(self, draft: Draft, encoded: Mapping[Map, Parts], material: Material) -> Draft:
        """Return the draft with encoded maps, once they are tuned."""
        model = pack(draft.model, encoded, self._format("float32"))
        if self.steps:
            self._tune(model, draft.base, material)
        stored, parts = self._format(), dict[Map, Parts]()
        for place, path in encoded:
            linear = layers(model)[place].get_submodule(path)
            dtypes = stored.shapes(*shape(linear))
            values = cast(PackedLinear, linear).parts
            parts[place, path] = {name: part.detach().to(dtypes[name][1]) for name, part in values.items()}
        return replace(draft, model=pack(draft.model, parts, stored))

    def _tune(self, model: nn.Module, base: nn.Module, material: Material) -> None:
        """Bring a model's packed maps, in place, nearer to the base's distribution of the next token."""
        model.eval()
        teacher = restack(base, range(len(layers(base)))).eval()
        batches = training_batches(
            material.samples, batch_size=self.batch_size, steps=self.steps, first_step=0, seed=self.seed
        )
        pv.tune(
            [m for m in layers(model).modules() if isinstance(m, PackedLinear) and isinstance(m.format, Additive)],
            pv.divergences(model, teacher, batches),
            steps=self.steps,
            learning_rate=self.learning_rate,
            fraction=self.code_fraction,
            tell=lambda step, steps: material.tell("pv", step, steps),
        )
