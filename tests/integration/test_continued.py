"""A run that goes on from a version of another one, over real processes: the same bytes as one run of all rounds."""

import json
from pathlib import Path
from typing import Any

import pytest

from offsite.client import Choice
from offsite.protos.errors import InputError, NotFoundError

SITES = ("bank", "hospital")
RANKS = Choice(name="lora", settings={"rank": 4, "alpha": 8.0, "ranks": {"bank": 2}})


MOMENTS, CORDA = Choice(name="moments"), Choice(name="lora", settings={"rank": 4, "init": "corda"})


def published(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow(alone=True)
def test_rounds_in_one_run_and_in_runs_that_go_on_from_each_other_give_the_same_bytes(
    coordinated: Any, tmp_path: Path, offsite: Any
) -> None:
    federation = coordinated
    federation.have(*SITES)
    spec = federation.spec(method=RANKS, sites=SITES, min_sites=2)
    with federation.connect() as session:
        whole = session.submit(federation.spec(method=RANKS, sites=SITES, min_sites=2, rounds=2))
        wanted = published(whole.result(tmp_path / "whole"))
        first = session.submit(spec)
        assert published(first.result(tmp_path / "first")) != wanted
        second = session.submit(spec, start=first)  # sites of two ranks leave a residual with the owner
        assert published(second.result(tmp_path / "second")) == wanted
        assert second.report["continues"] == {"run": first.id, "round": 1, "rounds": 1}
        assert first.report["continues"] is None

        file = tmp_path / "run.toml"
        file.write_text(
            f'model = "{spec.model}"\npublic = "{spec.public}"\nsites = ["bank", "hospital"]\nmin_sites = 2\n'
            f"method = {{ name = 'lora', settings = {{ rank = 4, alpha = 8.0, ranks = {{ bank = 2 }} }} }}\n"
            "builders = [{ name = 'crash', settings = { keep = 5 } }]\n"
            "trainable = { name = 'ends', settings = { bottom = 1, top = 1 } }\n"
            "training = { steps = 4, learning_rate = 0.01, max_length = 32, seed = 3 }\n"
        )
        kit = ("--coordinator", federation.address, "--identity", str(federation.owner))
        submitted = offsite("run", "submit", str(file), *kit, "--start", f"{whole.id}:1")
        third = session.run(submitted.stdout.strip())
        assert published(third.result(tmp_path / "third")) == wanted
        fourth = session.submit(spec, start=third)
        fourth.wait()
        assert fourth.report["continues"] == {"run": third.id, "round": 1, "rounds": 2}
        json.dumps(fourth.report, allow_nan=False)

        refused: list[tuple[dict[str, Any], str, type[Exception], str]] = [
            ({}, "abcd1234", NotFoundError, "abcd1234"),
            ({}, f"{whole.id}:3", InputError, f"has no round 3; {whole.id}:2 is the last that is done"),
            (
                {"method": Choice(name="lora", settings={"rank": 4})},
                whole.id,
                InputError,
                "is of method .*rank.*a run goes on with the same",
            ),
            (
                {"trainable": Choice(name="ends", settings={"bottom": 2, "top": 1})},
                whole.id,
                InputError,
                "is of trainable .*a run goes on with the same",
            ),
        ]
        for changes, start, kind, words in refused:
            with pytest.raises(kind, match=words):
                session.submit(federation.spec(**{"method": RANKS, "sites": SITES, **changes}), start=start)
        queued = session.submit(federation.spec(sites=("nobody",)))
        with pytest.raises(InputError, match=f"run {queued.id} is .*, and none of its rounds is done"):
            session.submit(spec, start=queued)
        queued.cancel()

        listed = json.loads(offsite("version", "list", fourth.id, *kit, "--format", "json").stdout)
        ids = [f"{run.id}:1" for run in (whole, third, fourth)]
        assert [f"{one['run']}:{one['round']}" for one in listed] == ids and listed[-1]["sites"] == [*SITES]
        shown = json.loads(offsite("version", "show", fourth.id, *kit, "--format", "json").stdout)
        assert shown["lineage"] == ids[:2] and shown["start"] == ids[1] and "residual.r2" in shown["state"]
        text = offsite("version", "rollback", f"{whole.id}:1", "--reason", "too much", *kit).stdout
        assert "taken back by" in text and "too much" in text
        assert [one.withdrawal is None for one in session.versions(whole)] == [True, False]
        assert not any(one.withdrawal for one in session.versions(fourth)), "it went on from what stands"
        with pytest.raises(InputError, match=f"{whole.id}:2 was taken back by"):
            session.submit(spec, start=f"{whole.id}:2")
        assert session.submit(spec, start=whole).cancel().spec.start == whole.id, "its first round stands"
        heads = {one.run: one.round for one in session.versions()}
        assert heads[whole.id] == heads[third.id] == heads[second.id] == 1
    with federation.connect(federation.researcher) as session, pytest.raises(NotFoundError, match=first.id):
        session.submit(spec, start=first.id)


@pytest.mark.slow
def test_lora_begins_from_moments_with_the_same_bytes_though_the_coordinator_is_killed_before(
    federation: Any, wait: Any, tmp_path: Path
) -> None:
    federation.coordinate()
    for site in SITES:
        federation.join(site, policy='bases = ["any"]\nmethods = ["moments", "lora"]\n')
    measuring = federation.spec(method=MOMENTS, strategy=Choice(name="sum"), sites=SITES, min_sites=2)
    training = federation.spec(method=CORDA, sites=SITES, min_sites=2)
    with federation.connect() as session:
        sums = session.submit(measuring)
        wanted = sums.result(tmp_path / "sums")
        tuned = session.submit(training, start=sums)
        bytes_wanted = published(tuned.result(tmp_path / "tuned"))
        assert tuned.report["continues"] == {"run": sums.id, "round": 1, "rounds": 1}

        again = session.submit(measuring)
        uploads = len(federation.events("bank", "uploaded"))
        wait(lambda: len(federation.events("bank", "uploaded")) > uploads, "an upload of what was measured")
        federation.kill("coordinator")
        federation.coordinate()
        file = "adapter/offsite_adapter.safetensors"
        assert (again.result(tmp_path / "again") / file).read_bytes() == (wanted / file).read_bytes()
        federation.kill("coordinator")
        federation.coordinate()
        rest = session.submit(training, start=again)
        assert published(rest.result(tmp_path / "rest")) == bytes_wanted
