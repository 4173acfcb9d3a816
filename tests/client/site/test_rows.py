"""Which rows a round sees."""

from dataclasses import replace
from typing import Any

import transformers

from offsite.client.site.rows import read, schedule_rows
from offsite.protos.spec import Ancestor


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
