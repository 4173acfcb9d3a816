"""Stores open by URL; what a scheme needs is imported once it is asked for."""

import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from offsite.coordinator.store.blobs import Blobs, Folder
from offsite.coordinator.store.journal import Journal
from offsite.protos.errors import InputError
from offsite.protos.extras import extra
from offsite.protos.ranges import readable

JOURNALS = {  # an example of each scheme
    "sqlite": "sqlite:////srv/offsite/journal.db",
    "postgresql": "postgresql://role:password@host:5432/database",
}
BLOBS = {"file": "file:///srv/offsite/blobs", "s3": "s3://bucket/prefix"}
LONGEST = 4096


def open_journal(url: str) -> Journal:
    """Open a journal, made if missing; raises InputError for a URL of none, and what else OffsiteError there is."""
    check(url, JOURNALS, "journal")
    if url.startswith("sqlite:"):
        from offsite.coordinator.store.sqlite import Sqlite

        return Journal(Sqlite(_path(url)))
    with extra("postgresql", option="--journal"):
        from offsite.coordinator.store.postgresql import Postgresql
    return Journal(Postgresql(where=shown(url), url=url))


def open_blobs(url: str, *, cache: Path) -> Blobs:
    """Open the blobs; raises InputError for a URL of none.

    Those that lie beyond this machine have a cache here, which all processes that open them share.
    """
    check(url, BLOBS, "blobs")
    if url.startswith("file:"):
        return Folder(_path(url))
    with extra("s3", option="--blobs"):
        from offsite.coordinator.store.bucket import Bucket
    return Bucket(url, cache)


def check(url: str, known: dict[str, str], what: str) -> None:
    """Raise InputError unless a URL has one of the known schemes and more than that."""
    scheme, _, rest = url.partition("://")
    if scheme in known and rest and readable(url) and len(url) <= LONGEST:
        return
    expected = f"expected one such as {' or '.join(known.values())}"
    if "://" not in url:
        raise InputError(f"--{what}: not a URL; {expected}")
    if scheme not in known:
        raise InputError(f"--{what}: {shown(url)} has a scheme that is not known; {expected}")
    raise InputError(f"--{what}: {shown(url)} is not a URL of at most {LONGEST} readable characters; {expected}")


def url_of(scheme: str, path: Path) -> str:
    """Return the URL of an absolute path."""
    return f"{scheme}://{quote(str(path))}"


def shown(url: str) -> str:
    """Return what may be shown of a URL: no name, no password, no settings."""
    return re.sub("//.*@", "//", url, flags=re.DOTALL).partition("?")[0][:200]


def place(url: str) -> str:
    """Return a URL without a name and a password: who comes with another password still means the same store.

    The settings of a bucket say how it is reached.
    """
    url = re.sub("//[^/?]*@", "//", url)
    return url.partition("?")[0] if url.startswith("s3:") else url


def _path(url: str) -> Path:
    return Path("/" + unquote(urlsplit(url).path).lstrip("/"))
