"""Two tasks one after the other on the real model: an average forgets less, and each expert is beaten where it is weak.

Perplexities of the first task and the second (seed 0): as they are 36.6 and 97.9, after the first 30.5 and 101.5, after
the second online 48.7 and 3.65, offline 40.8 and 3.74, both together 43.4 and 3.65.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.client.demo import data
from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Origin, Version
from offsite.coordinator.memory import Moment
from offsite.coordinator.memory.lae import Lae
from offsite.emulator import methods, modality, zoo
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.methods import Adapter
from offsite.emulator.modality import encode, read
from offsite.emulator.plug import plug_all
from offsite.emulator.tuning.loop import Schedule, tune

PLACES = {place: place for place in range(24, 30)}
TASKS = ("bank", "school")
ROUNDS, STEPS, RATE, LENGTH = 4, 6, 1e-3, 96
METHOD = methods.make("lora", {})


@pytest.mark.slow
@pytest.mark.long
def test_of_two_tasks_an_average_forgets_less_and_an_ensemble_is_never_the_worst(
    bench: Any, tell: Callable[..., None], tmp_path: Path
) -> None:
    made = data.prepare(tmp_path, cache=zoo.cache_folder(), examples=80, held_out=24, seed=bench.seed, exam=True)
    sites = {site.name: site for site in made}

    def samples(file: Path) -> list[Any]:
        return encode(read(file), bench.tokenizer, max_length=LENGTH, divide=False)

    exams = {task: evaluation_batches(samples(sites[task].held_out), batch_size=8) for task in TASKS}

    def perplexities(adapters: dict[str, Adapter]) -> list[float]:
        model = plug_all(copy.deepcopy(bench.base), METHOD, adapters)
        return [modality.score(model, exams[task]).perplexity for task in TASKS]

    own, strategy = Lae(), aggregation.make("low-rank", {})
    start = METHOD.start(bench.base, PLACES, seed=bench.seed)
    schema, begun, figures = METHOD.schema(start), Version(start, {"r8": start}), dict[str, list[float]]()
    last = begun
    for at, task in enumerate(TASKS):
        texts = samples(sites[task].train)
        moments = [Moment(number, ROUNDS, STEPS, at * ROUNDS, task) for number in range(ROUNDS + 1)]
        last = own.begin(last, begun, schema, moments[0])
        for moment in moments[1:]:
            model = METHOD.attach(copy.deepcopy(bench.base), PLACES, last.broadcast["r8"])
            tune(
                *(model, METHOD.named_parameters(model, PLACES), texts),
                Schedule(STEPS, RATE, batch_size=4, seed=bench.seed + moment.round),
            )
            fold = strategy.begin(last, schema)
            fold.add(METHOD.state(model, PLACES), Origin(task, "r8", 1.0))
            last = own.after(last, fold.finish(["r8"]), schema, moment)
        if not at:
            figures["before"] = perplexities(own.experts(last))
    experts = own.experts(last)
    figures |= {name: perplexities({name: one}) for name, one in experts.items()}
    figures["ensemble"] = perplexities(experts)
    first, second = ({name: values[at] for name, values in figures.items()} for at in (0, 1))
    tell(**{f"{name} {task}": one[name] for task, one in zip(TASKS, (first, second), strict=True) for name in figures})
    assert first["offline"] < first["online"]
    assert max(second["online"], second["offline"]) < second["before"]
    assert first["ensemble"] < first["online"] and second["ensemble"] < second["offline"]
