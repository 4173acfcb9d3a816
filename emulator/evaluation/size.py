"""What a method trains and sends of one layer, measured on random weights in the shapes of SmolLM2-135M."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from offsite.emulator import builders, catalogue, modality
from offsite.emulator.builders import Material
from offsite.emulator.methods import Method
from offsite.emulator.outline import Draft
from offsite.emulator.placements import Kept
from offsite.kernels.schema import Rule, settle, size_bytes

SHAPES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
ADAM_BYTES = 16  # of a value that trains in fp32: itself, its gradient, and AdamW's two moments


@dataclass(frozen=True)
class Size:
    """Of one layer: how many values train, and the bytes of an update that no stage packs, by kinds of tensors."""

    values: int
    update_bytes: int
    tensors: dict[str, tuple[str, Rule]]  # the last part of a key -> dtype and rule

    @property
    def training_bytes(self) -> int:
        """Memory that training takes for what trains, without activations and frozen weights."""
        return ADAM_BYTES * self.values


def measure(method: Method) -> Size:
    """Measure a method at its settings, on the layer as the builders make it that give what it needs."""
    _, draft = layer(method)
    start = method.start(draft.model, draft.outline.places, seed=0)
    schema = settle(method.schema(start), {key: tensor.shape for key, tensor in start.items()})
    return Size(
        values=sum(field.trained for field in schema.values()),
        update_bytes=size_bytes(schema),
        tensors={key.rpartition(".")[2]: (field.dtype, field.rule) for key, field in schema.items()},
    )


def layer(method: Method, shapes: Mapping[str, int] = SHAPES) -> tuple[nn.Module, Draft]:
    """Return a base of one layer, the same always, and what the builders make of it that give what a method needs."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        base: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**shapes, vocab_size=64, num_hidden_layers=1))
    base.eval()
    names = [name for name, kind in builders.BUILDERS.items() if kind.provides & method.needs] or [catalogue.FIRST]
    text = Material(batches=[modality.default().probe(base, rows=1, length=16)])
    return base, builders.run([builders.make(name, {}) for name in names[:1]], Kept(), base, text)
