"""Building a bundle: the emulator's files, and a manifest that names, counts and signs them."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offsite.coordinator.bundles.manifests import MANIFEST, SIGNATURE
from offsite.emulator import builders, bundle, modality, placements, zoo
from offsite.emulator.anatomy.stack import refuse_mixture
from offsite.emulator.anatomy.structure import experts, find, layers, positions
from offsite.emulator.batches import evaluation_batches
from offsite.emulator.builders import Builder, Material
from offsite.emulator.bundle import Layout
from offsite.emulator.checkpoint import Checkpoint
from offsite.emulator.evaluation.disclosure import base_sizes, by_layer, count, disclosed
from offsite.emulator.evaluation.portion import Portion
from offsite.emulator.modality import Sample
from offsite.emulator.outline import Draft, Grounds
from offsite.emulator.placements import Placement
from offsite.emulator.precision import explained, quicken
from offsite.emulator.zoo.weights import refuse_infinite
from offsite.protos import spec
from offsite.protos.chunks import digest_file
from offsite.protos.documents import to_json
from offsite.protos.errors import InputError
from offsite.protos.security.signing import sign
from offsite.protos.spec import BaseRef, Choice, FileEntry, Manifest, Packing

CALIBRATION_EXAMPLES = 64  # fewer choose other layers: 32 of 96 tokens doubled the emulator's perplexity
PUBLIC_TOKENS = 128
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """A bundle on disk.

    `recovery` is what the owner keeps to bring adapters back to the base, `portions` what is disclosed of each layer.
    """

    folder: Path
    manifest: Manifest
    recovery: dict[str, Tensor] = field(default_factory=dict)
    computed: str = "fp32"  # in which precision, and why
    portions: dict[str, Portion] = field(default_factory=dict)


def build(
    model: str,
    chain: Sequence[Choice],
    trainable: Choice,
    folder: Path,
    *,
    public: Path | None,
    calibration: Path | None = None,
    owner_key: Path | None,
    called: str = "",
    folders: Sequence[Path] = (),
    scratch: Path | None = None,
    stream: bool | None = None,
    tell: Tell = lambda what, step, steps: None,
) -> Built:
    """Build the emulator of a model into a folder.

    Args:
        model: a path, a hub id or a name from the model zoo.
        chain: which builders, in the order they work, and their settings.
        trainable: which of its layers train.
        folder: where the bundle goes; made if missing.
        public: text for builders that tune, and for those that look at how the model reads text.
        calibration: text for the latter to look at instead, such as the task's.
        owner_key: Ed25519 key that signs the manifest; None leaves the bundle unsigned.
        called: what others call the base; empty: as its folder is called.
        folders: that links inside a folder of text may not leave; empty: anywhere.
        scratch: a folder for the state of builders that tune, so that a killed build goes on where it was.
        stream: read the base's layers one at a time; None: if they would fill more than half of this machine's memory.
        tell: hears what is done, which step, and of how many.

    Raises:
        InputError: the model, the builders' settings or the text cannot be used.
    """
    try:
        makers = [builders.make(choice.name, choice.settings) for choice in chain]
        builders.check(makers)
        placement = placements.make(trainable.name, trainable.settings)
        source = zoo.locate(model, cache=zoo.cache_folder())
        checkpoint = Checkpoint.open(source)
        refuse_infinite(source)
        if checkpoint.bytes > memory() / 2 if stream is None else stream:
            return _build_streamed(
                *(checkpoint, makers, chain, placement, folder),
                text=calibration or public,
                folders=folders,
                called=called,
                owner_key=owner_key,
            )
        base = load(source)
        text = material(
            public,
            base.tokenizer,
            calibration=calibration,
            folders=folders,
            scratch=scratch,
            longest=positions(base.model),
            tell=tell,
        )
        draft = builders.run(makers, placement, base.model, text)
        return write_loaded(draft, base, folder, called=called, chain=chain, owner_key=owner_key)
    except ValueError as error:
        raise InputError(str(error)) from error


@dataclass(frozen=True)
class Base:
    """A base in memory, in the dtype that this machine computes in, and the one that its files have."""

    source: Path
    model: nn.Module
    tokenizer: Any
    stored: torch.dtype


def load(source: Path) -> Base:
    """Read a base from its folder, to build of it; raises ValueError."""
    model, tokenizer = zoo.load_base(source, dtype="auto")
    return Base(source, model, tokenizer, quicken(model))


def write_loaded(
    draft: Draft, base: Base, folder: Path, *, called: str, chain: Sequence[Choice], owner_key: Path | None
) -> Built:
    """Write an emulator that was built of a base into a folder, and say in which precision; raises ValueError."""
    named = ref(base.source, base.model, called=called)
    built = write(draft, base.tokenizer, folder, dtype=base.stored, base=named, chain=chain, owner_key=owner_key)
    return replace(built, computed=explained(base.model))


def write(
    draft: Draft,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    base: BaseRef,
    chain: Sequence[Choice],
    owner_key: Path | None,
) -> Built:
    """Write an emulator that was built into a folder, in the base's own dtype, with its manifest; raises ValueError."""
    layout = bundle.layout_of(draft)
    bundle.save(draft.model, tokenizer, folder, outline=draft.outline, dtype=dtype)
    share = disclosed(draft)
    return _seal(
        folder,
        layout,
        base=base,
        chain=chain,
        counts=(count(draft.model), share.verbatim, share.lossy, experts(*layers(draft.model))),
        owner_key=owner_key,
        recovery=draft.recovery,
        portions=by_layer(draft),
    )


def _build_streamed(
    checkpoint: Checkpoint,
    makers: Sequence[Builder],
    chain: Sequence[Choice],
    placement: Placement,
    folder: Path,
    *,
    text: Path | None,
    folders: Sequence[Path],
    called: str,
    owner_key: Path | None,
) -> Built:
    """Build an emulator of a base that is never in memory as a whole."""
    depth: Any = makers[0]
    if len(makers) > 1 or depth.stage != "depth":
        raise ValueError(f"only {builders.of('depth')}, each by itself, build from layers read one at a time")
    model, stored = checkpoint.stream()
    tokenizer = zoo.load_tokenizer(checkpoint.folder)
    zoo.refuse_strange_words(checkpoint.folder, tokenizer, model)
    looked_at = material(  # one pass over the layers
        text, tokenizer, folders=folders, batch_size=CALIBRATION_EXAMPLES, longest=positions(model)
    )
    outline = depth.outline(model, looked_at.batches, placement)
    own = [outline.layers[place] for place in outline.own]
    refuse_mixture(model, own)
    bundle.copy(checkpoint, model, tokenizer, folder, outline=outline, dtype=stored)
    kept = {"", *map(str, own)}
    sizes = base_sizes(model)
    portions = {layer: Portion(size if layer in kept else 0, 0, size, "") for layer, size in sizes.items()}
    held = sum(portion.verbatim for portion in portions.values())
    return _seal(
        folder,
        Layout(outline),
        base=ref(checkpoint.folder, model, called=called),
        chain=chain,
        counts=(held, held, 0, experts(*(layers(model)[at] for at in own))),
        owner_key=owner_key,
        recovery={},
        portions=portions,
    )


def _seal(
    folder: Path,
    layout: Layout,
    *,
    base: BaseRef,
    chain: Sequence[Choice],
    counts: tuple[int, int, int, int],
    owner_key: Path | None,
    recovery: dict[str, Tensor],
    portions: dict[str, Portion],
) -> Built:
    packed = None
    if layout.format is not None:
        format: Any = layout.format
        packed = Packing(format=Choice(name=format.name, settings=asdict(format)), places=layout.packed)
    manifest = Manifest(
        base=base,
        builders=tuple(chain),
        layers=layout.outline.layers,
        trainable=layout.outline.trainable,
        shared=layout.outline.shared,
        packed=packed,
        narrow=layout.narrow,
        grounds=grounds_told(layout.outline.grounds),
        parameters=counts[0],
        verbatim=counts[1],
        lossy=counts[2],
        experts=counts[3],
        files=tuple(_entries(folder)),
    )
    document = to_json(manifest)
    (folder / MANIFEST).write_bytes(document)
    if owner_key is not None:
        (folder / SIGNATURE).write_bytes(sign(document, owner_key, purpose="bundle"))
    return Built(folder, manifest, recovery, portions=portions)


def grounds_told(grounds: Grounds | None) -> spec.Grounds | None:
    """Write down on what layers were chosen, in few digits, so that equal choices have equal manifests."""
    if grounds is None:
        return None
    return spec.Grounds(
        links={layer: round(link, 3) for layer, link in grounds.links.items()},
        gap=round(grounds.gap, 3) if math.isfinite(grounds.gap) else None,
        margin=round(grounds.margin, 3),
        ways=grounds.ways,
        lead=None if grounds.lead is None else round(grounds.lead, 2),
    )


def grounds_of(told: spec.Grounds | None) -> Grounds | None:
    """Return what was written down so; written down again it is the same."""
    if told is None:
        return None
    return Grounds(told.links, math.inf if told.gap is None else told.gap, told.margin, told.ways, told.lead)


def ref(source: Path, base: nn.Module, *, called: str = "") -> BaseRef:
    """Name a base model: as it is called, else by the folder it was read from."""
    depth = len(find(base).layers)
    return BaseRef(name=called or source.name, digest=zoo.digest(source), layers=depth, parameters=count(base))


def material(
    public: Path | None,
    tokenizer: Any,
    *,
    calibration: Path | None = None,
    folders: Sequence[Path] = (),
    scratch: Path | None = None,
    batch_size: int = 8,
    longest: int | None = None,
    tell: Tell = lambda what, step, steps: None,
) -> Material:
    """Read the text that builders may use: `calibration`, else `public`, to look at, `public` to train on.

    `longest` is for how many tokens the model has positions, if it has a table of them. Raises ValueError.
    """
    tokens = min(PUBLIC_TOKENS, longest or PUBLIC_TOKENS)

    def samples(path: Path | None) -> list[Sample]:
        if not path:
            return []
        return modality.encode(modality.read(path, folders=folders), tokenizer, max_length=tokens, divide=False)

    public_text = samples(public)
    looked_at = (samples(calibration) or public_text)[:CALIBRATION_EXAMPLES]
    few = evaluation_batches(looked_at, batch_size=batch_size)
    return Material(batches=few, samples=public_text, scratch=scratch, tell=tell)


def _entries(folder: Path) -> list[FileEntry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, SIGNATURE))
    return [
        FileEntry(path=path.relative_to(folder).as_posix(), digest=digest_file(path), size=path.stat().st_size)
        for path in files
    ]


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
