"""Profiles: which coordinator one speaks with and by which kit, under a name, so that neither is typed twice.

    default = "work"

    [profile.work]
    coordinator = "tuning.example.org:8443"
    identity = "/home/alice/kits/alice"

The file is named by OFFSITE_CONFIG; else it is offsite/config.toml in XDG_CONFIG_HOME, which is ~/.config by default.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from offsite.protos.documents import document, from_toml, nearest, quoted
from offsite.protos.errors import InputError, NotFoundError
from offsite.protos.ranges import Name, Place
from offsite.protos.security.kit import write

Setting = Literal["coordinator", "identity"]


@document
class Profile:
    """What commands take where neither an option nor the environment says otherwise; empty: they must."""

    coordinator: Place = ""
    identity: Place = ""


@document
class Profiles:
    """All that the file holds; `default` is the profile of whoever names none."""

    default: Name | None = None
    profile: Annotated[dict[Name, Profile], Field(max_length=1000)] = Field(default_factory=dict)

    def of(self, name: str) -> Profile:
        """Return a profile; raises NotFoundError that names the nearest."""
        if name in self.profile:
            return self.profile[name]
        others = nearest(name, [*self.profile]) if self.profile else "`offsite identity profile add` makes one"
        raise NotFoundError(f"{file()}: there is no profile {quoted(name)}; {others}")

    def save(self) -> None:
        """Write the file anew, readable by its owner alone; raises InputError where it cannot be written."""
        lines = [] if self.default is None else [f"default = {json.dumps(self.default)}"]
        for name, one in sorted(self.profile.items()):
            lines += ["", f"[profile.{json.dumps(name)}]"]
            given = {"coordinator": one.coordinator, "identity": one.identity}
            # A string of JSON is one of TOML, but for pairs of surrogates, which are left as they are meant.
            lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value]
        write(file(), ("\n".join(lines).lstrip("\n") + "\n").encode(), secret=True)


def file() -> Path:
    """Return where profiles are kept; it need not be there."""
    if named := os.environ.get("OFFSITE_CONFIG"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "offsite" / "config.toml"


def load() -> Profiles:
    """Read the file; where there is none, there are no profiles. Raises InputError that names its field."""
    return from_toml(Profiles, file()) if file().exists() else Profiles()


def setting(of: Setting) -> str | None:
    """Return what the profile in use says, that of OFFSITE_PROFILE or the default; None where none says anything.

    Raises NotFoundError for a profile that is not there, InputError for a file that is not usable.
    """
    profiles = load()
    name = os.environ.get("OFFSITE_PROFILE") or profiles.default
    return (getattr(profiles.of(name), of) or None) if name else None


def absolute(identity: Path) -> str:
    """Return a kit's folder as a profile has it, the same from anywhere; raises InputError where it is no folder."""
    if not identity.is_dir():
        raise InputError(f"{identity}: no such folder; name that of a kit, as `offsite identity enrol` wrote it")
    return str(identity.resolve())
