"""A method of another package over real processes: its integer index goes to the sites and comes back untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.client import Choice

PLUG_INS = Path(__file__).parent.parent / "plug_ins"


def test_sites_train_at_an_index_that_is_kept_while_their_values_are_averaged(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PLUG_INS))  # installs the package for the processes that are started
    federation.coordinate()
    for site in ("hospital", "bank"):
        federation.join(site, policy='bases = ["any"]\nmethods = ["sparse"]\n')
    method = Choice(name="sparse", settings={"entries": 12})
    adapters = []
    with federation.connect() as session:
        for strategy in ("mean", "low-rank"):
            spec = federation.spec(method=method, strategy=Choice(name=strategy), min_sites=2, rounds=2, merge=True)
            folder = session.submit(spec).result(federation.folder / strategy)
            adapters.append(load_file(folder / "adapter" / "sparse.safetensors"))
    adapter, other = adapters
    assert len(adapter) == 2 * 7 * 2, "an index and values for each map of two layers"
    assert all(torch.equal(tensor, other[key]) for key, tensor in adapter.items()), "what is no product is averaged"
    merged = load_file(folder / "merged" / "model.safetensors")
    base = load_file(federation.material / "model" / "model.safetensors")
    for key in (key.removesuffix(".index") for key in adapter if key.endswith(".index")):
        index, values = adapter[f"{key}.index"], adapter[f"{key}.values"]
        assert index.dtype == torch.int32 and len(index.unique()) == 12 and bool(values.any())
        name = f"model.layers.{key}.weight"
        assert torch.equal(merged[name], base[name].flatten().index_add(0, index.long(), values).view_as(base[name]))
