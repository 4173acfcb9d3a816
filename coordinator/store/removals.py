"""What collections are about to remove from a bucket, so that whoever stores the same again, anywhere, takes heed.

A bucket has no locks, but what is written is seen by whoever looks afterwards. A collection writes the digests that it
means to remove into an object of its own, looks once more how old each of them is, removes the old ones, and takes that
object away. Who stores looks for such objects afterwards, waits while one names the digest, then looks whether the blob
is there, and else stores it again. So a collection that began earlier has done by then what it does, and one that
begins later finds the blob young.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import obstore

from offsite.coordinator.store.s3 import HURRIED_S, PATIENT_S, REPLY_S, SKEW_S, Place, client, in_words
from offsite.protos.errors import NotFoundError

FOLDER = "removals"
AGAIN_S = 0.25
HOLD_S = 60.0  # from before a list is written until the last of it is removed
GONE_S = HOLD_S + REPLY_S + 40.0  # after which a list that is still there is one that a kill has left
STALE_S = GONE_S + 2 * SKEW_S  # the same, by the server's clock and this one


class Removals:
    """The lists of a bucket's collections."""

    def __init__(self, place: Place) -> None:
        self._at = place

    @contextmanager
    def announced(self, digests: Iterable[str]) -> Iterator[Callable[[], bool]]:
        """Let nobody rely on some blobs while the body removes them; give what tells whether there is time for one."""
        name, end = f"{FOLDER}/{secrets.token_hex(16)}", time.monotonic() + HOLD_S
        obstore.put(client(self._at, HURRIED_S), name, "\n".join(digests).encode())
        try:
            yield lambda: time.monotonic() < end
        finally:
            obstore.delete(client(self._at, PATIENT_S), name)

    def heed(self, digest: str) -> None:
        """Wait while a blob is about to be removed."""
        end = time.monotonic() + GONE_S
        while self._names(digest) and time.monotonic() < end:
            time.sleep(AGAIN_S)

    def _names(self, digest: str) -> bool:
        """Tell whether a list names a digest."""
        for name, age_s in self._lists():
            with suppress(NotFoundError):  # it was taken away just now
                with in_words(self._at):
                    listed = bytes(obstore.get(client(self._at, PATIENT_S), name).bytes())
                if age_s < STALE_S and digest.encode() in listed:
                    return True
        return False

    def _lists(self) -> Iterator[tuple[str, float]]:
        """Yield each list's name, and its age in seconds."""
        for page in obstore.list(client(self._at, PATIENT_S), FOLDER):
            for about in page:
                yield about["path"], time.time() - about["last_modified"].timestamp()

    def clear(self) -> None:
        """Take away the lists of collections that were killed."""
        for name, age_s in list(self._lists()):
            if age_s > STALE_S:
                obstore.delete(client(self._at, PATIENT_S), name)
