# SPDX-License-Identifier: Apache-2.0
"""Progress bars with the time that is left, of loops on the host and inside compiled programs.

A bar appears after a second only, so that what is quick stays silent. A program that nobody watches
has no trace of it, and one that is a part of another program is not watched.
"""

from typing import Any, Self

import jax
from tqdm import tqdm

from numpyro_ebm.program.compilation import is_traced

__all__ = ["Progress"]

DELAY = 1.0
"""Seconds before a bar is shown."""


class Progress:
    """A progress bar; a context manager.

    :param str what: what takes its time.
    :param int total: how many steps it has; 100 for what is told as a fraction.
    :param bool shown: whether to show it.

    **Example**

    >>> from numpyro_ebm.program.progress import Progress
    >>> with Progress("resamples", 3) as progress:
    ...     for _ in range(3):
    ...         progress.step()
    """

    def __init__(self, what: str, total: int = 100, *, shown: bool = True):
        self._shown = shown and not is_traced()
        self._options: dict[str, Any] = {"desc": what, "total": total, "delay": DELAY}
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._shown:
            self._bar = tqdm(**self._options)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            jax.effects_barrier()  # calls of a program that has ended may still be under way
            self._bar.close()
            self._bar = None

    def step(self, num: int = 1) -> None:
        """Count steps, on the host."""
        if self._bar is not None:
            self._bar.update(num)

    def reach(self, fraction: jax.Array | float) -> None:
        """Tell which part is done, from 0 to 1, inside a compiled program.

        :param fraction: a scalar, which may be traced.
        """
        if self._bar is not None:
            jax.debug.callback(self._move, fraction)

    def _move(self, fraction):
        """To a fraction, if that is ahead: calls may come out of order."""
        if self._bar is not None:
            ahead = int(self._bar.total * float(fraction)) - self._bar.n
            self._bar.update(max(ahead, 0))
