"""A model card of what a run published: what it is, of what, how it was trained, its figures, and what is not known.

It names no site, for a card goes where the adapter goes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from offsite.client.figures import ended, lineage, short
from offsite.protos.documents import plain
from offsite.protos.figures import FIGURES

USE = {
    "peft": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "adapter")  # peft',
    "own": 'load(AutoModelForCausalLM.from_pretrained(BASE), Path("adapter"))  # offsite.emulator.plug',
    "ensemble": 'load(AutoModelForCausalLM.from_pretrained(BASE), Path("."))  # offsite.emulator.plug',
}


def card(report: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Return the card in Markdown, of a run's report and the digests of its published files by their names.

    What is said of licences and of what the data are is left to the owner, who knows.
    """
    return "\n".join(_lines(report, files)) + "\n"


def _lines(report: Mapping[str, Any], files: Mapping[str, str]) -> Iterator[str]:
    base, method = report["base"], report["method"]
    name = _text(report["name"] or f"run {report['run']}")
    peft = "adapter/adapter_config.json" in files
    yield from ("---", f"base_model: {json.dumps(_text(base['name']))}")
    if peft:
        yield "library_name: peft"
    yield from ("tags:", "- offsite", "- federated-learning", f"- {json.dumps(_text(method['name']))}", "---", "")
    yield from (f"# {name}", "")
    task = f" for the task {_text(report['task'])}" if report.get("task") else ""
    yield (
        f"An adapter ({_choice(method)}) of {_text(base['name'])}{task}, tuned with Offsite on data that did not leave "
        "its sites; no site held the whole model."
    )
    if report.get("continues"):
        yield f"It {lineage(dict(report))}."
    form = "ensemble" if "ensemble.json" in files else "peft" if peft else "own"
    yield from ("", "```python", USE[form], "```", "")
    yield from _figures(report)
    yield from ("## Training", "", *_training(report), "")
    yield from ("## Data", "", *_data(report), "")
    yield from ("## Licence", "", "Not known to Offsite: that of the base and of the data hold. Fill this in.", "")
    if files:
        yield from ("## Files", "", "| file | digest |", "|---|---|")
        yield from (f"| {_text(file)} | `{_text(digest)}` |" for file, digest in sorted(files.items()))


def _figures(report: Mapping[str, Any]) -> Iterator[str]:
    overall = report["overall"]
    if not overall:
        return
    yield from ("## Figures", "", "Perplexity over all held-out sets of the owner's; lower is better.", "")
    yield from ("| figure | perplexity |", "|---|---:|")
    yield from (
        f"| {figure.title} | {short(overall[key]) or 'not finite'} |"
        for key, figure in FIGURES.items()
        if key in overall
    )
    yield ""
    yield from (f"- {_text(warning)}" for warning in report["warnings"])
    yield from (f"- {_text(report['protection']['label'])}: {_text(report['protection']['reason'])}", "")


def _training(report: Mapping[str, Any]) -> Iterator[str]:
    training, bundle = report["training"], report["bundle"]
    builders = " + ".join(_choice(one) for one in bundle["builders"])
    yield f"- {len(report['rounds'])} rounds of {training['steps']} steps at up to {_sites(report)} sites"
    yield from (f"- {_text(words)}" for words in ended(dict(report)))
    yield f"- trained layers: {', '.join(map(str, bundle['trainable']))} of {report['base']['layers']}"
    yield f"- emulator: {builders}; it discloses {bundle['disclosed']:.0%} of the base's values"
    yield f"- aggregation: {_choice(report['strategy'])}; memory: {_choice(report.get('memory', {'name': 'none'}))}"
    if stages := report.get("upload"):
        yield f"- updates went through: {', '.join(_choice(one) for one in stages)}"
    yield f"- base: `{_text(report['base']['digest'])}`"


def _data(report: Mapping[str, Any]) -> Iterator[str]:
    seen = max((sum(site["examples"] for site in one["sites"].values()) for one in report["rounds"]), default=0)
    yield (
        f"Rows stayed at their sites and are not described here; a round saw up to {seen:,} distinct sequences. Say "
        "here what they are, with whose consent they were used, and what the model must not be used for."
    )


def _sites(report: Mapping[str, Any]) -> int:
    return max((len(one["sites"]) for one in report["rounds"]), default=0)


def _choice(choice: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in choice.get("settings", {}).items())
    return _text(f"{choice['name']}({settings})" if settings else choice["name"])


def _text(value: Any) -> str:
    """Return what others named as a line that is no markup."""
    return plain(str(value)).translate({ord(sign): f"\\{sign}" for sign in "|`<>[]*#"})
