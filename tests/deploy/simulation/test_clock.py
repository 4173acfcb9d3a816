"""The virtual clock: who is waited for, by the rules of a live round."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.runs import quorum
from offsite.deploy.simulation.clock import Clock, Load, Visit
from offsite.deploy.simulation.world import World
from offsite.protos.errors import InputError
from offsite.protos.spec import RunSpec

LOAD = Load(down=12_500_000, steps=20, up=2_500_000)  # 1 s, 20 s and 1 s in the default world


def clock(world: World | None, seed: int = 0, **fields: Any) -> Clock:
    return Clock(world, RunSpec(model="m", **fields), seed)


def traced(folder: Path, *rows: str, **fields: Any) -> World:
    """A world of which a trace tells when sites are there."""
    (folder / "trace.csv").write_text("site,sessions,steps_per_s\n" + "\n".join(rows))
    return World(trace=str(folder / "trace.csv"), **fields)


def test_without_a_world_no_time_passes_and_everybody_is_there() -> None:
    still = clock(None)
    assert still.round(0, {"a": LOAD, "b": LOAD}) == {"a": Visit("uploaded", 0.0), "b": Visit("uploaded", 0.0)}
    assert still.now == 0.0


def test_a_task_takes_its_bytes_and_steps_and_the_slowest_ends_the_round(tmp_path: Path) -> None:
    one = clock(traced(tmp_path, "slow,,0.1"))
    visits = one.round(0, {"a": LOAD, "slow": LOAD})
    assert visits["a"].at == pytest.approx(22.0) and one.now == visits["slow"].at == pytest.approx(202.0)
    assert one.round(1, {"a": LOAD})["a"].at == pytest.approx(224.0), "the next begins where the last ended"


def test_who_is_away_too_long_or_too_slow_is_left_out(tmp_path: Path) -> None:
    world = traced(tmp_path, "late,0-1000,0.02", "gone,50-90,", "back,0-10 60-1000,", "never,5000-6000,")
    visits = clock(world, stall_s=100.0, task_s=500.0).round(0, dict.fromkeys(("late", "gone", "back", "never"), LOAD))
    assert visits["late"] == Visit("stalled", 500.0, 0, "was not done 500 s after it took its task")
    assert visits["gone"] == Visit("uploaded", pytest.approx(72.0)), "it came within the time that one may be away"
    assert visits["back"] == Visit("uploaded", pytest.approx(72.0)), "it goes on with what it had done"
    assert visits["never"] == Visit("stalled", 100.0, 0, "got no further for 100 s")
    cut = clock(traced(tmp_path, "a,0-10,"), stall_s=100.0).round(0, {"a": LOAD})
    assert cut["a"] == Visit("stalled", 110.0, 0, "got no further for 100 s")


def test_once_the_quorum_is_in_a_round_waits_for_a_share_of_what_it_took(tmp_path: Path) -> None:
    loads = dict.fromkeys(("slow", "soon", "a", "b", "c"), LOAD)  # 202, 26 and 3 x 22 s
    one = clock(traced(tmp_path, "slow,,0.1", f"soon,,{20 / 24}"), quorum=3, grace=0.25)
    for number in range(3):
        visits = one.round(number, loads)
        assert visits["slow"] == Visit("late", pytest.approx(27.5 * (number + 1)), 0, quorum.WITHOUT)
        assert {visit.state for site, visit in visits.items() if site != "slow"} == {"uploaded"}
    assert one.now == pytest.approx(3 * 1.25 * 22.0)
    assert clock(traced(tmp_path, "slow,,0.1"), quorum=5).round(0, loads)["slow"].state == "uploaded"


def test_the_sessions_of_a_trace_begin_again_after_a_period(tmp_path: Path) -> None:
    day = clock(traced(tmp_path, "a,0-30,", period_s=100.0), stall_s=90.0)
    ends = [day.round(number, {"a": LOAD})["a"].at for number in range(3)]
    assert ends == pytest.approx([22.0, 114.0, 206.0])


def test_who_gives_up_is_asked_once_more() -> None:
    visits = clock(World(dropout=0.5)).round(0, {f"site-{number}": LOAD for number in range(2000)})
    ends = Counter((visit.state, visit.attempt) for visit in visits.values())
    assert ends.keys() == {("uploaded", 0), ("uploaded", 1), ("failed", 1)}
    assert ends["uploaded", 0] == pytest.approx(1000, rel=0.1) and ends["failed", 1] == pytest.approx(500, rel=0.15)
    assert all(visit.at > 22.0 for visit in visits.values() if visit.state == "uploaded" and visit.attempt)


def test_sites_are_there_for_as_much_of_the_time_as_the_world_says() -> None:
    one = clock(World(available=0.3, session_s=1000.0), stall_s=0.5, task_s=1e6)
    instant = Load(1, 1, 1)
    shares = []
    for number in range(5):
        visits = one.round(number, {f"site-{at}": instant for at in range(1000)})
        shares.append(sum(visit.state == "uploaded" for visit in visits.values()) / 1000)
        one.now += 20_000.0  # long enough for others to be there
    assert sum(shares) / 5 == pytest.approx(0.3, abs=0.02)


def test_a_world_is_the_same_for_the_same_seed_whoever_else_is_in_it(tmp_path: Path) -> None:
    file = tmp_path / "world.toml"
    file.write_text('steps_per_s = "lognormal(median=0.5, sigma=0.6)"\navailable = 0.5\ndropout = 0.1\n')
    world = World.load(file)

    def ends(*names: str, seed: int = 0) -> list[Visit]:
        return [clock(world, seed).round(0, dict.fromkeys(names, LOAD))[name] for name in names[:2]]

    assert ends("a", "b") == ends("a", "b", "c") != ends("a", "b", seed=1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('steps_per_s = "normal(mean=1)"', "steps_per_s: there is no distribution 'normal'"),
        ('steps_per_s = "uniform(low=0)"', "steps_per_s: .*high"),
        ("available = 0.0", "available"),
        ("speed = 1", "speed"),
    ],
)
def test_a_bad_world_is_refused_in_a_sentence(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "world.toml").write_text(text)
    with pytest.raises(InputError, match=why):
        clock(World.load(tmp_path / "world.toml"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("a,10-5,", "line 2: session '10-5': expected BEGIN-END in seconds, one after the other"),
        ("a,0-5 3-9,", "line 2: session '3-9'"),
        ("a,soon,", "line 2: 'soon' is not a number"),
        (",0-5,", "line 2: names no site"),
        ("a,0-5,0", "site a: a speed of 0"),
    ],
)
def test_a_bad_trace_is_refused_by_its_line(tmp_path: Path, row: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        clock(traced(tmp_path, row)).round(0, {"a": LOAD})
