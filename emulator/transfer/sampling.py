"""Texts that a model writes, the same for the same seed."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

TRIES = 4  # times as many texts are written as are asked for, at most: some are empty, or there already
HEAD = "### Example"
BATCH = 8

Write = Callable[[Sequence[str], int], list[str]]  # what follows each of some texts, drawn by a seed


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    given: Sequence[Sequence[int]],
    *,
    most: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Return what a model writes after each row of tokens, up to `most`: drawn, or at temperature 0 the likeliest."""
    device, training = next(model.parameters()).device, model.training
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    how = GenerationConfig(max_new_tokens=most, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, **drawn)
    written: list[str] = []
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for at in range(0, len(given), BATCH):
            ids = given[at : at + BATCH]
            width = max(map(len, ids))
            rows = torch.tensor([[pad] * (width - len(row)) + [*row] for row in ids], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
            generate: Any = model.generate
            out = generate(input_ids=rows, attention_mask=mask, generation_config=how)
            written += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    model.train(training)
    return written


def alike(write: Write, seeds: Sequence[str], *, count: int, shots: int = 5, seed: int = 0) -> list[str]:
    """Return up to `count` distinct texts that a model writes after `shots` of some texts, none of which is returned.

    Which ones it is shown, and in which order, is drawn. Raises ValueError if there are no texts, or nothing comes.
    """
    examples = [text.strip() for text in dict.fromkeys(seeds) if text.strip()]
    if not examples:
        raise ValueError("there is no text to write others like; give a few public examples of the task")
    draw, seen, texts = random.Random(seed), {*examples}, list[str]()
    for turn in range(TRIES * count // BATCH + 1):
        shown = [draw.sample(examples, min(shots, len(examples))) for _ in range(BATCH)]
        for text in write([_listed(some) for some in shown], seed + turn):
            new = text.partition("###")[0].strip()
            if new and new not in seen:
                seen.add(new)
                texts.append(new)
        if len(texts) >= count:
            return texts[:count]
    if not texts:
        raise ValueError(f"the model wrote nothing new after {TRIES * count} lists of examples; give other ones")
    return texts


def _listed(examples: Sequence[str]) -> str:
    parts = [f"{HEAD} {number}\n{text}\n\n" for number, text in enumerate(examples, start=1)]
    return "".join([*parts, f"{HEAD} {len(examples) + 1}\n"])
