"""A base with a published adapter in its weights."""

import shutil
from pathlib import Path
from typing import Any

from offsite.emulator.methods import own_format
from offsite.emulator.plug import load
from offsite.emulator.quiet import quiet
from offsite.emulator.zoo import load_base

PAPERS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def write(out: Path, directory: Path, base: Path) -> None:
    """Write the base with a published adapter in its weights, in the base's dtype, with its tokenizer.

    Raises ValueError if the adapter does not fit, or has no form in the weights of the base.
    """
    model, tokenizer = load_base(base, dtype="auto")
    if (directory / own_format.DOCUMENT).is_file():
        method, adapter = own_format.read(directory)
        method.merge(model, adapter)
    else:
        attached: Any = load(model, directory)
        if not hasattr(attached, "merge_and_unload"):
            raise ValueError(f"{directory}: several adapters answer together, and no one model has them merged")
        model = attached.merge_and_unload()
    with quiet():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name in PAPERS:
        if (base / name).is_file():
            shutil.copy2(base / name, out / name)
