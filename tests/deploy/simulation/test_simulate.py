"""What a simulation keeps of a live run: its policies, its checks, its rules of who is waited for; and what it adds."""

import json
import re
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from offsite.client import Choice, TrainingSpec
from offsite.client.site.policy import Policy
from offsite.deploy.simulation import rounds, visit
from offsite.deploy.simulation import simulate as module
from offsite.deploy.simulation.orders import Order, Reply
from offsite.deploy.simulation.pool import Pool
from offsite.deploy.simulation.worker import Worker
from offsite.deploy.simulation.world import World
from offsite.protos.errors import ConflictError, InputError, RunError, UnreachableError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import UpdateMetrics

from .conftest import Do, Here

ADAPTER = Path("adapter") / "adapter_model.safetensors"


def moving(one: visit.Visit) -> Any:
    """Train nothing, and move every value."""
    metrics = UpdateMetrics(examples=16, tokens=100, loss=2.0, engine="none")
    return {name: tensor + 1e-3 for name, tensor in one.broadcast.items()}, metrics


def hostile(one: visit.Visit) -> Any:
    """Do as `moving`, but for some sites."""
    adapter, metrics = moving(one)
    first = min(adapter)
    if one.site == "site-0001":
        adapter[first][0, 0] = float("nan")
    if one.site == "site-0002":
        del adapter[first]
    if one.site == "site-0003":
        adapter[first] = adapter[first] + 1e6
    if one.site == "site-0004":
        adapter[first] = adapter[first] + 1.0
    if one.site == "site-0005":
        metrics = UpdateMetrics(examples=99, tokens=100, loss=2.0, engine="none")
    return adapter, metrics


def odd(one: visit.Visit) -> Any:
    """Do as `hostile`, but each in a direction of its own, and with another weight."""
    adapter, metrics = hostile(one)
    number = int(one.site[-4:])
    metrics = replace(metrics, examples=max(metrics.examples - number % 5, 1))
    draw = torch.Generator().manual_seed(number)
    steps = {name: 1e-3 * torch.randn(tensor.shape, generator=draw) for name, tensor in adapter.items()}
    return {name: tensor + steps[name] for name, tensor in adapter.items()}, metrics


def test_the_report_is_that_of_a_run_and_more(do: Do, tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []
    done = do(rounds=2, train=f"{__name__}:moving", tell=lambda *how: told.append(how), sample=5)
    assert done.adapter.is_dir() and (done.out / "report.html").read_text().count("<svg") == 2
    assert (done.out / "clock.svg").read_text().startswith("<?xml")
    assert json.loads((done.out / "report.json").read_text()) == done.report
    first, second = done.report["simulation"]["rounds"]
    assert first["asked"] == first["updates"] == 5 and first["end_s"] == 0 and first["loss"] == 2.0
    assert first["bytes_down"] > second["bytes_down"] > 0, "the emulator goes down once"
    assert done.report["bytes"]["up"] == first["bytes_up"] + second["bytes_up"]
    asked = [set(one["sites"]) for one in done.report["rounds"]]
    assert asked[0] != asked[1] and {len(one) for one in asked} == {5}
    assert told == sorted(told) and told[0][0] == 0 and told[-1] == (1, 5, 5)
    assert not (done.out / "home" / "spool").exists()


def test_every_check_of_a_coordinator_is_made(do: Do) -> None:
    done = do(train=f"{__name__}:hostile", max_update_norm=1e5)
    why = {one["site"]: f"{one['state']}: {one['message']}" for one in done.report["left_out"]}
    expected = {
        "site-0001": "failed: update of site-0001, round 1: tensor .* holds 1 values that are not finite",
        "site-0002": "failed: update of site-0002, round 1: tensor .* is missing",
        "site-0003": "failed: update of site-0003, round 1: changed by a norm of .*, the run allows 100000",
        "site-0004": "left out: its update changed by a norm of .* times the round's median",
        "site-0005": "failed: update of site-0005, round 1: says it saw 99 examples, 16 at most",
    }
    assert why.keys() == expected.keys()
    for site, pattern in expected.items():
        assert re.match(pattern, why[site]), why[site]
    assert set(done.report["rounds"][0]["sites"]) == {f"site-000{number}" for number in (4, 6, 7, 8)}


@pytest.mark.parametrize("strategy", ["low-rank", pytest.param("factor-mean", marks=pytest.mark.slow)])
def test_who_works_on_what_changes_no_byte(do: Do, strategy: str) -> None:
    """Though some sites' updates are not let in or left out, there are more sites than columns, and two tiers."""
    how: dict[str, Any] = {"train": f"{__name__}:odd", "sites": 50, "rounds": 2, "max_update_norm": 1e5}
    how["strategy"] = Choice(name=strategy)
    if strategy == "low-rank":
        ranks = {f"site-00{number:02}": 1 for number in range(3, 50, 3)}
        how["method"] = Choice(name="lora", settings={"rank": 2, "modules": ["q_proj", "o_proj"], "ranks": ranks})
    done = {workers: do(f"by-{workers}", workers=workers, **how) for workers in (1, 3)}
    one, three = ((result.out / ADAPTER).read_bytes() for result in done.values())
    assert one == three
    for mine, its in zip(done[1].report["rounds"], done[3].report["rounds"], strict=True):
        assert mine["figures"] == its["figures"] and len(mine["sites"]) == 46
        weight = {name: site["weight"] for name, site in mine["sites"].items()}
        assert weight == {name: site["weight"] for name, site in its["sites"].items()}
        assert weight.pop("site-0004") == 0
        examples = {name: 16 - int(name[-4:]) % 5 for name in weight}
        total = sum(examples.values())
        assert weight == {name: pytest.approx(seen / total) for name, seen in examples.items()}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["ist(share=0.5)", "lisa(layers=1)"])
def test_sites_that_train_a_part_each_give_the_same_bytes_whoever_works(do: Do, top: Any, part: str) -> None:
    how: dict[str, Any] = {
        **{"sites": 3, "rounds": 2, "upload": (Choice(name="top", settings={"share": 0.5}),)},
        "training": TrainingSpec(steps=4, learning_rate=0.005, max_length=32, seed=3, part=parse_one(part)),
    }
    one, three = (do(f"by-{workers}", workers=workers, **how) for workers in (1, 3))
    assert (one.out / ADAPTER).read_bytes() == (three.out / ADAPTER).read_bytes()
    for moment, whole in zip(one.report["simulation"]["rounds"], three.report["simulation"]["rounds"], strict=True):
        assert moment["updates"] == 3 and moment["bytes_up"] == whole["bytes_up"] > 0
    assert one.report["left_out"] == []


class Guest:
    """A worker that does one order, and is lost with the next."""

    def __init__(self, pool: Pool) -> None:
        self._worker = Worker(replace(pool.setup, number=7))
        self.orders: list[Order] = []
        self.lost = Event()

    def ask(self, order: Order) -> Reply:
        self.orders.append(order)
        if len(self.orders) == 1:
            return self._worker.answer(order)
        self.lost.set()
        raise EOFError

    def close(self) -> None:
        assert self.lost.is_set()


@pytest.mark.slow(alone=True)
def test_a_worker_that_joins_and_is_lost_changes_no_byte(do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    guests: list[Guest] = []

    class Host(Here):
        def ask(self, number: int, order: Order) -> Reply:
            if number == 0 and not guests:
                guests.append(Guest(self))
                self.join(guests[0])  # type: ignore[arg-type]
                guests[0].lost.wait()
            return super().ask(number, order)

    how: dict[str, Any] = {"train": f"{__name__}:odd", "sites": 50, "rounds": 2, "workers": 1}
    alone = do("alone", **how)
    monkeypatch.setattr(module, "Pool", Host)
    joined = do("joined", **how)
    done, lost = guests[0].orders
    assert done.round and done.sites and lost.sites and not {*done.sites} & {*lost.sites}
    assert (joined.out / ADAPTER).read_bytes() == (alone.out / ADAPTER).read_bytes()


def test_a_token_without_a_cluster_and_a_cluster_that_is_not_there_are_refused(do: Do, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    with pytest.raises(InputError, match="ray_token: of which cluster"):
        do("refused", ray_token=tmp_path / "token")
    with pytest.raises(InputError, match="no file with a cluster's token"):
        do("refused", ray_address="127.0.0.1:9", ray_token=tmp_path / "none")
    with pytest.raises(UnreachableError, match="nothing answers at the Ray cluster's address"):
        do("refused", ray_address="127.0.0.1:9", ray_token=tmp_path / "token")


def test_a_sites_policy_refuses_what_a_live_one_refuses(do: Do) -> None:
    with pytest.raises(RunError, match=r"got 0 of at least 1 updates \(site-0001: .*max_learning_rate"):
        do("rate", policy=Policy(bases=("any",), data=("/",), max_learning_rate=1e-4), train=f"{__name__}:moving")
    with pytest.raises(RunError, match=r"site-0001: .*\(min_rows\): the round sees 16 distinct"):
        do("rows", policy=Policy(bases=("any",), data=("/",), min_rows=17))


def test_who_is_slow_or_gives_up_is_left_out_and_a_day_takes_moments(do: Do) -> None:
    world = World(
        steps_per_s=Choice(name="lognormal", settings={"median": 0.002, "sigma": 1.0}),
        **{"available": 0.8, "session_s": 7200.0, "dropout": 0.3},
    )
    done = do(rounds=6, train=f"{__name__}:moving", world=world, sites=40, task_s=7200.0, stall_s=1800.0)
    moments = done.report["simulation"]["rounds"]
    assert moments[-1]["end_s"] > 12_000 and all(one["begin_s"] < one["end_s"] for one in moments)
    assert all(one["updates"] + one["stalled"] + one["failed"] == 40 for one in moments)
    assert sum(one["stalled"] for one in moments) > 10 < sum(one["failed"] for one in moments)
    assert {one["state"] for one in done.report["left_out"]} == {"stalled", "failed"}
    with pytest.raises(RunError, match=r"got \d+ of at least 39 updates"):
        do("few", train=f"{__name__}:moving", world=world, sites=40, task_s=7200.0, min_sites=39)


@pytest.mark.slow(alone=True)
def test_one_that_was_stopped_goes_on_with_the_same_bytes(do: Do, monkeypatch: pytest.MonkeyPatch, top: Any) -> None:
    how: dict[str, Any] = {
        **{"rounds": 3, "train": f"{__name__}:moving", "upload": (Choice(name="top", settings={"share": 0.5}),)},
        **{"world": World(dropout=0.5), "sample": 6},
    }
    whole = do("whole", **how)
    store = rounds.store_version

    def stop(*arguments: Any) -> Any:
        monkeypatch.setattr(rounds, "store_version", stopped)
        return store(*arguments)

    def stopped(*_: Any) -> Any:  # once everything else of the round is done
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "store_version", stop)
    with pytest.raises(KeyboardInterrupt):
        do("cut", **how)
    monkeypatch.setattr(rounds, "store_version", store)
    with pytest.raises(ConflictError, match="holds another simulation"):
        do("cut", **how, seed=1)
    again = do("cut", **how)
    assert (again.out / ADAPTER).read_bytes() == (whole.out / ADAPTER).read_bytes()

    def timeless(report: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**one, "users_per_s": 0} for one in report["simulation"]["rounds"]]

    assert timeless(again.report) == timeless(whole.report)
    monkeypatch.setattr(top, "feedback", False)
    forgetful = do("forgetful", **how)
    assert (forgetful.out / ADAPTER).read_bytes() != (whole.out / ADAPTER).read_bytes(), "what was left out is sent"


def test_what_a_simulation_cannot_do_is_refused(do: Do) -> None:
    for changes, why in (
        ({"sites": 0}, "0 sites: expected 1"),
        ({"sites": 4, "min_sites": 5}, r"4 sites: expected 5 \(min_sites\)"),
        ({"sites": 4, "names": ("a",)}, "the run names its sites, and 4 others cannot be made up"),
        ({"names": ("a",), "sites": None}, "into how many sites is it to be cut"),
        ({"train": "nothing:here"}, "nothing:here cannot be imported"),
        ({"sites": 2, "contributions": True}, "contributions: a simulation keeps no updates"),
    ):
        with pytest.raises((InputError, RunError), match=why):
            do("refused", **changes)
