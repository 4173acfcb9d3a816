"""Updates with noise over real processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.client import Choice
from offsite.protos.errors import RunError

NOISE = (Choice(name="noise"),)


def exam(federation: Any) -> dict[str, str]:
    return {"exam": str(federation.material / "held-out.jsonl")}


@pytest.mark.slow(alone=True)
def test_noise_costs_nothing_that_can_be_measured_and_a_site_may_insist_on_it(coordinated: Any, tmp_path: Path) -> None:
    federation = coordinated
    federation.have("bank")
    policy = 'bases = ["any"]\nmin_noise = 0.01\n'
    federation.join("careful", data=federation.material / "hospital.jsonl", policy=policy)
    with federation.connect() as session:
        with pytest.raises(RunError, match=r"does not allow it \(min_noise\): ask for more noise among the stages"):
            session.submit(federation.spec(sites=("careful",))).result(tmp_path / "refused")
        runs, adapters = [], []
        for upload in ((), NOISE):
            spec = federation.spec(sites=("bank",), rounds=2, evaluation=exam(federation), upload=upload)
            runs.append(session.submit(spec))
            folder = runs[-1].result(tmp_path / runs[-1].id)
            adapters.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        noisy = session.submit(federation.spec(sites=("careful",), upload=NOISE))
        noisy.result(tmp_path / "noisy")
    plain, noise = (run.report for run in runs)
    assert (plain["upload"], noise["upload"]) == ([], [{"name": "noise", "settings": {}}])
    drop, other = (math.log(one["overall"]["base_zero_shot"] / one["overall"]["plug_in"]) for one in (plain, noise))
    assert drop > 0.05 and abs(other - drop) <= 0.005, (drop, other)  # in nats; measured: 0.1131 and 0.1120
    assert not all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
