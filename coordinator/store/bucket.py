"""Blobs in an S3 bucket and, as long as they are used, in a folder of this machine, too.

An object is named by its digest, put whole or not at all, and checked when it comes back. Multipart uploads, streams
and retries are obstore's.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import obstore

from offsite.coordinator.store.blobs import Blobs, log, room
from offsite.coordinator.store.cache import Cache
from offsite.coordinator.store.s3 import client, in_words, parse
from offsite.protos.chunks import CHUNK_BYTES, algorithm_of, digest_file, hasher, hex_of, is_digest
from offsite.protos.errors import InputError, MismatchError, NotFoundError

T = TypeVar("T")

PART_BYTES, PARTS_AT_ONCE = 8 << 20, 4  # of an upload: what of it is in memory
MOST_PARTS = 10_000  # that S3 takes
PATIENT_S, HURRIED_S = 60.0, 0.5  # with a server that is away: of a transfer, and of a question
YOUNG_S = 12 * 3600.0  # what a run may name that is so young, no collection has in view
SKEW_S = 900.0  # S3 answers nobody whose clock differs by more, so by no more are its times off


class Bucket(Blobs):
    """A content-addressed bucket, or what is under a prefix in one; no other journal's files may be there."""

    def __init__(self, url: str, cache: Path) -> None:
        self._at = parse(url)
        self._cache = Cache(cache, most=self._at.cache)

    def check(self) -> None:
        """Look into the bucket."""
        with in_words(self._at):
            next(obstore.list(client(self._at, HURRIED_S), chunk_size=1), None)

    def path(self, digest: str) -> Path:
        """See `Blobs`; fetched if it is not here."""
        return self._here(self._cache.path, digest)

    def served(self, digest: str) -> Path:
        """See `Blobs`; fetched if it is not here."""
        return self._here(self._cache.served, digest)

    def passed(self, digest: str) -> tuple[Path, Callable[[str], None] | None]:
        """See `Blobs`; fetched if it is not here."""
        return self._here(self._cache.passed, digest)

    def _here(self, read: Callable[[str], T], digest: str) -> T:
        with suppress(NotFoundError, MismatchError):
            return read(digest)
        with self._alone(digest):
            with suppress(NotFoundError, MismatchError):  # somebody was faster
                return read(digest)
            self._fetch(digest)
        return read(digest)

    def _fetch(self, digest: str) -> None:
        partial = self._cache.root / f"partial-{hex_of(digest, most=2)}"  # what a kill left is written over
        self._download(digest, partial)
        self._cache.keep(partial, digest)

    def _download(self, digest: str, file: Path) -> None:
        """Write a blob's bytes into a file; raises MismatchError when they have changed."""
        whole = hasher(algorithm_of(digest))
        with in_words(self._at, digest):
            blob = obstore.get(client(self._at, PATIENT_S), _key(digest))
            room(file.parent, blob.meta["size"])
            with file.open("wb") as output:
                for data in blob.stream(CHUNK_BYTES):
                    whole.update(data)
                    output.write(data)
        if (actual := f"{algorithm_of(digest)}:{whole.hexdigest()}") != digest:
            file.unlink()
            error = MismatchError(
                f"{self._at}/{_key(digest)}: the object has changed since it was stored (its digest is "
                f"{actual[:19]}...); put it back from a backup, or submit the run again"
            )
            log.error("%s", error)
            raise error

    def copy(self, digest: str, file: Path) -> None:
        """See `Blobs`; from the bucket, past what is here: much that is seldom used would make what is used go."""
        self._download(digest, file)

    def __contains__(self, digest: str) -> bool:
        return self._stored_at(digest) is not None

    def _stored_at(self, digest: str) -> float | None:
        """Return when a blob was stored, in seconds since the epoch by the server's clock; None: it is not there."""
        try:
            with in_words(self._at):
                return obstore.head(client(self._at, HURRIED_S), _key(digest))["last_modified"].timestamp()
        except NotFoundError:
            return None

    def keep(self, file: Path, digest: str, *, soon: bool = True) -> int:
        """See `Blobs`; it is put even where it is already, so that it is young, and whole if it was not."""
        with self._alone(digest), in_words(self._at):
            self._put(digest, file, file.stat().st_size)
        if soon:
            return self._cache.keep(file, digest)
        size = file.stat().st_size
        file.unlink()
        return size

    def _put(self, digest: str, content: Path | Iterator[bytes], size: int) -> None:
        part = max(PART_BYTES, size // MOST_PARTS + 1)
        obstore.put(client(self._at, PATIENT_S), _key(digest), content, chunk_size=part, max_concurrency=PARTS_AT_ONCE)

    def share(self, file: Path) -> tuple[str, int]:
        """See `Blobs`; it is put from where it is, and not into the cache."""
        digest, size = digest_file(file), file.stat().st_size
        whole = hasher(algorithm_of(digest))

        def read() -> Iterator[bytes]:
            with file.open("rb") as source:
                while data := source.read(PART_BYTES):
                    whole.update(data)
                    yield data

        with self._alone(digest), in_words(self._at):
            stored_at = self._stored_at(digest)
            if stored_at is None or stored_at < time.time() - YOUNG_S:
                self._put(digest, read(), size)
                if digest != f"{algorithm_of(digest)}:{whole.hexdigest()}":
                    obstore.delete(client(self._at, PATIENT_S), _key(digest))
                    raise MismatchError(f"{file}: it changes while it is read; submit the run again when it is at rest")
        return digest, size

    def sweep(self, keep: set[str], *, before: float, dry_run: bool = False) -> tuple[int, int]:
        """See `Blobs`; what was stored less than SKEW_S before that time stays, too."""
        files = size = 0
        with in_words(self._at):
            for about in (one for page in obstore.list(client(self._at, PATIENT_S)) for one in page):
                digest = about["path"].replace("/", ":")
                if not is_digest(digest) or digest in keep or about["last_modified"].timestamp() >= before - SKEW_S:
                    continue
                with self._alone(digest):  # nobody puts it meanwhile
                    stored_at = self._stored_at(digest)
                    if stored_at is None or stored_at >= before - SKEW_S:
                        continue
                    if not dry_run:
                        obstore.delete(client(self._at, PATIENT_S), _key(digest))
                files, size = files + 1, size + about["size"]
        self._cache.sweep(keep, before=before, dry_run=dry_run)
        return files, size

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """Hold a lock over all processes that use this cache; digests that begin alike share one."""
        _key(digest)
        with (self._cache.root / f"lock-{hex_of(digest, most=2)}").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _key(digest: str) -> str:
    """Return the name of a blob's object under the prefix."""
    if not is_digest(digest):
        raise InputError(f"{digest!r} is not a digest; expected blake3:<64 hex digits>")
    return digest.replace(":", "/")
