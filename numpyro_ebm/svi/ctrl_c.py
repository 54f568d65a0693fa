# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in a run: the first one ends it with what was learned, a second one at once."""

import signal
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Self

__all__ = ["CtrlC", "wait"]


class CtrlC:
    """Python's handler of Ctrl-C for the time of a run.

    The first one raises ``KeyboardInterrupt`` in functions that are :meth:`heard`, where somebody
    may wait long: what the user wrote, a program that is compiled. Elsewhere it is kept until one
    of them is called, so that no checkpoint is left in the middle and no result lost. The second
    one raises wherever it comes. Handlers other than Python's stay as they are.

    - **presses** - how often it was pressed.
    - **answered** - whether the user was told; otherwise it raises at the end of the run.
    """

    def __init__(self) -> None:
        self.presses, self.answered = 0, False
        self._is_heard = self._is_mine = False

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._press)
            self._is_mine = True
        return self

    def __exit__(self, *error: Any) -> None:
        if self._is_mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.presses and not self.answered and error[0] is None:
            raise KeyboardInterrupt

    def _press(self, *_):
        self.presses += 1
        if self._is_heard or self.presses > 1:
            raise KeyboardInterrupt

    def heard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is left at once, and is not begun after a Ctrl-C."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._is_heard = self._is_heard, True
            try:
                if self.presses:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)
            finally:
                self._is_heard = before

        return call


def wait(x: Any, seconds: float) -> None:
    """Wait for an array of JAX; in Python, where signals are heard, if it takes seconds."""
    if seconds > 1.0:
        while not x.is_ready():
            time.sleep(0.01)
    x.block_until_ready()
