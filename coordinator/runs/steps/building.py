"""Building a run's bundle, and re-aligning it to the newest adapter."""

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from offsite.coordinator import aggregation
from offsite.coordinator.aggregation import Separable
from offsite.coordinator.attacks import check_room, of_run
from offsite.coordinator.bundles import building, division
from offsite.coordinator.bundles.stored import open_bundle, recovered, store_adapter, store_bundle
from offsite.coordinator.bundles.trial import take_step
from offsite.coordinator.node import Node
from offsite.coordinator.runs.grant import Grant
from offsite.coordinator.runs.partial import part_of
from offsite.coordinator.runs.steps import memory
from offsite.coordinator.runs.steps.beginning import check_origin, first, go_on
from offsite.coordinator.runs.steps.inputs import folders, here, text, the_base, unfinished
from offsite.coordinator.runs.steps.orders import Build, Encodings, Outlined, Realign
from offsite.coordinator.runs.steps.results import Built, Realigned
from offsite.coordinator.runs.steps.retaining import kept, retain, unfolded
from offsite.coordinator.runs.steps.storage import store_schema, store_version
from offsite.coordinator.runs.steps.timeline import Timeline
from offsite.emulator import bundle, methods, zoo
from offsite.emulator.anatomy.structure import positions, text_config
from offsite.emulator.builders import make as make_builder
from offsite.emulator.methods import Adapter, Method
from offsite.emulator.methods.base import takes
from offsite.emulator.outline import Draft, Outline
from offsite.emulator.parts.training import whole_schema
from offsite.emulator.precision import quicken
from offsite.emulator.tuning.loop import Schedule
from offsite.emulator.tuning.rates import suited
from offsite.emulator.tuning.speed import STEPS, Trial, calibrated
from offsite.kernels.schema import Schema, groups, size_bytes
from offsite.protos import tensors, upload
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import canonical, to_plain
from offsite.protos.errors import InputError
from offsite.protos.spec import Choice


def build(node: Node, spec: Grant, order: Build) -> Built:
    """Build and store the bundle and the adapters that sites of each tier start from."""
    timeline = Timeline()
    blobs = node.blobs()
    strategy = aggregation.make(spec.strategy.name, spec.strategy.settings)
    with TemporaryDirectory(dir=node.scratch) as scratch, timeline.span("building"):
        built = _emulator(node, spec, order.encoded, Path(scratch) / "bundle")
        manifest = built.manifest
        method = methods.make(spec.method.name, spec.method.settings)
        layout = bundle.described(manifest)
        emulator, _ = bundle.load(built.folder, layout=layout, dtype="auto")
        if spec.attack_steps:  # at the run's end, when it would be late to say so
            check_room(node.scratch, [emulator], of_run(spec))
        tiers = {site: method.tier_at(site) for site in order.sites}
        joins = spec.join or (spec.replays is not None and spec.replays.joins)
        before = unfolded(blobs, Path(scratch), order.continued) if order.continued else None
        statistics = tensors.load(blobs.path(before.version.adapter)) if takes(method) and before else None
        begun = first(
            method,
            emulator,
            layout.outline.places,
            tiers=[*tiers.values(), *(method.tiers() if joins else ())],
            seed=spec.training.seed,
            statistics=statistics,
        )
        method.recover(begun.adapter, built.recovery)  # refuses now what could not be brought back later
        version = store_version(blobs, Path(scratch), begun)
        made_of = method.schema(begun.adapter)
        schema = store_schema(blobs, Path(scratch), made_of)
        settled = {tier: whole_schema(method, start) for tier, start in begun.broadcast.items()}
        update_sizes = {tier: _update_size(spec, own) for tier, own in settled.items()}
        schemas = {}
        if part_of(spec.training).partial:
            schemas = {tier: store_schema(blobs, Path(scratch), own) for tier, own in settled.items()}
        rate = spec.training.learning_rate or suited(method.rate, emulator)
        if spec.speed:
            rate = _calibrated(node, spec, built, begun.adapter, rate)
        take_step(emulator, method, layout.outline.places, begun.adapter)  # the last use of this copy
        recovery = None
        if built.recovery:
            recovery = store_adapter(blobs, Path(scratch) / "recovery.safetensors", built.recovery).digest
        stored = store_bundle(node, built)
    shutil.rmtree(unfinished(node, spec, "build"), ignore_errors=True)
    identity = {"base": manifest.base.digest, "method": to_plain(spec.method), "trainable": list(manifest.trainable)}
    result = Built(
        manifest=stored.manifest,
        manifest_size=stored.manifest_size,
        bundle=stored.bundle,
        base=manifest.base,
        version=version,
        tiers=tiers,
        schema=schema,
        schemas=schemas,
        groups=len(groups(made_of)) if isinstance(strategy, Separable) else 1,
        update_sizes=update_sizes,
        method=_told(spec.method, method),
        method_hash=digest_bytes(canonical(identity)),
        learning_rate=rate,
        computed=built.computed,
        vocabulary=text_config(emulator).vocab_size,
        recovery=recovery,
        portions=built.portions,
        spans=tuple(timeline),
    )
    origin = result.version
    if before and statistics is not None:
        check_origin(result, before)
        origin = replace(origin, state=kept(before.version, method))
    elif before:
        origin = go_on(blobs, result, before)
    with TemporaryDirectory(dir=node.scratch) as scratch:
        origin, anchors = retain(blobs, Path(scratch), spec.training, origin, made_of)
        version = memory.begin(blobs, Path(scratch), spec, origin, result.version, made_of)
    return replace(result, version=version, anchors=anchors)


def _emulator(node: Node, spec: Grant, encoded: Encodings | None, folder: Path) -> building.Built:
    """Build the emulator, or finish one whose maps were encoded in parts.

    Nothing signs it here: what is signed is each task, which names the manifest.
    """
    model, read, scratch = here(node, spec, spec.model), texts(node, spec), unfinished(node, spec, "build")
    if encoded is None:
        return building.build(
            model,
            spec.builders,
            spec.trainable,
            folder,
            public=read.public,
            calibration=read.calibration,
            owner_key=None,
            called=spec.base_name,
            folders=read.folders,
            scratch=scratch,
        )
    parts = [tensors.load(node.blobs().path(part)) for part in encoded.parts]
    return division.finish(
        model,
        spec.builders,
        outline(encoded.outline),
        {name: tensor for part in parts for name, tensor in part.items()},
        folder,
        read,
        called=spec.base_name,
        scratch=scratch,
    )


def texts(node: Node, spec: Grant) -> division.Texts:
    """Return where the texts that a build reads are on this machine."""
    return division.Texts(text(node, spec, spec.public), text(node, spec, spec.calibration), folders(spec))


def outline(outlined: Outlined) -> Outline:
    """Return the layers of an emulator as builders have them."""
    return Outline(outlined.layers, outlined.trainable, outlined.shared, building.grounds_of(outlined.grounds))


def _calibrated(node: Node, spec: Grant, built: building.Built, start: Adapter, rate: float) -> float:
    """Return the rate at which an adapter moves the emulator as fast as asked; raises InputError if there is none."""
    layout = bundle.described(built.manifest)
    emulator, tokenizer = bundle.load(built.folder, layout=layout, dtype="auto")
    quicken(emulator)
    method, read, asked = methods.make(spec.method.name, spec.method.settings), texts(node, spec), spec.training
    material = building.material(read.public, tokenizer, folders=read.folders, longest=positions(emulator))
    trial = Trial(emulator, method, layout.outline.places, start, material.samples)
    schedule = Schedule(
        STEPS,
        rate,
        batch_size=asked.batch_size,
        weight_decay=asked.weight_decay,
        gradient_clipping=asked.gradient_clipping,
        seed=asked.seed,
    )
    try:
        return calibrated(trial, spec.speed, schedule)
    except ValueError as error:
        raise InputError(f"speed: {error}") from error


def _update_size(spec: Grant, schema: Schema) -> int:
    """Bytes of the tensors of a tier that leave a site; raises InputError if a stage, or the run's part, cannot."""
    try:
        part_of(spec.training).fits(schema)
    except ValueError as error:
        raise InputError(f"training.part: {error}") from error
    try:
        return size_bytes(upload.schema_of(upload.make(spec.upload), schema))
    except ValueError as error:
        raise InputError(f"upload: {error}") from error


def _told(choice: Choice, method: Method) -> Choice:
    """What a site is told of the method: not who else takes part."""
    return Choice(name=choice.name, settings={k: v for k, v in choice.settings.items() if k not in method.withheld})


def realign(node: Node, spec: Grant, order: Realign) -> Realigned:
    """Tune the emulator's frozen layers beside the newest adapter, and store the bundle of the next round."""
    timeline = Timeline()
    blobs = node.blobs()
    source = the_base(node, spec, order.base)
    scratch = unfinished(node, spec, f"realign {order.adapter}")
    with TemporaryDirectory(dir=node.scratch) as folder, timeline.span("building"):
        full, tokenizer = zoo.load_base(source, dtype="auto")
        listed, emulator, _ = open_bundle(blobs, order.manifest, Path(folder) / "old", dtype="auto")
        dtype = quicken(full)
        quicken(emulator)
        draft = Draft(full, emulator, bundle.described(listed).outline)
        method = methods.make(spec.method.name, spec.method.settings)
        adapter = tensors.load(blobs.path(order.adapter))
        last: Any = make_builder(spec.builders[-1].name, spec.builders[-1].settings)
        material = building.material(
            text(node, spec, spec.public), tokenizer, folders=folders(spec), scratch=scratch, longest=positions(full)
        )
        aligned = last.realigned(
            draft,
            material,
            steps=spec.realign_steps,
            method=method,
            adapter=adapter,
            recovered=recovered(blobs, method, adapter, order.recovery),
        )
        built = building.write(
            aligned,
            tokenizer,
            Path(folder) / "new",
            dtype=dtype,
            base=listed.base,
            chain=listed.builders,
            owner_key=None,
        )
        stored = store_bundle(node, built)
    shutil.rmtree(scratch, ignore_errors=True)
    return Realigned(
        manifest=stored.manifest, manifest_size=stored.manifest_size, bundle=stored.bundle, spans=tuple(timeline)
    )
