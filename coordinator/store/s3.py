"""How a bucket is reached: its URL, what speaks to it, and what that says put into words."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from obstore.exceptions import BaseError
from obstore.store import S3Store

from offsite.coordinator.store import Unusable
from offsite.protos.documents import plain
from offsite.protos.errors import InputError, NotFoundError

if TYPE_CHECKING:  # obstore has these for type checkers only
    from obstore.store import ClientConfig, S3Config

CACHE = "50G"
UNITS = {"M": 20, "G": 30, "T": 40}  # powers of two
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
PATIENT_S, HURRIED_S = 60.0, 0.5  # with a server that is away: of a transfer, and of a question
SKEW_S = 900.0  # S3 answers nobody whose clock differs by more, so by no more are its times off
REPLY_S = 300  # a server may be silent for so long while it puts a large object together
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Place:
    """Where a bucket is."""

    bucket: str
    prefix: str
    endpoint: str  # of the server; empty: AWS's own
    region: str  # empty: as the environment says
    cache: int  # bytes of it that a coordinator's folder may hold

    def __str__(self) -> str:
        """Return its URL, without its settings."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse(url: str) -> Place:
    """Read s3://BUCKET/PREFIX?endpoint=&region=&cache=, all but the bucket optional; raises InputError."""
    parts = urlsplit(url)
    where = f"--blobs: s3://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def must(match: bool, problem: str) -> None:
        if not match:
            raise InputError(f"{where}: {problem}")

    settings = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix, region, cache = parts.path.strip("/"), settings.get("region", ""), settings.get("cache", CACHE)
    endpoint = settings.get("endpoint") or next(filter(None, map(os.environ.get, ENDPOINTS)), "")
    must("@" not in parts.netloc, "a key does not belong there; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    must(_is(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc), "that is not the name of a bucket")
    must(_is(r"([\w-][\w.-]*(/[\w-][\w.-]*)*)?", prefix), "a prefix has letters, digits and . _ - between its slashes")
    unknown = sorted(settings.keys() - {"endpoint", "region", "cache"})
    must(not unknown, f"there is no setting {unknown[:1]}; there are endpoint, region and cache")
    must(_is(r"[1-9]\d{0,5}[MGT]", cache), f"cache={cache} is not a size such as {CACHE}, in M, G or T")
    must(_is(r"[a-z0-9-]*", region), f"region={region} is not the name of one")
    must(_is(r"(https?://[\w.:\[\]-]+/?)?", endpoint), "the endpoint is not one such as https://s3.example.org:9000")
    return Place(parts.netloc, prefix, endpoint, region, int(cache[:-1]) << UNITS[cache[-1]])


def _is(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text, re.ASCII) is not None


@lru_cache
def client(place: Place, patience_s: float) -> S3Store:
    """Return what speaks to a bucket, and asks a server that is away again for so long.

    It takes some 20 ms to make, and serves all threads. Raises Unusable.
    """
    config: S3Config = {"region": place.region} if place.region else {}
    if place.endpoint:
        config["aws_endpoint_url_s3"] = place.endpoint  # this one wins over all variables
    options: ClientConfig = {"read_timeout": f"{REPLY_S}s", "timeout": "1day"}
    said = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")  # obstore reads it only where no option is set
    if said or urlsplit(place.endpoint).hostname in LOOPBACK:
        options["allow_http"] = True
    with in_words(place):
        return S3Store(
            place.bucket,
            prefix=place.prefix or None,
            config=config,
            client_options=options,
            retry_config={
                "max_retries": 100,
                "retry_timeout": timedelta(seconds=patience_s),
                "backoff": {"max_backoff": timedelta(seconds=5)},
            },
        )


@contextmanager
def in_words(place: Place, blob: str = "") -> Iterator[None]:
    """Turn what a server or obstore says into a sentence: NotFoundError of a blob that is read, Unusable of all."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        message = str(error).partition("\n\nDebug source")[0]
        if re.search("NoSuchKey|performing HEAD .* 404 ", message):
            raise NotFoundError(
                f"{place}: no blob {blob}; put it back from a backup, or submit the run again"
            ) from None
        raise Unusable(f"{place}: {_why(place, message)}") from None


KEY = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if it is one for a while, AWS_SESSION_TOKEN"
REASONS = {
    "NoSuchBucket": "there is no such bucket; make it, or name another",
    "RequestTimeTooSkewed|RequestExpired": "this machine's clock is too far from the server's; set it",
    "ExpiredToken|InvalidToken|TokenRefreshRequired": f"the key has expired; renew {KEY}, and start again",
    "SignatureDoesNotMatch|InvalidAccessKeyId|401 Unauthorized": f"the server does not accept the key; look at {KEY}",
    "/latest/(api|meta-data)|Missing (AccessKey|SecretAccessKey)": f"there is no key for it; set {KEY}",
    "PermanentRedirect|AuthorizationHeaderMalformed|configured region|status code: 30[127]": (
        "it is in another region; name that by AWS_REGION"
    ),
    "AccessDenied|403 Forbidden": (
        "the key may not do this; it takes s3:ListBucket of the bucket and s3:GetObject, s3:PutObject, s3:DeleteObject "
        "and s3:AbortMultipartUpload of what is under the prefix"
    ),
    "builder error": "plain http is for this machine; name an https endpoint, or set AWS_ALLOW_HTTP=true",
}


def _why(place: Place, message: str) -> str:
    for pattern, reason in REASONS.items():
        if re.search(pattern, message):
            return reason
    last = plain(re.sub(r"<[^>]*>", " ", message.rpartition(" - ")[2] or message), most=200)
    server = place.endpoint or "its server"
    return f"{server} does not answer as it should ({last}); look at it, and at the network between"
