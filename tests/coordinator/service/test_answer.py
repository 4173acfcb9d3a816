"""What callers are told of the coordinator's own troubles."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from offsite.coordinator.service.answer import RECHECK_S, Gate
from offsite.coordinator.store import Unusable
from offsite.protos.security.pki import Authority
from offsite.protos.security.revocation import Revocations


class Context:
    def __init__(self, certificate: bytes) -> None:
        self._certificate, self.answers = certificate, list[tuple[grpc.StatusCode, str]]()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]}

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.answers.append((code, details))


def test_a_store_that_is_away_is_asked_for_again_and_only_the_log_says_where_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority.create(tmp_path / "pki")
    kit = authority.issue("coordinator", "coordinator")
    context = Context((authority.issue("site", "ward") / "tls.crt").read_bytes())
    gate = Gate(Revocations(kit / "crl.pem", seen=tmp_path / "crl-number"))

    async def call() -> None:
        async with gate(context, "site"):
            raise Unusable("s3://bucket: http://s3.example.org does not answer")

    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            asyncio.run(call())
    said = "the coordinator cannot use its stored files just now; ask again"
    assert context.answers == [(grpc.StatusCode.RESOURCE_EXHAUSTED, said)] * 3
    assert caplog.messages == ["s3://bucket: http://s3.example.org does not answer"]


def test_a_caller_whose_transfer_goes_on_is_looked_at_again_and_at_its_end_but_not_at_each_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, looks = [100.0], list[str]()

    class List:
        def check(self, caller: str) -> None:
            looks.append(caller)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stub: Any = List()
    recheck = Gate(stub).rechecks("ward")  # type: ignore[arg-type]
    for _ in range(1000):  # pieces within 2.5 s
        now[0] += 0.0025 * RECHECK_S
        recheck(False)
    assert looks == ["ward", "ward"]
    recheck(True)
    assert looks == ["ward", "ward", "ward"]
