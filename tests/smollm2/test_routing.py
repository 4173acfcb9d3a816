"""Held-out rows of the demo's sites, without their names, go to the site whose training rows they are most like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.client.demo import data
from offsite.emulator import methods, zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.modality import encode, read
from offsite.emulator.routing.tasks import Tasks


@pytest.mark.slow
def test_rows_go_to_the_site_that_they_are_of(bench: Any, tell: Callable[..., None], tmp_path: Path) -> None:
    made = data.prepare(
        tmp_path / "data", cache=zoo.cache_folder(), examples=48, held_out=24, seed=bench.seed, exam=True
    )
    method: Any = methods.make("signature", {})

    def batches(file: Path) -> Any:
        return evaluation_batches(encode(read(file), bench.tokenizer, max_length=64, divide=False), batch_size=8)

    sums = {}
    for site in made:
        counts = [method.counts(batch) for batch in batches(site.train)]
        sums[site.name] = {f"0.signature.{part}": sum(one[part].sum(0) for one in counts) for part in method.sizes}
    Tasks(method, sums).save(tmp_path)
    tasks = Tasks.load(tmp_path)
    right = {}
    for site in made:
        nearest = [task for batch in batches(site.held_out) for task in tasks.nearest(batch)]
        right[site.name] = nearest.count(site.name) / len(nearest)
    tell(**right)
    assert min(right.values()) > 0.6 and sum(right.values()) / len(right) > 0.8, right
