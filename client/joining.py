"""Joining by a token: the key is made here, the kit is written whole or not at all, and a kill costs only time."""

import shutil
from pathlib import Path

from offsite.client.channel import Channel
from offsite.client.membership import ASK_S, Membership, Say
from offsite.protos import membership_pb2 as pb
from offsite.protos.errors import ConflictError, IdentityError, RefusedError
from offsite.protos.security.identity import Identity
from offsite.protos.security.kit import next_key, private, write
from offsite.protos.security.revocation import RevocationList
from offsite.protos.security.tokens import Token


def enrol(token: Token, folder: Path, *, say: Say) -> Identity:
    """Join by a token: make a key, have it certified, and write a whole kit, or none.

    Asks until the authority has signed. Raises ConflictError where the folder holds something else, IdentityError for a
    token that has ended, RefusedError where the authority refuses, UnreachableError where nobody answers.
    """
    if folder.exists():
        return _joined(token, folder)
    token.check_date()
    draft = folder.with_name(f".{folder.name}.joining")
    if not _is_of(token, draft):
        shutil.rmtree(draft, ignore_errors=True)
        token.write(draft)
    identity = Identity.load(draft, expect="joining")
    channel = Channel(token.address, identity)
    channel.waiting = say
    try:
        membership = Membership(channel, draft)
        reply = membership.join(wait_s=ASK_S)
        if not reply.certificate:
            say("the request is at the coordinator; waiting for the model owner's authority to sign it")
        while not reply.certificate:
            token.check_date()
            reply = membership.join(wait_s=ASK_S)
    except RefusedError:  # for good: nothing of it is of use
        shutil.rmtree(draft)
        raise
    finally:
        channel.close()
    _write_kit(token, folder, draft, reply)
    shutil.rmtree(draft)
    return Identity.load(folder)


def _is_of(token: Token, draft: Path) -> bool:
    """Tell whether a token was being used in a folder when it was left."""
    try:
        return all((draft / name).read_bytes() == data for name, data in token.files.items())
    except OSError:
        return False


def _joined(token: Token, folder: Path) -> Identity:
    """Return a kit that is the party's already; raises ConflictError for anything else."""
    try:
        known = Identity.load(folder, expect=token.role)
        if known.name == token.name and known.authority == token.files["ca.crt"]:
            return known
    except IdentityError:
        pass
    raise ConflictError(
        f"{folder}: is there already, and is no kit of {token.role} {token.name!r} that holds; name another folder, or "
        "move it away"
    )


def _write_kit(token: Token, folder: Path, draft: Path, reply: pb.SigningReply) -> None:
    whole = draft / "kit"
    shutil.rmtree(whole, ignore_errors=True)
    authority = token.files["ca.crt"]
    RevocationList.parse(reply.revocations, authority, where=whole / "crl.pem")
    for name, data in (("ca.crt", authority), ("owner.pub", token.files["owner.pub"]), ("crl.pem", reply.revocations)):
        write(whole / name, data)
    write(whole / "tls.crt", reply.certificate)
    write(whole / "tls.key", private(next_key(draft)), secret=True)
    kit = Identity.load(whole, expect=token.role)
    if kit.name != token.name:
        raise IdentityError(f"the certificate that came is of {kit.name!r}, and the token of {token.name!r}")
    whole.replace(folder)
