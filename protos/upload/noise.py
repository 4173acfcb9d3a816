"""Gaussian noise on a change, far below it: it covers the digits that give the text of few steps away.

AdamW's first steps look like signs, but its epsilon leaves the gradient in the last digits of each value, and with the
gradient most words of the batch. Noise of 1 % of the change's root mean square (rms) covers these digits.

It is no differential privacy: whether a text was trained on, and what was seen often, can still be told from the
change. Nor does it hide what the signs alone tell: where a batch has few words, some of them.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from offsite.kernels.schema import FLOATS, Rule, Schema, Tensors, groups
from offsite.protos.documents import document
from offsite.protos.security.draws import derive
from offsite.protos.upload.base import At


@document
class Noise:
    """Add to each tensor noise of a share of the rms of its group's change; where nothing changed, nothing.

    A group is what the schema folds together, as LoRA's two factors; integers and what is fixed stay as they are. The
    noise comes from the site's key and the change itself: the same change gets the same noise, so that repeating a task
    tells nothing new, and another change gets other noise, so that no difference of two uploads is without any.
    """

    name: ClassVar[str] = "noise"
    hides: ClassVar[bool] = False
    phases: ClassVar[tuple[str, ...]] = ("train",)
    whole: ClassVar[bool] = False
    feedback: ClassVar[bool] = False
    share: Annotated[float, Field(strict=True, gt=0, le=100)] = 0.01

    @property
    def noise(self) -> float:
        """The share."""
        return self.share

    def schema(self, given: Schema) -> Schema:
        """Return the schema as it is; raises ValueError for bits, which no small noise can cover."""
        if bits := sorted(key for key, field in given.items() if field.bits is not None):
            raise ValueError(
                f"stage {self.name} adds a little to values, and {bits[0]} is of bits; leave it out, or choose a "
                "method that sends values"
            )
        return given

    def pack(self, change: Tensors, at: At) -> Tensors:
        """Add the noise."""
        from offsite.protos.upload.gaussian import noisy  # torch: an agent that only asks a stage needs none

        packed = dict(change)
        for group, keys in groups(at.schema).items():
            moving = [key for key in keys if at.schema[key].dtype in FLOATS and at.schema[key].rule is not Rule.FIXED]
            packed |= noisy({key: change[key] for key in moving}, self.share, key=derive(at.key, group))
        return packed

    def unpack(self, packed: Tensors, at: At) -> Tensors:
        """Return the change with its noise: only the site could take it away."""
        return packed
