"""Every odd model folder is either built, loadable, trainable and right to the bit, or refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from offsite.coordinator.bundles import building
from offsite.coordinator.bundles.trial import try_out
from offsite.coordinator.runs.legality import judge
from offsite.emulator import bundle, zoo
from offsite.emulator.anatomy.stack import restack
from offsite.emulator.methods import make
from offsite.protos.errors import InputError, MismatchError
from offsite.protos.recipes import parse, parse_one
from offsite.protos.spec import RunSpec

WORDS, DEPTH = 24, 4
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
MIXTURES: dict[str, Callable[[], Any]] = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SMALL,
        **MLA,
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4, mlp_only_layers=[0, 2]),
    "qwen3_moe, every other": lambda: transformers.Qwen3MoeConfig(
        **SMALL, **EXPERTS, num_experts=4, decoder_sparse_step=2
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=24, num_local_experts=2, interleave_moe_layer_step=2, no_rope_layer_interval=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=DEPTH, state_size=4, pad_token_id=0
    ),
}


def save(config: Any, folder: Path, *, kind: Any = transformers.AutoModelForCausalLM, words: int = WORDS) -> Any:
    """Write a random model and a tokenizer of so many words; return the model."""
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0").save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with nothing odd about it, and its model."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, save(transformers.LlamaConfig(**SMALL), folder)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def odd(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return odd


def renamed(prefix: str, into: str = "") -> Callable[[Path], None]:
    return tensors(lambda held: {prefix + name.replace("mlp.", f"mlp.{into}"): held[name] for name in held})


def config(**settings: Any) -> Callable[[Path], None]:
    def odd(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return odd


def without(*names: str) -> Callable[[Path], None]:
    return tensors(lambda held: {name: held[name] for name in held if name not in names})


def infinite(folder: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        held["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
        return held

    tensors(change)(folder)


def stale(folder: Path) -> None:
    save_file(
        {name: 2 * held for name, held in load_file(folder / "model.safetensors").items()}, folder / "zz.safetensors"
    )


def sharded(**extra: str) -> Callable[[Path], None]:
    """Two files and their index, in which some names are changed."""

    def odd(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        halves = {"a.safetensors": list(held)[:9], "b.safetensors": list(held)[9:]}
        for file, names in halves.items():
            save_file({name: held[name] for name in names}, folder / file, metadata={"format": "pt"})
        index = {name: file for file, names in halves.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index | extra}))

    return odd


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other"}')
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")


def encoder(folder: Path) -> None:
    shutil.rmtree(folder)
    settings = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
    save(transformers.BertConfig(**settings), folder)


RIGHT: dict[str, Callable[[Path], None]] = {
    "plain": lambda folder: None,
    "prefix-module": renamed("module."),
    "prefix-orig-mod": renamed("_orig_mod."),
    "prefix-both": renamed("module._orig_mod."),
    "prefix-model": renamed("model."),
    "wrapped-inside": renamed("", "_orig_mod."),
    "tied-but-different": config(tie_word_embeddings=True),
    "stale-second-copy": stale,
    "shards": sharded(),
    "remote-code-known-type": config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
    "attn-flash": config(attn_implementation="flash_attention_2", _attn_implementation="flash_attention_2"),
}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing-head": (without("lm_head.weight"), "they have no lm_head.weight"),
    "missing-tensor": (without("model.norm.weight"), "they have no model.norm.weight"),
    "prefix-unknown": (renamed("policy."), r"they have no lm_head.weight and 38 more, but policy\.lm_head\.weight"),
    "depth-config-larger": (config(num_hidden_layers=5), r"they have no model\.layers\.4\..* and 8 more"),
    "depth-config-smaller": (config(num_hidden_layers=3), r"it has no model\.layers\.3\..* and 8 more"),
    "vocab-config-larger": (config(vocab_size=30), r"lm_head.weight is \(24, 16\) in the weights and \(30, 16\)"),
    "adapter-beside-model": (adapter, "adapter_config.json: an adapter beside a model leaves open"),
    "quant-bnb4": (config(quantization_config={"quant_method": "bitsandbytes"}), "packed by bitsandbytes"),
    "quant-gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "packed by gptq"),
    "tokenizer-larger": (
        lambda folder: save(transformers.LlamaConfig(**SMALL), folder, words=30) and None,
        "tokens up to number 29, and the model embeddings for 24",
    ),
    "bert": (encoder, "BertLMHeadModel is set up as an encoder"),
    "unknown-type": (config(model_type="own", auto_map={"AutoConfig": "own.X"}), "not a causal language model"),
    "config-no-json": (lambda folder: (folder / "config.json").write_text("{") and None, "cannot be read as JSON"),
    "config-deep": (
        lambda folder: (folder / "config.json").write_text("[" * 10**5) and None,
        "config.json: cannot be read as JSON",
    ),
    "index-outside": (sharded(**{"lm_head.weight": "../b.safetensors"}), "it names '../b.safetensors'"),
    "index-lost": (sharded(**{"lm_head.weight": "c.safetensors"}), "it names 'c.safetensors'"),
}


def build(folder: Path, out: Path, *, builder: str = "whole", stream: bool = False) -> Any:
    """Build, load and train an emulator as `offsite emulator build` does, and return what was built."""
    ends = parse_one("ends(bottom=1,top=1)")
    built = building.build(str(folder), parse(builder), ends, out, public=None, owner_key=None, stream=stream)
    try_out(built, make("lora", {}))
    return built


def run(folder: Path, builder: str = "whole", **settings: Any) -> RunSpec:
    return RunSpec(model=str(folder), builders=parse(builder), trainable=parse_one("ends(bottom=1,top=1)"), **settings)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(WORDS)[None]).logits


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "streamed"])
@pytest.mark.parametrize("case", RIGHT)
def test_a_model_that_is_all_there_gives_an_emulator_equal_to_the_bit(
    case: str, stream: bool, plain: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(plain[0], tmp_path / "base"))
    RIGHT[case](folder)
    judge(run(folder))
    built = build(folder, tmp_path / "bundle", stream=stream)
    emulator, _ = bundle.load(built.folder, layout=bundle.described(built.manifest), dtype="auto")
    assert torch.equal(logits(emulator), logits(plain[1]))
    digest = zoo.digest(folder)
    assert built.manifest.base.digest == digest
    assert bool(caplog.records) == (case not in ("plain", "shards", "attn-flash")), caplog.text
    if case == "stale-second-copy":
        (folder / "zz.safetensors").unlink()
        assert zoo.digest(folder) == digest


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_a_base_is_refused_when_it_is_submitted_and_when_it_is_built(
    case: str, plain: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain[0], tmp_path / "base"))
    odd, fault = REFUSED[case]
    odd(folder)
    with pytest.raises(InputError, match=fault) as submitted:
        judge(run(folder))
    assert len(str(submitted.value)) < 600 and "\n" not in str(submitted.value)
    for stream in (False, True):
        with pytest.raises(InputError, match=fault):
            build(folder, tmp_path / "bundle", stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "streamed"])
def test_weights_that_are_not_finite_are_refused_by_name(stream: bool, plain: tuple[Path, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain[0], tmp_path / "base"))
    infinite(folder)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        build(folder, tmp_path / "bundle", stream=stream)


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_of_several_kinds_can_be_dropped_trained_and_brought_back(family: str, tmp_path: Path) -> None:
    base = save(MIXTURES[family](), tmp_path / "base")
    judge(run(tmp_path / "base", "uniform(keep=3)"))
    built = build(tmp_path / "base", tmp_path / "bundle", builder="uniform(keep=3)+quantised(layers=frozen)")
    assert built.manifest.layers == (0, 2, 3)
    plain = build(tmp_path / "base", tmp_path / "plain", builder="uniform(keep=3)")
    layout = bundle.described(plain.manifest)
    emulator, _ = bundle.load(plain.folder, layout=layout, dtype="auto")
    assert torch.equal(logits(emulator), logits(restack(base, (0, 2, 3))))
    assert (plain.manifest.experts > 0) == (family != "mamba")
    method = make("lora", {})
    places = {at: at for at in (0, 3)}
    adapter = {key: torch.randn_like(held) / 9 for key, held in method.start(base, places, seed=0).items()}
    assert adapter.keys() == method.start(emulator, layout.outline.places, seed=0).keys()
    method.export(tmp_path / "adapter", adapter, base=base, base_name="base")
    attached = method.attach(zoo.load_base(tmp_path / "base", "auto")[0], places, adapter).eval()
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(attached), logits(theirs))


def test_experts_that_are_joined_when_they_are_read_cannot_be_streamed_and_that_is_said(tmp_path: Path) -> None:
    save(MIXTURES["mixtral"](), tmp_path / "base")
    with pytest.raises(
        InputError, match=r"no tensor model\.layers\.0\.mlp.* cannot be read one at a time; build it in"
    ):
        build(tmp_path / "base", tmp_path / "bundle", stream=True)


def test_a_stack_that_the_configuration_cannot_describe_is_refused(tmp_path: Path) -> None:
    settings = SMALL | EXPERTS
    save(
        transformers.Ernie4_5_MoeConfig(**settings, moe_num_experts=4, moe_k=2, moe_layer_interval=2), tmp_path / "base"
    )
    with pytest.raises(InputError, match="its config.json cannot say that layer . comes at place"):
        judge(run(tmp_path / "base", "uniform(keep=3)"))
    with pytest.raises(InputError, match="its config.json cannot say that layer . comes at place"):
        build(tmp_path / "base", tmp_path / "bundle", builder="uniform(keep=3)")


@pytest.mark.parametrize(
    ("builder", "settings", "fault"),
    [
        ("uniform(keep=20)", {}, r"keep .* must be in 3\.\.4 for a base of 4 layers"),
        ("loram(mlp=0.5,first=2,last=2)", {}, "no layer is left to prune"),
        ("quantised", {"trainable": parse_one("kept")}, "there is nothing to pack"),
        ("whole", {"trainable": parse_one("spread(count=9)")}, r"count must be in 1\.\.4"),
        ("whole", {"trainable": parse_one("ends(bottom=2,top=2)")}, "bottom and top must leave a middle"),
        ("whole", {"method": parse_one("lora(modules=[nope])")}, "no linear map of a layer ends in 'nope'"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_when_they_are_submitted(
    builder: str, settings: dict[str, Any], fault: str, plain: tuple[Path, Any]
) -> None:
    spec = {"trainable": parse_one("ends(bottom=1,top=1)")} | settings
    with pytest.raises(InputError, match=fault):
        judge(RunSpec(model=str(plain[0]), builders=parse(builder), **spec))


def test_a_text_longer_than_the_table_of_positions_is_refused_when_it_is_submitted(tmp_path: Path) -> None:
    save(
        transformers.GPT2Config(vocab_size=WORDS, n_embd=16, n_head=2, n_layer=DEPTH, n_positions=48), tmp_path / "base"
    )
    with pytest.raises(InputError, match=r"training.max_length is 256, but base has positions for 48 tokens"):
        judge(run(tmp_path / "base"))
    build(tmp_path / "base", tmp_path / "bundle")


def test_a_hub_id_that_cannot_be_had_is_refused_when_it_is_submitted(
    plain: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("offsite.emulator.zoo.models.HfApi.model_info", unreachable)
    with pytest.raises(
        InputError, match="'org/name': no such folder here, and the hub did not give it: no route to host"
    ):
        judge(RunSpec(model="org/name", builders=parse("whole")))
    config = str(plain[0] / "config.json")
    monkeypatch.setattr("offsite.emulator.zoo.models.try_to_load_from_cache", lambda *_: config)
    with pytest.raises(InputError, match="for a base of 4 layers"):
        judge(RunSpec(model="org/name", builders=parse("uniform(keep=20)")))


def test_an_emulator_that_does_not_train_is_not_called_done(
    plain: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = parse_one("ends(bottom=1,top=1)")
    built = building.build(str(plain[0]), parse("whole"), ends, tmp_path / "bundle", public=None, owner_key=None)
    monkeypatch.setattr("offsite.emulator.modality.loss", lambda model, batch: model(batch.input_ids).logits.sum() * 0)
    with pytest.raises(MismatchError, match="cannot be trained by lora: 28 trained tensors have no effect on the loss"):
        try_out(built, make("lora", {}))
