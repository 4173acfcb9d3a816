"""Published LoRA at one rank, as GGUF and merged: other forms of the same change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from offsite.client.adapters import export
from offsite.emulator.exports import llama_cpp, uniform
from offsite.emulator.methods import make
from offsite.protos.errors import ConflictError, InputError

PLACES = {0: 0, 4: 4}
MODULES = ["q_proj", "k_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 7.0}}
SETTINGS = {"rank": 4, "alpha": 6.0, "modules": MODULES, **PATTERNS}


@pytest.fixture
def published(tiny: Any, tmp_path: Path) -> Path:
    """LoRA of several ranks and scales, as a run publishes it."""
    method, drawn = make("lora", SETTINGS), torch.Generator().manual_seed(1)
    start = method.start(tiny(), PLACES, seed=0)
    adapter = {key: value + 0.2 * torch.randn(value.shape, generator=drawn) for key, value in start.items()}
    method.export(tmp_path / "adapter", adapter, base=tiny(), base_name="base")
    return tmp_path / "adapter"


def logits(tiny: Any, adapter: Path, ids: Any) -> Any:
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny(), str(adapter)).eval()(ids).logits


def test_one_rank_for_all_maps_is_the_same_change_where_it_is_the_largest(
    published: Path, tmp_path: Path, tiny: Any, ids: Any
) -> None:
    assert export(tmp_path / "out", published, "vllm") < 1e-6
    own = uniform.read(tmp_path / "out")
    assert own.rank == 6 and own.config["rank_pattern"] == own.config["alpha_pattern"] == {}
    assert {pair.rank for pair in own.pairs.values()} == {own.config["r"], own.config["lora_alpha"]}
    torch.testing.assert_close(logits(tiny, tmp_path / "out", ids), logits(tiny, published, ids), atol=1e-4, rtol=1e-4)


def test_a_smaller_rank_leaves_out_what_it_says_and_no_less_could_be(published: Path, tmp_path: Path) -> None:
    lost = export(tmp_path / "out", published, "vllm", rank=2)
    whole, kept = uniform.read(published), uniform.read(tmp_path / "out")
    wholes, keeps = ({name: pair.B @ pair.A for name, pair in one.pairs.items()} for one in (whole, kept))
    energies = torch.stack([torch.linalg.svdvals(product.double())[:6].square() for product in wholes.values()])
    rest = sum(float((wholes[name] - keeps[name]).double().square().sum()) for name in wholes)
    least = float(energies[:, 2:].sum())  # Eckart and Young's
    assert kept.rank == 2 and rest == pytest.approx(least, rel=1e-3)
    assert lost == pytest.approx((least / float(energies.sum())) ** 0.5, rel=1e-4)


def test_gguf_has_the_same_product_with_queries_and_keys_as_llama_cpp_has_them(
    published: Path, tmp_path: Path, tiny: Any
) -> None:
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    export(tmp_path / "out", published, "gguf", base=tmp_path / "base")
    reader, own = GGUFReader(tmp_path / "out" / "adapter.gguf"), uniform.read(published)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 6.0)
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    heads = {"q_proj": base.config.num_attention_heads, "k_proj": base.config.num_key_value_heads}
    theirs = LlamaTensorProcessor(base.config)
    for path, pair in own.pairs.items():
        _, _, layer, ending = path.split(".", 3)
        left, right = (tensors.pop(f"blk.{layer}.{names[ending]}.weight.lora_{part}") for part in "ba")
        if count := heads.get(ending.rpartition(".")[2]):  # transformers' way back from GGUF
            left = torch.tensor(theirs._reverse_permute_weights(left.numpy(), count, None))
        torch.testing.assert_close(left @ right, pair.B @ pair.A)
    assert not tensors


def test_interleaving_moves_rows_within_a_head_alone() -> None:
    rows = torch.arange(12).reshape(12, 1)
    assert llama_cpp.interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_a_merged_model_answers_as_the_adapter_beside_the_base(
    published: Path, tmp_path: Path, tiny: Any, tokenizer: Any, ids: Any
) -> None:
    import transformers

    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("as you like")
    export(tmp_path / "out", published, "merged", base=tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits(tiny, published, ids), atol=1e-3, rtol=1e-3)
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_what_has_no_such_form_is_said_to(published: Path, tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(InputError, match="expected LoRA in peft's format"):
        export(tmp_path / "out", tmp_path, "vllm")
    with pytest.raises(InputError, match="made with the base: name its folder"):
        export(tmp_path / "out", published, "merged")
    with pytest.raises(InputError, match=r"config.json: expected the base's configuration"):
        export(tmp_path / "out", published, "gguf", base=tmp_path / "none")
    tiny("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="models of type 'gpt2' are not written as GGUF; expected one of llama"):
        export(tmp_path / "out", published, "gguf", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConflictError, match="not empty"):
        export(published, published, "vllm")
    method = make("ssf", {})
    method.export(tmp_path / "ssf", method.start(tiny(), {0: 0}, seed=0), base=tiny(), base_name="base")
    with pytest.raises(InputError, match="which this is not"):
        export(tmp_path / "out", tmp_path / "ssf", "vllm")
