"""The page of the SDK, docs/sdk.md, of what its names say of themselves; `.ci/reference` writes it."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from offsite import client
from offsite.client import frames, plugins, report
from offsite.protos.fields import comments, defaults
from offsite.protos.recipes import render
from offsite.protos.spec import Choice, RunSpec, TrainingSpec

HEAD = """# The SDK

Written by `.ci/reference`, of what the names say of themselves. Everything here is imported as
`from offsite.client import NAME`, which loads no tensor library, and answers with dataclasses. What goes wrong is an
`OffsiteError`, whose text says what to do and whose `exit_code` is that of the [command line](exit-codes.md).
"""
PLUGINS = """
## offsite.client.plugins

A class for each plug-in, with its settings and their types: `RunSpec(model="base", builders=Crash(keep=24) +
Quantised(), method=Lora(rank=8))`. A `Choice`, or a recipe in a text (`"crash(keep=24)+quantised"`), says the same.
What each does is in [emulators.md](emulators.md), [methods.md](methods.md), [memory.md](memory.md) and
[legality.md](legality.md), which says what goes together.

| class | settings and their defaults | |
|---|---|---|
"""


def page() -> str:
    """Write the page."""
    text = HEAD
    for name in client.__all__:
        text += f"\n## {name}\n\n" + "\n".join(_name(getattr(client, name)))
    for module, names in ((frames, _public(frames)), (report, ("plot",))):
        text += f"\n## {module.__name__}\n\n{_words(module.__doc__)}\n\n| | |\n|---|---|\n"
        text += "".join(_row(name, getattr(module, name)) for name in names)
    rows = (getattr(plugins, name) for name in plugins.__all__)
    return text + PLUGINS + "".join(f"| `{one.__name__}` | {_settings(one)} | {_cell(one.__doc__)} |\n" for one in rows)


def _public(module: Any) -> list[str]:
    own = inspect.getmembers(module, lambda one: inspect.isfunction(one) and one.__module__ == module.__name__)
    return [name for name, _ in own if not name.startswith("_")]


def _name(thing: Any) -> Iterator[str]:
    call = f"`{thing.__name__}{_signature(thing)}`: " if inspect.isfunction(thing) else ""
    yield f"{call}{_words(thing.__doc__)}\n"
    if thing in (RunSpec, TrainingSpec):
        said, usual = comments(thing), defaults(thing)
        yield "| field | default | |\n|---|---|---|"
        yield "".join(f"| `{name}` | {_default(usual, name)} | {_cell(text)} |\n" for name, text in said.items())
        return
    if is_dataclass(thing) and (bare := [f"`{one.name}`" for one in fields(thing) if not comments(thing)[one.name]]):
        yield f"It has {', '.join(bare)}.\n"
    if members := [*_fields(thing), *_members(thing)]:
        yield "| | |\n|---|---|"
        yield "".join(members)


def _fields(cls: Any) -> Iterator[str]:
    if is_dataclass(cls):
        said = comments(cls)
        yield from (f"| `{one.name}` | {_cell(said[one.name])} |\n" for one in fields(cls) if said[one.name])


def _members(cls: Any) -> Iterator[str]:
    for name, member in vars(cls).items():
        if not name.startswith("_") and (isinstance(member, property) or inspect.isfunction(member)):
            yield _row(name, member)


def _row(name: str, member: Any) -> str:
    call = _signature(member) if inspect.isfunction(member) else ""
    return f"| `{_cell(name + call)}` | {_cell(_words(member.__doc__))} |\n"


def _signature(function: Any) -> str:
    """Write how a function is called, without types: these are in its own signature, for who completes."""
    signature = inspect.signature(function)
    kept = [one.replace(annotation=one.empty) for one in signature.parameters.values() if one.name != "self"]
    return re.sub(r"=<[^>]*>", "=...", str(signature.replace(parameters=kept, return_annotation=signature.empty)))


def _settings(cls: Any) -> str:
    return ", ".join(f"`{_cell(f'{name}={value!r}')}`" for name, value in defaults(cls).items())


def _default(usual: dict[str, Any], name: str) -> str:
    if name not in usual:
        return "required"
    value = usual[name]
    if isinstance(value, dict) and value.keys() == {"name", "settings"}:
        value = [value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"`{render([Choice(**one) for one in value])}`"
    return "" if name == "training" or value in ("", [], {}, None) else f"`{value}`"


def _cell(text: str) -> str:
    return _words(text).replace("|", "\\|")


def _words(text: str | None) -> str:
    """Return the first paragraphs of a docstring, in a line, without its sections and examples."""
    kept = re.split(r"\n\s*\n(?=\s*(?:Args:|from ))", inspect.cleandoc(text or ""))[0]
    return " ".join(kept.split())
