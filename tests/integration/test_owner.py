"""What the owner keeps: a researcher tries all there is to try, an auditor looks, an owner sees to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offsite.client import Choice
from offsite.protos import runs_pb2 as pb
from offsite.protos.documents import to_json
from offsite.protos.errors import InputError, NotFoundError, OffsiteError, RefusedError, RunError
from offsite.protos.transfer_pb2 import DownloadRequest

OWN = {"model": "tiny", "public": "public.jsonl", "evaluation": {"exam": "held-out.jsonl"}}


def lay_out(federation: Any, folder: Path) -> None:
    """Start a coordinator under a policy with a good and a broken model, good and bad texts; and a site."""
    texts = folder / "texts"
    texts.mkdir()
    (texts / "bad.jsonl").write_text('{"text": "fine"}\n{"diagnosis": "classified"}\n')
    (texts / "out.jsonl").symlink_to(federation.material / "bank.jsonl")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    data = json.dumps([str(texts), str(federation.material)])
    models = {"tiny": federation.material / "model", "broken": folder / "broken"}
    named = "".join(f"{name} = {json.dumps(str(place))}\n" for name, place in models.items())
    federation.coordinate(policy=f"data = {data}\nmax_live_runs = 2\n[models]\n{named}")
    federation.join("hospital")


@pytest.mark.slow
def test_a_researcher_gets_what_the_owners_policy_gives_and_nothing_more(federation: Any, tmp_path: Path) -> None:
    lay_out(federation, tmp_path)
    kits = {"alice": federation.researcher, "olga": federation.owner}
    kits |= {name: federation.authority.issue(role, name) for name, role in (("bob", "researcher"), ("ada", "auditor"))}
    alice, bob, ada, olga = (federation.connect(kits[name]) for name in ("alice", "bob", "ada", "olga"))

    wrong: list[tuple[dict[str, Any], type[OffsiteError], str]] = [
        ({"builders": (Choice(name="whole"),), "merge": True}, RefusedError, r"\(builders\)"),
        ({"merge": True}, RefusedError, r"\(merged\)"),
        ({"model": str(federation.material / "model")}, RefusedError, r"\(models\).*\(broken, tiny\)"),
        ({"evaluation": {"exam": str(federation.material / "held-out.jsonl")}}, RefusedError, r"\(data\)"),
        ({"public": "../pki/coordinator/owner.key"}, RefusedError, r"\(data\)"),
        ({"public": "out.jsonl"}, RefusedError, r"\(data\).*leads out"),
        ({"public": "bad.jsonl"}, InputError, "^bad.jsonl, line 2: among "),
        ({"model": "broken"}, InputError, "broken: no .*safetensors"),
    ]
    for fields, kind, said in wrong:
        with pytest.raises(kind, match=said) as raised:
            alice.submit(federation.spec(**OWN | fields))
        assert str(tmp_path) not in str(raised.value) and "diagnosis" not in str(raised.value)

    spec = federation.spec(**OWN)
    run = alice.submit(spec, token="once").wait()
    other = bob.submit(federation.spec(**OWN, sites=("nowhere",)), token="once")
    assert other.id != run.id, "a token is its person's own"
    digest = next(file.digest for file in run.status.artifacts)
    for stranger, id in ((bob, run.id), (alice, other.id)):
        for call in ("Get", "Cancel"):
            with pytest.raises(NotFoundError, match=f"there is no run '{id}'"):
                stranger.call(call, pb.RunId(id=id))
        with pytest.raises(NotFoundError, match=f"there is no run '{id}'"):
            list(stranger.stream("Watch", pb.WatchRequest(id=id)))
        with pytest.raises(NotFoundError):
            stranger.call("List", pb.ListRequest(before=id))
        assert id not in {seen.id for seen in stranger.runs()}
    with pytest.raises(NotFoundError, match="not a published file"):
        list(bob.stream("Fetch", DownloadRequest(digest=digest)))

    for everything in (ada, olga):
        assert {(seen.id, seen.status.owner) for seen in everything.runs()} == {(run.id, "alice"), (other.id, "bob")}
    assert ada.run(run.id).report == run.report and [site.name for site in ada.sites()] == ["hospital"]
    for call, request in {
        "Cancel": pb.RunId(id=other.id),
        "Submit": pb.SubmitRequest(),
        "Fetch": DownloadRequest(digest=digest),
    }.items():
        with pytest.raises(RefusedError, match="ada has a certificate for role auditor"):
            list(ada.stream(call, request)) if call == "Fetch" else ada.call(call, request)
    assert "cancelled by olga" in olga.run(other.id).cancel().error

    folder = run.result(tmp_path / "out")
    base = list(load_file(federation.material / "model" / "model.safetensors").values())
    published = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert published and not any(torch.equal(one, other) for one in published for other in base)
    told = json.dumps([run.report, *(event.data for event in run.watch())]) + to_json(run.spec).decode()
    told += "".join(file.read_text() for file in folder.rglob("*.json"))
    assert str(federation.material) not in told and str(tmp_path) not in told
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == run.report["base"]["name"] == run.report["model"] == "tiny"

    merged = olga.submit(federation.spec(**OWN, merge=True)).wait()
    files = {file.name: file.digest for file in merged.status.artifacts}
    with pytest.raises(NotFoundError):
        list(alice.stream("Fetch", DownloadRequest(digest=files["merged/model.safetensors"])))
    (dropped,) = {*range(6)} - {*run.report["bundle"]["layers"]}
    bottom, top = (dropped + 1, 1) if dropped < 3 else (1, 6 - dropped)  # these keep what the first one dropped
    other_layers = {
        "trainable": Choice(name="ends", settings={"bottom": bottom, "top": top}),
        "builders": (Choice(name="uniform", settings={"keep": bottom + top + 1}),),
    }
    with pytest.raises(RunError, match=r"\(max_disclosed\): with this emulator 100.0% of the base"):
        alice.submit(federation.spec(**OWN | other_layers)).wait()
    for session in (alice, bob, ada, olga):
        session.close()
