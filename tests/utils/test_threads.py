"""Work on many small items by threads."""

import threading
import time

import pytest

from mambapeft_vision.utils.threads import map_in_threads


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("threads", [1, 3, None])
def test_results_come_in_order(count, threads):
    assert list(map_in_threads(lambda n: n * n, range(count), threads)) == [n * n for n in range(count)]


def test_few_items_are_shared_out():
    """Each of two threads waits for the other one."""
    both = threading.Barrier(2, timeout=10)
    assert len(list(map_in_threads(lambda _: both.wait(), range(2), 2))) == 2


def test_the_first_error_in_order_is_raised_and_the_rest_is_cancelled():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.001)
        if number in (100, 120):
            raise ValueError(number)
        return number

    with pytest.raises(ValueError, match="^100$"):
        list(map_in_threads(work, range(2000), 2))
    assert len(begun) < 2000


def test_a_caller_that_stops_ends_it():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.001)

    for _ in map_in_threads(work, range(2000), 2):
        break
    assert len(begun) < 2000
