"""Which linear maps of a layer play which role in its attention and MLP, told by the names families give them."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from offsite.emulator.anatomy.structure import described, layers, linears, text_config
from offsite.kernels import plugins


@dataclass(frozen=True)
class Roles:
    """Paths of linear maps inside a layer. One map may be query, key and value at once, its rows in blocks or groups:

    "blocks" has all of q, then all of k, then all of v; "groups" has q, k and v of one KV group after the other.
    """

    query: str
    key: str
    value: str
    output: str
    mlp_in: tuple[str, ...]  # the maps that have a row for each channel of the MLP
    mlp_out: str  # the map that has a column for each
    fused: Literal["", "blocks", "groups"] = ""
    alibi: bool = False  # a head's number tells how it sees positions, so that none may go

    @property
    def attention(self) -> set[str]:
        """The maps of the attention."""
        return {self.query, self.key, self.value, self.output}

    @property
    def mlp(self) -> set[str]:
        """The maps of the MLP."""
        return {*self.mlp_in, self.mlp_out}


@dataclass(frozen=True)
class Heads:
    """The attention heads of a layer: query heads, the KV groups that share keys and values, and a head's width."""

    count: int
    groups: int
    width: int


TABLE: dict[str, Roles] = {
    "Llama, Qwen, Mistral, Gemma": Roles(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
    ),
    "OPT": Roles(
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        mlp_in=("fc1",),
        mlp_out="fc2",
    ),
    "GPT-2": Roles(
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj",
        fused="blocks",
    ),
    "GPT-NeoX": Roles(
        query="attention.query_key_value",
        key="attention.query_key_value",
        value="attention.query_key_value",
        output="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        fused="groups",
    ),
    "BLOOM": Roles(
        query="self_attention.query_key_value",
        key="self_attention.query_key_value",
        value="self_attention.query_key_value",
        output="self_attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        mlp_out="mlp.dense_4h_to_h",
        fused="groups",
        alibi=True,
    ),
    "BERT": Roles(
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        mlp_in=("intermediate.dense",),
        mlp_out="output.dense",
    ),
    "ViT": Roles(
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
        mlp_in=("mlp.fc1",),
        mlp_out="mlp.fc2",
    ),
}


def roles(model: nn.Module, place: int) -> Roles:
    """Return the roles of a layer's maps, as its family or its `config.anatomy` has them.

    Raises ValueError that says how to describe a family that is in no table.
    """
    has = linears(layers(model)[place])
    table = {name: value for name, value in described(model).items() if name != "layers"}
    known = {"config.json": plugins.make("anatomy", {"config.json": Roles}, "config.json", table)} if table else TABLE
    for maps in known.values():
        if maps.attention | maps.mlp <= {*has}:
            return maps
    looked_for = "; ".join(f"{name}: {', '.join(sorted(maps.attention | maps.mlp))}" for name, maps in known.items())
    example = json.dumps({"anatomy": _example(TABLE["Llama, Qwen, Mistral, Gemma"])})
    raise ValueError(
        f"{type(model).__name__}, layer {place}: looked for the linear maps of attention and MLP ({looked_for}), but "
        f"the layer has {', '.join(has) or 'no linear map'}; describe such a family in its config.json: {example}, "
        'and where one map is query, key and value, name it three times and say how its rows are "fused": "blocks" '
        '(all of q, of k, of v) or "groups" (q, k and v of one KV group after the other)'
    )


def heads(model: nn.Module) -> Heads:
    """Return the heads of a model's layers as its configuration has them; raises ValueError if it does not say."""
    config = text_config(model)
    count = getattr(config, "num_attention_heads", None)
    if not count:
        raise ValueError(f"{type(model).__name__}: the configuration has no num_attention_heads, so no head can go")
    groups = getattr(config, "num_key_value_heads", None) or count
    return Heads(count, groups, getattr(config, "head_dim", None) or config.hidden_size // count)


def _example(maps: Roles) -> dict[str, Any]:
    return {role: paths for role, paths in asdict(maps).items() if paths}
