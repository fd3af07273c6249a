"""What threads may take together."""

import os
import threading

import pytest

from mambapeft_vision.utils.budget import Budget


def is_free(budget: Budget, amount: int) -> bool:
    """Whether a thread gets the amount at once."""
    got = threading.Event()

    def take() -> None:
        with budget.of(amount):
            got.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return got.wait(0.2)


def test_amounts_that_fit_are_taken_together_and_others_wait():
    budget = Budget(10)
    with budget.of(4):
        assert is_free(budget, 6) and not is_free(budget, 7)
    assert is_free(budget, 7)


def test_more_than_there_is_waits_until_nothing_is_taken():
    budget = Budget(10)
    with budget.of(1):
        assert not is_free(budget, 11)
    assert is_free(budget, 11)


def test_an_error_gives_back_what_was_taken():
    budget = Budget(10)
    with pytest.raises(ValueError), budget.of(10):
        raise ValueError
    assert is_free(budget, 10)


def test_a_forked_process_begins_with_everything_free():
    budget = Budget(10)
    with budget.of(10):
        child = os.fork()
        if child == 0:
            os._exit(0 if is_free(budget, 10) else 1)
        assert os.waitpid(child, 0)[1] == 0
