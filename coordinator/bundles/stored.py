"""Adapters and bundles as blobs: how the steps of a run keep them, and read them again."""

from pathlib import Path
from typing import Any

import torch

from offsite.coordinator.bundles import building
from offsite.coordinator.bundles.manifests import MANIFEST, Bundle, describe
from offsite.coordinator.node import Node
from offsite.coordinator.store.blobs import Blobs, Stored, room
from offsite.emulator import bundle
from offsite.emulator.methods import Adapter, Method
from offsite.protos import tensors
from offsite.protos.chunks import digest_bytes
from offsite.protos.documents import from_json, to_json
from offsite.protos.spec import Manifest


def store_adapter(blobs: Blobs, path: Path, adapter: dict[str, torch.Tensor]) -> Stored:
    """Write an adapter to a path and store the file."""
    tensors.save(path, adapter)
    digest, size = blobs.take(path)
    return Stored(digest=digest, size=size)


def store_bundle(node: Node, built: building.Built) -> Bundle:
    """Store a bundle's files."""
    blobs, manifest = node.blobs(), built.manifest
    room(node.root, sum(entry.size for entry in manifest.files))
    for entry in manifest.files:
        blobs.take(built.folder / entry.path, digest=entry.digest)
    blobs.take(built.folder / MANIFEST)
    document = to_json(manifest)
    return Bundle(manifest=digest_bytes(document), manifest_size=len(document), bundle=describe(manifest))


def lay_out(blobs: Blobs, manifest: str, folder: Path) -> Manifest:
    """Fill a folder with links to a stored bundle's files; return its manifest."""
    listed = from_json(Manifest, blobs.path(manifest).read_bytes(), where="manifest")
    for entry in listed.files:
        link = folder / entry.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs.path(entry.digest).resolve())
    return listed


def open_bundle(blobs: Blobs, manifest: str, folder: Path, *, dtype: torch.dtype | str) -> tuple[Manifest, Any, Any]:
    """Read a stored bundle: its manifest, emulator and tokenizer."""
    listed = lay_out(blobs, manifest, folder)
    return listed, *bundle.load(folder, layout=bundle.described(listed), dtype=dtype)


def recovered(blobs: Blobs, method: Method, adapter: Adapter, recovery: str | None) -> Adapter:
    """Bring an adapter back to the base, with what the owner kept when the emulator was built."""
    return method.recover(adapter, tensors.load(blobs.path(recovery)) if recovery else {})
