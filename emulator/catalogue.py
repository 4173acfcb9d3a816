"""The plug-ins of this package by name, family by family, and where each of them is.

To add one, write its file and name it here. Whoever only needs to know the names loads no tensor library for them.
"""

from typing import Any

from offsite.emulator import refusals
from offsite.kernels.plugins import Plugins

METHODS: Plugins[Any] = Plugins(
    "method",
    {
        "amt": "offsite.emulator.methods.amt:Amt",
        "apet": "offsite.emulator.methods.apet:Apet",
        "bi-lora": "offsite.emulator.methods.bi_lora:BiLora",
        "blocks": "offsite.emulator.methods.blocks:Blocks",
        "bottleneck": "offsite.emulator.methods.bottleneck:Bottleneck",
        "compacter": "offsite.emulator.methods.compacter:Compacter",
        "dora": "offsite.emulator.methods.dora:Dora",
        "grids": "offsite.emulator.methods.grids:Grids",
        "halves": "offsite.emulator.methods.halves:Halves",
        "hydra": "offsite.emulator.methods.hydra:Hydra",
        "invertible": "offsite.emulator.methods.invertible:Invertible",
        "loldu": "offsite.emulator.methods.loldu:Loldu",
        "lora": "offsite.emulator.methods.lora:Lora",
        "c3a": "offsite.emulator.methods.peft_types:C3a",
        "fourierft": "offsite.emulator.methods.peft_types:Fourierft",
        "gralora": "offsite.emulator.methods.peft_types:Gralora",
        "hira": "offsite.emulator.methods.peft_types:Hira",
        "hra": "offsite.emulator.methods.peft_types:Hra",
        "ia3": "offsite.emulator.methods.peft_types:Ia3",
        "loha": "offsite.emulator.methods.peft_types:Loha",
        "lokr": "offsite.emulator.methods.peft_types:Lokr",
        "miss": "offsite.emulator.methods.peft_types:Miss",
        "oft": "offsite.emulator.methods.peft_types:Oft",
        "peanut": "offsite.emulator.methods.peft_types:Peanut",
        "pvera": "offsite.emulator.methods.peft_types:Pvera",
        "randlora": "offsite.emulator.methods.peft_types:Randlora",
        "road": "offsite.emulator.methods.peft_types:Road",
        "shira": "offsite.emulator.methods.peft_types:Shira",
        "vera": "offsite.emulator.methods.peft_types:Vera",
        "waveft": "offsite.emulator.methods.peft_types:Waveft",
        "fisher": "offsite.emulator.methods.fisher:Fisher",
        "mhr": "offsite.emulator.methods.mhr:Mhr",
        "moments": "offsite.emulator.methods.moments:Moments",
        "mosa": "offsite.emulator.methods.mosa:Mosa",
        "mos": "offsite.emulator.methods.mos:Mos",
        "paca": "offsite.emulator.methods.paca:Paca",
        "prototype": "offsite.emulator.methods.prototype:Prototype",
        "s2ft": "offsite.emulator.methods.s2ft:S2ft",
        "lt-sft": "offsite.emulator.methods.lt_sft:LtSft",
        "sara": "offsite.emulator.methods.sara:Sara",
        "spiel": "offsite.emulator.methods.spiel:Spiel",
        "signature": "offsite.emulator.methods.signature:Signature",
        "soka": "offsite.emulator.methods.soka:Soka",
        "spt": "offsite.emulator.methods.spt:Spt",
        "ssf": "offsite.emulator.methods.ssf:Ssf",
    },
    group="offsite.methods",
    states=(
        *("needs", "spares", "rate", "rules", "attaches", "mergeable", "withheld"),
        *("paper", "kind", "formula", "linear", "seeded", "disclosure"),
    ),
    refused=refusals.PEFT,
)
BUILDERS: Plugins[Any] = Plugins(
    "builder",
    {
        "additive": "offsite.emulator.builders.additive:AdditiveCodebooks",
        "crash": "offsite.emulator.builders.crash:Crash",
        "distilled": "offsite.emulator.builders.distilled:Distilled",
        "loram": "offsite.emulator.builders.loram:Loram",
        "quantised": "offsite.emulator.builders.quantised:Quantised",
        "sketch": "offsite.emulator.builders.sketched:Sketched",
        "uniform": "offsite.emulator.builders.uniform:Uniform",
        "whole": "offsite.emulator.builders.whole:Whole",
    },
    group="offsite.builders",
)
FIRST = "whole"  # the builder that a chain begins with where it names none that decides which layers stay
FORMATS: Plugins[Any] = Plugins(
    "format",
    {
        "additive": "offsite.emulator.formats.additive:Additive",
        "int4": "offsite.emulator.formats.int4:Int4",
        "nf4": "offsite.emulator.formats.nf4:NF4",
        "sketch": "offsite.emulator.formats.sketch:Sketch",
    },
    group="offsite.formats",
)
MODALITIES: Plugins[Any] = Plugins(
    "modality", {"causal-text": "offsite.emulator.modality.causal_text:CausalText"}, group="offsite.modalities"
)
MODALITY = "causal-text"  # that of every run: bases are causal language models
OBJECTIVES: Plugins[Any] = Plugins(
    "objective",
    {
        "supervised": "offsite.emulator.objectives.supervised:Supervised",
        "dpo": "offsite.emulator.objectives.dpo:Dpo",
        "kto": "offsite.emulator.objectives.kto:Kto",
    },
    group="offsite.objectives",
    states=("paper", "compares"),
)
OPTIMISERS: Plugins[Any] = Plugins(
    "optimiser",
    {
        "adamw": "offsite.emulator.optimisers.adamw:AdamW",
        "natural-galore": "offsite.emulator.optimisers.natural_galore:NaturalGalore",
        "spsa-gc": "offsite.emulator.optimisers.spsa_gc:SpsaGc",
    },
    group="offsite.optimisers",
    states=("paper", "elementwise", "forward_only", "scale_free", "aligned"),
    refused={
        "galore": "it is natural-galore without a history, natural-galore(history=0)",
        "spsa": "it is spsa-gc without correction, spsa-gc(momentum=0.0)",
    },
)
PLACEMENTS: Plugins[Any] = Plugins(
    "placement",
    {
        "ends": "offsite.emulator.placements:Ends",
        "spread": "offsite.emulator.placements:Spread",
        "kept": "offsite.emulator.placements:Kept",
    },
    group="offsite.placements",
)
SCHEDULES: Plugins[Any] = Plugins(
    "schedule",
    {
        "constant": "offsite.emulator.schedules:Constant",
        "linear": "offsite.emulator.schedules:Linear",
        "cosine": "offsite.emulator.schedules:Cosine",
        "cosine_with_min_lr": "offsite.emulator.schedules:CosineWithFloor",
        "polynomial": "offsite.emulator.schedules:Polynomial",
        "inverse_sqrt": "offsite.emulator.schedules:InverseSqrt",
        "warmup_stable_decay": "offsite.emulator.schedules:WarmupStableDecay",
    },
    group="offsite.schedules",
    refused={
        "constant_with_warmup": "constant warms up over warmup_steps as all others do",
        "greedy": "it follows a loss on held-out text, which a site does not measure while it trains",
        "reduce_lr_on_plateau": "it follows a loss on held-out text, which a site does not measure while it trains",
    },
)
PARTS: Plugins[Any] = Plugins(
    "part",
    {
        "all": "offsite.emulator.parts.whole:Whole",
        "by-capability": "offsite.emulator.parts.by_capability:ByCapability",
        "by-expert": "offsite.emulator.parts.by_expert:ByExpert",
        "by-task": "offsite.emulator.parts.by_task:ByTask",
        "half": "offsite.emulator.parts.half:Half",
        "ist": "offsite.emulator.parts.ist:Ist",
        "lisa": "offsite.emulator.parts.lisa:Lisa",
    },
    group="offsite.parts",
    states=("partial", "starts"),
)
RETENTIONS: Plugins[Any] = Plugins(
    "retention",
    {
        "none": "offsite.emulator.retention.none:Plain",
        "distil": "offsite.emulator.retention.distil:Distil",
        "ewc": "offsite.emulator.retention.ewc:Ewc",
        "orthogonal": "offsite.emulator.retention.orthogonal:Orthogonal",
        "replay": "offsite.emulator.retention.replay:Replay",
        "surgery": "offsite.emulator.retention.surgery:Surgery",
    },
    group="offsite.retentions",
    states=("paper", "active", "starts", "asks", "rules", "needs", "valued", "compares"),
    refused={"o-lora": "it is orthogonal", "mos": "it is surgery", "lwf": "it is distil"},
)
