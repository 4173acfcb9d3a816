"""Blobs in an S3 bucket and, as long as they are used, in a folder of this machine, too.

An object is named by its digest, put whole or not at all, and checked when it comes back. Multipart uploads, streams
and retries are obstore's.
"""

import fcntl
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import obstore

from offsite.coordinator.store.blobs import Blobs, Stamp, log, room
from offsite.coordinator.store.cache import Cache
from offsite.coordinator.store.removals import Removals
from offsite.coordinator.store.s3 import HURRIED_S, PATIENT_S, SKEW_S, client, in_words, parse
from offsite.protos.chunks import CHUNK_BYTES, algorithm_of, digest_file, hasher, hex_of, is_digest
from offsite.protos.errors import InputError, MismatchError, NotFoundError

T = TypeVar("T")

PART_BYTES, PARTS_AT_ONCE = 8 << 20, 4  # of an upload: what of it is in memory
MOST_PARTS = 10_000  # that S3 takes
YOUNG_S = 12 * 3600.0  # what is so young is not put again, and no collection removes it
BATCH = 64  # blobs that are removed together


class Bucket(Blobs):
    """A content-addressed bucket, or what is under a prefix in one; no other journal's files may be there."""

    def __init__(self, url: str, cache: Path) -> None:
        self._at = parse(url)
        self._removals = Removals(self._at)
        self._cache = Cache(cache, most=self._at.cache)

    def check(self) -> None:
        """Look into the bucket."""
        with in_words(self._at):
            next(obstore.list(client(self._at, HURRIED_S), chunk_size=1), None)

    def path(self, digest: str, stamp: Stamp | None = None) -> Path:
        """See `Blobs`; fetched if it is not here."""
        return self._here(partial(self._cache.path, stamp=stamp), digest)

    def stamp(self, digest: str) -> Stamp:
        """See `Blobs`; fetched if it is not here."""
        return self._here(self._cache.stamp, digest)

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

    def size(self, digest: str) -> int:
        """Return how many bytes a blob has; raises NotFoundError."""
        with in_words(self._at):
            return int(obstore.head(client(self._at, HURRIED_S), _key(digest))["size"])

    def _stored_at(self, digest: str, patience_s: float = HURRIED_S) -> float | None:
        """Return when a blob was stored, in seconds since the epoch by the server's clock; None: it is not there."""
        try:
            with in_words(self._at):
                return obstore.head(client(self._at, patience_s), _key(digest))["last_modified"].timestamp()
        except NotFoundError:
            return None

    def keep(self, file: Path, digest: str, *, soon: bool = True) -> int:
        """See `Blobs`; it is put even where it is already, so that it is young, and whole if it was not."""
        size = file.stat().st_size
        with in_words(self._at):
            self._store(digest, lambda: self._put(digest, file, size))
        if soon:
            return self._cache.keep(file, digest)
        file.unlink()
        return size

    def _store(self, digest: str, put: Callable[[], None]) -> None:
        """Put a blob, again if a collection has removed it meanwhile, on whichever machine."""
        put()
        while True:
            self._removals.heed(digest)
            if self._stored_at(digest, PATIENT_S) is not None:
                return
            put()

    def _put(self, digest: str, content: Path | Iterator[bytes], size: int) -> None:
        part = max(PART_BYTES, size // MOST_PARTS + 1)
        obstore.put(client(self._at, PATIENT_S), _key(digest), content, chunk_size=part, max_concurrency=PARTS_AT_ONCE)

    def share(self, file: Path) -> tuple[str, int]:
        """See `Blobs`; it is put from where it is, and not into the cache."""
        digest, size = digest_file(file), file.stat().st_size

        def read() -> Iterator[bytes]:
            whole = hasher(algorithm_of(digest))
            with file.open("rb") as source:
                while data := source.read(PART_BYTES):
                    whole.update(data)
                    yield data
            if digest != f"{algorithm_of(digest)}:{whole.hexdigest()}":  # and nothing is stored
                raise MismatchError(f"{file}: it changes while it is read; submit the run again when it is at rest")

        with in_words(self._at):
            stored_at = self._stored_at(digest)
            if stored_at is None or stored_at < time.time() - YOUNG_S:
                self._store(digest, lambda: self._put(digest, read(), size))
        return digest, size

    def sweep(self, keep: set[str], *, before: float, dry_run: bool = False) -> tuple[int, int]:
        """See `Blobs`; what was stored within YOUNG_S, or less than SKEW_S before that time, stays, too."""
        before = min(before, time.time() - YOUNG_S) - SKEW_S
        files = size = 0
        with in_words(self._at):
            if not dry_run:
                self._removals.clear()
            old = self._old(keep, before)
            while batch := dict(islice(old, BATCH)):
                removed = batch.keys() if dry_run else self._remove(batch.keys(), before)
                files, size = files + len(removed), size + sum(batch[digest] for digest in removed)
        self._cache.sweep(keep, before=before, dry_run=dry_run)
        return files, size

    def _old(self, keep: set[str], before: float) -> Iterator[tuple[str, int]]:
        """Yield each blob that is not to be kept and was stored before a time by the server's clock, and its bytes."""
        for page in obstore.list(client(self._at, PATIENT_S)):
            for about in page:
                digest = about["path"].replace("/", ":")
                if is_digest(digest) and digest not in keep and about["last_modified"].timestamp() < before:
                    yield digest, about["size"]

    def _remove(self, digests: Collection[str], before: float) -> list[str]:
        """Remove those that nobody has stored since, as far as there is time, and return them."""
        removed = []
        with self._removals.announced(digests) as in_time:
            for digest in digests:
                stored_at = self._stored_at(digest)
                if stored_at is not None and stored_at < before and in_time():
                    obstore.delete(client(self._at, HURRIED_S), _key(digest))
                    removed.append(digest)
        return removed

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
