"""Written by `.ci/plugins`, of the plug-ins themselves: each by a class with its settings and their defaults.

from offsite.client.plugins import Crash, Lora, Quantised

RunSpec(model="base", builders=Crash(keep=24) + Quantised(), method=Lora(rank=8))

Importing it loads no tensor library. What another package adds is named by a recipe or a `Choice`.
"""

from dataclasses import field
from typing import Any, Literal

from offsite.client.config import Config


class Amt(Config, name="amt"):
    """Train which weights of some maps are zero, by as many fp32 scores as a map has weights."""

    modules: tuple[str, ...] | Literal["all-linear", "attention"] = "attention"


class Apet(Config, name="apet"):
    """Train a `share` of the maps' entries' number: "28.self_attn.q_proj.A" and ".B", or ".change" (d_out,
    d_in)."""

    share: float = 0.0625
    rank: int = 16
    scale: float = 2.0  # of products, whatever their rank
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class BiLora(Config, name="bi-lora"):
    """Train LoRA's factors of some maps in `bits` a value."""

    rank: int = 32
    alpha: float = 64.0
    bits: Literal[1, 2] = 1
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Blocks(Config, name="blocks"):
    """The parameters of the layers that train; an adapter holds their values: "28.self_attn.q_proj.weight"."""


class Bottleneck(Config, name="bottleneck"):
    """Bottlenecks of a width: "28.mlp.down_proj.down" and ".up", which is zero at the start."""

    width: int = 64
    form: Literal["series", "parallel"] = "series"
    activation: Literal["gelu", "relu", "silu", "tanh"] = "tanh"
    modules: tuple[str, ...] | Literal["all-linear", "outputs", "mlp-output"] = "outputs"
    biases: bool = False


class C3a(Config, name="c3a"):
    """C3A (Chen et al., arXiv 2407.19342): a block circulant change, of d_in * d_out / block_size values."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    block_size: int = 16


class Compacter(Config, name="compacter"):
    """Train "0.mlp.down_proj.slow" (n, n, n) for all maps, and factors and biases of each."""

    width: int = 16
    terms: int = 4  # n, which divides the width and the maps' rows
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    modules: tuple[str, ...] | Literal["all-linear", "outputs"] = "outputs"


class Dora(Config, name="dora"):
    """Train "28.mlp.down_proj.A" (r, d_in), ".B" (d_out, r) and ".magnitude" (d_out,), by how much rows grow."""

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    scaling: Literal["alpha / rank", "alpha / sqrt(rank)"] = "alpha / rank"


class Fisher(Config, name="fisher"):
    """Measure the Fisher information of another method's adapter."""

    method: str = "lora"
    settings: dict[str, Any] = field(default_factory=dict)
    decay: float = 1.0  # of what was measured on earlier tasks, when this one's is added (arXiv 1805.06370)


class Fourierft(Config, name="fourierft"):
    """FourierFT (Gao et al., arXiv 2405.03003): n_frequency entries of the change's spectrum."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    n_frequency: int = 256
    scaling: float = 150.0
    random_loc_seed: int = 777


class Gralora(Config, name="gralora"):
    """GraLoRA (Jung et al., arXiv 2505.20355): a LoRA for each of gralora_k x gralora_k blocks of a map."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8
    alpha: int = 16
    gralora_k: int = 2


class Grids(Config, name="grids"):
    """The grids of the layers that train; an adapter holds their values: "28.self_attn.q_proj.grid"."""


class Halves(Config, name="halves"):
    """Train "28.mlp.down_proj.down" (r, d_in - d_in // 2) and ".up" (d_out - d_out // 2, r), each a group by
    itself."""

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] | Literal["all-linear", "outputs"] = "all-linear"


class Hira(Config, name="hira"):
    """HiRA (Huang et al., ICLR 2025): the weights times, value by value, a product of rank r."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8


class Hra(Config, name="hra"):
    """HRA (Yuan et al., arXiv 2405.17484): r Householder reflections of a map's inputs, even so that they
    cancel."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8


class Hydra(Config, name="hydra"):
    """Two products of one rank: "28.mlp.down_proj.A" (r, d_in), ".B" (d_out, r), ".C" (r, d_out), ".D" (d_out,
    r)."""

    rank: int = 4
    scale: float = 1.0
    modules: tuple[str, ...] | Literal["all-linear", "outputs"] = "outputs"


class Ia3(Config, name="ia3"):
    """(IA)3 (Liu et al., arXiv 2205.05638): one factor for each output of a map."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Invertible(Config, name="invertible"):
    """Train "0.coupling.F_down" and seven more at the lowest layer, and the tensors of a bottleneck in each
    layer."""

    bottleneck: int = 48  # the width behind each MLP
    reduction: int = 2  # of the width of F and G: how many times it is in what they are given, d / 2


class Loha(Config, name="loha"):
    """LoHa (Hyeon-Woo et al., arXiv 2108.06098): the product, value by value, of two products of rank r."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8
    alpha: float = 16.0


class Lokr(Config, name="lokr"):
    """LoKr (Yeh et al., arXiv 2309.14859): a Kronecker product, of which a large factor has rank r."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8
    alpha: float = 16.0
    decompose_factor: int = 4


class Loldu(Config, name="loldu"):
    """Train "28.mlp.down_proj.diagonal" (r,); ".order" (1,) is a check sum of the rows that were pivots."""

    rank: int = 256  # the most; a map of fewer rows or columns has its whole diagonal
    modules: tuple[str, ...] | Literal["all-linear", "outputs"] = "all-linear"


class Lora(Config, name="lora"):
    """Low-rank adapters on the linear maps of the layers that train."""

    rank: int = 8
    alpha: float = 16.0
    ranks: dict[str, int] = field(default_factory=dict)  # site name -> smaller rank, the most that its maps have
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    scaling: Literal["alpha / rank", "alpha / sqrt(rank)"] = "alpha / rank"
    rank_pattern: dict[str, int] = field(default_factory=dict)  # ending -> these maps' rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # ending -> these maps' alpha
    init: Literal["random", "pissa", "olora", "corda", "corda-kpm", "eva", "lora-ga"] = (
        "random"  # what A and B start from; taken off again, it is one start for all sites
    )


class LtSft(Config, name="lt-sft"):
    """Train the `share` of each map's entries that the sites chose in the first round."""

    share: float = 0.01
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Mhr(Config, name="mhr"):
    """Train "28.mlp.down_proj.A" (h, s, r, d_in / h), ".B" (h, s, d_out / h, r) and ".routing" (h, s)."""

    skills: int = 8
    rank: int = 1  # of a skill, and so of a task's product
    heads: int = 4  # which must divide a map's sizes
    alpha: float = 4.0
    modules: tuple[str, ...] | Literal["all-linear", "outputs"] = "all-linear"


class Miss(Config, name="miss"):
    """MiSS (Kang and Yin, arXiv 2409.15371): r rows that all groups of inputs share."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8


class Moments(Config, name="moments"):
    """Measure moments of the maps that train: "28.mlp.down_proj.inputs" and ".count", ".gradients" or
    ".squares"."""

    of: Literal["inputs", "gradients", "squares"] = "inputs"
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Mos(Config, name="mos"):
    """Train "0.mlp.down_proj.pool_A" (n, d_in / l) and ".pool_B" (n, d_out / l), n = budget * layers * l."""

    budget: int = 2
    rank: int = 8  # of each layer's product, at least the budget
    shards: int = 4  # of a vector, whose size they must divide
    private: int = 1  # rows of the budget that one layer has to itself
    alpha: float = 16.0
    pools: int = 1  # into which the shards of A, and those of B, are dealt, as evenly as can be, the private ones last
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Mosa(Config, name="mosa"):
    """Train "28.mlp.down_proj.down" and of each expert ".up_0" (k,), at ".index_0" (k,), flat indices into U."""

    width: int = 64
    experts: int = 4
    form: Literal["series", "parallel"] = "parallel"
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    modules: tuple[str, ...] | Literal["all-linear", "outputs", "mlp-output"] = "outputs"


class Oft(Config, name="oft"):
    """OFT (Qiu et al., arXiv 2306.07280; the rotation of inputs of arXiv 2506.19847): blocks rotate a map's
    inputs."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    oft_block_size: int = 16


class Paca(Config, name="paca"):
    """Train `rank` columns of each map: "28.self_attn.q_proj.columns" (rank,) and ".change" (d_out, rank)."""

    rank: int = 8
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Peanut(Config, name="peanut"):
    """PEANuT (arXiv 2410.01870): a change that a small network with a ReLU makes of the weights."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8


class Prototype(Config, name="prototype"):
    """Measure "0.prototype.bundle" (size,) and ".count" (1,), that of rows; compared is what has one salt and
    model."""

    size: int = 4096  # of a code
    salt: int = 0  # of the projection and the keys


class Pvera(Config, name="pvera"):
    """PVeRA (arXiv 2512.07703): VeRA whose scaled activations are drawn, in training alone, from a distribution."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1


class Randlora(Config, name="randlora"):
    """RandLoRA (Albert et al., arXiv 2502.00987): sums of random products of rank r, each one scaled."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8
    randlora_alpha: int = 160
    projection_prng_key: int = 0


class Road(Config, name="road"):
    """RoAd (Liao and Monz, arXiv 2409.00119): rotations of pairs of outputs, each with a scale."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    group_size: int = 16


class S2ft(Config, name="s2ft"):
    """Train a share of the channels, and of the KV groups, of each layer: "28.mlp.down_proj.columns" (n,),
    ".change"."""

    channels: float = 0.03  # of the MLP, at least one unless 0
    groups: float = 0.0  # of the attention
    before: bool = False  # whether the rows of the maps before train too


class Sara(Config, name="sara"):
    """Train the `share` of each map's entries that is nearest to zero: "28.self_attn.q_proj.index", ".change"."""

    share: float = 0.02
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Shira(Config, name="shira"):
    """SHiRA (Bhardwaj et al., arXiv 2406.13175): as many random entries of W as LoRA of rank r has values."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 8
    random_seed: int = 0


class Signature(Config, name="signature"):
    """Measure "0.signature.terms" (buckets,), ".documents" (buckets,), the rows that have one, and ".count"
    (1,)."""

    ngram: int = 2  # the longest, in tokens
    buckets: int = 4096
    salt: str = ""


class Soka(Config, name="soka"):
    """Train "28.mlp.down_proj.B" (m n, r) and ".A" (r, p q), of r terms; ".B0" and ".A0" are what they start
    from."""

    terms: int = 8
    modules: tuple[str, ...] | Literal["all-linear", "outputs"] = "all-linear"


class Spiel(Config, name="spiel"):
    """Train a `share` of each map's entries, of which a site grows the part `renewed` anew each round, or more."""

    share: float = 0.01
    renewed: float = 0.2
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Spt(Config, name="spt"):
    """Train a `share` of the maps' entries' number: "28.self_attn.q_proj.A" and ".B", or ".index" and ".change"."""

    share: float = 0.01
    rank: int = 8
    alpha: float = 16.0
    ratio: float = 10.0  # of the values of a pair to the sensitive entries that a map gets one for
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Ssf(Config, name="ssf"):
    """Train how much a map's output grows: "28.mlp.down_proj.scale" (d_out,), and ".shift" where it has a bias."""

    modules: tuple[str, ...] | Literal["all-linear", "outputs"] = "all-linear"


class Vera(Config, name="vera"):
    """VeRA (Kopiczko et al., arXiv 2310.11454): vectors that scale random factors, which all maps share."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1


class Waveft(Config, name="waveft"):
    """WaveFT (arXiv 2505.12532): n_frequency entries of the change's wavelet transform."""

    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    n_frequency: int = 256
    scaling: float = 25.0
    random_loc_seed: int = 777


class Additive(Config, name="additive"):
    """Packs the linear maps of the frozen layers or of all, then tunes them to predict what the base does."""

    group: int = 8  # entries of a row that are encoded together
    codebooks: int = 2
    bits: Literal[4, 8] = 8  # of a code; codebooks * bits / group is the cost of an entry
    layers: Literal["frozen", "all"] = "frozen"
    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 0.01  # relative to the size of the codebooks
    code_fraction: float = 0.01
    seed: int = 0


class Crash(Config, name="crash"):
    """Keeps `keep` distinct layers in all: those the placement fixes, and of the rest one per segment of similar
    ones."""

    keep: int | None = None  # distinct layers in all; None: four fifths
    reduction: Literal["cluster", "drop"] = "cluster"
    sharing: Literal["off", "auto", "on"] = "off"


class Distilled(Config, name="distilled"):
    """Tunes the frozen layers with the loss of Offsite-Tuning (arXiv 2302.04870); those that train stay as they
    are."""

    steps: int = 200
    learning_rate: float | None = None  # None: RATE, as it suits the model
    batch_size: int = 4
    kd_weight: float = 30.0  # of the distance between hidden states
    lm_weight: float = 1.0  # of the loss of the text
    warmup_steps: int = 20
    seed: int = 0


class Loram(Config, name="loram"):
    """Prunes a share of the MLP channels, and of the KV groups, of all layers but the base's `first` and `last`
    ones."""

    mlp: float = 0.5  # share of the channels that goes
    attention: float = 0.0  # share of the KV groups that goes
    score: Literal["weight", "activation"] = "weight"
    first: int = 2
    last: int = 2


class Quantised(Config, name="quantised"):
    """Packs the linear maps of the frozen layers, or of all: then LoRA trains on packed maps, as in QLoRA."""

    format: str = "nf4"  # one of 16 levels and a scale for each block
    block: int = 64  # entries of a row that share a scale
    layers: Literal["frozen", "all"] = "frozen"


class Sketch(Config, name="sketch"):
    """Sketches the linear maps of the frozen layers or of all, with `groups` grids a row."""

    groups: int = 1
    layers: Literal["frozen", "all"] = "all"
    iterations: int = 4


class Uniform(Config, name="uniform"):
    """Keeps `keep` layers in all: those the placement fixes, and of the rest evenly."""

    keep: int | None = None  # distinct layers in all; None: four fifths


class Whole(Config, name="whole"):
    """Keeps every layer."""


class Ends(Config, name="ends"):
    """The lowest `bottom` and the highest `top` layers, as in Offsite-Tuning (arXiv 2302.04870)."""

    bottom: int = 2
    top: int = 2


class Kept(Config, name="kept"):
    """Every layer that is kept: their absolute ids bring what was trained back to the base exactly."""


class Spread(Config, name="spread"):
    """`count` of the kept layers, the first and the last among them, as in CRaSh (arXiv 2310.15477)."""

    count: int = 4


class FactorMean(Config, name="factor-mean"):
    """Average A and B apart; needs equal ranks."""


class IndexUnion(Config, name="index-union"):
    """Average sparse matrices exactly; send on the largest entries of the mean, as many as before."""


class LowRank(Config, name="low-rank"):
    """Average products exactly; re-project to each site's rank by QR and SVD."""

    tolerance: float = 1e-07  # singular values below this share of the largest are dropped


class Mean(Config, name="mean"):
    """Average every tensor by itself."""


class Requantise(Config, name="requantise"):
    """Average what codes stand for, and encode the mean."""


class Sum(Config, name="sum"):
    """Add the tensors of all sites to those of the last version."""


class Vote(Config, name="vote"):
    """Take for each bit what most of the weight has."""


class Noise(Config, name="noise"):
    """Add to each tensor noise of a share of the rms of its group's change; where nothing changed, nothing."""

    share: float = 0.01


class Ema(Config, name="ema"):
    """Average the rounds of a run into the version that it went on from, and end with that."""

    least: float = 0.01  # weight of an optimiser step where the rule gives none
    rank: int = 0  # most ranks of its products; 0: as many as its average has, so that it is exact


class Grown(Config, name="grown"):
    """Keep one adapter for each task."""

    origin: Literal["start", "last"] = "start"  # of a new task's adapter: the method's, or what the last task ended in


class Lae(Config, name="lae"):
    """Keep a slow average of what the rounds give, beside the newest version."""

    c: float = 2.0  # how often the offline adapter would be replaced in a run, if its steps did not overlap
    rank: int = 0  # most ranks of its products; 0: as many as its average has, so that it is exact
    serve: Literal["ensemble", "offline", "online"] = "ensemble"


class NoMemory(Config, name="none"):
    """Keep nothing."""


class ShardStore(Config, name="shard-store"):
    """Keep the private shards of each task, and let the common ones move slowly."""

    c: float = 2.0  # how often a later task's run would replace the common shards, if its steps did not overlap


class Constant(Config, name="constant"):
    """The whole rate, once warm."""


class Cosine(Config, name="cosine"):
    """Along half a wave to zero (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""


class CosineWithMinLr(Config, name="cosine_with_min_lr"):
    """Along half a wave to a share of the rate."""

    floor: float = 0.1


class InverseSqrt(Config, name="inverse_sqrt"):
    """As 1 / sqrt(1 + k / timescale), k steps after the warm-up (Zhai et al., arXiv 2106.04560)."""

    timescale: int | None = None  # steps; None: one more than those of the warm-up (Vaswani et al., arXiv 1706.03762)


class Linear(Config, name="linear"):
    """In a line to zero."""


class Polynomial(Config, name="polynomial"):
    """As the power of a line to a share of the rate."""

    power: float = 2.0
    floor: float = 0.0


class WarmupStableDecay(Config, name="warmup_stable_decay"):
    """The whole rate until the last steps, in which it falls to zero (MiniCPM, arXiv 2404.06395)."""

    decay: float = 0.2  # share of the steps after the warm-up in which it falls, one at least
    shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"  # the best of Haegele et al., arXiv 2405.18392


class Adamw(Config, name="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), with torch's default moments."""


class NaturalGalore(Config, name="natural-galore"):
    """Natural gradients in the subspace of GaLore (Das, arXiv 2410.16029; Zhao et al., arXiv 2403.03507)."""

    rank: int = 4
    every: int = 200  # steps between two choices of the subspace
    scale: float = 0.25  # of the steps in it
    history: int = 20  # gradients whose outer products are the curvature; 0: GaLore
    sides: Literal["least", "one"] = "least"  # those with which least is kept, or the shorter one
    damping: float = 1.0  # of the curvature, as a share of the mean squared norm of these gradients


class SpsaGc(Config, name="spsa-gc"):
    """Simultaneous perturbation with gradient correction (BlackVIP, arXiv 2303.14773, eq. 3 and 4; Spall, 1992)."""

    draws: int = 5  # of D in a step: each takes two forward passes, and the mean of the estimates is taken
    perturbation: float = 0.01
    momentum: float = 0.9  # 0: SPSA without correction
    alpha: float = 0.4  # 0: the rate falls by its schedule alone
    gamma: float = 0.1
    offset: float = 1.0


class Dpo(Config, name="dpo"):
    """-log sigmoid(beta ((log p_w - log ref_w) - (log p_l - log ref_l))) of a pair (Rafailov et al., arXiv
    2305.18290)."""

    beta: float = 0.1


class Kto(Config, name="kto"):
    """1 - sigmoid(beta (r - z)) of a desired answer, 1 - sigmoid(beta (z - r)) of another (Ethayarajh et al., eq.
    8)."""

    beta: float = 0.1
    desirable: float = 1.0  # weight of the terms of desired answers
    undesirable: float = 1.0  # and of the others


class Supervised(Config, name="supervised"):
    """Maximum likelihood of what is to be learned."""


class All(Config, name="all"):
    """Train all that the method trains."""


class ByCapability(Config, name="by-capability"):
    """Cut an adapter into shards, and hand a site as many as it can carry."""

    shards: int = 4
    carries: int = 1  # how many a site has that is not named below
    first: int = 0  # the shard that such a site begins with
    step: int = 0  # how many shards all go on by in a round; 0: as many as the least site carries
    sites: dict[str, int] = field(default_factory=dict)  # site -> how many it carries


class ByExpert(Config, name="by-expert"):
    """Take the experts in turn."""


class ByTask(Config, name="by-task"):
    """Leave what tasks share as it is."""


class Half(Config, name="half"):
    """Draw one half of the groups of each layer."""

    per: Literal["round", "site"] = "round"


class Ist(Config, name="ist"):
    """Draw a share of the layers by their importance, which `trials` of three forward passes on a batch tell."""

    share: float = 0.25  # of the layers, at least one
    trials: int = 4
    response: float = 0.25  # what is left of a response that is made small


class Lisa(Config, name="lisa"):
    """Draw so many of the layers, each as likely as any other."""

    layers: int = 2
    per: Literal["round", "site"] = "round"


class Distil(Config, name="distil"):
    """Add strength * T^2 KL(p_before || p) at temperature T, the mean over the targets (LwF, arXiv 1606.09282)."""

    strength: float = 1.0
    temperature: float = 2.0
    k: int = 32


class Ewc(Config, name="ewc"):
    """Add strength / 2 * sum F (theta - before)^2 (Kirkpatrick et al., arXiv 1612.00796, eq. 3)."""

    strength: float = 1.0


class NoRetention(Config, name="none"):
    """Let training forget what it will."""


class Orthogonal(Config, name="orthogonal"):
    """Add strength * sum |(B A - B0 A0) Q^T|^2, Frobenius, over the maps that train (Wang et al., arXiv
    2310.14152)."""

    strength: float = 0.5


class Replay(Config, name="replay"):
    """Keep `rows` of each task, and fill a `share` of each batch of later ones with them (arXiv 1902.10486)."""

    rows: int = 64
    share: float = 0.25


class Surgery(Config, name="surgery"):
    """After each step theta becomes (1 - alpha) theta + alpha mean_k theta_k, over earlier tasks k (MOS, AAAI
    2025)."""

    alpha: float = 0.1


__all__ = [
    "Adamw",
    "Additive",
    "All",
    "Amt",
    "Apet",
    "BiLora",
    "Blocks",
    "Bottleneck",
    "ByCapability",
    "ByExpert",
    "ByTask",
    "C3a",
    "Compacter",
    "Constant",
    "Cosine",
    "CosineWithMinLr",
    "Crash",
    "Distil",
    "Distilled",
    "Dora",
    "Dpo",
    "Ema",
    "Ends",
    "Ewc",
    "FactorMean",
    "Fisher",
    "Fourierft",
    "Gralora",
    "Grids",
    "Grown",
    "Half",
    "Halves",
    "Hira",
    "Hra",
    "Hydra",
    "Ia3",
    "IndexUnion",
    "InverseSqrt",
    "Invertible",
    "Ist",
    "Kept",
    "Kto",
    "Lae",
    "Linear",
    "Lisa",
    "Loha",
    "Lokr",
    "Loldu",
    "Lora",
    "Loram",
    "LowRank",
    "LtSft",
    "Mean",
    "Mhr",
    "Miss",
    "Moments",
    "Mos",
    "Mosa",
    "NaturalGalore",
    "NoMemory",
    "NoRetention",
    "Noise",
    "Oft",
    "Orthogonal",
    "Paca",
    "Peanut",
    "Polynomial",
    "Prototype",
    "Pvera",
    "Quantised",
    "Randlora",
    "Replay",
    "Requantise",
    "Road",
    "S2ft",
    "Sara",
    "ShardStore",
    "Shira",
    "Signature",
    "Sketch",
    "Soka",
    "Spiel",
    "Spread",
    "SpsaGc",
    "Spt",
    "Ssf",
    "Sum",
    "Supervised",
    "Surgery",
    "Uniform",
    "Vera",
    "Vote",
    "WarmupStableDecay",
    "Waveft",
    "Whole",
]
