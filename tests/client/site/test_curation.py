"""What an exam shares with what is trained on, and how rows are parted."""

import stat
from pathlib import Path

import pytest

from offsite.client.site import curation
from offsite.emulator.examples import Example
from offsite.emulator.modality import default
from offsite.protos.errors import ConflictError, InputError

LONG = " ".join(f"word{at}" for at in range(40))


def row(place: str = "", **cells: object) -> Example:
    return default().example(dict(cells), place)


def asks(question: str, answer: str = "yes", place: str = "") -> Example:
    return row(place, prompt=question, completion=answer)


@pytest.mark.parametrize(
    ("exam", "why"),
    [
        (row(text="  The SAME, words! "), "the same words"),
        (asks("Where is it?", "over here"), "the same question"),
        (row(text=f"before it {' '.join(LONG.split()[5:18])} after it"), "13 words in a row"),
        (row(text=f"before it {' '.join(LONG.split()[5:17])} after it"), ""),
        (row(text="..."), "the same words"),
        (row(text="!!!"), ""),
        (
            row(messages=[{"role": "user", "content": "where is it"}, {"role": "assistant", "content": "there"}]),
            "the same question",
        ),
    ],
)
def test_what_is_known_from_training_is_named_with_its_place(exam: Example, why: str) -> None:
    trained = [row("a, line 1", text="the same words"), asks("where is it", place="a, line 2"), row(text=LONG)]
    trained.append(row(text="..."))
    assert [leak.why for leak in curation.leaks([exam], trained)] == ([why] if why else [])
    if why == "the same question":
        assert curation.leaks([exam], trained)[0].source == "a, line 2"


def test_a_template_that_many_rows_have_is_no_leak() -> None:
    exam = [asks(f"{LONG} how?", "so")]
    trained = [asks(f"{LONG} what {at}?") for at in range(curation.COMMON)]
    assert curation.leaks(exam, trained)
    assert not curation.leaks(exam, [*trained, asks(f"{LONG} what else?")])


def test_a_row_stays_on_its_side_when_others_come_and_nothing_is_on_both() -> None:
    rows = [asks(f"number {at}?", f"it is {at}") for at in range(200)]
    trained, exam, neither = curation.split(rows[:120], share=0.25, seed=3)
    more, larger, _ = curation.split(rows[::-1], share=0.25, seed=3)
    assert neither == 0 and len(trained) + len(exam) == 120 and 15 < len(exam) < 45
    assert {*map(repr, trained)} <= {*map(repr, more)} and {*map(repr, exam)} <= {*map(repr, larger)}
    other = curation.split(rows[:120], share=0.25, seed=4)[1]
    assert {*map(repr, other)} != {*map(repr, exam)}


def test_an_exam_that_was_split_off_knows_nothing_of_training() -> None:
    copies = [asks(f"number {at // 4}?", f"answer {at}") for at in range(160)]
    texts = [row(text=f"{at} {LONG if at % 8 == 0 else at} {at}") for at in range(64)]
    rows = [*copies, *texts, *copies[:7]]
    trained, exam, neither = curation.split(rows, share=0.3, seed=0)
    assert not curation.leaks(exam, trained)
    assert neither == len(rows) - len(trained) - len(exam) >= 7
    assert curation.asked_twice(copies) == 120
    for share in (1e-9, 1 - 1e-12):
        with pytest.raises(InputError, match="leave none to"):
            curation.split(rows[:9], share=share, seed=0)


def test_parts_are_their_owners_alone_and_never_written_over(tmp_path: Path) -> None:
    curation.write(tmp_path / "out", {"train.jsonl": [row(text="a\u2028b")]})
    file = tmp_path / "out" / "train.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text() == '{"text": "a\u2028b"}\n'
    with pytest.raises(ConflictError, match="exists; choose another"):
        curation.write(tmp_path / "out", {"held-out.jsonl": [], "train.jsonl": []})
    assert not (tmp_path / "out" / "held-out.jsonl").exists()
