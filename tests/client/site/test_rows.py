"""Which rows a round sees."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from offsite.client.site.rows import read, schedule_rows
from offsite.protos.spec import Ancestor


def test_a_site_may_have_names_of_its_own_for_columns(job: Any, tmp_path: Path) -> None:
    one, data = job(), tmp_path / "own.jsonl"
    rows = [json.loads(line) for line in Path(one.data).read_text().splitlines()]
    data.write_text("".join(json.dumps({f"own {name}": value for name, value in row.items()}) + "\n" for row in rows))
    names = {f"own {name}": name for row in rows for name in row}
    policy = replace(one.policy, columns=names, data=(str(tmp_path),))
    assert read(replace(one, data=str(data), policy=policy)).examples == read(one).examples


def test_a_run_goes_on_in_the_order_of_the_one_before_it(job: Any) -> None:
    one = job()
    tokenizer = transformers.AutoTokenizer.from_pretrained(one.bundle)

    def order(**changes: Any) -> list[list[int]]:
        at = replace(one, task=replace(one.task, **changes))
        return schedule_rows(at, read(at), tokenizer).order

    rounds = [order(round=number) for number in range(4)]
    assert len({tuple(map(tuple, rows)) for rows in rounds}) == 4
    last = Ancestor(run="old", round=1, rounds=2)
    assert [order(round=number, continues=last) for number in (0, 1)] == rounds[2:]
