"""URLs of buckets: what is none is refused in a sentence that tells no key."""

from pathlib import Path

import pytest

from offsite.coordinator.store.opening import open_blobs
from offsite.protos.errors import InputError


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://me:secret@bucket/runs", "s3://bucket/runs: a key does not belong there; set AWS_ACCESS_KEY_ID"),
        ("s3://Bucket", "that is not the name of a bucket"),
        ("s3:///runs", "that is not the name of a bucket"),
        ("s3://bucket/../other", "a prefix has letters, digits"),
        ("s3://bucket/a//b", "a prefix has letters, digits"),
        ("s3://bucket?password=secret", "there is no setting .'password'.; there are endpoint, region and cache"),
        ("s3://bucket?cache=50", "cache=50 is not a size such as 50G"),
        ("s3://bucket?region=eu west", "region=eu west is not the name of one"),
        ("s3://bucket?endpoint=nonsense", "the endpoint is not one such as https"),
        ("s3://bucket?endpoint=https://me:secret@host", "the endpoint is not one such as https"),
    ],
)
def test_a_url_of_no_bucket_is_refused_in_a_sentence(url: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as refused:
        open_blobs(url, cache=tmp_path)
    assert "secret" not in str(refused.value)
