# SPDX-License-Identifier: Apache-2.0
"""Arrays of a program that read no input, evaluated when an analysis asks for their values."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import Tracer
from numpyro_ebm.program.jaxprs import applied, interpret

__all__ = ["Constant", "evaluate_known", "evaluate_later", "evaluate_now", "keep_known", "known"]


class Constant:
    """An array that reads no input.

    :param compute: returns its values, or ``None`` where they are not known yet (under `jit`).
    """

    def __init__(self, compute: Callable[[], np.ndarray | None]):
        self._compute, self._value = compute, None

    def get(self) -> np.ndarray | None:
        """Its values as a NumPy array, or ``None``."""
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        return self._value


def known(x: Any) -> Constant:
    """The constant of an array that a program holds."""
    return Constant(lambda: None if isinstance(x, Tracer) else np.asarray(x))


def keep_known(*inputs: Any) -> AbstractContextManager[Any]:
    """A context in which results of known inputs, pytrees of arrays, are known inside of `jit`."""
    is_known = not any(isinstance(x, Tracer) for x in jax.tree.leaves(inputs))
    return jax.ensure_compile_time_eval() if is_known else nullcontext()


def evaluate_now(eqn: Any, arguments: Sequence[Any]) -> list[np.ndarray]:
    """The results of one operation at these values, as NumPy arrays."""
    with jax.ensure_compile_time_eval():  # concrete inside of `jit` too
        return [np.asarray(x) for x in applied(eqn, [*map(jnp.asarray, arguments)])]


def evaluate_known(closed: Any, arguments: Sequence[Any]) -> list[Any]:
    """The results of a program at known inputs, which are known inside of `jit` too.

    Indices are counted on the host: JAX would compile a program for each number of them.
    """

    def apply(eqn, operands):
        if eqn.primitive.name == "iota" and eqn.outvars[0].aval.ndim == 1:
            return [jax.device_put(np.arange(*eqn.params["shape"], dtype=eqn.params["dtype"]))]
        return applied(eqn, operands)

    with jax.ensure_compile_time_eval():
        return interpret(closed, apply, arguments)


def evaluate_later(eqn: Any, operands: Sequence[Constant]) -> list[Constant]:
    """The results of one operation on constants, as constants."""
    cache = []

    def compute(i):
        if not cache:
            values = [x.get() for x in operands]
            unknown = any(x is None for x in values) or eqn.effects
            cache.append([None] * len(eqn.outvars) if unknown else evaluate_now(eqn, values))
        return cache[0][i]

    return [Constant(lambda i=i: compute(i)) for i in range(len(eqn.outvars))]
