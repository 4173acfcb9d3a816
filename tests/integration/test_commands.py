"""What people type, against a coordinator that runs."""

import json
from pathlib import Path
from typing import Any

from offsite.protos.security.pki import Authority


def test_an_emulator_is_built_signed_inspected_and_a_changed_one_is_found_out(
    tmp_path: Path, material: Path, offsite: Any
) -> None:
    authority = Authority.create(tmp_path / "pki")
    kit = authority.issue("coordinator", "owner")
    out = tmp_path / "bundle"
    public = ["--public", str(material / "public.jsonl"), "--identity", str(kit)]
    build = ["emulator", "build", str(material / "model"), "--out", str(out), *public]
    made = offsite(*build, "--builder", "crash(keep=5)", "--trainable", "ends(bottom=1,top=1)")
    assert made.returncode == 0, made.stderr
    assert "5" in made.stdout and "not protected" in made.stdout

    told = offsite("emulator", "inspect", str(out), "--owner", str(kit / "owner.pub"), "--format", "json")
    figures = json.loads(told.stdout)
    assert figures["trainable"] == [0, 5] and len(figures["layers"]) == 5 and 0.5 < figures["disclosed"] < 1
    assert figures["grounds"]["links"].keys() == {"1", "2", "3"} and figures["grounds"]["gap"] > 0
    assert "in 1 - CKA" in made.stdout and "Computed in fp32 (in a race of matrices" in " ".join(made.stdout.split())
    assert figures["base"]["layers"] == 6 and figures["base"]["digest"].startswith("sha256:")

    again = offsite(*build)
    assert (again.returncode, "not empty" in again.stderr) == (11, True)
    other = Authority.create(tmp_path / "other").issue("coordinator", "owner")
    foreign = offsite("emulator", "inspect", str(out), "--owner", str(other / "owner.pub"))
    assert foreign.returncode == 7 and "signature" in foreign.stderr
    weights = next(out.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = offsite("emulator", "inspect", str(out))
    assert changed.returncode == 7 and "its digest is" in changed.stderr
    wrong = offsite("emulator", "build", str(material / "model"), "--out", str(tmp_path / "w"), "--builder", "uniform")
    assert wrong.returncode == 0, wrong.stderr
    wrong = offsite("emulator", "build", str(tmp_path), "--out", str(tmp_path / "x"), "--builder", "uniform")
    assert wrong.returncode == 3 and "config.json" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_a_run_is_submitted_listed_shown_fetched_and_cancelled(coordinated: Any, tmp_path: Path, offsite: Any) -> None:
    federation = coordinated
    federation.have("hospital")
    where = ["--coordinator", federation.address, "--identity", str(federation.owner)]
    (tmp_path / "run.toml").write_text(
        f'model = "{federation.material}/model"\nname = "first"\nsites = ["hospital"]\n'
        f'[[builders]]\nname = "uniform"\nsettings = {{ keep = 5 }}\n'
        f'[evaluation]\nexam = "{federation.material}/held-out.jsonl"\n'
        "[training]\nsteps = 4\nmax_length = 32\n"
    )
    submitted = offsite("run", "submit", str(tmp_path / "run.toml"), *where, "--set", "rounds=1", "--watch")
    assert submitted.returncode == 0, submitted.stderr
    run = submitted.stdout.split()[0]
    assert "plug-in: perplexity" in submitted.stdout and "emulator: 5 layers" in submitted.stdout

    runs = json.loads(offsite("run", "list", *where, "--format", "json").stdout)
    (listed,) = (one for one in runs if one["id"] == run)
    assert (listed["id"], listed["name"], listed["state"], listed["round"]) == (run, "first", "completed", 1)
    shown = json.loads(offsite("run", "show", run, *where, "--format", "json").stdout)
    assert shown["spec"]["training"]["steps"] == 4 and shown["report"]["overall"]["plug_in"] > 1
    assert "hospital" in offsite("run", "sites", *where).stdout
    assert offsite("run", "fetch", run, str(tmp_path / "out"), *where).returncode == 0
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    unknown = offsite("run", "show", "nothing", *where)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (6, 1) and "no run 'nothing'" in unknown.stderr

    more = ["--set", "rounds=1", "--set", 'sites=["school"]', "--format", "json"]
    second = json.loads(offsite("run", "submit", str(tmp_path / "run.toml"), *where, *more).stdout)["id"]
    assert "is cancelled" in offsite("run", "cancel", second, *where).stdout
    watched = offsite("run", "watch", second, *where)
    assert watched.returncode == 10 and "cancelled by olga" in watched.stderr


def test_the_doctor_shakes_hands_with_a_coordinator_and_says_whom_it_refuses(coordinated: Any, offsite: Any) -> None:
    def asked(kit: Path) -> tuple[int, dict[str, Any]]:
        where = ("--coordinator", coordinated.address, "--identity", str(kit), "--disk", "0", "--memory", "0")
        told = offsite("doctor", *where, "--format", "json")
        return told.returncode, {row["name"]: row for row in json.loads(told.stdout)}

    code, seen = asked(coordinated.owner)
    assert code == 0 and seen["coordinator"]["message"].endswith("answers owner 'olga' over TLS 1.3")
    gone = coordinated.authority.issue("site", "gone")
    coordinated.authority.revoke("gone")
    code, seen = asked(gone)
    assert code == 4 and "is revoked" in seen["coordinator"]["message"], seen
