"""The policies of the demo's sites and owner: safe bounds, opened only where the demo is asked for more."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.client.demo.data import SiteData
from offsite.client.site.policy import Policy
from offsite.emulator.catalogue import METHODS

if TYPE_CHECKING:
    from offsite.client.demo.play import Settings

MODEL = "base"  # what the owner's policy calls it


def write_owners(path: Path, *, model: str, texts: Path, settings: "Settings") -> Path:
    """Write the owner's policy: one model, the owner's own texts, and the base's weights if they were asked for."""
    bounds = {  # the safe value where no more is asked for
        "max_rounds": max(settings.rounds, 20),
        "max_steps": max(settings.steps, 1000),
        "max_batch_size": max(settings.batch_size, 64),
        "max_length": max(settings.max_length, 4096),
        "max_disclosed": 0.9 if settings.keep is None else 1.0,
        "max_disclosed_lossy": 0.9 if settings.keep is None else 1.0,
        "max_adapter_mib": 1024.0,  # whatever model it is shown with
        "max_bundle_mib": 65536.0,
    }
    discloses = METHODS.make(settings.method.name, settings.method.settings).disclosure
    path.write_text(
        "# What the owner allows researchers; what is left out has its safe value.\n"
        f"methods = [{json.dumps(settings.method.name)}]\n"
        f"data = [{json.dumps(str(texts))}]\n"
        f"merged = {json.dumps(['researcher'] if settings.merge or discloses else [])}\n"
        + "".join(f"{name} = {value}\n" for name, value in bounds.items())
        + f"[models]\n{MODEL} = {json.dumps(model)}\n"
    )
    return path


def write(path: Path, *, site: SiteData, settings: "Settings") -> Path:
    """Write a site's own policy: only the folder of its data, only what the demo trains, small updates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bounds = "".join(f"{name} = {value}\n" for name, value in _bounds(settings).items())
    kept = f"held_out = {site.apart}\nmin_held_out = {min(10, site.apart // 2 or 1)}\n"
    given = "# It has handed an exam over to the owner (--exam), and so holds no more of its rows out.\nheld_out = 0\n"
    path.write_text(
        f"# What site {site.name} allows on its machines; what is left out has its safe value.\n"
        f'bases = ["any"]\ndata = [{json.dumps(str(site.train.parent))}]\n'
        f"methods = [{json.dumps(settings.method.name)}]\n{bounds}{given if site.held_out else kept}"
    )
    return path


def _bounds(settings: "Settings") -> dict[str, float]:
    safe = Policy(bases=("any",), data=())
    sequences, rows = settings.steps * settings.batch_size, 1 if settings.sites else settings.rows
    rate = METHODS.make(settings.method.name, settings.method.settings).rate
    bounds = {
        "min_steps": min(settings.steps, safe.min_steps),
        "max_steps": max(settings.steps, safe.max_steps),
        "min_batch_size": min(settings.batch_size, safe.min_batch_size),
        "max_batch_size": max(settings.batch_size, safe.max_batch_size),
        "min_length": min(settings.max_length, safe.min_length),
        "max_length": max(settings.max_length, safe.max_length),
        "max_rounds": max(settings.rounds, safe.max_rounds),
        "max_learning_rate": max(settings.learning_rate or rate, safe.max_learning_rate),
        "max_upload_mib": max(1024.0, safe.max_upload_mib),  # whatever it is shown with
        "max_bundle_mib": 65536.0,  # whatever model it is shown with
        "min_rows": min(sequences, rows, safe.min_rows),
        "max_passes": max(2.0 * settings.rounds * sequences / rows, safe.max_passes),
    }
    return {name: value for name, value in bounds.items() if value != getattr(safe, name)}
