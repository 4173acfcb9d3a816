"""What more rounds of a run are, and when they are not those of a longer one."""

from typing import Any

import pytest

from offsite.coordinator.runs.extending import alters, extension
from offsite.protos.errors import ConflictError, InputError
from offsite.protos.recipes import parse_one
from offsite.protos.spec import Choice, RunSpec, TrainingSpec


def test_an_extension_is_the_run_from_one_of_its_versions_by_the_sites_of_that(stand: Any) -> None:
    stand.submit("ward", "bank", rounds=3, name="notes", training=TrainingSpec(seed=7), least_gain=0.0)
    with pytest.raises(ConflictError, match="run r is running; wait for its end, or cancel it"):
        extension(stand.journal, "r", rounds=2)
    stand.run()
    more = extension(stand.journal, "r", rounds=2)
    assert (more.start, more.rounds, more.sites) == ("r:3", 2, ("bank", "ward"))
    assert (more.name, more.training, more.patience) == ("notes", TrainingSpec(seed=7), 0)
    assert extension(stand.journal, "r", rounds=2, number=1).start == "r:1"
    with pytest.raises(InputError, match="has no round 4"):
        extension(stand.journal, "r", rounds=2, number=4)
    stand.journal.withdraw({"r": [3]}, by="olga", reason="worse")
    assert extension(stand.journal, "r", rounds=2).start == "r:2", "the newest that stands"


def test_a_run_that_failed_goes_on_from_what_it_did(stand: Any) -> None:
    stand.act = lambda task: stand.close(task) if task.round else stand.upload(task)
    stand.submit("ward", rounds=3)
    assert stand.run().state == "failed"
    assert extension(stand.journal, "r", rounds=2).start == "r:1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"training": TrainingSpec(span="run", schedule=parse_one("cosine"))}, "its learning rate goes over all"),
        ({"training": TrainingSpec(span="run", warmup_steps=2)}, "its learning rate goes over all"),
        ({"training": TrainingSpec(retention=parse_one("replay"))}, "retention replay holds its sites"),
        ({"sites_per_round": 1}, "which sites a round asks is drawn anew"),
        ({"realign_steps": 2}, "its emulator is tuned again"),
        ({"memory": Choice(name="lae")}, "memory lae moves at a pace"),
    ],
)
def test_what_would_be_no_longer_run_is_refused(stand: Any, fields: Any, words: str) -> None:
    assert alters(RunSpec(model="m", training=TrainingSpec(span="run"))) == "", "a rate that never changes"
    stand.submit("ward", **fields)
    stand.run()
    with pytest.raises(InputError, match=f"run r cannot be extended: {words}.* go"):
        extension(stand.journal, "r", rounds=1)


def test_what_stages_feed_back_is_of_one_run(top: Any) -> None:
    assert "what stage top left out" in alters(RunSpec(model="m", upload=(Choice(name="top"),)))
