"""What is measured of one candidate: the emulator is built, read and trained as at a site, plugged in, and attacked."""

import copy
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from offsite.coordinator.bundles import building, manifests
from offsite.coordinator.bundles.building import Built
from offsite.coordinator.comparison.bench import Bench
from offsite.coordinator.comparison.rows import Candidate, ClientStep, Emulated, Measured
from offsite.emulator import bundle, methods
from offsite.emulator.anatomy.structure import layers
from offsite.emulator.batches import training_batches
from offsite.emulator.evaluation.cost import Cost, costs
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.plug import plug
from offsite.protos import tensors
from offsite.protos.documents import to_plain
from offsite.protos.figures import BASE_TUNED, BASE_ZERO_SHOT, EMULATOR_TUNED, EMULATOR_ZERO_SHOT, PLUG_IN
from offsite.protos.recipes import render
from offsite.protos.spec import METHOD


def measured(candidate: Candidate, bench: Bench) -> Measured:
    """Measure a candidate, or return what was measured of it before; raises InputError and ValueError."""
    depends = bench.identity | {"candidate": to_plain(candidate)}
    return bench.finished(Measured, depends, lambda: _measure(candidate, bench))


def unfinished(candidate: Candidate, bench: Bench) -> Path:
    """Return the folder of a candidate's bundle while it is needed: the same for all that build the same."""
    return bench.folder / "unfinished" / bench.finished.name(_build(candidate, bench))


def _measure(candidate: Candidate, bench: Bench) -> Measured:
    start = time.time()
    method = methods.make(candidate.method.name, candidate.method.settings)
    built = _built(candidate, bench)
    layout = bundle.described(built.manifest)
    emulator, _ = bundle.load(built.folder, layout=layout, dtype=bench.dtype)  # as a site reads it
    emulator.to(bench.device).eval()
    emulated = bench.finished(Emulated, _build(candidate, bench), lambda: _emulated(candidate, bench, built, emulator))

    places = layout.outline.places
    tuned = bench.train(emulator, method, places, "tuning the emulator")
    emulator_tuned = bench.score(tuned)
    adapter = method.recover(method.state(tuned, places), built.recovery)
    attacks = bench.attacked(
        {"tuned": tuned},
        bench.identity | {"candidate": to_plain(candidate)},
        state=unfinished(candidate, bench) / "attacks",
    )
    step = _costs(bench, tuned, method.named_parameters(tuned, places), method)

    return Measured(
        emulated=emulated,
        figures={
            BASE_ZERO_SHOT: bench.zero_shot(),
            EMULATOR_ZERO_SHOT: emulated.zero_shot,
            EMULATOR_TUNED: emulator_tuned,
            PLUG_IN: bench.score(_plugged(bench, method, adapter)),
            BASE_TUNED: bench.bound(candidate.method, layout.outline.trainable),
        },
        attacks=attacks,
        client=ClientStep(**asdict(step["client"])),
        full=ClientStep(**asdict(step["full"])),
        seconds=time.time() - start,
    )


def _build(candidate: Candidate, bench: Bench) -> dict[str, object]:
    """Return all that a candidate's emulator depends on; the method is none of it."""
    return bench.identity | {"builders": to_plain(candidate.builders), "trainable": to_plain(candidate.trainable)}


def _built(candidate: Candidate, bench: Bench) -> Built:
    """Build a candidate's bundle, unless one that builds the same has done it."""
    scratch = unfinished(candidate, bench)
    folder, partial, recovery = scratch / "bundle", scratch / "partial", scratch / "recovery.safetensors"
    if folder.exists():
        kept = tensors.load(recovery) if recovery.exists() else {}
        return Built(folder, manifests.read(folder), kept)
    shutil.rmtree(partial, ignore_errors=True)
    bench.tell(f"building {render(candidate.builders)}", 0, 1)
    built = building.build(
        bench.plan.model,
        candidate.builders,
        candidate.trainable,
        partial,
        public=bench.texts.public_path,
        calibration=Path(bench.plan.calibration) if bench.plan.calibration else None,
        owner_key=None,
        scratch=scratch,
        tell=bench.tell,
    )
    if built.recovery:
        tensors.save(recovery, built.recovery)
    partial.rename(folder)  # last, so that a bundle that is there is whole
    return replace(built, folder=folder)


def _emulated(candidate: Candidate, bench: Bench, built: Built, emulator: nn.Module) -> Emulated:
    """Measure an emulator as it is handed out, then attack it."""
    manifest = built.manifest
    return Emulated(
        layers=manifest.layers,
        trained=manifest.trainable,
        zero_shot=bench.score(emulator),
        attacks=bench.attacked(
            {"emulator": emulator}, _build(candidate, bench), state=unfinished(candidate, bench) / "attacks"
        ),
        verbatim=manifest.verbatim,
        lossy=manifest.lossy,
        parameters=manifest.base.parameters,
        bytes=sum(entry.size for entry in manifest.files),
    )


def _plugged(bench: Bench, method: Method, adapter: Adapter) -> nn.Module:
    """Return the base with an adapter in it; the base itself stays as it is."""
    model = bench.own()
    stack = layers(model)
    for layer in {int(key.partition(".")[0]) for key in adapter}:
        stack[layer] = copy.deepcopy(stack[layer])  # a merge writes into these
    return plug(model, method, adapter)


def _costs(bench: Bench, tuned: nn.Module, trained: Mapping[str, nn.Parameter], method: Method) -> dict[str, Cost]:
    """Measure a client's step beside one of a run's usual method on every layer of the base."""
    bench.tell("measuring a client's step", 0, 1)
    full = method if method.name == METHOD.name else methods.make(METHOD.name, METHOD.settings)
    base = bench.own()
    everywhere = {layer: layer for layer in range(len(layers(base)))}
    base = full.attach(base, everywhere, full.start(base, everywhere, seed=bench.plan.training.seed))
    batch_size, seed = bench.plan.training.batch_size, bench.plan.training.seed
    (batch,) = training_batches(bench.texts.train, batch_size=batch_size, steps=1, first_step=0, seed=seed)
    return costs({"client": (tuned, trained), "full": (base, full.named_parameters(base, everywhere))}, batch)
