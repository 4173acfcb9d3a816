import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from offsite.emulator import modality
from offsite.emulator.methods import make
from offsite.emulator.modality.causal_text.batch import TokenBatch
from offsite.emulator.modality.causal_text.encoding import IGNORED


def reference(model: Any, batch: TokenBatch) -> torch.Tensor:
    """The sum over all positions of full logits, row by row without padding."""
    total = torch.zeros((), dtype=torch.float64)
    for row, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
        length = int(mask.sum())
        logits = model(row[None, :length]).logits[0, :-1].double()
        total = total + functional.cross_entropy(logits, labels[1:length], ignore_index=IGNORED, reduction="sum")
    return total


def test_the_likelihood_is_that_of_full_logits(family: str, tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny(family)
    found = modality.score(model, text)
    assert found.count == sum(batch.targets for batch in text)
    assert found.total == pytest.approx(sum(float(reference(model, batch).detach()) for batch in text), rel=1e-5)


def test_the_loss_is_the_mean_and_has_its_gradients(family: str, tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny(family)
    batch = text[0]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mean = reference(model, batch) / batch.targets
    expected = torch.autograd.grad(mean, parameters)
    value = modality.loss(model, batch)
    assert float(value.detach()) == pytest.approx(float(mean.detach()), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(value, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_logits_are_computed_only_where_labels_are(tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny()
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    modality.loss(model, text[0])
    labelled = (text[0].labels[:, 1:] != IGNORED).any(dim=0)
    assert seen == [int(labelled.sum())]
    assert seen[0] < text[0].labels.shape[1] - 1


def test_an_attached_model_has_the_same_loss(family: str, tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny(family)
    before = modality.loss(model, text[0])
    method = make("lora", {})
    attached = method.attach(model, {0: 0}, method.start(model, {0: 0}, seed=0))
    assert torch.equal(modality.loss(attached, text[0]), before)


def test_likelihoods_add_up(tiny: Any, text: list[TokenBatch]) -> None:
    model = tiny()
    parts = [modality.score(model, [batch]) for batch in text]
    whole = modality.score(model, text)
    assert sum(parts, modality.Score(0.0, 0)) == whole
    assert whole.perplexity == pytest.approx(math.exp(whole.total / whole.count))
    assert modality.Score(1e6, 10).perplexity == math.inf


def test_nothing_to_predict_is_refused(tiny: Any) -> None:
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="no token to predict"):
        modality.loss(tiny(), TokenBatch(ids, torch.ones_like(ids), torch.full_like(ids, IGNORED)))
