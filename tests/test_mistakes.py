"""What people get wrong at the command line: each is answered by a sentence that names it and says what to do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.protos.security.pki import Authority

AT = ("--coordinator", "localhost:1")
ME = (*AT, "--identity", "pki/me")
JOIN = ("site", "join", "localhost:1", "--identity", "pki/ward", "--policy")
SUBMIT = ("run", "submit")
FILES = {
    "broken.toml": "x = [",
    "field.toml": 'model = "m"\nround = 3\n',
    "range.toml": 'model = "m"\n[training]\nsteps = 0\n',
    "recipe.toml": 'model = "m"\nmethod = "lora(rank=3"\n',
    "list.toml": 'model = "m"\nsites = "ward"\n',
    "nameless.toml": "rounds = 2\n",
    "policy.toml": 'bases = ["any"]\ndata = ["."]\n',
    "policy-field.toml": 'bases = ["any"]\ndata = ["."]\nmax_step = 3\n',
    "policy-method.toml": 'bases = ["any"]\ndata = ["."]\nmethods = ["lorra"]\n',
    "policy-nothing.toml": 'bases = ["any"]\ndata = ["."]\nmin_steps = 9\nmax_steps = 3\n',
    "policy-folder.toml": 'bases = ["any"]\ndata = ["none"]\n',
    "policy-half.toml": 'bases = ["any"]\n',
    "owner.toml": "[models]\n",
    "good.jsonl": '{"text": "a b"}\n',
    "columns.jsonl": '{"question": "a"}\n',
    "lines.jsonl": '{"text": "a b"}\nnot JSON\n',
    "empty.jsonl": "",
}
CASES = [
    (("sit", "join"), 2, "No such command 'sit'; did you mean site?"),
    (("site", "joyn"), 2, "Did you mean 'join'?"),
    (("run", "list", "--limits", "3"), 2, "No such option"),
    (("run", "list", *AT), 2, "Missing option '--identity'"),
    (("run", "list", "--limit", "0", *ME), 2, "greater than or equal to 1"),
    (("methods", "--format", "yaml"), 2, "'yaml' is not one of 'text', 'json', 'markdown'"),
    (("run", "list", "--coordinator", "localhost", "--identity", "pki/me"), 3, "no port.; expected HOST:PORT, such as"),
    (("run", "list", "--coordinator", "localhost:99999", "--identity", "pki/me"), 3, "a port from 1 to 65535"),
    (("run", "list", *AT, "--identity", "pki/ward"), 4, "kit of site 'ward', but one of role owner, researcher or aud"),
    (("run", "list", *AT, "--identity", "none"), 4, "none/tls.crt: no such file; name the folder of a whole kit"),
    ((*SUBMIT, "none.toml", *ME), 3, "none.toml: cannot be read: No such file"),
    ((*SUBMIT, "broken.toml", *ME), 3, "broken.toml: not TOML"),
    ((*SUBMIT, "field.toml", *ME), 3, "round: there is no such field; did you mean rounds?"),
    ((*SUBMIT, "range.toml", *ME), 3, r"training.steps: Input should be greater than or equal to 1 \(got 0\)"),
    ((*SUBMIT, "recipe.toml", *ME), 3, r"method: recipe .*'\(' was never closed; a recipe reads like"),
    ((*SUBMIT, "list.toml", *ME), 3, r"sites: expected a list \(got 'ward'\)"),
    ((*SUBMIT, "nameless.toml", *ME), 3, "model: is missing, and has no default"),
    ((*SUBMIT, "--set", "model", *ME), 3, "--set model: expected NAME=VALUE, such as training.steps=20"),
    ((*SUBMIT, "--set", "training.stps=3", *ME), 3, "there is no training.stps; did you mean steps?"),
    ((*SUBMIT, "--set", "model=m", "--start", "a:b", *ME), 3, r"start: expected RUN, or RUN:ROUND .* \(got 'a:b'\)"),
    ((*SUBMIT, "--set", "model=m", "--set", "task=a b", *ME), 3, "task: expected a task of at most 40 letters"),
    (("version", "rollback", "a", "--reason", "x", *ME), 3, "expected RUN:ROUND, such as a:2, the last to stay"),
    ((*JOIN, "none.toml", "--data", "good.jsonl"), 3, "none.toml: cannot be read"),
    ((*JOIN, "policy-field.toml", "--data", "good.jsonl"), 3, "max_step: there is no such field; did you mean max_st"),
    ((*JOIN, "policy-method.toml", "--data", "good.jsonl"), 3, "no method 'lorra'; did you mean lora?"),
    (
        (*JOIN, "policy-nothing.toml", "--data", "good.jsonl"),
        3,
        "min_steps = 9 is more than max_steps = 3, so that not",
    ),
    ((*JOIN, "policy-folder.toml", "--data", "good.jsonl"), 3, "data: .*none is not a folder"),
    ((*JOIN, "policy-half.toml", "--data", "good.jsonl"), 3, "data: is missing, and has no default"),
    ((*JOIN, "policy.toml", "--data", "/etc/hostname"), 5, "the policy allows data only in"),
    ((*JOIN, "policy.toml", "--data", "none.jsonl"), 3, "none.jsonl: no such file or folder of examples"),
    ((*JOIN, "policy.toml", "--data", "empty.jsonl"), 3, "empty.jsonl: holds no example; expected"),
    ((*JOIN, "policy.toml", "--data", "columns.jsonl"), 3, r"line 1: found the columns \['question'\]; expected"),
    ((*JOIN, "policy.toml", "--data", "good.jsonl", "--zero-stage", "5"), 2, "less than or equal to 3"),
    ((*JOIN, "policy.toml", "--data", "good.jsonl", "--tokenizer", "none"), 3, "none: not a folder; expected one with"),
    (
        ("site", "join", "localhost:1", "--identity", "pki/me", *JOIN[5:], "policy.toml", "--data", "good.jsonl"),
        4,
        "rol",
    ),
    (
        ("site", "enrol", "nonsense", "--identity", "x"),
        3,
        "neither a token, which begins with 'offsite-join-1.', nor a",
    ),
    (("pki", "init", "pki"), 11, "holds an authority already .*; it is never overwritten, choose another folder"),
    (("pki", "issue", "none", "--role", "site", "a"), 6, "no authority here, ca.crt is missing; make one with"),
    (("pki", "issue", "pki", "--role", "site", "ward"), 11, "site 'ward' has a certificate .* revoke it first with"),
    (("pki", "issue", "pki", "--role", "nurse", "x"), 2, "'nurse' is not one of 'coordinator', 'site'"),
    (
        ("pki", "revoke", "pki", "nobody"),
        6,
        r"no valid certificate of 'nobody' to revoke \(valid: coordinator, me, ward",
    ),
    (("coordinator", "up", "--identity", "pki/ward", "--home", "h"), 4, "one of role coordinator is needed here"),
    (
        ("coordinator", "up", "--identity", "pki/coordinator", "--home", "h", "--listen", "::1"),
        3,
        "write it in brackets",
    ),
    (
        ("coordinator", "up", "--identity", "pki/coordinator", "--home", "h", "--policy", "policy.toml"),
        3,
        "policy.toml: bases: there is no such field; expected one of models, data",
    ),
    (("emulator", "build", "none", "--out", "e"), 3, "no such folder; expected a folder with config.json"),
    (("emulator", "build", "pki", "--out", "e"), 3, "pki: no config.json; expected one beside"),
    (("emulator", "build", "pki", "--out", "e", "--builder", "crsh"), 3, r"no builder 'crsh' \(did you mean crash\?\)"),
    (("emulator", "inspect", "pki"), 6, "no manifest.json in it; a bundle is made by `offsite emulator build`"),
    (("demo", "--site", "ward"), 3, "--site ward: expected NAME=FILE"),
    (("demo", "--method", "lorra"), 3, r"there is no method 'lorra' \(did you mean lora\?\)"),
    (("data", "check", "columns.jsonl"), 3, "--column OWN=READ says what yours are called"),
    (("data", "check", "good.jsonl", "--column", "question"), 2, "expected OWN=READ, such as question=prompt"),
    (("data", "check", "good.jsonl", "--held-out", "good.jsonl"), 7, "1 rows of the exam are known from the data"),
    (("data", "split", "good.jsonl", "out"), 3, "leave none to train on with share 0.1 and seed 0; take another"),
    (("run", "export", "out", "pki"), 3, "expected LoRA in peft's format, which this is not"),
    (("run", "export", "pki", "pki"), 11, "pki: not empty; .* so name a new one"),
    (("run", "export", "out", "pki", "--as", "gguf"), 3, "the form gguf is made with the base: name its folder"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (place / name).write_text(text)
    authority = Authority.create(place / "pki")
    for role, name in (("coordinator", "coordinator"), ("owner", "me"), ("site", "ward")):
        authority.issue(role, name)
    return place


@pytest.mark.parametrize(("arguments", "code", "said"), CASES, ids=[" ".join(case[0])[:60] for case in CASES])
def test_a_mistake_is_named_with_what_to_do(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    folder: Path,
    offsite: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    end = offsite(*arguments)
    text = " ".join(end.stderr.replace("│", " ").split())
    assert end.returncode == code, text
    assert re.search(said, text), text
    assert "Traceback" not in text and len(text) < 2000


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40 and {case[0][0] for case in CASES} >= {"run", "site", "pki", "coordinator", "data"}
