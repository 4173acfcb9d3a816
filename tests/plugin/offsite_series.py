"""A modality of a package of its own: series of numbers, each of which is predicted from those before it.

A row is {"series": [0.5, 1, ...]}. Its model takes values (b, t) and gives predictions of the next ones, (b, t); its
metric is the squared error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.emulator.examples import Fault, OddRows
from offsite.emulator.modality import Batch, Encoding, Score
from offsite.emulator.seeds import generator


@dataclass(frozen=True)
class Series:
    """An example."""

    values: tuple[float, ...]
    place: str = field(default="", compare=False, repr=False)

    @property
    def row(self) -> dict[str, Any]:
        return {"series": list(self.values)}

    @property
    def characters(self) -> int:
        return len(str(self.row))


@dataclass(frozen=True)
class Window:
    """Values as many as a sample has."""

    values: tuple[float, ...]

    modality: ClassVar[str] = "series"

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class SeriesBatch(Batch):
    """Values and which of them are no padding, both (b, t), fp32 and int64."""

    values: Tensor
    real: Tensor

    modality: ClassVar[str] = "series"

    @property
    def targets(self) -> int:
        return int(self.real[:, 1:].sum())

    @property
    def mask(self) -> Tensor:
        return self.real

    @property
    def samples(self) -> list[Window]:
        lengths = self.real.sum(dim=1).tolist()
        return [Window(tuple(row[:length].tolist())) for row, length in zip(self.values, lengths, strict=True)]


class Forecaster(nn.Module):
    """A recurrent net."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(1, 8, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, values: Tensor) -> Tensor:
        states: Tensor = self.cell(values[..., None])[0]
        predicted: Tensor = self.head(states)
        return predicted.squeeze(-1)


@dataclass(frozen=True)
class SeriesModality:
    """Its outputs are predictions (b, t), and its targets all values but the first."""

    name: ClassVar[str] = "series"
    metric: ClassVar[str] = "squared error"
    columns: ClassVar[tuple[str, ...]] = ("series",)
    shapes: ClassVar[str] = '{"series": [number, number, ...]}'

    def example(self, row: dict[str, Any], place: str) -> Series:
        values = row.get("series")
        if not isinstance(values, list) or len(values) < 2 or not all(map(_is_number, values)):
            raise Fault("rows that are no series", f"expected {self.shapes}, at least two")
        return Series(tuple(map(float, values)), place)

    def encode(
        self, examples: Sequence[Series], tokenizer: Any, *, max_length: int, divide: bool = True, odd_rows: OddRows
    ) -> Encoding:
        """Every series that was read can be encoded."""
        windows = [
            Window(one.values[at : at + max_length])
            for one in examples
            for at in range(0, len(one.values) if divide else 1, max_length)
        ]
        windows = [window for window in windows if len(window) > 1]
        if not windows:
            raise ValueError(f"none of the {len(examples)} series has a value to predict within {max_length}")
        return Encoding(windows, {"windows": len(windows), "left_out": 0}, [])

    def collate(self, samples: Sequence[Window]) -> SeriesBatch:
        length = max(map(len, samples))
        values = [[*one.values, *[0.0] * (length - len(one))] for one in samples]
        real = [[1] * len(one) + [0] * (length - len(one)) for one in samples]
        return SeriesBatch(torch.tensor(values, dtype=torch.float32), torch.tensor(real, dtype=torch.int64))

    def probe(self, model: nn.Module, *, rows: int, length: int) -> SeriesBatch:
        values = torch.randn(rows, length, generator=generator(0, "probe"))
        batch = SeriesBatch(values, torch.ones(rows, length, dtype=torch.int64))
        return batch.to(next(model.parameters()).device)

    def disturb(self, model: nn.Module, batch: SeriesBatch) -> tuple[SeriesBatch, Tensor]:
        even = torch.arange(batch.values.shape[1], device=batch.values.device) % 2 == 0
        values = torch.where(even, batch.values + 1, batch.values)
        return replace(batch, values=values), (~even & batch.real.bool()).cpu()

    def run(self, model: nn.Module, batch: SeriesBatch, *, keep: Tensor | None = None) -> Tensor:
        predicted: Tensor = model(batch.values)
        return predicted if keep is None else predicted[:, keep]

    def loss(self, model: nn.Module, batch: SeriesBatch) -> Tensor:
        return self._missed(model, batch) / batch.targets

    def score(self, model: nn.Module, batch: SeriesBatch) -> Score:
        return Score(float(self._missed(model, batch)), batch.targets, self.metric)

    def _missed(self, model: nn.Module, batch: SeriesBatch) -> Tensor:
        real = batch.real[:, 1:].bool()
        if not bool(real.any()):
            raise ValueError("the batch has no value to predict")
        return functional.mse_loss(self.run(model, batch)[:, :-1][real], batch.values[:, 1:][real], reduction="sum")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
