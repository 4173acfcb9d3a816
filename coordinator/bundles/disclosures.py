"""What all emulators of a base disclose of it together: two of them with different layers may be the base."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any

from offsite.coordinator.home import Home
from offsite.emulator.evaluation.portion import Portion
from offsite.protos.documents import document, parse, to_plain
from offsite.protos.errors import RefusedError
from offsite.protos.ranges import Digest

STEP = "disclosure"  # in the journal
Portions = Mapping[str, Portion]  # by the base's layer; "": what is in no layer


@document
class Disclosure:
    """What a run's emulator holds of a base."""

    base: Digest
    portions: dict[str, Portion]


def union(emulators: Iterable[Portions]) -> tuple[int, int]:
    """Count the parameters that several emulators of a base disclose: (verbatim, verbatim or in few bits).

    Of a layer of which they hold different rows or columns, the sum counts, up to all of it.
    """
    largest: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    sizes: dict[str, int] = {}
    for portions in emulators:
        for layer, (verbatim, lossy, size, part) in portions.items():
            most = largest[layer].get(part, (0, 0))
            largest[layer][part] = (max(most[0], verbatim), max(most[1], verbatim + lossy))
            sizes[layer] = size
    exact, any_ = (
        sum(min(sizes[layer], sum(pair[which] for pair in parts.values())) for layer, parts in largest.items())
        for which in (0, 1)
    )
    return exact, any_


def record(home: Home, run: str, *, base: str, portions: Portions, bound: bool) -> None:
    """Record what a run's emulator discloses, before it is handed out.

    Args:
        home: whose journal has what was disclosed before, by whomsoever's runs.
        run: the run, whose earlier record for the same emulator does not count.
        base: digest of the base.
        portions: what the emulator holds of it.
        bound: whether the owner's policy binds the run: then it is refused if it discloses more than was, and too much.

    Raises RefusedError.
    """
    policy = home.policy()
    bounds = {"max_disclosed": policy.max_disclosed, "max_disclosed_lossy": policy.max_disclosed_lossy}

    def judge(others: Mapping[str, dict[str, Any]]) -> None:
        known = [parse(Disclosure, value, where=f"step {STEP} of run {other}") for other, value in others.items()]
        earlier = [disclosure.portions for disclosure in known if disclosure.base == base]
        of = sum(portion.size for portion in portions.values())
        before, after = union(earlier), union([*earlier, portions])
        for which, (name, share) in enumerate(bounds.items()):
            if bound and after[which] > share * of and after[which] > before[which]:
                raise RefusedError(
                    f"the owner's policy refuses the run ({name}): with this emulator {after[which] / of:.1%} of "
                    f"the base would be disclosed, {before[which] / of:.1%} are by earlier ones, and {share:.0%} "
                    "may be; keep the layers of an earlier run, or ask the owner"
                )

    with closing(home.journal()) as journal:
        journal.add_step_beside(run, STEP, to_plain(Disclosure(base=base, portions=dict(portions))), judge)
