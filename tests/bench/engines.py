"""SmolLM2-135M through the product's engines, beside stock peft with DeepSpeed: losses, memory and time of a step.

What `gpu.py` prints below its own table. All train the same LoRA from the same start on the same batches, each in a
process of its own. `off` is the largest distance of a loss to that of the engine plain in fp32 on the CPU.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from wire import forget_peak, resident

Run = dict[str, Any]
COLUMNS = ("engine", "device", "weights", "step ms", "peak MiB", "first loss", "last loss", "off")
MODULES, RANK = ("q_proj", "v_proj"), 8


def lines(*, short: bool) -> list[tuple[str, ...]]:
    """Train with every engine and return the lines of the table."""
    expected: list[float] = []
    rows = []
    for (title, device, precision), work in works(short=short):
        if device == "cuda" and not torch.cuda.is_available():
            rows.append((title, device, precision, *("needs a GPU" for _ in COLUMNS[3:])))
            continue
        run = apart(work)
        expected = expected or run["losses"]
        off = max(abs(a - b) for a, b in zip(run["losses"], expected, strict=True))
        ends = (f"{run['losses'][0]:.4f}", f"{run['losses'][-1]:.4f}", f"{off:.1e}")
        rows.append((title, device, precision, f"{1000 * run['step_s']:.0f}", f"{run['bytes'] / 2**20:.0f}", *ends))
    return rows


def works(*, short: bool) -> Iterator[tuple[tuple[str, str, str], Callable[[], Run]]]:
    """Yield each line's title, device and precision, and what it does; the first is what others are held against."""
    stages = list(product((1, 2, 3), (False, True)))
    for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")):
        yield ("plain", device, precision), partial(ours, "plain", {}, device, precision, short=short)
        for stage, offload in stages:
            if device == "cpu" and offload:
                continue  # it is there already
            title = f"ZeRO {stage}{', offload' if offload else ''}"
            settings = {"zero_stage": stage, "offload": offload}
            yield (title, device, precision), partial(ours, "deepspeed", settings, device, precision, short=short)
            work = partial(stock, settings, device, precision, short=short)
            yield (f"peft, {title}", device, precision), work


def apart(work: Callable[[], Run]) -> Run:
    """Do something in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work)


def prepared(precision: str, *, short: bool) -> tuple[Any, Any, list[Any], Any]:
    """Return the base, its training, its batches, and the start of its adapter with the method."""
    from offsite.emulator import methods, zoo
    from offsite.emulator.batches import training_batches
    from offsite.emulator.modality import encode
    from offsite.emulator.modality.causal_text.shapes import TextExample
    from offsite.emulator.precision import DTYPES
    from offsite.protos.spec import LocalTraining

    folder = zoo.locate("smollm2-135m-instruct", cache=zoo.cache_folder())
    model, tokenizer = zoo.load_base(folder, DTYPES[precision])  # type: ignore[index]
    size = {"steps": 3, "batch_size": 2} if short else {"steps": 20, "batch_size": 8}
    training = LocalTraining(learning_rate=1e-3, max_length=96, precision=precision, **size)  # type: ignore[arg-type]
    pairs = product(range(9), repeat=2)
    examples = [TextExample("", f"{a} times {b} is {a * b}, and {a} plus {b} is {a + b}.") for a, b in pairs]
    encoded = encode(examples, tokenizer, max_length=training.max_length)
    batches = list(
        training_batches(encoded, batch_size=training.batch_size, steps=training.steps, first_step=0, seed=0)
    )
    return model, training, batches, methods.make("lora", {"rank": RANK, "modules": list(MODULES)})


def places(model: Any) -> dict[int, int]:
    """Every layer trains."""
    return {at: at for at in range(model.config.num_hidden_layers)}


def measured(step: Callable[[Any], float], batches: list[Any], device: str) -> Run:
    """Take the steps; return the losses, the median time of a step but the first, and the most memory."""
    cuda = device == "cuda"
    idle = forget_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for batch in batches:
        begin = time.perf_counter()
        losses.append(step(batch))  # a number, which waits for the GPU
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - idle
    return {"losses": losses, "step_s": median(times[1:]), "bytes": peak}


def joined(spec: Any) -> Any:
    """Be the only process of a job."""
    from offsite.client.site.engines import join

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return join(spec, Path(tempfile.mkdtemp()) / "rendezvous")


def ours(name: str, settings: dict[str, Any], device: str, precision: str, *, short: bool) -> Run:
    """Train with an engine of the product."""
    from offsite.client.site.engines import ENGINES
    from offsite.client.site.job import EngineSpec

    os.dup2(2, 1)  # DeepSpeed prints
    model, training, batches, method = prepared(precision, short=short)
    spec = EngineSpec(name=name, device=device, **settings)  # type: ignore[arg-type]
    ranks, start = joined(spec), method.start(model, places(model), seed=0)
    model = method.attach(model, places(model), start).train()
    if spec.whole:
        model.to(ranks.device)
    engine = ENGINES[name](model, method.named_parameters(model, places(model)), training, spec, ranks)
    return measured(engine.step, batches, device)


def stock(settings: dict[str, Any], device: str, precision: str, *, short: bool) -> Run:
    """Train with peft and DeepSpeed as their own documentation puts them together."""
    import deepspeed
    from peft import LoraConfig, get_peft_model

    from offsite.client.site.engines.zero import configuration
    from offsite.client.site.job import EngineSpec

    os.dup2(2, 1)
    model, training, batches, method = prepared(precision, short=short)
    spec = EngineSpec(name="deepspeed", device=device, **settings)  # type: ignore[arg-type]
    ranks, start = joined(spec), method.start(model, places(model), seed=0)
    config = LoraConfig(r=RANK, lora_alpha=method.scale_of(MODULES[0]) * RANK, target_modules=list(MODULES))
    attached: Any = get_peft_model(model, config)
    with torch.no_grad():
        for key, value in start.items():
            path, _, part = key.rpartition(".")
            name = f"base_model.model.model.layers.{path}.lora_{part}.default.weight"
            attached.get_parameter(name).copy_(value)
    trained = [parameter for parameter in attached.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    engine, *_ = deepspeed.initialize(
        model=attached.train().to(ranks.device),
        optimizer=adam,
        model_parameters=trained,
        config=configuration(spec, training, ranks),
        dist_init_required=False,
    )

    def step(batch: Any) -> float:
        from offsite.emulator import modality

        loss = modality.loss(engine, batch.to(ranks.device))
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return measured(step, batches, device)
