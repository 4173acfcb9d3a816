"""Simulations whose virtual sites work in the test's own process, one after the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Self

import pytest

from offsite.client import Choice, RunSpec, TrainingSpec
from offsite.client.site.policy import Policy
from offsite.deploy.simulation import simulate as module
from offsite.deploy.simulation.orders import Order, Reply
from offsite.deploy.simulation.pool import Pool
from offsite.deploy.simulation.simulate import Simulation, simulate
from offsite.deploy.simulation.spool import Spool
from offsite.deploy.simulation.worker import Worker

from ...integration.conftest import write_material

Do = Callable[..., Simulation]


class Here(Pool):
    """A pool of no process: its workers take turns."""

    def __enter__(self) -> Self:
        Spool(Path(self.setup.spool)).clear()
        self._here = [Worker(replace(self.setup, number=number)) for number in range(self.setup.workers)]
        self._turn = Lock()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def ask(self, number: int, order: Order) -> Reply:
        with self._turn:
            return self._here[number].answer(order)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def do(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Do:
    """Simulate eight sites with 16 rows each.

    Keywords change the run, `names` its sites, and `start` names the folder that it goes on from; those that are none
    of its fields, and `sites`, are `simulate`'s.
    """
    monkeypatch.setattr(module, "Pool", Here)

    def simulated(
        out: str = "out",
        *,
        start: str = "",
        policy: Any = None,
        names: tuple[str, ...] = (),
        sites: int | None = 8,
        **changes: Any,
    ) -> Simulation:
        fields: dict[str, Any] = {
            "model": str(material / "model"),
            "builders": (Choice(name="crash", settings={"keep": 5}),),
            "trainable": Choice(name="ends", settings={"bottom": 1, "top": 1}),
            "method": Choice(name="lora", settings={"rank": 2, "alpha": 4.0, "modules": ["q_proj"]}),
            "training": TrainingSpec(steps=4, learning_rate=0.005, max_length=32, seed=3),
            "public": str(material / "public.jsonl"),
            "sites": names,
        }
        own = {name: value for name, value in changes.items() if name not in RunSpec.__dataclass_fields__}
        fields |= {name: value for name, value in changes.items() if name not in own}
        lax = Policy(bases=("any",), data=("/",), max_passes=1e9, min_rows=1)
        options: dict[str, Any] = {
            "sites": sites,
            "partition": Choice(name="iid", settings={"rows": 16}),
            "workers": 2,
        } | own
        return simulate(
            RunSpec(**fields),
            data=material / "hospital.jsonl",
            out=tmp_path / out,
            start=tmp_path / start if start else None,
            policy=policy or lax,
            **options,
        )

    return simulated
