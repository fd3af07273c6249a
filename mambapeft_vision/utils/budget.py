"""A resource of limited size that the threads of a process share."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """`with budget.of(amount)` waits until the amount is free, or until nothing is taken if it exceeds the size."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free_everything()
        # The threads that hold something do not exist in a forked process.
        os.register_at_fork(after_in_child=self._free_everything)

    @contextmanager
    def of(self, amount: int) -> Iterator[None]:
        """Takes `amount` for the time of the context; waits until it is free."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + amount <= self._most)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()

    def _free_everything(self) -> None:
        self._taken = 0
        self._changed = threading.Condition()
