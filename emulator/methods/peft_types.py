"""Types of adapters that peft has, one class each; their fields are peft's own settings, by peft's names.

A rate of 1e-2 is for few values that start at zero. No rate was searched for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from offsite.emulator.methods.base import Formula, Kind
from offsite.emulator.methods.peft_hub import PeftMethod


@dataclass(frozen=True)
class Ia3(PeftMethod):
    """(IA)3 (Liu et al., arXiv 2205.05638): one factor for each output of a map."""

    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "arXiv 2205.05638"
    kind: ClassVar[Kind] = Kind.ADDITIVE
    formula: ClassVar[Formula] = Formula("map", "d_out")
    linear: ClassVar[bool] = True
    rate: ClassVar[float] = 1e-2
    constants: ClassVar[Mapping[str, Any]] = {"feedforward_modules": ()}


@dataclass(frozen=True)
class Loha(PeftMethod):
    """LoHa (Hyeon-Woo et al., arXiv 2108.06098): the product, value by value, of two products of rank r."""

    r: int = 8
    alpha: float = 16.0

    name: ClassVar[str] = "loha"
    paper: ClassVar[str] = "arXiv 2108.06098"
    formula: ClassVar[Formula] = Formula("map", "2 * r * (d_in + d_out)")
    seeded: ClassVar[bool] = True


@dataclass(frozen=True)
class Lokr(PeftMethod):
    """LoKr (Yeh et al., arXiv 2309.14859): a Kronecker product, of which a large factor has rank r.

    The formula holds where decompose_factor divides both sizes of a map; peft takes a smaller one where it does not.
    """

    r: int = 8
    alpha: float = 16.0
    decompose_factor: int = 4

    name: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "arXiv 2309.14859"
    formula: ClassVar[Formula] = Formula(
        "map",
        "decompose_factor**2 + (r * (d_out + d_in) // decompose_factor"
        " if 2 * r < max(d_out, d_in) // decompose_factor else d_out * d_in // decompose_factor**2)",
    )
    seeded: ClassVar[bool] = True


@dataclass(frozen=True)
class Oft(PeftMethod):
    """OFT (Qiu et al., arXiv 2306.07280; the rotation of inputs of arXiv 2506.19847): blocks rotate a map's inputs."""

    oft_block_size: int = 16

    name: ClassVar[str] = "oft"
    paper: ClassVar[str] = "arXiv 2306.07280"
    formula: ClassVar[Formula] = Formula("map", "d_in * (oft_block_size - 1) // 2")
    constants: ClassVar[Mapping[str, Any]] = {"use_cayley_neumann": False}


@dataclass(frozen=True)
class Hra(PeftMethod):
    """HRA (Yuan et al., arXiv 2405.17484): r Householder reflections of a map's inputs, even so that they cancel."""

    r: int = 8

    name: ClassVar[str] = "hra"
    paper: ClassVar[str] = "arXiv 2405.17484"
    formula: ClassVar[Formula] = Formula("map", "r * d_in")
    seeded: ClassVar[bool] = True


@dataclass(frozen=True)
class Vera(PeftMethod):
    """VeRA (Kopiczko et al., arXiv 2310.11454): vectors that scale random factors, which all maps share."""

    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "arXiv 2310.11454"
    formula: ClassVar[Formula] = Formula("map", "r + d_out")
    rate: ClassVar[float] = 1e-2


@dataclass(frozen=True)
class Pvera(PeftMethod):
    """PVeRA (arXiv 2512.07703): VeRA whose scaled activations are drawn, in training alone, from a distribution."""

    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1

    name: ClassVar[str] = "pvera"
    paper: ClassVar[str] = "arXiv 2512.07703"
    formula: ClassVar[Formula] = Formula("map", "2 * r + d_out")
    rate: ClassVar[float] = 1e-2


@dataclass(frozen=True)
class Fourierft(PeftMethod):
    """FourierFT (Gao et al., arXiv 2405.03003): n_frequency entries of the change's spectrum."""

    n_frequency: int = 256
    scaling: float = 150.0
    random_loc_seed: int = 777

    name: ClassVar[str] = "fourierft"
    paper: ClassVar[str] = "arXiv 2405.03003"
    formula: ClassVar[Formula] = Formula("map", "n_frequency")
    linear: ClassVar[bool] = True
    rate: ClassVar[float] = 1e-2
    constants: ClassVar[Mapping[str, Any]] = {"init_weights": True}


@dataclass(frozen=True)
class Waveft(PeftMethod):
    """WaveFT (arXiv 2505.12532): n_frequency entries of the change's wavelet transform."""

    n_frequency: int = 256
    scaling: float = 25.0
    random_loc_seed: int = 777

    name: ClassVar[str] = "waveft"
    paper: ClassVar[str] = "arXiv 2505.12532"
    formula: ClassVar[Formula] = Formula("map", "n_frequency")
    linear: ClassVar[bool] = True
    rate: ClassVar[float] = 1e-2


@dataclass(frozen=True)
class Miss(PeftMethod):
    """MiSS (Kang and Yin, arXiv 2409.15371): r rows that all groups of inputs share."""

    r: int = 8

    name: ClassVar[str] = "miss"
    paper: ClassVar[str] = "arXiv 2409.15371"
    formula: ClassVar[Formula] = Formula("map", "r * d_out")
    linear: ClassVar[bool] = True


@dataclass(frozen=True)
class Randlora(PeftMethod):
    """RandLoRA (Albert et al., arXiv 2502.00987): sums of random products of rank r, each one scaled."""

    r: int = 8
    randlora_alpha: int = 160
    projection_prng_key: int = 0

    name: ClassVar[str] = "randlora"
    paper: ClassVar[str] = "arXiv 2502.00987"
    formula: ClassVar[Formula] = Formula("map", "-(-min(d_in, d_out) // r) * (r + min(d_in, d_out))")


@dataclass(frozen=True)
class Road(PeftMethod):
    """RoAd (Liao and Monz, arXiv 2409.00119): rotations of pairs of outputs, each with a scale."""

    group_size: int = 16

    name: ClassVar[str] = "road"
    paper: ClassVar[str] = "arXiv 2409.00119"
    formula: ClassVar[Formula] = Formula("map", "d_out")


@dataclass(frozen=True)
class Shira(PeftMethod):
    """SHiRA (Bhardwaj et al., arXiv 2406.13175): as many random entries of W as LoRA of rank r has values."""

    r: int = 8
    random_seed: int = 0

    name: ClassVar[str] = "shira"
    paper: ClassVar[str] = "arXiv 2406.13175"
    kind: ClassVar[Kind] = Kind.SELECTIVE
    formula: ClassVar[Formula] = Formula("map", "r * (d_in + d_out)")
    linear: ClassVar[bool] = True
    rate: ClassVar[float] = 1e-2


@dataclass(frozen=True)
class C3a(PeftMethod):
    """C3A (Chen et al., arXiv 2407.19342): a block circulant change, of d_in * d_out / block_size values."""

    block_size: int = 16

    name: ClassVar[str] = "c3a"
    paper: ClassVar[str] = "arXiv 2407.19342"
    formula: ClassVar[Formula] = Formula("map", "d_in * d_out // block_size")
    linear: ClassVar[bool] = True
    rate: ClassVar[float] = 1e-2
    constants: ClassVar[Mapping[str, Any]] = {"init_weights": True}


@dataclass(frozen=True)
class Hira(PeftMethod):
    """HiRA (Huang et al., ICLR 2025): the weights times, value by value, a product of rank r."""

    r: int = 8

    name: ClassVar[str] = "hira"
    paper: ClassVar[str] = "ICLR 2025"
    formula: ClassVar[Formula] = Formula("map", "r * (d_in + d_out)")
    seeded: ClassVar[bool] = True


@dataclass(frozen=True)
class Gralora(PeftMethod):
    """GraLoRA (Jung et al., arXiv 2505.20355): a LoRA for each of gralora_k x gralora_k blocks of a map."""

    r: int = 8
    alpha: int = 16
    gralora_k: int = 2

    name: ClassVar[str] = "gralora"
    paper: ClassVar[str] = "arXiv 2505.20355"
    formula: ClassVar[Formula] = Formula("map", "r * (d_in + d_out)")
    seeded: ClassVar[bool] = True


@dataclass(frozen=True)
class Peanut(PeftMethod):
    """PEANuT (arXiv 2410.01870): a change that a small network with a ReLU makes of the weights."""

    r: int = 8

    name: ClassVar[str] = "peanut"
    paper: ClassVar[str] = "arXiv 2410.01870"
    formula: ClassVar[Formula] = Formula("map", "2 * r * d_out")
    seeded: ClassVar[bool] = True
