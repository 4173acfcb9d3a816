"""Signing where the authority is: an owner fetches what is asked for, and hands back certificates."""

from collections.abc import Iterator
from pathlib import Path

from offsite.client.channel import Channel
from offsite.protos import membership_pb2 as pb
from offsite.protos import membership_pb2_grpc
from offsite.protos.errors import IdentityError, MismatchError
from offsite.protos.security.identity import Identity
from offsite.protos.security.pki import Answer, Authority


def sign_all(folder: Path, address: str, kit: Path) -> Iterator[Answer]:
    """Answer all that is asked at a coordinator, and yield each answer.

    Raises IdentityError for a kit of another authority, and MismatchError where a coordinator names what is no serial.
    """
    authority, identity = Authority.open(folder), Identity.load(kit, expect="owner")
    if (folder / "ca.crt").read_bytes() != identity.authority:
        raise IdentityError(f"{kit}: a kit of another authority than {folder}; name the one that made it")
    channel = Channel(address, identity)
    calls = membership_pb2_grpc.MembershipStub(channel.grpc)  # type: ignore[no-untyped-call]
    try:
        while requests := channel.call(calls.Unsigned, pb.UnsignedRequest()).requests:
            try:
                asked = [(int(one.caller, 16), bytes(one.request)) for one in requests]
            except ValueError:
                raise MismatchError("the coordinator names a serial number that is none") from None
            answers = authority.sign(asked)
            signed = [
                pb.Signed(caller=one.caller, key=one.key, certificate=answer.certificate, refusal=answer.refusal)
                for one, answer in zip(requests, answers, strict=True)
            ]
            channel.call(calls.Sign, pb.SignRequest(answers=signed, revocations=authority.newest().pem))
            yield from answers
    finally:
        channel.close()
