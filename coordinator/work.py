"""The heavy steps of a run, each a function of plain data, run in a worker process.

A step reads and writes files by digest and returns what the journal keeps. Running one twice gives the same result.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offsite.coordinator import aggregation, bundles
from offsite.coordinator.home import Home
from offsite.coordinator.store.blobs import Blobs, room
from offsite.emulator import bundle, methods, plug, zoo
from offsite.emulator.batches import encode, evaluation_batches
from offsite.emulator.examples import read
from offsite.emulator.fidelity import likelihood
from offsite.protos import tensors
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import canonical, from_json, to_plain
from offsite.protos.errors import InputError, MismatchError, OffsiteError, from_system
from offsite.protos.spec import Manifest, RunSpec, Span

EVALUATION_BATCH = 8


class Timeline(list[dict[str, Any]]):
    """The spans of one step."""

    @contextmanager
    def span(self, kind: Any) -> Iterator[None]:
        """Record a stretch of time of one kind."""
        start = time.time()
        yield
        self.append(to_plain(Span(kind=kind, start=start, end=time.time())))


def build(home: Home, spec: RunSpec, *, sites: list[str]) -> dict[str, Any]:
    """Build and store the bundle and the adapters that sites of each rank start from."""
    timeline = Timeline()
    blobs = home.blobs()
    with TemporaryDirectory(dir=home.scratch) as scratch, timeline.span("building"):
        folder = Path(scratch) / "bundle"
        calibration = Path(spec.calibration) if spec.calibration else None
        built = bundles.build(spec.model, spec.builder, folder, calibration=calibration, owner_key=home.owner_key)
        manifest = built.manifest
        room(home.root, sum(entry.size for entry in manifest.files))
        method = methods.make(spec.method.name, spec.method.settings)
        emulator, _ = bundle.load(folder, outline=bundles.outline_of(manifest), dtype="auto")
        trained = bundles.outline_of(manifest).places
        adapters = {}
        for rank in sorted({method.rank_at(site) for site in sites}):
            adapter = method.start(emulator, trained, seed=spec.training.seed, rank=rank)
            adapters[rank] = _store(blobs, Path(scratch) / f"start-{rank}.safetensors", adapter)
        for entry in manifest.files:
            blobs.take(folder / entry.path, digest=entry.digest)
        blobs.take(folder / bundles.MANIFEST)
    identity = {"base": manifest.base.digest, "method": to_plain(spec.method), "trainable": list(manifest.trainable)}
    return {
        "manifest": digest_bytes(document := _manifest(manifest)),
        "manifest_size": len(document),
        "base": to_plain(manifest.base),
        "method_hash": digest_bytes(canonical(identity)),
        "broadcast": {site: adapters[method.rank_at(site)] for site in sites},
        "exact": None,
        "residual": {},
        "bundle": bundles.describe(manifest),
        "spans": timeline,
    }


def aggregate(
    home: Home, spec: RunSpec, *, residual: dict[str, str], updates: list[dict[str, Any]], sites: list[str]
) -> dict[str, Any]:
    """Fold the updates of a round, in the order of the sites' names, and store the next version."""
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    with timeline.span("aggregation"), TemporaryDirectory(dir=home.scratch) as scratch:
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
                rank: _store(blobs, Path(scratch) / f"{name}-{rank}.safetensors", adapter)
                for rank, adapter in adapters.items()
            }

        broadcast, rest = store("broadcast", outcome.broadcast), store("residual", outcome.residual)
        exact = _store(blobs, Path(scratch) / "exact.safetensors", outcome.exact)
    return {
        "broadcast": {site: broadcast[method.rank_at(site)] for site in sites},
        "exact": exact["digest"],
        "residual": {str(rank): stored["digest"] for rank, stored in rest.items()},
        "lineage": {
            update["site"]: {"update": update["digest"], "weight": update["examples"] / total} for update in updates
        },
        "figures": outcome.figures,
        "spans": timeline,
    }


def evaluate(home: Home, spec: RunSpec, *, base: str, manifest: str | None, exact: str | None) -> dict[str, Any]:
    """Measure the base (manifest None) or the emulator, with an adapter or without, on the owner's held-out data."""
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    with timeline.span("loading"), TemporaryDirectory(dir=home.scratch) as scratch:
        outline = None
        if manifest is None:
            model, tokenizer = zoo.load_base(_the_base(spec, base), dtype=dtype_of(spec))
        else:
            listed = from_json(Manifest, blobs.path(manifest).read_bytes(), where="manifest")
            for entry in listed.files:
                link = Path(scratch) / entry.path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blobs.path(entry.digest).resolve())
            outline = bundles.outline_of(listed)
            model, tokenizer = bundle.load(Path(scratch), outline=outline, dtype=dtype_of(spec))
        if exact is not None:
            adapter = tensors.load(blobs.path(exact))
            itself = {layer: layer for layer in {int(key.split(".")[0]) for key in adapter}}
            model = method.attach(model, outline.places if outline else itself, adapter)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    figures: dict[str, dict[str, float]] = {}
    for name, path in sorted(spec.evaluation.items()):
        batches = evaluation_batches(
            encode(read(Path(path)), tokenizer, max_length=spec.training.max_length), batch_size=EVALUATION_BATCH
        )
        with timeline.span("evaluation"):
            found = likelihood(model, batches)
        figures[name] = {"nll": found.nll, "tokens": found.tokens}
    return {"sets": figures, "spans": timeline}


def publish(home: Home, spec: RunSpec, *, base: str, exact: str) -> dict[str, Any]:
    """Write the outcome as a standard peft adapter and, if asked for, the merged model."""
    timeline = Timeline()
    blobs = home.blobs()
    method = methods.make(spec.method.name, spec.method.settings)
    source = _the_base(spec, base)
    with timeline.span("loading"):
        model, tokenizer = zoo.load_base(source, dtype="auto")
    adapter = tensors.load(blobs.path(exact))
    files: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(dir=home.scratch) as scratch:
        plug.export_peft(Path(scratch) / "adapter", adapter, scale=method.scale, model=model, base_name=spec.model)
        if spec.merge:
            room(home.root, 2 * sum(parameter.nbytes for parameter in model.parameters()))
            plug.merge(model, adapter, scale=method.scale)
            model.save_pretrained(Path(scratch) / "merged")
            tokenizer.save_pretrained(Path(scratch) / "merged")
        for path in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
            name = path.relative_to(scratch).as_posix()
            digest, size = blobs.take(path)
            files[name] = {"digest": digest, "size": size}
    return {"artifacts": files, "spans": timeline}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "build": build,
    "aggregate": aggregate,
    "evaluate": evaluate,
    "publish": publish,
}


def perform(step: str, root: str, identity: str, spec: bytes, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do one step by name; an error that users can act on comes back as {"error": {"status", "message"}}."""
    home = Home(Path(root), Path(identity)).prepare()
    try:
        return STEPS[step](home, from_json(RunSpec, spec, where="run spec"), **arguments)
    except OSError as error:
        known = from_system(error)
    except ValueError as error:
        known = InputError(str(error))
    except OffsiteError as error:
        known = error
    return {"error": {"status": known.status, "message": str(known)}}


def dtype_of(spec: RunSpec) -> torch.dtype:
    """The dtype of frozen weights that a run asks for."""
    return torch.bfloat16 if spec.training.precision == "bf16" else torch.float32


def _the_base(spec: RunSpec, digest: str) -> Path:
    """Find the base again; raises MismatchError if it is no longer what the run began with."""
    source = zoo.locate(spec.model, cache=zoo.cache_folder())
    if (found := zoo.digest(source)) != digest:
        raise MismatchError(f"model {spec.model} has changed since the run began: {found}, it was {digest}")
    return source


def _manifest(manifest: Manifest) -> bytes:
    return canonical(to_plain(manifest))


def _store(blobs: Blobs, path: Path, adapter: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors.save(path, adapter)
    digest, size = blobs.take(path)
    return {"digest": digest, "size": size}
