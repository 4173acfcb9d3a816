"""A learning rate for a model that nobody has tried one on.

The rates of methods suit a model of the width they were found on. For a wider one AdamW's rate shrinks with the width,
as in maximal update parametrisation (Yang et al., arXiv 2203.03466): a step changes each entry by about the rate, and
what a map gives by that times the number of entries of a row. A narrower one gets no more than was tried.
"""

from torch import nn

from offsite.emulator.anatomy.structure import text_config

WIDTH = 576  # of SmolLM2-135M, on which the rates of the methods, the attacks and distillation were found


def suited(rate: float, model: nn.Module) -> float:
    """Return the rate for a model, of two digits, from that for a model of width WIDTH."""
    width = getattr(text_config(model), "hidden_size", WIDTH)
    return float(f"{rate * min(1.0, WIDTH / width):.2g}")
