"""`offsite identity`: join by a token, and look after one's kit."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from offsite.client.commands import profiles
from offsite.client.commands.options import Format, named

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Join by a token, and look after your kit.")
app.add_typer(profiles.app, name="profile")

TokenText = Annotated[
    str,
    typer.Argument(metavar="TOKEN|FILE|-", help="The token, a file that holds it, or - to read it from the input."),
]
NewKit = Annotated[Path, typer.Option("--identity", help="Folder of the kit that is written; it must not exist yet.")]
Coordinator = Annotated[str, named("coordinator", "HOST:PORT of the coordinator.")]


@app.command()
def enrol(
    token: TokenText,
    identity: NewKit,
    format: Format = "text",
) -> None:
    """Join by a token from the model owner: the private key is made here and never leaves this machine.

    Repeat the command if it was interrupted. A token is a secret, and others on
    this machine see command lines: a file or the input is better.
    """
    from offsite.client import joining
    from offsite.protos.output import say
    from offsite.protos.security import tokens

    kit = joining.enrol(tokens.read(_text(token)), identity.resolve(), say=_say)
    say(
        format,
        kit.about,
        f"Wrote the kit of {kit.role} {kit.name!r} to {identity}; it holds until {kit.expires:%Y-%m-%d}.",
        "It is renewed by itself while it is used: by a site's agent, or when a command or the SDK connects.",
    )


@app.command()
def renew(
    coordinator: Coordinator,
    identity: Annotated[Path, named("identity", "The kit.")],
    format: Format = "text",
) -> None:
    """Renew a kit's certificate now, with a new key, and fetch the newest list of certificates."""
    from offsite.client.channel import Channel
    from offsite.client.membership import Renewal
    from offsite.protos.output import say
    from offsite.protos.security.certificates import MEMBERS
    from offsite.protos.security.identity import Identity

    kit = Identity.load(identity, expect=MEMBERS)
    channel = Channel(coordinator, kit)
    try:
        renewal = Renewal(channel, kit, say=_say)
        renewed = renewal.renew()
        renewal.refresh()
    finally:
        channel.close()
    waits = renewed.certificate == kit.certificate
    if waits:
        _say("the request is at the coordinator; once the model owner's authority has signed it, ask again")
    line = f"{identity}: the kit of {renewed.role} {renewed.name!r} holds until {renewed.expires:%Y-%m-%d}"
    say(format, renewed.about | {"renewed": not waits}, line)


@app.command()
def sign(
    authority: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")],
    coordinator: Coordinator,
    identity: Annotated[Path, named("identity", "The kit of an owner.")],
    format: Format = "text",
) -> None:
    """Sign what is asked for at a coordinator, with an authority that stays on this machine.

    Where no coordinator was started with `--authority`, who joins or renews waits
    for this.
    """
    from offsite.client.signing import sign_all
    from offsite.protos.documents import plain
    from offsite.protos.output import say

    answers = []
    for answer in sign_all(authority, coordinator, identity):
        answers.append({"whose": answer.whose, "refusal": answer.refusal})
        if format == "text":
            print(f"refused: {plain(answer.refusal)}" if answer.refusal else f"signed for {answer.whose}", flush=True)
    say(format, answers, *([] if answers else ["nobody waits for a certificate"]))


def _text(token: str) -> str:
    """Return a token that is given as itself, as a file's name or on the input; raises InputError."""
    from offsite.protos.errors import InputError
    from offsite.protos.security.tokens import MOST, PREFIX

    if token.startswith(PREFIX):
        return token
    try:
        if token == "-":
            return sys.stdin.read(2 * MOST)
        with Path(token).open(encoding="utf-8", errors="replace") as file:
            return file.read(2 * MOST)
    except (OSError, ValueError):
        raise InputError(
            f"neither a token, which begins with {PREFIX!r}, nor a file that can be read; write - to read it from the "
            "input"
        ) from None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
