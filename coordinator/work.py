"""The heavy steps of a run, each a function of plain data, run in a worker process.

A step reads and writes files by digest and returns what the journal keeps. Running one twice gives the same result.
"""

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offsite.coordinator import aggregation, bundles, disclosures
from offsite.coordinator.aggregation.outliers import Change, outliers
from offsite.coordinator.grant import Grant
from offsite.coordinator.home import Home
from offsite.coordinator.kept import distance, open_bundle, recovered, store_adapter, store_bundle
from offsite.coordinator.store.blobs import room
from offsite.coordinator.trial import take_step
from offsite.emulator import bundle, methods, zoo
from offsite.emulator.anatomy.structure import positions, text_config
from offsite.emulator.batches import encode, evaluation_batches
from offsite.emulator.builders import Draft
from offsite.emulator.builders import make as make_builder
from offsite.emulator.builders.distilled import Distilled, realigned, tuned_places
from offsite.emulator.evaluation.fidelity import likelihood
from offsite.emulator.examples import read
from offsite.emulator.plug import plug
from offsite.emulator.precision import DTYPES, quicken
from offsite.emulator.tuning.rates import suited
from offsite.protos import tensors
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import canonical, from_json, to_json, to_plain
from offsite.protos.errors import InputError, MismatchError, OffsiteError, ResourceError, RunError, from_system
from offsite.protos.spec import RunSpec, Span

EVALUATION_BATCH = 8


class Timeline(list[dict[str, Any]]):
    """The spans of one step."""

    @contextmanager
    def span(self, kind: Any) -> Iterator[None]:
        """Record a stretch of time of one kind."""
        start = time.time()
        yield
        self.append(to_plain(Span(kind=kind, start=start, end=time.time())))


def build(home: Home, spec: Grant, *, run: str, sites: list[str]) -> dict[str, Any]:
    """Build and store the bundle and the adapters that sites of each rank start from."""
    timeline = Timeline()
    blobs = home.blobs()
    with TemporaryDirectory(dir=home.scratch) as scratch, timeline.span("building"):
        built = bundles.build(
            spec.model,
            spec.builders,
            spec.trainable,
            Path(scratch) / "bundle",
            public=Path(spec.public) if spec.public else None,
            calibration=Path(spec.calibration) if spec.calibration else None,
            owner_key=home.owner_key,
            called=spec.base_name,
            folders=_folders(spec),
            scratch=_unfinished(home, spec, "build"),
        )
        manifest = built.manifest
        method = methods.make(spec.method.name, spec.method.settings)
        layout = bundle.described(manifest)
        emulator, _ = bundle.load(built.folder, layout=layout, dtype="auto")
        adapters = {}
        for rank in sorted({method.rank_at(site) for site in sites}):
            adapter = method.start(emulator, layout.outline.places, seed=spec.training.seed, rank=rank)
            method.recover(adapter, built.recovery)  # refuses now what could not be brought back later
            adapters[rank] = store_adapter(blobs, Path(scratch) / f"start-{rank}.safetensors", adapter)
        rate = spec.training.learning_rate or suited(method.rate, emulator)
        take_step(emulator, method, layout.outline.places, adapter)  # the last use of this copy
        recovery = None
        if built.recovery:
            recovery = store_adapter(blobs, Path(scratch) / "recovery.safetensors", built.recovery)["digest"]
        bound = spec.role == "researcher"
        if bound:
            largest = max(adapter["size"] for adapter in adapters.values())
            size = sum(entry.size for entry in manifest.files)
            home.policy().check_built(sites=len(sites), adapter=largest, bundle=size)
        disclosures.record(home, run, base=manifest.base.digest, portions=built.portions, bound=bound)
        stored = store_bundle(home, built)
    shutil.rmtree(_unfinished(home, spec, "build"), ignore_errors=True)
    identity = {"base": manifest.base.digest, "method": to_plain(spec.method), "trainable": list(manifest.trainable)}
    return stored | {
        "base": to_plain(manifest.base),
        "method_hash": digest_bytes(canonical(identity)),
        "broadcast": {site: adapters[method.rank_at(site)] for site in sites},
        "learning_rate": rate,
        "computed": built.computed,
        "vocabulary": text_config(emulator).vocab_size,
        "exact": None,
        "residual": {},
        "recovery": recovery,
        "spans": timeline,
    }


def realign(home: Home, spec: Grant, *, base: str, manifest: str, exact: str, recovery: str | None) -> dict[str, Any]:
    """Tune the emulator's frozen layers beside the newest adapter, and store the bundle of the next round."""
    timeline = Timeline()
    blobs = home.blobs()
    source = _the_base(spec, base)
    scratch = _unfinished(home, spec, f"realign {exact}")
    with TemporaryDirectory(dir=home.scratch) as folder, timeline.span("building"):
        full, tokenizer = zoo.load_base(source, dtype="auto")
        listed, emulator, _ = open_bundle(blobs, manifest, Path(folder) / "old", dtype="auto")
        dtype = quicken(full)
        quicken(emulator)
        outline = bundle.described(listed).outline
        method = methods.make(spec.method.name, spec.method.settings)
        adapter = tensors.load(blobs.path(exact))
        named = next(choice for choice in spec.builders if choice.name == Distilled.name)
        settings: Any = make_builder(named.name, named.settings)
        aligned = realigned(
            full,
            emulator,
            outline,
            method=method,
            adapter=adapter,
            recovered=recovered(blobs, method, adapter, recovery),
            material=bundles.material(
                Path(spec.public), tokenizer, folders=_folders(spec), scratch=scratch, longest=positions(full)
            ),
            settings=replace(settings, steps=spec.realign_steps),
        )
        draft = Draft(full, aligned, outline, tuned=tuple(tuned_places(full, emulator, outline)))
        built = bundles.write(
            draft,
            tokenizer,
            Path(folder) / "new",
            dtype=dtype,
            base=listed.base,
            chain=listed.builders,
            owner_key=home.owner_key,
        )
        stored = store_bundle(home, built)
    shutil.rmtree(scratch, ignore_errors=True)
    return stored | {"spans": timeline}


def aggregate(
    home: Home,
    spec: RunSpec,
    *,
    residual: dict[str, str],
    broadcast: dict[str, dict[str, Any]],
    updates: list[dict[str, Any]],
    sites: list[str],
) -> dict[str, Any]:
    """Fold the updates of a round, in the order of the sites' names, and store the next version.

    Those far larger than the others are left out, and named; raises RunError if too few are left.
    """
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    with timeline.span("aggregation"), TemporaryDirectory(dir=home.scratch) as scratch:
        changes = {
            str(update["site"]): Change(
                distance(blobs, update["digest"], broadcast[update["site"]]["digest"]), method.rank_at(update["site"])
            )
            for update in updates
        }
        left_out = outliers(changes, ratio=spec.max_update_ratio)
        updates = [update for update in updates if update["site"] not in left_out]
        if len(updates) < spec.min_sites:
            why = "; ".join(f"{site}: {reason}" for site, reason in left_out.items())
            raise RunError(f"{len(updates)} of at least {spec.min_sites} updates are left in the round ({why})")
        kept = {int(rank): tensors.load(blobs.path(digest)) for rank, digest in residual.items()}
        fold = strategy.begin(kept)
        total = sum(update["examples"] for update in updates)
        for update in sorted(updates, key=lambda update: str(update["site"])):
            fold.add(tensors.load(blobs.path(update["digest"])), weight=update["examples"] / total)
        outcome = fold.finish(sorted({method.rank_at(site) for site in sites}))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in outcome.exact.values()):
            raise MismatchError("the average of the updates is not finite; lower max_update_norm and look at the sites")

        def store(name: str, adapters: dict[int, dict[str, torch.Tensor]]) -> dict[int, dict[str, Any]]:
            return {
                rank: store_adapter(blobs, Path(scratch) / f"{name}-{rank}.safetensors", adapter)
                for rank, adapter in adapters.items()
            }

        sent, rest = store("broadcast", outcome.broadcast), store("residual", outcome.residual)
        exact = store_adapter(blobs, Path(scratch) / "exact.safetensors", outcome.exact)
    return {
        "broadcast": {site: sent[method.rank_at(site)] for site in sites},
        "exact": exact["digest"],
        "residual": {str(rank): stored["digest"] for rank, stored in rest.items()},
        "lineage": {
            update["site"]: {"update": update["digest"], "weight": update["examples"] / total} for update in updates
        },
        "left_out": left_out,
        "figures": outcome.figures,
        "spans": timeline,
    }


def evaluate(
    home: Home, spec: Grant, *, base: str, manifest: str | None, exact: str | None, recovery: str | None = None
) -> dict[str, Any]:
    """Measure the base (manifest None) or the emulator, with an adapter or without, on the owner's held-out data."""
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    with timeline.span("loading"), TemporaryDirectory(dir=home.scratch) as scratch:
        if manifest is None:
            model, tokenizer = zoo.load_base(_the_base(spec, base), dtype=DTYPES[spec.training.precision])
            if exact is not None:
                adapter = recovered(blobs, method, tensors.load(blobs.path(exact)), recovery)
                model = plug(model, method, adapter)
        else:
            listed, model, tokenizer = open_bundle(
                blobs, manifest, Path(scratch), dtype=DTYPES[spec.training.precision]
            )
            if exact is not None:
                places = bundle.described(listed).outline.places
                model = method.attach(model, places, tensors.load(blobs.path(exact)))
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    figures: dict[str, dict[str, float]] = {}
    for name, path in sorted(spec.evaluation.items()):
        batches = evaluation_batches(
            encode(read(Path(path), folders=_folders(spec)), tokenizer, max_length=spec.training.max_length),
            batch_size=EVALUATION_BATCH,
        )
        with timeline.span("evaluation"):
            found = likelihood(model, batches)
        figures[name] = {"nll": found.nll, "tokens": found.tokens}
    return {"sets": figures, "spans": timeline}


def publish(home: Home, spec: Grant, *, base: str, exact: str, recovery: str | None) -> dict[str, Any]:
    """Write the outcome as an adapter of the base (LoRA as peft does) and, if asked for, the merged model."""
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    source = _the_base(spec, base)
    with timeline.span("loading"):
        model, tokenizer = zoo.load_base(source, dtype="auto")
    adapter = recovered(blobs, method, tensors.load(blobs.path(exact)), recovery)
    files: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(dir=home.scratch) as scratch:
        method.export(Path(scratch) / "adapter", adapter, base=model, base_name=spec.base_name or spec.model)
        if spec.merge:
            room(home.root, 2 * sum(parameter.nbytes for parameter in model.parameters()))
            method.merge(model, adapter)
            model.save_pretrained(Path(scratch) / "merged")
            tokenizer.save_pretrained(Path(scratch) / "merged")
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            name = path.relative_to(scratch).as_posix()
            digest, size = blobs.take(path)
            files[name] = {"digest": digest, "size": size}
    return {"artifacts": files, "spans": timeline}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "build": build,
    "realign": realign,
    "aggregate": aggregate,
    "evaluate": evaluate,
    "publish": publish,
}


def perform(step: str, root: str, identity: str, spec: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do one step by name; an error that users can act on comes back as {"error": {"status", "message"}}."""
    home = Home(Path(root), Path(identity)).prepare()
    grant = from_json(Grant, spec, where="run spec")
    try:
        return STEPS[step](home, grant, **arguments)
    except Exception as error:
        known = _in_words(error, step)
        if known is None:
            raise
        return {"error": {"status": known.status, "message": grant.told(error, str(known))}}


def _in_words(error: Exception, step: str) -> OffsiteError | None:
    """Return what a user can act on; None for a fault of ours. Libraries wrap what the system says, in many ways."""
    if isinstance(error, OffsiteError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return ResourceError(f"memory is missing for the step {step!r}; give it more, or take a smaller model or batch")
    if "No space left on device" in str(error):
        return from_system(OSError(errno.ENOSPC, "", getattr(error, "filename", None)))
    if isinstance(error, OSError):
        return from_system(error)
    return InputError(str(error)) if isinstance(error, ValueError) else None


def _the_base(spec: RunSpec, digest: str) -> Path:
    """Find the base again; raises MismatchError if it is no longer what the run began with."""
    source = zoo.locate(spec.model, cache=zoo.cache_folder())
    if (found := zoo.digest(source)) != digest:
        raise MismatchError(f"model {spec.model} has changed since the run began: {found}, it was {digest}")
    return source


def _folders(spec: Grant) -> list[Path]:
    """Return the folders that links inside a folder of texts may not leave; none: they may lead anywhere."""
    return [Path(folder) for folder in spec.folders]


def _unfinished(home: Home, spec: RunSpec, step: str) -> Path:
    """Where a long step keeps its state, so that it goes on after a kill: the same work finds the same folder."""
    return home.scratch / f"unfinished-{digest_bytes(to_json(spec) + step.encode())[7:23]}"
