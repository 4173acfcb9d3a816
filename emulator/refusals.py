"""Types of adapters that peft 0.21 has and the catalogue has not, and why: what was seen of each when it was tried.

What stands behind most reasons: an emulator starts from the same adapter as the base, whatever is stored in few bits;
an adapter is of layers by their numbers in the base; and what was trained in a few layers can be merged into its.
"""

PROMPT = "it trains tokens put before the prompt, or their keys and values, which no layer's weights can take in"

PEFT: dict[str, str] = {
    "adalora": "it prunes its ranks in a call of the training loop, each site other ones, so their mean has no meaning",
    "adamss": "it starts from a decomposition of each map's weights, so an emulator of few bits starts elsewhere",
    "adaption_prompt": "peft cannot merge it, and puts it on the last layers only",
    "beft": "it trains a bias, and peft cannot merge it into maps that have none, as Llama's",
    "boft": "peft compiles a CUDA extension for it when it is first used, and warns on machines that cannot",
    "cartridge": PROMPT,
    "cpt": PROMPT,
    "deft": "it starts from a projection of each map's weights, so an emulator of few bits starts elsewhere",
    "delora": "what peft writes of it has the norms of the base's columns, which are the owner's",
    "frod": "it starts from a joint decomposition of all maps' weights, so it depends on which layers train",
    "glora": "peft puts it on plain linear maps alone, and not on those that an emulator stores in few bits",
    "lily": "peft cannot merge it, for a router chooses by the input",
    "ln_tuning": "its copies of the norms train in the dtype of the base, bf16 as it may be, and not in fp32",
    "multitask_prompt_tuning": PROMPT,
    "osf": "it trains the singular vectors of the base's own weights, so an emulator of few bits starts elsewhere",
    "p_tuning": PROMPT + "; of its encoder, peft's state holds the outcome alone",
    "poly": "it is mhr with one head, mhr(heads=1), which has a row of its router for each task",
    "prefix_tuning": PROMPT,
    "prompt_tuning": PROMPT,
    "psoft": "it rotates inside the largest singular vectors of each map, which are others in few bits",
    "shadow": "peft cannot merge it, for what it adds to a layer depends on the input",
    "supertuning": "it trains the largest weights of each map, which are others in few bits",
    "tinylora": "it is fixed by singular vectors of each map's weights, which are others in few bits",
    "trainable_tokens": "it trains rows of the embedding, which is in no layer",
    "unilora": "one vector is shared by all layers and belongs to none, and its start changes the model",
    "vblora": "one bank of vectors is shared by all layers and belongs to none, and its start changes the model",
    "xlora": "it mixes LoRA adapters that were trained before, by the input, so it cannot be merged",
}
