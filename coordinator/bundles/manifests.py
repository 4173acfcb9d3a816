"""A bundle's manifest, read and told without any tensor library."""

from pathlib import Path

from offsite.protos.chunks import digest_file
from offsite.protos.documents import document, from_json, parse, to_plain
from offsite.protos.errors import MismatchError, NotFoundError
from offsite.protos.ranges import Amount, AtLeastZero, Digest
from offsite.protos.security.signing import verify
from offsite.protos.spec import Manifest

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"


@document
class Description(Manifest):
    """A manifest, and the figures of its bundle that people look at."""

    bytes: Amount  # of all its files
    disclosed: AtLeastZero  # parameters of the base that it holds as they are, as a share of all
    disclosed_lossy: AtLeastZero  # and those in a format of few bits


@document
class Bundle:
    """A bundle that was stored."""

    manifest: Digest
    manifest_size: Amount
    bundle: Description


def read(folder: Path, *, owner_public: Path | None = None) -> Manifest:
    """Read a bundle's manifest and check every file against it, and it against its signature."""
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
        if (actual := digest_file(folder / entry.path, like=entry.digest)) != entry.digest:
            raise MismatchError(f"{folder / entry.path}: its digest is {actual}, the manifest says {entry.digest}")
    return manifest


def describe(manifest: Manifest) -> Description:
    """Add to a manifest the figures of its bundle that people look at."""
    figures = {
        "bytes": sum(entry.size for entry in manifest.files),
        "disclosed": manifest.verbatim / manifest.base.parameters,
        "disclosed_lossy": manifest.lossy / manifest.base.parameters,
    }
    return parse(Description, to_plain(manifest) | figures, where="manifest")
