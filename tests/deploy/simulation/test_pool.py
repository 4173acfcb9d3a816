"""Who works on what: each site once, in orders that are neither too long nor too large."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from offsite.deploy.simulation.todo import BATCH_BYTES, Asked, Todo


@pytest.mark.parametrize("size", [1, BATCH_BYTES // 3, 2 * BATCH_BYTES])
def test_every_site_is_asked_once_and_orders_are_bounded(size: int) -> None:
    names = [f"site-{number:03}" for number in range(200)]
    todo = Todo([Asked("r4", names[:150], size), Asked("r8", names[150:], size, newest={"site-199": 2})], workers=2)
    orders = []
    while (order := todo.take(16)) is not None:
        orders.append(order)
        todo.end()
    assert [site for order in orders for site in order.sites] == names
    assert {order.tier for order in orders if order.sites[0] < "site-150"} == {"r4"}
    assert max(len(order.sites) for order in orders) == max(1, min(16, BATCH_BYTES // size))
    assert len(orders[-1].sites) == 1, "the last ones are dealt out singly, so that no worker waits long"
    assert orders[-1].previous == (2,) and orders[0].previous == ()


def test_sites_that_train_a_part_each_are_dealt_out_singly() -> None:
    todo = Todo([Asked("r4", ["site-1", "site-2", "site-3"], 1, alone=True)], workers=1)
    orders = [todo.take(16) for _ in range(3)]
    assert [order.sites for order in orders if order] == [("site-1",), ("site-2",), ("site-3",)]


def test_what_a_lost_worker_was_at_is_done_by_one_that_waits_for_it() -> None:
    todo = Todo([Asked("r4", ["site-1", "site-2"], 1)], workers=2)
    first, second = todo.take(1), todo.take(1)
    assert first and second and first.sites + second.sites == ("site-1", "site-2")
    with ThreadPoolExecutor() as threads:
        waits = threads.submit(todo.take, 1)
        todo.end()
        assert not waits.done(), "the second may be given back"
        todo.give_back(second)
        assert waits.result() == second
        todo.end()
        assert todo.take(1) is None


def test_nobody_takes_or_waits_any_more_once_a_round_is_over() -> None:
    todo = Todo([Asked("r4", ["site-1", "site-2", "site-3"], 1)], workers=2)
    first = todo.take(1)
    todo.clear()
    assert first and todo.take(1) is None
    todo.give_back(first)
    assert todo.take(1) is None
