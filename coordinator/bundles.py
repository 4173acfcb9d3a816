"""Building a bundle: the emulator's files, and a manifest that names, counts and signs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from offsite.emulator import builders, bundle, zoo
from offsite.emulator.batches import Batch, encode, evaluation_batches
from offsite.emulator.builders import Outline
from offsite.emulator.examples import read
from offsite.emulator.stack import restack
from offsite.protos.chunks import digest_file
from offsite.protos.documents import from_json, to_json, to_plain
from offsite.protos.errors import InputError, MismatchError, NotFoundError
from offsite.protos.security.signing import sign, verify
from offsite.protos.spec import BaseRef, Choice, FileEntry, Manifest

CALIBRATION_EXAMPLES = 64  # fewer choose other layers: 32 of 96 tokens doubled the emulator's perplexity
CALIBRATION_TOKENS = 128
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"


@dataclass(frozen=True)
class Built:
    """A bundle on disk."""

    folder: Path
    manifest: Manifest


def build(model: str, builder: Choice, folder: Path, *, calibration: Path | None, owner_key: Path | None) -> Built:
    """Build the emulator of a model into a folder.

    Args:
        model: a path, a hub id or a name from the model zoo.
        builder: which builder, and its settings.
        folder: where the bundle goes; made if missing.
        calibration: public text for builders that look at hidden states.
        owner_key: Ed25519 key that signs the manifest; None leaves the bundle unsigned.

    Raises:
        InputError: the model, the builder's settings or the calibration text cannot be used.
    """
    try:
        maker = builders.make(builder.name, builder.settings)
        source = zoo.locate(model, cache=zoo.cache_folder())
        base, tokenizer = zoo.load_base(source, dtype="auto")
        outline = maker.outline(base, _calibration(calibration, tokenizer))
        emulator = restack(base, outline.layers, outline.shared)
        folder.mkdir(parents=True, exist_ok=True)
        bundle.save(emulator, tokenizer, folder, outline=outline)
    except ValueError as error:
        raise InputError(str(error)) from error
    manifest = Manifest(
        base=BaseRef(
            name=source.name,
            digest=zoo.digest(source),
            layers=base.config.num_hidden_layers,
            parameters=count(base),
        ),
        builder=builder,
        layers=outline.layers,
        trainable=outline.trainable,
        shared=outline.shared,
        parameters=count(emulator),
        files=tuple(_entries(folder)),
    )
    document = to_json(manifest)
    (folder / MANIFEST).write_bytes(document)
    if owner_key is not None:
        (folder / SIGNATURE).write_bytes(sign(document, owner_key, purpose="bundle"))
    return Built(folder, manifest)


def open_bundle(folder: Path, *, owner_public: Path | None = None) -> Built:
    """Read a bundle and check every file against its manifest, and the manifest against its signature."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"{folder}: no {MANIFEST} in it; a bundle is made by `offsite emulator build`")
    document = path.read_bytes()
    if owner_public is not None:
        if not (folder / SIGNATURE).is_file():
            raise MismatchError(f"{folder}: the bundle is not signed; build it with --identity")
        verify(document, (folder / SIGNATURE).read_bytes(), owner_public, purpose="bundle")
    manifest = from_json(Manifest, document, where=str(path))
    for entry in manifest.files:
        if not (folder / entry.path).is_file():
            raise MismatchError(f"{folder}: {entry.path} is missing, the manifest names it")
        if (found := digest_file(folder / entry.path)) != entry.digest:
            raise MismatchError(f"{folder / entry.path}: its digest is {found}, the manifest says {entry.digest}")
    return Built(folder, manifest)


def outline_of(manifest: Manifest) -> Outline:
    """Return the emulator's outline that a manifest describes."""
    return Outline(layers=manifest.layers, trainable=manifest.trainable, shared=manifest.shared)


def count(model: nn.Module) -> int:
    """Count a model's parameters, tied and shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _entries(folder: Path) -> list[FileEntry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, SIGNATURE))
    return [
        FileEntry(path=path.relative_to(folder).as_posix(), digest=digest_file(path), size=path.stat().st_size)
        for path in files
    ]


def _calibration(path: Path | None, tokenizer: object) -> Sequence[Batch]:
    if path is None:
        return ()
    encoded = encode(read(path)[:CALIBRATION_EXAMPLES], tokenizer, max_length=CALIBRATION_TOKENS)
    return evaluation_batches(encoded, batch_size=8)


def describe(manifest: Manifest) -> dict[str, Any]:
    """Return the figures of a bundle that people look at."""
    size = sum(entry.size for entry in manifest.files)
    plain: dict[str, Any] = to_plain(manifest)
    return plain | {
        "bytes": size,
        "disclosed": manifest.parameters / manifest.base.parameters,
    }
